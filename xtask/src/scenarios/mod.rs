//! Scenarios on virtual machines: each proves one thing.
//!
//! A scenario that crashes, kills or misconfigures something has its machines to itself. Those that
//! leave the volume protected on A as they found it share one lab: each begins by checking that it
//! is so, and after a failure the next one gets fresh machines. Those that measure have the host to
//! themselves.

mod agent_killed;
mod agent_restarted;
mod bad_input;
pub(crate) mod bench;
mod claim_withdrawn;
mod control_loses_unflushed;
mod disk_ahead;
mod gate;
mod gate_nfs;
mod gate_uring;
mod interconnect_cut;
mod killed_in_replay;
mod lab_survives;
mod nfs;
mod nfs_async;
mod paused_owner;
mod preempt_full;
mod returning_owner;
mod runner;
mod steady;
mod subtree;
mod survives_crash;
mod torture;
mod writer_cost;
mod wrong_peer;

use std::fmt;

use anyhow::{Context as _, Result};

use crate::lab::{Lab, Lifetime, Options};

pub use runner::{Outcome, run};

/// A named scenario.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it proves.
    pub proves: &'static str,
    /// About how long it takes, with its machines' boot, on a host that does nothing else.
    pub seconds: u32,
    run: Run,
}

/// Where a scenario runs.
#[derive(Clone, Copy)]
enum Run {
    /// On machines of its own.
    Alone(fn() -> Result<()>),
    /// On machines of its own, while the host runs no others: it measures.
    Quiet(fn() -> Result<()>),
    /// On the machines that it leaves as it found them: A owns, B mirrors, all is protected.
    Shared(fn(&Lab) -> Result<()>),
}

use Run::{Alone, Quiet, Shared};

/// The one that also the quick tests run.
pub const SMOKE: &str = "survives_crash";

const fn scenario(name: &'static str, seconds: u32, run: Run, proves: &'static str) -> Scenario {
    Scenario {
        name,
        proves,
        seconds,
        run,
    }
}

/// What repeats another scenario on another kernel or file system: left out unless all are asked for, since the
/// rest takes more than an hour where machines are emulated.
const REPEATS: &[&str] = &[
    "survives_crash_btrfs_6_1",
    "gate_uring_preempt",
    "gate_nfs_v3",
    "paused_owner_xfs",
    "subtree_xfs_6_1",
    "subtree_btrfs",
];

/// Which scenarios to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice<'a> {
    /// Each.
    All,
    /// All that do not repeat another one on another kernel or file system.
    Usual,
    /// The one of this name.
    Named(&'a str),
}

impl Choice<'_> {
    fn takes(self, scenario: &Scenario) -> bool {
        match self {
            Self::All => true,
            Self::Usual => !scenario.is_repeat(),
            Self::Named(name) => scenario.name == name,
        }
    }
}

impl Scenario {
    /// Whether it repeats another one on another kernel or file system.
    #[must_use]
    pub fn is_repeat(&self) -> bool {
        REPEATS.contains(&self.name)
    }
}

/// All of them, in the order they run; those that share machines are neighbours.
pub const ALL: &[Scenario] = &[
    scenario(
        SMOKE,
        50,
        Alone(survives_crash::run),
        "what was written and not flushed is there after a power cut, and is not without twinwrite",
    ),
    scenario(
        "survives_crash_btrfs",
        60,
        Alone(survives_crash::on_btrfs),
        "the same on btrfs",
    ),
    scenario(
        "survives_crash_btrfs_6_1",
        60,
        Alone(survives_crash::on_btrfs_of_6_1),
        "the same on btrfs of the older kernel",
    ),
    scenario(
        "lab_survives",
        90,
        Alone(lab_survives::run),
        "the lab crashes, fences, cuts and ends what it should, and nothing else",
    ),
    scenario(
        "control_loses_unflushed",
        30,
        Alone(control_loses_unflushed::run),
        "without twinwrite a crash loses what was not flushed, and only that",
    ),
    scenario(
        "disk_ahead",
        90,
        Alone(disk_ahead::run),
        "what eight applications were told is durable survives a cut link and a power cut, on disks that \
         lose what was not flushed",
    ),
    scenario(
        "torture",
        200,
        Alone(torture::run),
        "what random operations of six seeds left survives power cuts, at rest and in their middle",
    ),
    scenario(
        "subtree",
        150,
        Alone(subtree::run),
        "of a volume with a protected directory what is below it survives, what is outside is not captured, and \
         nothing crosses the border",
    ),
    scenario(
        "subtree_xfs_6_1",
        150,
        Alone(subtree::on_xfs_of_6_1),
        "the same on XFS of the older kernel",
    ),
    scenario(
        "subtree_btrfs",
        150,
        Alone(subtree::on_btrfs),
        "the same on btrfs",
    ),
    scenario(
        "metrics",
        30,
        Shared(steady::metrics),
        "the endpoint's text is well-formed and its numbers move with the writes",
    ),
    scenario(
        "idle_cost",
        70,
        Shared(steady::idle_cost),
        "an idle agent uses under 1.5 % of a processor on either node, and wakes up when it must",
    ),
    scenario(
        "writer_cost",
        70,
        Alone(writer_cost::run),
        "capturing a write allocates no memory and makes no system call in the writer",
    ),
    scenario(
        "loaded_host",
        75,
        Shared(steady::loaded_host),
        "a host that is busy with other things makes nobody take over",
    ),
    scenario(
        "interconnect_cut",
        50,
        Shared(interconnect_cut::run),
        "a cut link exposes the volume and makes nobody take over; mended, it is protected again",
    ),
    scenario(
        "gate_price",
        60,
        Quiet(gate::price),
        "an fsync is answered with its mark mirrored; what that costs is printed",
    ),
    scenario(
        "gate_holds",
        90,
        Alone(gate::holds),
        "an fsync is not answered before its mark is mirrored, and what was answered survives",
    ),
    scenario(
        "gate_off_reverts",
        90,
        Alone(gate::off_reverts),
        "without the gate the same crash reverts what an fsync confirmed: the negative control",
    ),
    scenario(
        "gate_calls",
        90,
        Alone(gate::calls),
        "every call that confirms data waits while nobody mirrors, and is answered afterwards",
    ),
    scenario(
        "gate_signals",
        70,
        Alone(gate::signals),
        "a held process goes on with the gate and not before; a stop by others is heeded, a kill works",
    ),
    scenario(
        "gate_replaced",
        80,
        Alone(gate::replaced),
        "other programs may take the place of those at whose gate somebody waits",
    ),
    scenario(
        "gate_two_volumes",
        80,
        Alone(gate::two_volumes),
        "a process that waits for two volumes goes on when both let it, with the next agent, too",
    ),
    scenario(
        "gate_uring",
        120,
        Quiet(gate_uring::run),
        "what an io_uring confirms waits at the gate, whoever of the process looks for it, and survives",
    ),
    scenario(
        "gate_uring_6_1",
        120,
        Quiet(gate_uring::on_6_1),
        "the same on Linux 6.1",
    ),
    scenario(
        "gate_uring_preempt",
        120,
        Quiet(gate_uring::preempted),
        "the same on a kernel that preempts itself",
    ),
    scenario(
        "gate_two_processors",
        120,
        Alone(gate::two_processors),
        "with a killed agent all fsyncs wait, the machine stays usable, and the next agent goes on",
    ),
    scenario(
        "gate_nfs",
        130,
        Alone(gate_nfs::run),
        "the kernel's NFS server confirms nothing while nobody mirrors, and what it confirmed survives",
    ),
    scenario(
        "gate_nfs_v3",
        130,
        Alone(gate_nfs::run_v3),
        "the same with NFS 3 over XFS on the older kernel",
    ),
    scenario(
        "gate_nfs_off_reverts",
        110,
        Alone(gate_nfs::off_reverts),
        "without the gate the same crash reverts what an NFS server confirmed: the negative control",
    ),
    scenario(
        "nfs_async",
        120,
        Alone(nfs_async::run),
        "what the kernel's NFS server answered for an `async` export is there after a power cut, and is not \
         without twinwrite",
    ),
    scenario(
        "agent_killed_on_owner",
        70,
        Alone(agent_killed::on_owner),
        "the owner's agent may be killed and started again within an epoch without a gap",
    ),
    scenario(
        "agent_killed_on_mirror",
        70,
        Alone(agent_killed::on_mirror),
        "the mirror's agent may be killed and started again without losing the region",
    ),
    scenario(
        "agent_restarted",
        120,
        Alone(agent_restarted::run),
        "a restart that was announced is no death however long it takes, and costs no record",
    ),
    scenario(
        "killed_in_replay",
        70,
        Alone(killed_in_replay::run),
        "a replay that was killed in the middle is finished by the next agent, completely",
    ),
    scenario(
        "returning_owner",
        110,
        Alone(returning_owner::run),
        "an owner that returns after it was taken over mounts and replays nothing, and mirrors",
    ),
    scenario(
        "claim_withdrawn",
        90,
        Alone(claim_withdrawn::run),
        "an owner whose volume is claimed and stays busy confirms nothing, and serves again once it is given back",
    ),
    scenario(
        "paused_owner",
        130,
        Alone(paused_owner::on_ext4),
        "an owner that stands still again and again never writes beside the one that took over",
    ),
    scenario(
        "paused_owner_xfs",
        130,
        Alone(paused_owner::on_xfs),
        "the same on XFS",
    ),
    scenario(
        "preempt_full",
        60,
        Alone(preempt_full::run),
        "hooks that a preemptible kernel skips end the epoch while the writers still write",
    ),
    scenario(
        "wrong_peer",
        60,
        Alone(wrong_peer::run),
        "a peer of another cluster or name is refused in words on both sides and reaches no region",
    ),
    scenario(
        "bad_input",
        150,
        Alone(bad_input::run),
        "what cannot work is refused in words that name it, with a status, and changes nothing",
    ),
];

/// Whether the scenarios that can be short or long shall be long (`TWINWRITE_LONG=1`).
fn is_long() -> bool {
    std::env::var_os("TWINWRITE_LONG").is_some_and(|value| value == "1")
}

/// Gives `work` a lab of its own, named after the scenario, and ends it whatever happens; it also
/// ends with this process.
///
/// # Errors
/// Those of the lab and of `work`.
pub fn with_lab(name: &str, options: Options, work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let name = format!("test-{}", name.replace('_', "-"));
    let lab = Lab::up(
        &name,
        Options {
            lifetime: Lifetime::ThisProcess,
            ..options
        },
    )?;
    let _ending = Ending(&lab);
    work(&lab).map_err(|error| {
        let error = error.context(format!(
            "in lab {name}; its logs: {}",
            lab.directory().display()
        ));
        match lab.emulators_fault() {
            Some(fault) => error.context(EmulatorsFault(fault)),
            None => error,
        }
    })?;
    lab.down()
}

/// The emulator ended or broke a machine under a scenario, which therefore tells nothing.
#[derive(Debug)]
pub(crate) struct EmulatorsFault(String);

impl fmt::Display for EmulatorsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Ends a lab also if its scenario fails or panics.
struct Ending<'a>(&'a Lab);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.down() {
            eprintln!("lab {}: {error:#}", self.0.name());
        }
    }
}

/// The scenario of that name.
///
/// # Errors
/// If there is none.
pub fn find(name: &str) -> Result<&'static Scenario> {
    ALL.iter()
        .find(|scenario| scenario.name == name)
        .with_context(|| format!("no scenario `{name}`: cargo xtask test --list"))
}

#[cfg(test)]
mod tests {
    use super::{REPEATS, find};

    #[test]
    fn what_is_left_out_is_there() {
        for name in REPEATS {
            assert!(find(name).is_ok(), "{name}");
        }
    }
}
