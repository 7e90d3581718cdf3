//! One file system on one kernel.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::{Cell, Probe, Verdict};
use crate::lab::config::MOUNT_POINT;
use crate::lab::{
    AgentAction, AwaitedState, CrashKind, Filesystem, KernelRelease, Lab, NodeName, Options,
    Service,
};
use crate::progress;
use crate::scenarios::bench::{
    self, CrashedDisk, LIMIT, NO_CHECKPOINT, await_takeover, crash_and_copy, log_mark, losses,
    number, until, volume,
};
use crate::scenarios::with_lab;

use NodeName::{A, B};

/// What is captured is asked here, not how fast an emulated machine is.
const SLOW_IS_NO_LOSS: &str = "lag_limit = \"20s\"";
/// A change that is noticed and not captured has ended the epoch by then.
const NOTICED_WITHIN: Duration = Duration::from_secs(2);
/// A hundred programs, one after the other.
const LONG: Duration = Duration::from_secs(600);

pub(super) fn run(
    filesystem: Filesystem,
    kernel: KernelRelease,
    only: &[String],
) -> Result<Vec<(Probe, Cell)>> {
    let options = Options {
        filesystem,
        kernel,
        service: Service::PlainMount,
        ..bench::options(&[], &[NO_CHECKPOINT, SLOW_IS_NO_LOSS])
    };
    let name = format!("coverage_{filesystem}_{kernel}").replace('.', "_");
    let mut cells = BTreeMap::new();
    let mut probes = Vec::new();
    with_lab(&name, options, |lab| {
        probes = listed(lab, only)?;
        let without = without_twinwrite(lab, &probes)?;
        if filesystem == Filesystem::Xfs {
            // Before it is mounted: what is due to flush the log keeps to the interval of that time.
            lab.run(A, "sysctl -qw fs.xfs.xfssyncd_centisecs=720000")?;
        }
        for node in [B, A] {
            lab.agent(node, AgentAction::Start)?;
        }
        bench::require_start(lab)?;
        let column = Column {
            lab,
            filesystem,
            without,
        };
        for (probe, cell) in column.classify(&probes)? {
            cells.insert(probe, cell);
        }
        let chosen = |wanted: &dyn Fn(&Probe, &Verdict) -> bool| -> Vec<String> {
            let is_wanted = |probe: &&Probe| {
                let cell = cells.get(&probe.name);
                cell.is_some_and(|cell| wanted(probe, &cell.verdict))
            };
            let wanted = probes.iter().filter(is_wanted);
            wanted.map(|probe| probe.name.clone()).collect()
        };
        let unflushed =
            chosen(&|probe, verdict| *verdict == Verdict::Captured && !probe.is_durable);
        let covered = chosen(&|probe, verdict| {
            *verdict == Verdict::Covered || (*verdict == Verdict::Captured && probe.is_durable)
        });
        let lost = column.crash_unflushed(&unflushed)?;
        let lost_later = column.crash_covered(&covered)?;
        for (name, words) in lost.into_iter().chain(lost_later) {
            let verdict = Verdict::Failed;
            cells.insert(name, Cell { verdict, words });
        }
        Ok(())
    })?;
    let found = probes.into_iter().filter_map(|probe| {
        let cell = cells.remove(&probe.name)?;
        Some((probe, cell))
    });
    Ok(found.collect())
}

fn listed(lab: &Lab, only: &[String]) -> Result<Vec<Probe>> {
    let text = lab.run(A, "twinwrite-workload probes")?;
    let probes = text.lines().map(serde_json::from_str::<Probe>);
    let mut probes = probes.collect::<Result<Vec<_>, _>>()?;
    probes.retain(|probe| only.is_empty() || only.contains(&probe.name));
    ensure!(!probes.is_empty(), "there is no such probe");
    Ok(probes)
}

/// What each probe finds on the same file system while nobody protects it, whose directories stay there.
fn without_twinwrite(lab: &Lab, probes: &[Probe]) -> Result<BTreeMap<String, Outcome>> {
    let names: Vec<String> = probes.iter().map(|probe| probe.name.clone()).collect();
    prepare(lab, A, "unprotected", &names)?;
    let mut found = BTreeMap::new();
    for name in names {
        let outcome = act(lab, A, "unprotected", &name)?;
        found.insert(name, outcome);
    }
    lab.run(A, &format!("umount {MOUNT_POINT}"))?;
    Ok(found)
}

/// The directory of all probes, which the oracle knows by the prefix of a manifest.
const TOP: &str = "coverage";

/// Makes what the probes need, and has it flushed.
fn prepare(lab: &Lab, node: NodeName, below: &str, names: &[String]) -> Result<()> {
    let script = format!(
        "set -e; for name in {}; do twinwrite-workload probe --stage prepare --name $name \
         --directory {MOUNT_POINT}/{TOP}/{below}/$name >/dev/null; done; sync",
        names.join(" ")
    );
    lab.run_within(node, &script, LONG).map(drop)
}

fn act(lab: &Lab, node: NodeName, below: &str, name: &str) -> Result<Outcome> {
    let command = format!(
        "twinwrite-workload probe --stage act --name {name} \
         --directory {MOUNT_POINT}/{TOP}/{below}/{name}"
    );
    let said = lab.run(node, &command)?;
    serde_json::from_str(&said).with_context(|| format!("the probe {name} said {said:?}"))
}

/// What the system answered to an operation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
enum Outcome {
    Done,
    Refused,
    NotOffered { reason: String },
}

impl Outcome {
    fn words(&self) -> &str {
        match self {
            Self::Done => "",
            Self::Refused => "Operation not permitted",
            Self::NotOffered { reason } => reason,
        }
    }
}

/// What a survivor lacks, by the probe's name.
type Lost = Vec<(String, String)>;

struct Column<'a> {
    lab: &'a Lab,
    filesystem: Filesystem,
    without: BTreeMap<String, Outcome>,
}

impl Column<'_> {
    /// Everything is captured, mirrored, and the volume protected; the epoch.
    fn settled(&self, node: NodeName) -> Result<u64> {
        until(self.lab, "all is protected and mirrored", LIMIT, || {
            let volume = volume(self.lab, node)?;
            Ok(volume["role"] == "owner"
                && volume["protection"] == "protected"
                && number(&volume, "lag_records")? == 0)
        })?;
        number(&volume(self.lab, node)?, "epoch")
    }

    /// Again, where it was found to succeed.
    fn act_again(&self, node: NodeName, below: &str, name: &str) -> Result<()> {
        let outcome = act(self.lab, node, below, name)?;
        ensure!(outcome == Outcome::Done, "{name} again: {outcome:?}");
        Ok(())
    }

    /// Each probe by itself, on a volume that stays protected until then.
    fn classify(&self, probes: &[Probe]) -> Result<Vec<(String, Cell)>> {
        let names: Vec<String> = probes.iter().map(|probe| probe.name.clone()).collect();
        prepare(self.lab, A, "looked-at", &names)?;
        let mut cells = Vec::new();
        for name in names {
            let cell = self.look(&name).with_context(|| format!("probe {name}"))?;
            progress::note(&format!("{name}: {:?} {}", cell.verdict, cell.words));
            cells.push((name, cell));
        }
        Ok(cells)
    }

    fn look(&self, name: &str) -> Result<Cell> {
        let epoch = self.settled(A)?;
        let mark = log_mark(self.lab, A);
        let [_, _, gaps] = losses(self.lab, A)?;
        let outcome = act(self.lab, A, "looked-at", name)?;
        let cell = |verdict, words: &str| Cell {
            verdict,
            words: words.to_owned(),
        };
        if outcome != Outcome::Done {
            // Only what nobody refuses without twinwrite is refused by it.
            let verdict = match self.without.get(name) {
                Some(Outcome::Done) => Verdict::Refused,
                _ => Verdict::NotOffered,
            };
            return Ok(cell(verdict, outcome.words()));
        }
        sleep(NOTICED_WITHIN);
        let now = volume(self.lab, A)?;
        let [_, _, gaps_now] = losses(self.lab, A)?;
        if now["protection"] != "protected" || number(&now, "epoch")? != epoch {
            return Ok(cell(Verdict::Covered, &self.why_closed(mark)?));
        }
        // The epoch goes on, and its next checkpoint covers what was not captured.
        if gaps_now != gaps {
            return Ok(cell(Verdict::Covered, "noticed, the epoch goes on"));
        }
        Ok(cell(Verdict::Captured, ""))
    }

    fn why_closed(&self, mark: usize) -> Result<String> {
        let log = fs::read(self.lab.agent_log(A))?;
        let log = String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned();
        let ended = log.lines().find_map(|line| line.split_once("ended: "));
        let words = ended.map_or("", |(_, words)| words);
        Ok(words.trim_end_matches('"').to_owned())
    }

    /// What is not flushed for an operation stays in memory: it takes longer to carry all out than the kernel
    /// leaves data, and the file systems their journals.
    fn flush_nothing_by_age(&self) -> Result<()> {
        let remount = match self.filesystem {
            Filesystem::Ext4 | Filesystem::Btrfs => {
                format!("mount -o remount,commit=300 {MOUNT_POINT};")
            }
            Filesystem::Xfs => String::new(),
        };
        let script = format!("set -e; sysctl -qw vm.dirty_writeback_centisecs=0; {remount} sync");
        self.lab.run(A, &script).map(drop)
    }

    /// All together in one epoch; the owner's power is cut with nothing flushed.
    fn crash_unflushed(&self, names: &[String]) -> Result<Lost> {
        if names.is_empty() {
            return Ok(Lost::new());
        }
        prepare(self.lab, A, "unflushed", names)?;
        self.flush_nothing_by_age()?;
        let epoch = self.settled(A)?;
        for name in names {
            self.act_again(A, "unflushed", name)?;
        }
        self.describe(A, "unflushed", names)?;
        ensure!(
            self.settled(A)? == epoch,
            "the epoch was closed, although each of these leaves it open: {names:?}"
        );
        let disk = crash_and_copy(self.lab, A)?;
        await_takeover(self.lab, B)?;
        let lost = self.judge(B, "unflushed", MOUNT_POINT, names)?;
        disk.mount(self.lab)?;
        let without = self.judge(B, "unflushed", CrashedDisk::MOUNT_POINT, names);
        disk.unmount(self.lab)?;
        let without = without?;
        let flushed = |name: &&String| without.iter().all(|(lost, _)| lost != *name);
        let worthless: Vec<_> = names.iter().filter(flushed).collect();
        ensure!(
            worthless.is_empty(),
            "the disk itself kept these, so the crash proves nothing: {worthless:?}"
        );
        Ok(lost)
    }

    /// One after the other, each covered by a checkpoint; the power of the owner, B by now, is cut.
    fn crash_covered(&self, names: &[String]) -> Result<Lost> {
        if names.is_empty() {
            return Ok(Lost::new());
        }
        let owner = if volume(self.lab, B)?["role"] == "owner" {
            self.lab.boot(A, false)?;
            self.lab.agent(A, AgentAction::Start)?;
            B
        } else {
            A
        };
        self.lab.wait(owner, AwaitedState::Protected, LIMIT)?;
        prepare(self.lab, owner, "covered", names)?;
        for name in names {
            self.settled(owner)?;
            self.act_again(owner, "covered", name)?;
            sleep(NOTICED_WITHIN);
        }
        self.describe(owner, "covered", names)?;
        self.settled(owner)?;
        self.lab.crash(owner, CrashKind::Kill)?;
        await_takeover(self.lab, owner.peer())?;
        self.judge(owner.peer(), "covered", MOUNT_POINT, names)
    }

    /// What the probes' directories show now is what a survivor must show.
    fn describe(&self, node: NodeName, below: &str, names: &[String]) -> Result<()> {
        let script = format!(
            "set -e; mkdir -p /host/{below}; for name in {}; do twinwrite-workload describe --root \
             {MOUNT_POINT} --prefix {TOP}/{below}/$name --manifest /host/{below}/$name; done",
            names.join(" ")
        );
        self.lab.run_within(node, &script, LONG)?;
        let (from, to) = (self.lab.share(node), self.lab.share(node.peer()));
        fs::create_dir_all(to.join(below))?;
        for name in names {
            fs::copy(from.join(below).join(name), to.join(below).join(name))?;
        }
        let differs = self.judge(node, below, MOUNT_POINT, names)?;
        ensure!(
            differs.is_empty(),
            "the oracle does not know what it was shown: {differs:?}"
        );
        Ok(())
    }

    fn judge(&self, node: NodeName, below: &str, root: &str, names: &[String]) -> Result<Lost> {
        let script = format!(
            "for name in {}; do twinwrite-workload check --root {root} --manifest /host/{below}/$name \
             --report /host/{below}/$name.report; test $? -lt 2 || exit 2; done",
            names.join(" ")
        );
        self.lab.run_within(node, &script, LONG)?;
        let mut lost = Lost::new();
        for name in names {
            let path = self
                .lab
                .share(node)
                .join(below)
                .join(format!("{name}.report"));
            let report: Value = serde_json::from_slice(&fs::read(&path)?)?;
            if report["pass"] != true {
                lost.push((name.clone(), report["differences"].to_string()));
            }
        }
        Ok(lost)
    }
}
