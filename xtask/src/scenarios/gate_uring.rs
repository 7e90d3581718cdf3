//! What an io_uring confirms: its workers do not return to user space, so their process is stopped for them.
//!
//! Each way to ask for durability has a process of its own. They are let on one after the other, so that none
//! needs more processors than the machine has.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, all_mirrored, await_takeover, metric, options, require_start, until,
};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{AwaitedState, CrashKind, KernelRelease, Lab, NodeName, Options};
use crate::progress;

use NodeName::{A, B};

/// Ways that leave the epoch open.
const SYNCING: [&str; 6] = ["wait", "deferred", "poll", "linked", "dsync", "submitter"];
/// The one that ends it.
const DIRECT: [&str; 1] = ["direct"];
/// So long nobody is there who could answer.
const ALONE_FOR: Duration = Duration::from_secs(4);
/// What is mirrored without a mark is so much higher than what was confirmed.
const AHEAD: u64 = 1000;
const STOP_AGENT: &str = "kill -STOP $(cat /run/twinwrite-agent.pid)";
const CONTINUE_AGENT: &str = "kill -CONT $(cat /run/twinwrite-agent.pid)";

fn slow_to_die() -> Options {
    options(
        &["dead_after = \"40s\""],
        &[NO_CHECKPOINT, "lag_limit = \"60s\""],
    )
}

pub(super) fn run() -> Result<()> {
    with_lab("gate_uring", slow_to_die(), all_ways)
}

pub(super) fn on_6_1() -> Result<()> {
    let options = Options {
        kernel: KernelRelease::V6_1,
        ..slow_to_die()
    };
    with_lab("gate_uring_6_1", options, all_ways)
}

pub(super) fn preempted() -> Result<()> {
    let options = Options {
        kernel_parameters: vec!["preempt=full".to_owned()],
        ..slow_to_die()
    };
    with_lab("gate_uring_preempt", options, all_ways)
}

/// The process of one way.
struct Process<'a> {
    lab: &'a Lab,
    way: &'static str,
}

impl<'a> Process<'a> {
    /// Starts it; it goes on when it is let.
    fn start(lab: &'a Lab, way: &'static str) -> Result<Self> {
        let process = Self { lab, way };
        process.pause()?;
        lab.run(
            A,
            &format!(
                "setsid twinwrite-workload uring --way {way} --file {MOUNT_POINT}/{way} \
                 --log /host/{way}.log --pause /host/{way}.pause </dev/null >/host/{way}.out 2>&1 &"
            ),
        )?;
        Ok(process)
    }

    fn pause(&self) -> Result<()> {
        let path = self.lab.share(A).join(format!("{}.pause", self.way));
        Ok(fs::write(path, "")?)
    }

    fn let_on(&self) -> Result<()> {
        let path = self.lab.share(A).join(format!("{}.pause", self.way));
        Ok(fs::remove_file(path)?)
    }

    /// The last number that was `tried`, or `seen`.
    fn last(&self, word: &str) -> Result<u64> {
        let path = self.lab.share(A).join(format!("{}.log", self.way));
        let log = fs::read_to_string(path).unwrap_or_default();
        let mut last = log.lines().rev().filter_map(|line| line.strip_prefix(word));
        Ok(last.next().unwrap_or("0").trim().parse()?)
    }

    /// What it had begun when it was paused is over.
    fn rests(&self) -> Result<()> {
        until(self.lab, &format!("{} rests", self.way), LIMIT, || {
            Ok(self.last("tried")? == self.last("seen")?)
        })
    }

    fn goes_on(&self) -> Result<()> {
        let before = self.last("seen")?;
        until(self.lab, &format!("{} goes on", self.way), LIMIT, || {
            let path = self.lab.share(A).join(format!("{}.out", self.way));
            let out = fs::read_to_string(path)?;
            ensure!(out.is_empty(), "{} failed: {out}", self.way);
            Ok(self.last("seen")? > before + 2)
        })
    }

    /// Lets it on while no agent is there: it tries something and is stopped.
    fn is_held(&self) -> Result<()> {
        let (tried, state) = (self.last("tried")?, self.way);
        self.let_on()?;
        until(
            self.lab,
            &format!("{state} waits at the gate"),
            LIMIT,
            || {
                let command =
                    format!("ps -o stat= -p $(pgrep --full -- '--log /host/{state}[.]log')");
                Ok(self.last("tried")? > tried && self.lab.run(A, &command)?.starts_with('T'))
            },
        )
    }

    /// Writes a higher number, without a mark.
    fn write_ahead(&self) -> Result<()> {
        let (way, number) = (self.way, self.last("tried")? + AHEAD);
        let command = format!(
            "twinwrite-workload overwrite --file {MOUNT_POINT}/{way} --log /host/ahead.log \
             --from {number} --count 1 --no-sync"
        );
        self.lab.run(A, &command).map(drop)
    }

    fn found(&self, node: NodeName) -> Result<u64> {
        let command = format!(
            "twinwrite-workload overwritten --file {MOUNT_POINT}/{}",
            self.way
        );
        Ok(self.lab.run(node, &command)?.parse()?)
    }
}

fn all_ways(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let start = |ways: &[&'static str]| -> Result<Vec<Process<'_>>> {
        ways.iter().map(|way| Process::start(lab, way)).collect()
    };
    let (syncing, direct) = (start(&SYNCING)?, start(&DIRECT)?);
    let ungated = || metric(lab, A, "twinwrite_gaps_total", "reason=\"ungated\"");
    for process in syncing.iter().chain(&direct) {
        process.let_on()?;
        process.goes_on()?;
        process.pause()?;
    }
    lab.wait(A, AwaitedState::Protected, LIMIT)?;
    let before = ungated()?;
    for processes in [&syncing, &direct] {
        for process in processes {
            process.rests()?;
        }
        all_mirrored(lab, A)?;
        let seen = without_agent(lab, processes)?;
        for process in processes {
            process.pause()?;
        }
        lab.run(A, CONTINUE_AGENT)?;
        for (process, seen) in processes.iter().zip(seen) {
            let what = format!("{} is answered", process.way);
            until(lab, &what, LIMIT, || Ok(process.last("seen")? > seen))?;
            process.let_on()?;
            process.goes_on()?;
            process.pause()?;
        }
        lab.wait(A, AwaitedState::Protected, LIMIT)?;
    }
    let held = metric(lab, A, "twinwrite_gate_calls_total", "held")?;
    let after = ungated()?;
    // Where a thread of the process gets no processor for longer than a worker waits for it, the answer
    // is a gap, also if nobody saw it: an emulated machine on a busy host may do so now and then.
    let ungated = after - before;
    ensure!(
        ungated * 10.0 < held,
        "{ungated} answers of {held} were not known to be held in time"
    );
    progress::note(&format!("{held} holds, {ungated} not known in time"));
    survives(lab, &syncing, &direct)
}

/// Stops the agent and lets each process try something: nothing may be confirmed. What was seen before.
fn without_agent(lab: &Lab, processes: &[Process<'_>]) -> Result<Vec<u64>> {
    lab.run(A, STOP_AGENT)?;
    let seen = || -> Result<Vec<u64>> { processes.iter().map(|each| each.last("seen")).collect() };
    let before = seen()?;
    for process in processes {
        process.is_held()?;
    }
    sleep(ALONE_FOR);
    let after = seen()?;
    ensure!(
        before == after,
        "confirmed while nobody mirrored: {before:?} became {after:?} of {:?}",
        processes.iter().map(|each| each.way).collect::<Vec<_>>()
    );
    Ok(after)
}

/// Power cut while all wait: what was confirmed, or mirrored, is there.
fn survives(lab: &Lab, syncing: &[Process<'_>], direct: &[Process<'_>]) -> Result<()> {
    let all = || syncing.iter().chain(direct);
    for process in all() {
        process.write_ahead()?;
    }
    all_mirrored(lab, A)?;
    without_agent(lab, syncing)?;
    for process in direct {
        process.is_held()?;
    }
    lab.crash(A, CrashKind::Kill)?;
    await_takeover(lab, B)?;
    for process in all() {
        let (found, seen, tried) = (
            process.found(B)?,
            process.last("seen")?,
            process.last("tried")?,
        );
        ensure!(
            (seen.max(tried - 1)..=tried).contains(&found),
            "{}: {seen} was confirmed, {tried} tried, and {found} is there\n{}",
            process.way,
            lab.explain()
        );
    }
    Ok(())
}
