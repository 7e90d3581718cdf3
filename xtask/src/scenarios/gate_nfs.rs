//! The gate before the kernel's NFS server: what it confirms to its clients is never undone, although
//! nothing can stop its threads.
//!
//! A exports the volume, B is its client, by the kernel's own server and client.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, all_mirrored, await_takeover, metric, number, options, require_start,
    throughout, until, volume,
};
use super::nfs::{self, Replies, Version};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{AgentAction, CrashKind, Filesystem, KernelRelease, Lab, NodeName, Options};
use crate::progress;

use NodeName::{A, B};

/// The agent stands still for less than this before the crash.
const DEAD_AFTER: &str = "dead_after = \"20s\"";
/// An agent that is gone for a while does not end the epoch.
const LAG_LIMIT: &str = "lag_limit = \"60s\"";
/// If nobody is told anything for so long, what was sent when the agent was stopped has arrived.
const QUIET: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// So long nobody is there who could open the gate.
const ALONE_FOR: Duration = Duration::from_secs(7);
const SETTLED: u64 = 1;
/// What is mirrored and not durable.
const MIRRORED: u64 = 1_000_000;
/// What is written over it while the agent stands still.
const CONFIRMED: u64 = 2_000_000;
/// Where the client has the volume.
const CLIENT: &str = "/mnt/nfs";

/// What the clients do.
const KINDS: [&str; 3] = ["fsync", "o-sync", "mkdir"];
/// XFS shows no sign by which a name that its server makes durable could be known.
const KINDS_OF_XFS: [&str; 2] = ["fsync", "o-sync"];

/// The server on A and the client on B.
struct Nfs<'a> {
    lab: &'a Lab,
    kinds: &'static [&'static str],
}

impl<'a> Nfs<'a> {
    fn start(lab: &'a Lab, version: Version, kinds: &'static [&'static str]) -> Result<Self> {
        for node in [A, B] {
            fs::write(
                lab.share(node).join("gate_nfs.py"),
                include_str!("gate_nfs.py"),
            )?;
        }
        nfs::export(lab, A, Replies::WhenDurable)?;
        nfs::mount(lab, A, version, CLIENT, "")?;
        Ok(Self { lab, kinds })
    }

    fn log(kind: &str) -> String {
        format!("nfs-{kind}.log")
    }

    /// Writes one number on A, past the server and without asking for durability.
    fn write_on_owner(&self, kind: &str, number: u64) -> Result<()> {
        let command = format!(
            "python3 /host/gate_nfs.py plain {MOUNT_POINT}/nfs-{kind} /host/{} {number} 1",
            Self::log(kind)
        );
        self.lab.run(A, &command).map(drop)
    }

    /// The clients go on with numbers from this one.
    fn keep_on(&self, from: u64) -> Result<()> {
        for kind in self.kinds {
            let command = format!(
                "setsid python3 /host/gate_nfs.py {kind} {CLIENT}/nfs-{kind} /host/{} {from} \
                 </dev/null >>/host/nfs-{kind}.out 2>&1 &",
                Self::log(kind)
            );
            self.lab.run(B, &command)?;
        }
        Ok(())
    }

    /// Ends the clients, which the server answers.
    fn end_clients(&self) -> Result<()> {
        self.lab.run(B, "pkill -KILL --full gate_nfs[.]py")?;
        until(self.lab, "the clients end", LIMIT, || {
            let found = self.lab.exec(B, "pgrep --full gate_nfs[.]py", LIMIT)?;
            Ok(found.status != 0)
        })
    }

    /// The last number that was confirmed to a client, of each kind.
    fn confirmed(&self) -> Result<Vec<u64>> {
        let last = |kind: &&str| -> Result<u64> {
            let path = self.lab.share(B).join(Self::log(kind));
            let log = fs::read_to_string(path).unwrap_or_default();
            let line = log.lines().next_back().unwrap_or("0");
            line.parse()
                .with_context(|| format!("the log of {kind} ends with {line:?}"))
        };
        self.kinds.iter().map(last).collect()
    }

    /// What is confirmed once the answers have arrived that had left when the agent was stopped, just before: of each
    /// client one, and one that was not in its log yet. On a slow host they take seconds.
    fn last_answers(&self) -> Result<Vec<u64>> {
        const UNDER_WAY_MAX: u64 = 2;
        let at_stop = self.confirmed()?;
        let (mut last, mut quiet_since) = (at_stop.clone(), Instant::now());
        while quiet_since.elapsed() < QUIET {
            sleep(LOOK_EVERY);
            let now = self.confirmed()?;
            if now != last {
                (last, quiet_since) = (now, Instant::now());
            }
            let is_late = |(now, then): (&u64, &u64)| *now <= then + UNDER_WAY_MAX;
            ensure!(
                last.iter().zip(&at_stop).all(is_late),
                "clients are answered while the agent stands still: {at_stop:?} became {last:?}"
            );
        }
        Ok(last)
    }

    fn goes_on(&self, what: &str) -> Result<()> {
        let before = self.confirmed()?;
        until(self.lab, what, LIMIT, || {
            let now = self.confirmed()?;
            Ok(now
                .iter()
                .zip(&before)
                .all(|(now, before)| *now > before + 3))
        })
    }

    /// No call of a client failed: what waits is answered, not refused.
    fn require_no_error(&self) -> Result<()> {
        for kind in self.kinds {
            let out = fs::read_to_string(self.lab.share(B).join(format!("nfs-{kind}.out")))?;
            ensure!(out.is_empty(), "the client's {kind} failed: {out}");
        }
        Ok(())
    }

    /// The number in a file of B's volume.
    fn found(&self, kind: &str) -> Result<u64> {
        let command = format!("head --lines 1 {MOUNT_POINT}/nfs-{kind}");
        Ok(self.lab.run(B, &command)?.trim().parse()?)
    }

    /// That the volume of B shows all that was confirmed, of each kind.
    fn require_confirmed(&self, confirmed: &[u64]) -> Result<()> {
        for (kind, confirmed) in self.kinds.iter().zip(confirmed) {
            let found = if *kind == "mkdir" {
                let command = format!("ls {MOUNT_POINT}/nfs-mkdir | wc --lines");
                let there: u64 = self.lab.run(B, &command)?.trim().parse()?;
                let log = fs::read_to_string(self.lab.share(B).join(Self::log(kind)))?;
                let answered = log.lines().count() as u64;
                ensure!(
                    there >= answered,
                    "{answered} directories were confirmed and {there} are there\n{}",
                    self.lab.explain()
                );
                continue;
            } else {
                self.found(kind)?
            };
            ensure!(
                found >= *confirmed,
                "{kind}: {confirmed} was confirmed and {found} is there\n{}",
                self.lab.explain()
            );
        }
        Ok(())
    }

    /// A mirrored write without a mark; then, while the agent stands still, the clients write over it.
    fn overwrite_without_agent(&self) -> Result<()> {
        for kind in self.kinds.iter().filter(|kind| **kind != "mkdir") {
            self.write_on_owner(kind, SETTLED)?;
        }
        self.lab.run(A, "sync")?;
        for kind in self.kinds.iter().filter(|kind| **kind != "mkdir") {
            self.write_on_owner(kind, MIRRORED)?;
        }
        until(self.lab, "the writes are mirrored", LIMIT, || {
            let volume = volume(self.lab, A)?;
            Ok(
                number(&volume, "captured_seq")? == number(&volume, "mirrored_seq")?
                    && number(&volume, "lag_records")? == 0,
            )
        })?;
        stop_agent(self.lab)?;
        self.keep_on(CONFIRMED)?;
        sleep(ALONE_FOR);
        Ok(())
    }

    /// The power of A is cut, its client on B gives up, and B takes the volume over.
    fn crash(&self) -> Result<()> {
        self.lab.crash(A, CrashKind::Kill)?;
        // They wait for an answer, whatever kills them; what they ask for is given up.
        self.lab
            .run(B, "pkill -KILL --full gate_nfs[.]py || true")?;
        nfs::give_up(self.lab, B, CLIENT)?;
        await_takeover(self.lab, B).map(drop)
    }
}

fn stop_agent(lab: &Lab) -> Result<()> {
    lab.run(A, "kill -STOP $(cat /run/twinwrite-agent.pid)")
        .map(drop)
}

/// NFS 4.2 over ext4.
pub(super) fn run() -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_nfs", options, |lab| holds(lab, Version::V4_2, &KINDS))
}

/// NFS 3 over XFS, on the older kernel.
pub(super) fn run_v3() -> Result<()> {
    let options = Options {
        filesystem: Filesystem::Xfs,
        kernel: KernelRelease::V6_1,
        ..options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT])
    };
    with_lab("gate_nfs_v3", options, |lab| {
        holds(lab, Version::V3, &KINDS_OF_XFS)
    })
}

fn holds(lab: &Lab, version: Version, kinds: &'static [&'static str]) -> Result<()> {
    require_start(lab)?;
    let nfs = Nfs::start(lab, version, kinds)?;
    nfs.keep_on(1)?;
    nfs.goes_on("all clients are answered")?;
    let epoch = number(&volume(lab, A)?, "epoch")?;
    stop_agent(lab)?;
    let before = nfs.last_answers()?;
    throughout(lab, "no client is told anything", ALONE_FOR, || {
        Ok(nfs.confirmed()? == before)
    })?;
    lab.run(A, "kill -CONT $(cat /run/twinwrite-agent.pid)")?;
    nfs.goes_on("all clients go on with the agent")?;
    nfs.require_no_error()?;
    let refused = metric(lab, A, "twinwrite_gate_replies_refused_total", "")?;
    let ungated = metric(lab, A, "twinwrite_gaps_total", "ungated")?;
    ensure!(
        refused > 0.0 && ungated == 0.0,
        "{refused} replies were refused and {ungated} went out too early"
    );
    progress::note(&format!("{refused} replies were refused"));
    let now = number(&volume(lab, A)?, "epoch")?;
    ensure!(now == epoch, "epoch {epoch} ended for it, {now} runs");
    nfs.end_clients()?;
    all_mirrored(lab, A)?;
    nfs.overwrite_without_agent()?;
    let confirmed = nfs.confirmed()?;
    ensure!(
        confirmed.iter().all(|confirmed| *confirmed < CONFIRMED),
        "a client was answered while nobody mirrored: {confirmed:?}"
    );
    nfs.crash()?;
    nfs.require_confirmed(&confirmed)
}

/// The same without the gate: the negative control.
pub(super) fn off_reverts() -> Result<()> {
    let options = options(&[DEAD_AFTER], &[NO_CHECKPOINT, LAG_LIMIT]);
    with_lab("gate_nfs_off_reverts", options, |lab| {
        require_start(lab)?;
        lab.agent(A, AgentAction::Stop)?;
        lab.run(A, "TWINWRITE_TEST_GATE_OFF=1 twinwrite-agent start")?;
        until(lab, "A says that its gate is off", LIMIT, || {
            let shown = volume(lab, A)?;
            Ok(shown["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("the gate is switched off")))
        })?;
        let nfs = Nfs::start(lab, Version::V4_2, &KINDS_OF_XFS)?;
        nfs.overwrite_without_agent()?;
        let confirmed = nfs.confirmed()?;
        ensure!(
            confirmed.iter().all(|confirmed| *confirmed >= CONFIRMED),
            "without the gate a client waited all the same: {confirmed:?}"
        );
        nfs.crash()?;
        for (kind, confirmed) in nfs.kinds.iter().zip(confirmed) {
            let found = nfs.found(kind)?;
            ensure!(
                found == MIRRORED,
                "{kind}: without the gate {confirmed} was confirmed and {found} is there: the control \
                 shows nothing"
            );
        }
        Ok(())
    })
}
