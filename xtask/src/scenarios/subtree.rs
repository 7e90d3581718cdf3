//! A volume of which one directory is protected (`directory`): what is below it is mirrored and survives, what is
//! outside costs nothing, and nothing crosses the border but by a copy.
//!
//! Everything that may end the epoch comes first; what the crash must not take is written after it, without
//! any checkpoint, so that the disk of the crash lacks it.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::bench::{
    CrashedDisk, LIMIT, NO_CHECKPOINT, all_mirrored, await_takeover, crash_and_copy, logged,
    losses, metric, number, options, oracle, require_start, until, volume,
};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{
    AgentAction, AwaitedState, Filesystem, KernelRelease, Lab, NodeName, Options, Service,
};
use crate::progress;

use NodeName::{A, B};

const DIRECTORY: &str = "directory = \"kept\"";
/// The agent stands still for less than this.
const DEAD_AFTER: &str = "dead_after = \"15s\"";
/// An agent that stands still for a while does not end the epoch.
const LAG_LIMIT: &str = "lag_limit = \"60s\"";
/// The kernel's own commits shall not save what the control must lose.
const NO_COMMIT: &str = "mount_options = \"commit=300\"";
const NO_WRITEBACK: &str = "echo 0 >/proc/sys/vm/dirty_writeback_centisecs";
/// Stores through a mapping are captured by then, and a gap has been seen.
const NOTICED_WITHIN: Duration = Duration::from_secs(2);

const PROGRAM: &str = "subtree.py";
const MANIFEST: &str = "kept.manifest";
/// Plain writes of one side's work; each is a record if it is protected.
const WRITES: u64 = 250;
/// Directories of the deepest path, and so records of the protected side's work besides those writes.
const LEVELS: u64 = 100;
/// The agent's own records during one side's work are not so many.
const OTHERS_MAX: u64 = 20;
/// Writes to a file of which it is not certain on which side it is.
const BORDER_WRITES: u64 = 50;
/// In it, on the machine, each call that was answered leaves a file.
const ANSWERED: &str = "/run/answered";
/// What those processes say, on the machine's share.
const GATE_OUT: &str = "gate.out";

pub(super) fn run() -> Result<()> {
    on("subtree", Filesystem::Ext4, KernelRelease::V6_12)
}

pub(super) fn on_xfs_of_6_1() -> Result<()> {
    on("subtree-xfs-6-1", Filesystem::Xfs, KernelRelease::V6_1)
}

pub(super) fn on_btrfs() -> Result<()> {
    on("subtree-btrfs", Filesystem::Btrfs, KernelRelease::V6_12)
}

fn on(name: &str, filesystem: Filesystem, kernel: KernelRelease) -> Result<()> {
    let mut volume = vec![DIRECTORY, NO_CHECKPOINT, LAG_LIMIT];
    if filesystem != Filesystem::Xfs {
        volume.push(NO_COMMIT);
    }
    let options = Options {
        // It cannot be protected before the directory is there.
        service: Service::Nothing,
        filesystem,
        kernel,
        ..options(&[DEAD_AFTER], &volume)
    };
    with_lab(name, options, |lab| {
        for node in NodeName::ALL {
            fs::write(lab.share(node).join(PROGRAM), include_str!("subtree.py"))?;
        }
        begins_without(lab).context("without the directory")?;
        lab.run(A, NO_WRITEBACK)?;
        outside_costs_nothing(lab, A, "first").context("outside")?;
        outside_passes_the_gate(lab).context("the gate")?;
        nobody_can_tell(lab).context("a file without a name in memory")?;
        crash(lab)?;
        returned(lab).context("after the first owner's return")
    })
}

/// A place on the volume.
fn at(place: &str) -> String {
    format!("{MOUNT_POINT}/{place}")
}

/// A command line of the program in the machines.
fn program(words: &str) -> String {
    format!("python3 /host/{PROGRAM} {words}")
}

/// Whether an owner calls its volume exposed with these words, in its status and in its log.
fn is_exposed_for(lab: &Lab, owner: NodeName, words: &[&str]) -> Result<bool> {
    let shown = volume(lab, owner)?;
    let reason = shown["reason"].as_str().unwrap_or_default();
    Ok(shown["role"] == "owner"
        && shown["protection"] == "exposed"
        && words.iter().all(|word| reason.contains(word))
        && logged(lab, owner, 0, words)?)
}

/// The agent names what is missing, then what leads out of it, and goes on by itself once all is well.
fn begins_without(lab: &Lab) -> Result<()> {
    for node in NodeName::ALL {
        lab.agent(node, AgentAction::Start)?;
    }
    let kept = at("kept");
    until(lab, "A says that the directory is missing", LIMIT, || {
        is_exposed_for(lab, A, &["`directory`", &kept, "make it"])
    })?;
    lab.run(A, &program(&format!("prepare {MOUNT_POINT} {kept}")))?;
    until(lab, "A names the hard link that leads out", LIMIT, || {
        is_exposed_for(
            lab,
            A,
            &["`directory`", "kept/crossed has 2 names, and 1 of them"],
        )
    })?;
    lab.run(A, &format!("rm {}", at("outside/crossed")))?;
    require_start(lab)
}

/// What must not change while work is done that is captured, or need not be.
#[derive(Debug, PartialEq)]
struct Standing {
    epoch: u64,
    losses: [u64; 3],
}

impl Standing {
    fn of(lab: &Lab, node: NodeName) -> Result<Self> {
        Ok(Self {
            epoch: number(&volume(lab, node)?, "epoch")?,
            losses: losses(lab, node)?,
        })
    }
}

/// How many records came while a command ran, which must not end the epoch.
fn records_of(lab: &Lab, node: NodeName, command: &str) -> Result<u64> {
    let captured = all_mirrored(lab, node)?;
    let before = Standing::of(lab, node)?;
    lab.run_within(node, command, LIMIT)?;
    sleep(NOTICED_WITHIN);
    let captured_after = all_mirrored(lab, node)?;
    let after = Standing::of(lab, node)?;
    ensure!(
        after == before,
        "{before:?} became {after:?} by `{command}`\n{}",
        lab.explain()
    );
    Ok(captured_after.saturating_sub(captured))
}

fn outside_costs_nothing(lab: &Lab, node: NodeName, name: &str) -> Result<()> {
    let work = format!(
        "work_unprotected {} {WRITES}",
        at(&format!("outside/{name}"))
    );
    let records = records_of(lab, node, &program(&work))?;
    ensure!(
        records < OTHERS_MAX,
        "{WRITES} writes and more outside made {records} records\n{}",
        lab.explain()
    );
    progress::note(&format!("{records} records by the work outside on {node}"));
    Ok(())
}

/// The control of [`outside_costs_nothing`], and what the crash must not take.
fn inside_is_captured(lab: &Lab, node: NodeName, name: &str) -> Result<()> {
    let work = format!("work {} {WRITES}", at(&format!("kept/{name}")));
    let records = records_of(lab, node, &program(&work))?;
    ensure!(
        records >= WRITES + LEVELS,
        "{WRITES} writes and {LEVELS} directories inside made only {records} records\n{}",
        lab.explain()
    );
    progress::note(&format!(
        "{records} records by the same work inside on {node}"
    ));
    Ok(())
}

/// While the agent stands still what is confirmed outside is answered, and what is confirmed inside is not.
fn outside_passes_the_gate(lab: &Lab) -> Result<()> {
    // What no checkpoint has proven yet, which a sync of all the volume waits for.
    lab.run(
        A,
        &program(&format!("write {} unproven 1", at("kept/unproven"))),
    )?;
    all_mirrored(lab, A)?;
    let lost_before = losses(lab, A)?;
    let calls = start_confirming(lab)?;
    let answered = answered_without_agent(lab, calls)?;
    let is_outside = |name: &&str| name.starts_with("outside-");
    ensure!(
        answered.lines().filter(is_outside).count() == calls,
        "while nobody mirrors, of {calls} calls outside only these were answered: {answered}\n{}",
        fs::read_to_string(lab.share(A).join(GATE_OUT)).unwrap_or_default()
    );
    ensure!(
        !answered.contains("inside-"),
        "what confirms what is inside was answered while nobody mirrored: {answered}"
    );
    until(lab, "what confirms the inside is answered", LIMIT, || {
        let look = format!("test -e {ANSWERED}/inside-fsync -a -e {ANSWERED}/inside-syncfs");
        Ok(lab.exec(A, &look, LIMIT)?.status == 0)
    })?;
    all_mirrored(lab, A)?;
    let lost = losses(lab, A)?;
    ensure!(
        lost == lost_before,
        "what was confirmed outside is counted as lost: {lost_before:?} became {lost:?}"
    );
    Ok(())
}

/// Processes that wait for the moment to make one call each. How many of them make it outside.
fn start_confirming(lab: &Lab) -> Result<usize> {
    fs::write(
        lab.share(A).join("gate_calls.py"),
        include_str!("gate_calls.py"),
    )?;
    let (kept, outside) = (at("kept"), at("outside"));
    let start = program(&format!("gate {kept} {outside} /run/go {ANSWERED}"));
    lab.run(
        A,
        &format!("mkdir -p {ANSWERED}; setsid {start} </dev/null >/host/{GATE_OUT} 2>&1 &"),
    )?;
    let out = lab.share(A).join(GATE_OUT);
    let mut calls = 0;
    until(lab, "the processes are there", LIMIT, || {
        let said = fs::read_to_string(&out)?;
        let number = said.lines().find_map(|line| line.strip_suffix(" outside"));
        calls = number.context(said.clone())?.parse()?;
        Ok(calls > 0)
    })?;
    Ok(calls)
}

/// Which calls are answered while the agent stands still. It does so within one command, and so not for long
/// on whatever host.
fn answered_without_agent(lab: &Lab, calls: usize) -> Result<String> {
    lab.run(
        A,
        &format!(
            "agent=$(cat /run/twinwrite-agent.pid); trap \"kill -CONT $agent\" EXIT; \
             kill -STOP $agent; touch /run/go; \
             for i in $(seq 60); do \
             test $(ls {ANSWERED} | grep -c ^outside-) -ge {calls} && break; sleep 0.1; done; \
             sleep 1; ls {ANSWERED}"
        ),
    )
}

/// What was written through no name is captured or ends the epoch. What the file holds is looked at on the survivor.
fn nobody_can_tell(lab: &Lab) -> Result<()> {
    let by_handle = format!(
        "write_by_handle {MOUNT_POINT} {} handle {BORDER_WRITES}",
        at("kept/by-handle")
    );
    captured_or_told(lab, "a write by handle", &program(&by_handle))?;
    let held = "touch /run/held-go; for i in $(seq 600); do test -e /run/held-done && exit 0; sleep 0.1; done; exit 1";
    captured_or_told(lab, "a write through a name outside that was removed", held)
}

fn captured_or_told(lab: &Lab, what: &str, command: &str) -> Result<()> {
    let border = || metric(lab, A, "twinwrite_gaps_total", "reason=\"border\"");
    let captured = all_mirrored(lab, A)?;
    let (epoch, gaps) = (number(&volume(lab, A)?, "epoch")?, border()?);
    lab.run(A, command).context(what.to_owned())?;
    sleep(NOTICED_WITHIN);
    let mut told = false;
    until(lab, &format!("{what} is captured or told"), LIMIT, || {
        let shown = volume(lab, A)?;
        let epoch_now = number(&shown, "epoch")?;
        told = epoch_now > epoch && border()? > gaps;
        let is_captured =
            epoch_now == epoch && number(&shown, "captured_seq")? >= captured + BORDER_WRITES;
        Ok((is_captured || told) && shown["protection"] == "protected")
    })?;
    let became = if told {
        "ended the epoch"
    } else {
        "was captured"
    };
    progress::note(&format!("{what} {became}"));
    // A gap that is noted again afterwards would end the next epoch as well.
    all_mirrored(lab, A).map(drop)
}

/// What an application sees of the protected directory.
struct Told {
    /// Mode, owner, group and time of the directory itself, which no manifest of what is in it has.
    top: String,
}

impl Told {
    const LOOK: &'static str = "stat -c '%a %u %g %y'";

    fn by(lab: &Lab, node: NodeName) -> Result<Self> {
        let kept = at("kept");
        lab.run_within(
            node,
            &format!("twinwrite-workload inventory --root {kept} >/host/{MANIFEST}"),
            LIMIT,
        )?;
        let top = lab.run(node, &format!("{} {kept}", Self::LOOK))?;
        Ok(Self { top })
    }

    fn require_all(&self, lab: &Lab, node: NodeName) -> Result<()> {
        let kept = at("kept");
        let report = oracle(lab, node, &kept, &format!("--manifest /host/{MANIFEST}"))?;
        ensure!(
            report["pass"] == true && number(&report, "files_expected")? > LEVELS,
            "not all is as it was told: {report}\n{}",
            lab.explain()
        );
        let top = lab.run(node, &format!("{} {kept}", Self::LOOK))?;
        ensure!(
            top == self.top,
            "the protected directory itself was {} and is {top}",
            self.top
        );
        Ok(())
    }

    /// The negative control.
    fn require_loss(lab: &Lab, disk: &CrashedDisk, node: NodeName) -> Result<()> {
        disk.mount(lab)?;
        let kept = format!("{}/kept", CrashedDisk::MOUNT_POINT);
        let report = oracle(lab, node, &kept, &format!("--manifest /host/{MANIFEST}"));
        disk.unmount(lab)?;
        let report = report.context("the oracle on the disk of the crash")?;
        let (missing, different) = (
            number(&report, "files_missing")?,
            number(&report, "files_different")?,
        );
        ensure!(
            report["pass"] == false && missing + different > 0,
            "the disk lost nothing in the crash, so this proves nothing: {report}"
        );
        progress::note(&format!(
            "of {} paths the disk of the crash lacks {missing}, and {different} differ",
            report["files_expected"]
        ));
        Ok(())
    }
}

/// Writes inside and across, cuts the power, and compares.
fn crash(lab: &Lab) -> Result<()> {
    let crosses = program(&format!("border {} {}", at("kept"), at("outside")));
    let before = Standing::of(lab, A)?;
    let refused = lab.run_within(A, &crosses, LIMIT).context("the border")?;
    progress::note(&format!("{refused} calls across the border were refused"));
    inside_is_captured(lab, A, "first").context("inside")?;
    let writes = [
        // Its other name is not in memory.
        program(&format!(
            "write_forgotten {} twice {BORDER_WRITES}",
            at("kept/before/below/twice")
        )),
        format!("ln {} {}", at("kept/twice"), at("kept/thrice")),
        program(&format!(
            "write {} known {BORDER_WRITES}",
            at("kept/before/below/file")
        )),
        format!("rm {}", at("kept/twice")),
    ];
    let records = records_of(lab, A, &writes.join(" && "))?;
    ensure!(
        records >= 2 * BORDER_WRITES,
        "files that were there before made only {records} records"
    );
    let after = Standing::of(lab, A)?;
    ensure!(
        after == before,
        "something ended the epoch, so the control would show nothing: {before:?} became {after:?}\n{}",
        lab.explain()
    );
    let told = Told::by(lab, A)?;
    let records = all_mirrored(lab, A)?;
    let disk = crash_and_copy(lab, A)?;
    let takeover = await_takeover(lab, B)?;
    ensure!(
        number(&takeover, "cut_seq")? >= records,
        "{records} records were mirrored and not all were replayed: {takeover}"
    );
    fs::copy(lab.share(A).join(MANIFEST), lab.share(B).join(MANIFEST))?;
    told.require_all(lab, B)?;
    Told::require_loss(lab, &disk, B)
}

/// The survivor protects the same directory.
fn returned(lab: &Lab) -> Result<()> {
    lab.boot(A, false)?;
    lab.agent(A, AgentAction::Start)?;
    lab.wait(B, AwaitedState::Protected, LIMIT)?;
    outside_costs_nothing(lab, B, "second")?;
    inside_is_captured(lab, B, "second")?;
    let kept = at("kept");
    lab.run(B, &format!("mount -t tmpfs none {kept}"))?;
    until(lab, "B says that something is mounted there", LIMIT, || {
        is_exposed_for(lab, B, &["`directory`", &kept, "another mount"])
    })?;
    lab.run(B, &format!("umount {kept}"))?;
    lab.wait(B, AwaitedState::Protected, LIMIT).map(drop)
}
