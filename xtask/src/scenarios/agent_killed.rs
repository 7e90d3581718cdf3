//! The agent dies and comes back while applications write on: capture goes on without it.

use anyhow::{Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, Stream, all_mirrored, await_takeover, crash_and_copy, kill_agent, losses,
    number, options, require_start, volume,
};
use super::with_lab;
use crate::lab::{AgentAction, AwaitedState, Lab, NodeName};

use NodeName::{A, B};

/// The agent has this long to come back before its silence is a death.
const DEAD_AFTER: &str = "dead_after = \"20s\"";
/// The mirror's agent has this long to come back before the epoch ends for want of it.
const LAG_LIMIT: &str = "lag_limit = \"20s\"";
/// They must go on after the agent is back: its first checkpoint covers what was written until then.
const OPERATIONS: u64 = 1_500;
const PER_SECOND: u64 = 100;

pub(super) fn on_owner() -> Result<()> {
    killed("agent_killed_on_owner", A)
}

pub(super) fn on_mirror() -> Result<()> {
    killed("agent_killed_on_mirror", B)
}

fn killed(name: &str, node: NodeName) -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab(name, options, |lab| kill_start_crash(lab, node))
}

fn kill_start_crash(lab: &Lab, node: NodeName) -> Result<()> {
    require_start(lab)?;
    let before = volume(lab, A)?;
    let losses_before = losses(lab, A)?;
    let stream = Stream::start(lab, A, OPERATIONS, PER_SECOND)?;
    stream.reach(OPERATIONS / 6)?;
    kill_agent(lab, node)?;
    // What is written now has nobody to read it (A) or nobody to ask (B).
    stream.reach(stream.acknowledged() + OPERATIONS / 6)?;
    lab.agent(node, AgentAction::Start)?;
    lab.wait(A, AwaitedState::Protected, LIMIT)?;
    ensure!(
        stream.acknowledged() < OPERATIONS,
        "all was written before the agent of {node} was back: this host is too slow to tell"
    );
    stream.finish()?;
    let records = all_mirrored(lab, A)?;
    let after = volume(lab, A)?;
    ensure!(
        after["epoch"] == before["epoch"],
        "the agent of {node} was killed and epoch {} became {}: the log has a gap\n{}",
        before["epoch"],
        after["epoch"],
        lab.explain()
    );
    ensure!(
        records >= number(&before, "captured_seq")? + OPERATIONS,
        "{OPERATIONS} operations gave no more than {records} records in the epoch"
    );
    let losses_after = losses(lab, A)?;
    ensure!(
        losses_after == losses_before,
        "drops, skipped hooks and gaps went from {losses_before:?} to {losses_after:?}"
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
