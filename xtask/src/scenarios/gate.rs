//! The gate: what an fsync confirmed is never undone, whatever the agent is doing, and nobody pays for
//! that with a machine that does nothing else.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::bench::{
    LIMIT, NO_CHECKPOINT, all_mirrored, await_takeover, kill_agent, log_mark, logged, metric,
    number, options, require_start, until, volume,
};
use super::with_lab;
use crate::lab::config::{MOUNT_POINT, VOLUME_DEVICE};
use crate::lab::{AgentAction, AwaitedState, CrashKind, DiskKind, Lab, NodeName, Options};
use crate::progress;

use NodeName::{A, B};

/// The agent stands still for less than this before the crash.
const DEAD_AFTER: &str = "dead_after = \"15s\"";
/// An agent that is gone for a while does not end the epoch.
const LAG_LIMIT: &str = "lag_limit = \"60s\"";
/// So long nobody is there who could answer.
const ALONE_FOR: Duration = Duration::from_secs(4);
/// What is on the disk when it begins.
const SETTLED: u64 = 1;
/// What is mirrored and not durable.
const MIRRORED: u64 = 1000;
/// What is written over it while the agent stands still.
const CONFIRMED: u64 = 2000;
/// A command on a machine whose fsyncs all wait may take so much longer than on an idle one.
const USABLE_WITHIN: Duration = Duration::from_secs(1);
const PRICE_CALLS: u64 = 200;
/// How long a flush takes. An fsync of ext4 makes two, one after the other.
const FLUSHES_US: [u64; 4] = [0, 1000, 2000, 5000];
/// Prints the states of the processes that fsync.
const STATES: &str = "ps -o stat= -p $(pidof twinwrite-workload | tr ' ' ,)";

/// A file that numbers are written over, and the log of those that were answered.
struct Block<'a> {
    lab: &'a Lab,
    name: &'static str,
}

impl<'a> Block<'a> {
    fn new(lab: &'a Lab, name: &'static str) -> Self {
        Self { lab, name }
    }

    fn command(&self, from: u64, count: u64, more: &str) -> String {
        let name = self.name;
        format!(
            "twinwrite-workload overwrite --file {MOUNT_POINT}/{name} --log /host/{name}.log \
             --from {from} --count {count} {more}"
        )
    }

    /// Writes numbers, and waits for the answers.
    fn write(&self, from: u64, count: u64, more: &str) -> Result<Value> {
        let said = self
            .lab
            .run_within(A, &self.command(from, count, more), LIMIT)?;
        Ok(serde_json::from_str(&said)?)
    }

    /// Goes on writing numbers in the background; `on` is a command to run it with.
    fn keep_writing(&self, from: u64, count: u64, on: &str) -> Result<()> {
        let (command, name) = (self.command(from, count, ""), self.name);
        self.lab
            .run(
                A,
                &format!("setsid {on} {command} </dev/null >/host/{name}.out 2>&1 &"),
            )
            .map(drop)
    }

    /// The process that goes on writing.
    fn process(&self) -> Result<String> {
        let name = self.name;
        self.lab
            .run(A, &format!("pgrep --full -- '--log /host/{name}[.]log'"))
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let process = self.process()?;
        self.lab
            .run(A, &format!("kill -{signal} {process}"))
            .map(drop)
    }

    fn is_stopped(&self) -> Result<bool> {
        let process = self.process()?;
        let state = self.lab.run(A, &format!("ps -o stat= -p {process}"))?;
        Ok(state.starts_with('T'))
    }

    /// The last number whose fsync was answered.
    fn answered(&self) -> Result<u64> {
        let log = fs::read_to_string(self.lab.share(A).join(format!("{}.log", self.name)))?;
        let last = log.lines().next_back().unwrap_or("0");
        last.parse()
            .with_context(|| format!("the log of {} ends with {last:?}", self.name))
    }

    /// The number on `node`.
    fn found(&self, node: NodeName) -> Result<u64> {
        let path = format!("{MOUNT_POINT}/{}", self.name);
        let said = self.lab.run(
            node,
            &format!("twinwrite-workload overwritten --file {path}"),
        )?;
        Ok(said.parse()?)
    }
}

pub(super) fn holds() -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_holds", options, |lab| {
        require_start(lab)?;
        let (confirmed, waiting) = (Block::new(lab, "confirmed"), Block::new(lab, "waiting"));
        // Answered while the agent runs: the last mirrored bytes of this one are not the last bytes.
        confirmed.write(SETTLED, 1, "")?;
        confirmed.write(MIRRORED, 1, "--no-sync")?;
        all_mirrored(lab, A)?;
        confirmed.write(CONFIRMED, 20, "")?;
        overwrite_without_agent(lab, &waiting)?;
        ensure!(
            waiting.answered()? == MIRRORED,
            "an fsync was answered while nobody mirrored its mark: {}",
            waiting.answered()?
        );
        let stopped = lab.run(A, STATES)?;
        ensure!(
            stopped.starts_with('T'),
            "the process that fsyncs is not stopped: {stopped:?}"
        );
        lab.crash(A, CrashKind::Kill)?;
        await_takeover(lab, B)?;
        for block in [confirmed, waiting] {
            let (found, answered) = (block.found(B)?, block.answered()?);
            ensure!(
                found >= answered,
                "{}: {answered} was confirmed and {found} is there\n{}",
                block.name,
                lab.explain()
            );
        }
        Ok(())
    })
}

/// The same without the gate: the negative control.
pub(super) fn off_reverts() -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_off_reverts", options, |lab| {
        require_start(lab)?;
        lab.agent(A, AgentAction::Stop)?;
        lab.run(A, "TWINWRITE_TEST_GATE_OFF=1 twinwrite-agent start")?;
        until(lab, "A says that its gate is off", LIMIT, || {
            let shown = volume(lab, A)?;
            Ok(shown["protection"] == "exposed"
                && shown["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains("the gate is switched off")))
        })?;
        let waiting = Block::new(lab, "waiting");
        overwrite_without_agent(lab, &waiting)?;
        let answered = waiting.answered()?;
        ensure!(
            answered >= CONFIRMED,
            "without the gate an fsync waited all the same"
        );
        lab.crash(A, CrashKind::Kill)?;
        await_takeover(lab, B)?;
        let found = waiting.found(B)?;
        ensure!(
            found == MIRRORED,
            "without the gate {answered} was confirmed and {found} is there: the control shows nothing"
        );
        Ok(())
    })
}

/// A mirrored write without a mark, and then, while the agent stands still, writes over the same
/// bytes, each with an fsync.
fn overwrite_without_agent(lab: &Lab, block: &Block<'_>) -> Result<()> {
    block.write(SETTLED, 1, "")?;
    block.write(MIRRORED, 1, "--no-sync")?;
    // Whatever the protection is called: it is not `protected` without the gate.
    until(lab, "the write is mirrored", LIMIT, || {
        let volume = volume(lab, A)?;
        Ok(
            number(&volume, "captured_seq")? == number(&volume, "mirrored_seq")?
                && number(&volume, "lag_records")? == 0,
        )
    })?;
    lab.run(A, "kill -STOP $(cat /run/twinwrite-agent.pid)")?;
    block.keep_writing(CONFIRMED, u64::MAX, "")?;
    sleep(ALONE_FOR);
    Ok(())
}

/// Calls that must wait while nobody mirrors.
const WAITING_CALLS: [&str; 10] = [
    "fsync",
    "fdatasync",
    "directory",
    "sync",
    "syncfs",
    "range-waits",
    "o-sync",
    "o-dsync",
    "rwf-dsync",
    "msync",
];
/// Calls that confirm nothing.
const PLAIN_CALLS: [&str; 2] = ["write", "range-starts"];
/// These end the epoch first, so they come after the others.
const DIRECT_CALLS: [&str; 2] = ["o-direct", "o-direct-dsync"];

/// Each call of the class, one process each.
pub(super) fn calls() -> Result<()> {
    let options = options(&["dead_after = \"60s\""], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_calls", options, |lab| {
        require_start(lab)?;
        fs::write(
            lab.share(A).join("gate_calls.py"),
            include_str!("gate_calls.py"),
        )?;
        let first: Vec<&str> = WAITING_CALLS.into_iter().chain(PLAIN_CALLS).collect();
        for (calls, free) in [(&first[..], &PLAIN_CALLS[..]), (&DIRECT_CALLS[..], &[])] {
            all_mirrored(lab, A)?;
            lab.run(A, "kill -STOP $(cat /run/twinwrite-agent.pid)")?;
            for call in calls {
                lab.run(
                    A,
                    &format!(
                        "setsid python3 /host/gate_calls.py {call} {MOUNT_POINT}/call-{call} \
                         </dev/null >/host/call-{call}.out 2>&1 &"
                    ),
                )?;
            }
            let said =
                |call: &str| fs::read_to_string(lab.share(A).join(format!("call-{call}.out")));
            until(lab, "all calls are made", LIMIT, || {
                for call in calls {
                    if !said(call)?.contains("ready") {
                        return Ok(false);
                    }
                }
                Ok(true)
            })?;
            sleep(ALONE_FOR);
            for call in calls {
                ensure!(
                    said(call)?.contains("answered") == free.contains(call),
                    "{call} while nobody mirrors: {}",
                    said(call)?
                );
            }
            lab.run(A, "kill -CONT $(cat /run/twinwrite-agent.pid)")?;
            until(lab, "all calls are answered", LIMIT, || {
                for call in calls {
                    if !said(call)?.contains("answered") {
                        return Ok(false);
                    }
                }
                Ok(true)
            })?;
        }
        lab.wait(A, AwaitedState::Protected, LIMIT).map(drop)
    })
}

pub(super) fn two_processors() -> Result<()> {
    let options = options(&["dead_after = \"60s\""], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_two_processors", options, |lab| {
        require_start(lab)?;
        let before = volume(lab, A)?;
        let blocks = [Block::new(lab, "first"), Block::new(lab, "second")];
        for (processor, block) in blocks.iter().enumerate() {
            block.keep_writing(1, u64::MAX, &format!("taskset --cpu-list {processor}"))?;
        }
        let grow = |what: &str| {
            let mut least = Vec::new();
            for block in &blocks {
                least.push(block.answered().unwrap_or(0) + 3);
            }
            until(lab, what, LIMIT, || {
                for (block, least) in blocks.iter().zip(&least) {
                    if block.answered()? < *least {
                        return Ok(false);
                    }
                }
                Ok(true)
            })
        };
        grow("both processes fsync")?;
        lab.agent(A, AgentAction::Stop)?;
        let idle = quickest(lab)?;
        lab.agent(A, AgentAction::Start)?;
        lab.wait(A, AwaitedState::Protected, LIMIT)?;
        grow("both fsync with the next agent")?;
        kill_agent(lab, A)?;
        until(lab, "both wait at the gate", LIMIT, || {
            let states = lab.run(A, STATES)?;
            Ok(states
                .lines()
                .filter(|state| state.starts_with('T'))
                .count()
                == 2)
        })?;
        let waiting = quickest(lab)?;
        ensure!(
            waiting < idle + USABLE_WITHIN,
            "with all fsyncs waiting a command takes {waiting:?}, else {idle:?}"
        );
        progress::note(&format!(
            "a command takes {waiting:?} with both processes held, {idle:?} with none"
        ));
        lab.agent(A, AgentAction::Start)?;
        lab.wait(A, AwaitedState::Protected, LIMIT)?;
        grow("both go on after the agent's return")?;
        let after = volume(lab, A)?;
        ensure!(
            number(&after, "epoch")? > number(&before, "epoch")?,
            "stopping the agent did not end its epoch: {after}"
        );
        ensure!(
            metric(lab, A, "twinwrite_gate_held_groups", "")? <= 2.0,
            "more processes are held than there are"
        );
        for block in &blocks {
            let out = fs::read_to_string(lab.share(A).join(format!("{}.out", block.name)))?;
            ensure!(out.is_empty(), "{} failed: {out}", block.name);
        }
        lab.run(A, "kill -KILL $(pidof twinwrite-workload)")
            .map(drop)
    })
}

/// What others do to a process that is held: it goes on with the gate and not before, a stop is heeded,
/// and a kill always works. Nothing stays attached behind it.
pub(super) fn signals() -> Result<()> {
    let options = options(&["dead_after = \"60s\""], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_signals", options, |lab| {
        require_start(lab)?;
        let names = ["continued", "stopped", "killed"];
        let [continued, stopped, killed] = names.map(|name| Block::new(lab, name));
        for block in [&continued, &stopped, &killed] {
            block.keep_writing(1, u64::MAX, "")?;
        }
        lab.run(A, "kill -STOP $(cat /run/twinwrite-agent.pid)")?;
        until(lab, "all wait at the gate", LIMIT, || {
            Ok([&continued, &stopped, &killed]
                .iter()
                .all(|block| block.is_stopped().unwrap_or(false)))
        })?;
        ensure!(
            continued.signal("CONT").is_err() && continued.is_stopped()?,
            "somebody continued a process that waits at the gate"
        );
        stopped.signal("STOP")?;
        killed.signal("KILL")?;
        until(lab, "the killed process is gone", LIMIT, || {
            Ok(killed.process().is_err())
        })?;
        let before = continued.answered()?;
        lab.run(A, "kill -CONT $(cat /run/twinwrite-agent.pid)")?;
        until(lab, "the held process goes on", LIMIT, || {
            Ok(continued.answered()? > before + 3)
        })?;
        ensure!(
            stopped.is_stopped()?,
            "a process that somebody else had stopped was continued with the gate"
        );
        let before = stopped.answered()?;
        stopped.signal("CONT")?;
        until(
            lab,
            "the stopped process goes on when it is told to",
            LIMIT,
            || Ok(stopped.answered()? > before + 3),
        )?;
        for block in [&continued, &stopped] {
            block.signal("KILL")?;
            until(lab, "the process is gone", LIMIT, || {
                Ok(block.process().is_err())
            })?;
        }
        lab.agent(A, AgentAction::Stop)?;
        lab.run(A, "twinwrite detach vol0")?;
        let left = lab.run(A, "ls -d /sys/fs/bpf/twinwrite*/* 2>/dev/null || true")?;
        ensure!(left.is_empty(), "detach left {left}");
        lab.run(
            A,
            &format!("! mountpoint --quiet {MOUNT_POINT} || umount {MOUNT_POINT}"),
        )
        .map(drop)
    })
}

/// Other programs take the place of those at whose gate somebody waits.
pub(super) fn replaced() -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_replaced", options, |lab| {
        require_start(lab)?;
        let block = Block::new(lab, "waiting");
        block.keep_writing(1, u64::MAX, "")?;
        until(lab, "it writes", LIMIT, || Ok(block.answered()? > 3))?;
        kill_agent(lab, A)?;
        until(lab, "it waits at the gate", LIMIT, || block.is_stopped())?;
        // A ring of another size cannot be taken over.
        lab.run(
            A,
            "echo 'ring_bytes = \"8MiB\"' >>/etc/twinwrite/twinwrite.toml",
        )?;
        let (before, mark) = (block.answered()?, log_mark(lab, A));
        lab.agent(A, AgentAction::Start)?;
        lab.wait(A, AwaitedState::Protected, LIMIT)?;
        ensure!(
            logged(lab, A, mark, &["attaching anew", "ring"])?,
            "the programs were not replaced"
        );
        until(lab, "it goes on", LIMIT, || {
            Ok(block.answered()? > before + 3)
        })?;
        lab.crash(A, CrashKind::Kill)?;
        await_takeover(lab, B)?;
        let (found, answered) = (block.found(B)?, block.answered()?);
        ensure!(
            found >= answered,
            "{answered} was confirmed and {found} is there\n{}",
            lab.explain()
        );
        Ok(())
    })
}

/// A second volume for both agents; only its owner needs the device.
const SECOND_VOLUME: &str = "\n[[volume]]\nname = \"vol1\"\ndevice = \"/dev/loop7\"\n\
    mount_point = \"/srv/vol1\"\nfilesystem = \"ext4\"\nowner = \"a\"\nmirror = \"b\"\n\
    lag_limit = \"60s\"\nring_bytes = \"4MiB\"\nregion_bytes = \"32MiB\"\n";

/// A process with threads on two volumes goes on when both gates let it, and not before.
pub(super) fn two_volumes() -> Result<()> {
    let options = options(&["dead_after = \"60s\""], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_two_volumes", options, |lab| {
        require_start(lab)?;
        for node in [A, B] {
            lab.agent(node, AgentAction::Stop)?;
            lab.run(
                node,
                &format!(
                    "modprobe loop; truncate --size 64M /tmp/vol1 && losetup /dev/loop7 /tmp/vol1 && \
                     mkdir -p /srv/vol1 && printf '{SECOND_VOLUME}' >>/etc/twinwrite/twinwrite.toml"
                ),
            )?;
        }
        // The machines have no mkfs of their own.
        let image = lab.share(A).join("vol1.img");
        fs::File::create(&image)?.set_len(64 << 20)?;
        let made = Command::new("mkfs.ext4").arg("-q").arg(&image).status()?;
        ensure!(made.success(), "mkfs.ext4 ended with {made}");
        lab.run(
            A,
            "dd if=/host/vol1.img of=/dev/loop7 bs=1M status=none && sync",
        )?;
        for node in [B, A] {
            lab.agent(node, AgentAction::Start)?;
        }
        both_protected(lab)?;
        fs::write(
            lab.share(A).join("gate_two_volumes.py"),
            include_str!("gate_two_volumes.py"),
        )?;
        lab.run(
            A,
            "setsid python3 /host/gate_two_volumes.py </dev/null >/host/two.out 2>&1 &",
        )?;
        let rounds = || -> Result<u64> {
            let text = fs::read_to_string(lab.share(A).join("rounds")).unwrap_or_default();
            Ok(text.lines().next_back().unwrap_or("0").parse()?)
        };
        let goes_on = |what: &str| {
            let before = rounds()?;
            until(lab, what, LIMIT, || Ok(rounds()? > before + 2))
        };
        let is_held = |what: &str| {
            until(lab, what, LIMIT, || {
                let state = lab.run(A, "ps -o stat= -p $(pgrep --full 'gate_two_volumes[.]py')")?;
                Ok(state.starts_with('T'))
            })
        };
        goes_on("both threads fsync")?;
        lab.run(A, "kill -STOP $(cat /run/twinwrite-agent.pid)")?;
        is_held("the process waits at the gate")?;
        lab.run(A, "kill -CONT $(cat /run/twinwrite-agent.pid)")?;
        goes_on("both threads go on")?;
        kill_agent(lab, A)?;
        is_held("the process waits for the next agent")?;
        lab.agent(A, AgentAction::Start)?;
        goes_on("both threads go on with the next agent")?;
        both_protected(lab)?;
        let out = fs::read_to_string(lab.share(A).join("two.out"))?;
        ensure!(out.is_empty(), "the process failed: {out}");
        lab.run(A, "kill -KILL $(pgrep --full 'gate_two_volumes[.]py')")
            .map(drop)
    })
}

fn both_protected(lab: &Lab) -> Result<()> {
    until(lab, "both volumes are protected", LIMIT, || {
        let status = lab.agent_status(A)?;
        let volumes = status["volumes"].as_array().context("no volumes")?;
        Ok(volumes.len() == 2 && volumes.iter().all(|each| each["protection"] == "protected"))
    })
}

/// The shortest of some commands: what the machine can do, not what the host lets it.
fn quickest(lab: &Lab) -> Result<Duration> {
    let mut shortest = Duration::MAX;
    for _ in 0..4 {
        let began = Instant::now();
        lab.run(A, "ls / >/dev/null")?;
        shortest = shortest.min(began.elapsed());
    }
    Ok(shortest)
}

/// Medians of an fsync of a 4-KiB write, microseconds, on disks whose flush takes each of [`FLUSHES_US`].
fn medians(block: &Block<'_>, from: u64) -> Result<Vec<u64>> {
    let mut medians = Vec::new();
    for (flush_us, from) in FLUSHES_US.into_iter().zip((from..).step_by(1000)) {
        block.lab.flush_takes(flush_us)?;
        // The first ones find other caches.
        block.write(from, 20, "")?;
        medians.push(number(
            &block.write(from + 20, PRICE_CALLS, "")?,
            "median_us",
        )?);
    }
    block.lab.flush_takes(0)?;
    Ok(medians)
}

pub(super) fn price() -> Result<()> {
    let options = Options {
        disks: DiskKind::Volatile,
        ..options(&[], &[])
    };
    with_lab("gate_price", options, |lab| {
        require_start(lab)?;
        let block = Block::new(lab, "priced");
        let mirrored = medians(&block, 1)?;
        let mut counts = Vec::new();
        for outcome in ["passed", "polled", "held"] {
            let count = metric(lab, A, "twinwrite_gate_calls_total", outcome)?;
            counts.push(format!("{outcome} {count}"));
        }
        lab.agent(A, AgentAction::Stop)?;
        lab.run(
            A,
            &format!(
                "twinwrite detach vol0 >/dev/null && \
                 {{ mountpoint --quiet {MOUNT_POINT} || mount {VOLUME_DEVICE} {MOUNT_POINT}; }}"
            ),
        )?;
        let plain = medians(&block, 10_000)?;
        for (flush_us, (with, without)) in
            FLUSHES_US.into_iter().zip(mirrored.into_iter().zip(plain))
        {
            let ratio = with as f64 / without.max(1) as f64;
            progress::note(&format!(
                "fsync of a 4-KiB write on a disk whose flush takes {flush_us} us more than none, median \
                 of {PRICE_CALLS}: {with} us mirrored, {without} us unprotected, ratio {ratio:.2}",
            ));
        }
        progress::note(&format!("at the gate: {}", counts.join(", ")));
        Ok(())
    })
}
