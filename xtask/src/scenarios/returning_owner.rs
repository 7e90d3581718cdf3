//! An owner that was taken over comes back, mirrors, and takes the volume over in its turn.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, Stream, all_mirrored, await_takeover, crash_and_copy, is_mounted,
    log_mark, logged, number, options, require_start, throughout, volume,
};
use super::with_lab;
use crate::lab::{AwaitedState, Lab, NodeName};

use NodeName::{A, B};

const OPERATIONS: u64 = 300;
/// Long enough for the returning agent to do what it must not.
const WATCHED_FOR: Duration = Duration::from_secs(8);

pub(super) fn run() -> Result<()> {
    with_lab(
        "returning_owner",
        options(&[], &[NO_CHECKPOINT]),
        there_and_back,
    )
}

fn there_and_back(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let first = Stream::start(lab, A, OPERATIONS, 0)?;
    take_over(lab, A, &first).context("B's takeover")?;
    comes_back(lab)?;
    first.require_all(B).context("after A came back")?;
    // The other way round: now A is the mirror and B's power is cut.
    lab.run(B, "rm -rf /srv/vol0/stream")?;
    let second = Stream::start(lab, B, OPERATIONS, 0)?;
    take_over(lab, B, &second).context("A's takeover")
}

/// The stream ends and is mirrored, its node's power is cut, the other one has everything.
fn take_over(lab: &Lab, from: NodeName, stream: &Stream<'_>) -> Result<()> {
    stream.finish()?;
    let records = all_mirrored(lab, from)?;
    let disk = crash_and_copy(lab, from)?;
    let takeover = await_takeover(lab, from.peer())?;
    ensure!(
        number(&takeover, "cut_seq")? >= records,
        "of {records} mirrored records the region held only {takeover}"
    );
    stream.require_all(from.peer())?;
    stream.require_loss(&disk)
}

fn comes_back(lab: &Lab) -> Result<()> {
    let epoch_before = number(&volume(lab, B)?, "epoch")?;
    let mark = log_mark(lab, A);
    lab.boot(A, true)?;
    throughout(
        lab,
        "A has nothing mounted and does not take itself for the owner",
        WATCHED_FOR,
        || {
            let role = volume(lab, A).map(|volume| volume["role"].clone());
            // While its agent starts there is no status yet.
            Ok(!is_mounted(lab, A)? && !role.is_ok_and(|role| role == "owner"))
        },
    )?;
    lab.wait(A, AwaitedState::Mirror, LIMIT)?;
    lab.wait(B, AwaitedState::Protected, LIMIT)?;
    ensure!(
        !is_mounted(lab, A)?,
        "A mirrors the volume and has it mounted"
    );
    ensure!(
        logged(lab, A, mark, &["taken", "vol0"])?,
        "A's log does not say that it was taken over:\n{}",
        lab.explain()
    );
    let log = fs::read(lab.agent_log(A))?;
    let log = String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned();
    ensure!(!log.contains("replay"), "A replayed something:\n{log}");
    let volume = volume(lab, B)?;
    ensure!(
        number(&volume, "epoch")? > epoch_before,
        "B has a mirror again and no new epoch: {volume}"
    );
    Ok(())
}
