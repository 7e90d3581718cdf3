//! The survivor's agent dies in the middle of its replay; the next one finishes it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, Stream, all_mirrored, await_takeover, crash_and_copy, number, options,
    require_start,
};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{AgentAction, Lab, NodeName};

use NodeName::{A, B};

/// So many that their replay can be hit in the middle.
const OPERATIONS: u64 = 6000;

pub(super) fn run() -> Result<()> {
    with_lab("killed_in_replay", options(&[], &[NO_CHECKPOINT]), killed)
}

fn killed(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let stream = Stream::start(lab, A, OPERATIONS, 0)?;
    stream.finish()?;
    let records = all_mirrored(lab, A)?;
    let disk = crash_and_copy(lab, A)?;
    kill_in_replay(lab)?;
    ensure!(
        !stream.judge(B, MOUNT_POINT)?["pass"]
            .as_bool()
            .unwrap_or(true),
        "the replay was complete already when the agent was killed: nothing was interrupted"
    );
    lab.agent(B, AgentAction::Start)?;
    let takeover = await_takeover(lab, B)?;
    ensure!(
        number(&takeover, "records_replayed")? >= OPERATIONS
            && number(&takeover, "cut_seq")? >= records,
        "of {records} mirrored records not all were replayed: {takeover}"
    );
    stream.require_all(B)?;
    stream.require_loss(&disk)?;
    let left = lab.run(B, &format!("ls -A {MOUNT_POINT}/.twinwrite"))?;
    ensure!(
        !left.contains("staging"),
        "the replay left its scaffold behind: {left}"
    );
    Ok(())
}

/// Waits, inside the machine, for the staging directory of the replay on the volume and kills at once:
/// the way through the host would often come too late.
fn kill_in_replay(lab: &Lab) -> Result<()> {
    let began = Instant::now();
    let program = format!(
        "pid=$(cat /run/twinwrite-agent.pid)\n\
         while [ ! -d {MOUNT_POINT}/.twinwrite/staging ]; do [ -d /proc/$pid ] || exit 3; done\n\
         kill -KILL $pid"
    );
    lab.run_within(B, &program, LIMIT)?;
    while lab.agent_is_alive(B)? {
        ensure!(began.elapsed() < LIMIT, "the agent of B survived SIGKILL");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
