//! The owner's agent is restarted on purpose, and is away for longer than a death takes to be seen.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, Stream, all_mirrored, await_takeover, crash_and_copy, losses, number,
    options, require_start, volume,
};
use super::with_lab;
use crate::lab::{AgentAction, AwaitedState, Lab, NodeName};

use NodeName::{A, B};

/// Shorter than the agent is away.
const DEAD_AFTER: &str = "dead_after = \"4s\"";
/// The mirror's answer may take its time on a busy host.
const LAG_LIMIT: &str = "lag_limit = \"20s\"";
const AWAY: Duration = Duration::from_secs(10);
const ANNOUNCE: &str = "twinwrite stop --restart-within 40s";
/// They outlast the restart: the next agent begins with a checkpoint, and what comes after it is what
/// the region must bring back.
const OPERATIONS: u64 = 3000;
const PER_SECOND: u64 = 50;

pub(super) fn run() -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("agent_restarted", options, restart_and_crash)
}

fn await_end(lab: &Lab) -> Result<()> {
    let began = Instant::now();
    while lab.agent_is_alive(A)? {
        ensure!(began.elapsed() < LIMIT, "the agent of A does not end");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn restart_and_crash(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let before = volume(lab, A)?;
    let losses_before = losses(lab, A)?;
    let stream = Stream::start(lab, A, OPERATIONS, PER_SECOND)?;
    stream.reach(OPERATIONS / 6)?;
    lab.run(A, ANNOUNCE)?;
    await_end(lab)?;
    std::thread::sleep(AWAY);
    let seen = lab.agent_status(B)?;
    ensure!(
        seen["peers"][0]["state"] == "alive" && seen["peers"][0]["restarting"] == true,
        "A announced a restart, and B says {}",
        seen["peers"]
    );
    ensure!(
        seen["volumes"][0]["role"] == "mirror" && seen["volumes"][0]["takeover"].is_null(),
        "B took over from a node that is healthy: {}",
        seen["volumes"]
    );
    lab.agent(A, AgentAction::Start)?;
    lab.wait(A, AwaitedState::Protected, LIMIT)?;
    ensure!(
        stream.acknowledged() + OPERATIONS / 6 < OPERATIONS,
        "the restart took longer than the operations: nothing is left to be brought back"
    );
    stream.finish()?;
    let records = all_mirrored(lab, A)?;
    let after = volume(lab, A)?;
    ensure!(
        after["epoch"] == before["epoch"] && losses(lab, A)? == losses_before,
        "the restart cost epoch {}: {after}\n{}",
        before["epoch"],
        lab.explain()
    );
    ensure!(
        lab.agent_status(B)?["peers"][0]["restarting"] == false,
        "the announcement outlived the restart"
    );
    let disk = crash_and_copy(lab, A)?;
    let takeover = await_takeover(lab, B)?;
    ensure!(
        number(&takeover, "cut_seq")? >= records,
        "of {records} mirrored records the region held only {takeover}"
    );
    stream.require_all(B)?;
    stream.require_loss(&disk)
}
