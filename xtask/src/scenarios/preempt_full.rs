//! A kernel that preempts itself everywhere skips hooks: what was skipped is found out before it matters.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::bench::{
    LIMIT, NO_CHECKPOINT, await_takeover, losses, metric, number, options, require_start, until,
    volume,
};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{CrashKind, Lab, NodeName, Options};
use crate::progress;

use NodeName::{A, B};

const WRITERS: u64 = 4;
const WRITES_EACH: u64 = 20_000;
const SUMS: &str = "cd /srv/vol0 && sha256sum w-*";

pub(super) fn run() -> Result<()> {
    let options = Options {
        kernel_parameters: vec!["preempt=full".to_owned()],
        ..options(&[], &[NO_CHECKPOINT])
    };
    with_lab("preempt_full", options, writers)
}

/// What the run of the writers left.
#[derive(Debug)]
struct Run {
    began_ns: i128,
    ended_ns: i128,
    /// Records of writes that the agent took.
    records: u64,
    skipped: u64,
    epoch_before: u64,
    epoch_after: u64,
}

fn writers(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let parameters = lab.run(A, "cat /proc/cmdline /sys/kernel/debug/sched/preempt")?;
    ensure!(
        parameters.contains("(full)"),
        "the kernel does not preempt itself everywhere: {parameters}"
    );
    let run = write_all(lab)?;
    if run.epoch_after == run.epoch_before && run.skipped == 0 {
        ensure!(
            run.records >= WRITERS * WRITES_EACH,
            "nothing was skipped, the epoch went on, and of {} writes records are missing: {run:?}",
            WRITERS * WRITES_EACH
        );
        progress::note(&format!("no hook was skipped: {run:?}"));
    } else {
        let ended_ns = first_end(lab, &run)?;
        ensure!(
            (run.began_ns..run.ended_ns).contains(&ended_ns),
            "hooks were skipped, and the epoch ended only after the last write: {ended_ns}, {run:?}"
        );
        progress::note(&format!(
            "{} hooks were skipped in {} ms of writing; the epoch ended {} ms after the first write",
            run.skipped,
            (run.ended_ns - run.began_ns) / 1_000_000,
            (ended_ns - run.began_ns) / 1_000_000
        ));
    }
    survives(lab)
}

fn write_all(lab: &Lab) -> Result<Run> {
    let epoch_before = number(&volume(lab, A)?, "epoch")?;
    let records = || metric(lab, A, "twinwrite_records_total", "operation=\"write\"");
    let (records_before, skipped_before) = (records()?, losses(lab, A)?[1]);
    let said = lab.run_within(
        A,
        &format!(
            "date +%s%N; for i in $(seq {WRITERS}); do \
             dd if=/dev/urandom of={MOUNT_POINT}/w-$i bs=64 count={WRITES_EACH} status=none & \
             done; wait; date +%s%N"
        ),
        LIMIT,
    )?;
    let mut times = said.lines().map(str::parse::<i128>);
    let mut time = || {
        times
            .next()
            .context("no time was told")
            .and_then(|t| Ok(t?))
    };
    let (began_ns, ended_ns) = (time()?, time()?);
    until(lab, "the agent has seen all of it", LIMIT, || {
        let volume = volume(lab, A)?;
        Ok(volume["protection"] == "protected" && number(&volume, "lag_records")? == 0)
    })?;
    // The counters are asked for once a second when nothing happens.
    std::thread::sleep(std::time::Duration::from_secs(2));
    Ok(Run {
        began_ns,
        ended_ns,
        records: (records()? - records_before) as u64,
        skipped: losses(lab, A)?[1] - skipped_before,
        epoch_before,
        epoch_after: number(&volume(lab, A)?, "epoch")?,
    })
}

/// When the state first said, after the first write, that events were lost.
fn first_end(lab: &Lab, run: &Run) -> Result<i128> {
    let text = lab.run(A, "cat /var/lib/twinwrite/events.jsonl")?;
    for line in text.lines() {
        let event: Value = serde_json::from_str(line)?;
        let at: jiff::Timestamp = event["time"].as_str().context("no time")?.parse()?;
        let reason = event["reason"].as_str().unwrap_or_default();
        if at.as_nanosecond() >= run.began_ns
            && event["event"] == "protection_changed"
            && reason.contains("events were lost")
        {
            return Ok(at.as_nanosecond());
        }
    }
    anyhow::bail!("hooks were skipped, and nobody said so: {run:?}\n{text}")
}

/// What was written is there after a crash, whatever was skipped.
fn survives(lab: &Lab) -> Result<()> {
    let written = lab.run(A, SUMS)?;
    until(lab, "all is mirrored or durable", LIMIT, || {
        let volume = volume(lab, A)?;
        Ok(volume["protection"] == "protected" && number(&volume, "lag_records")? == 0)
    })?;
    lab.crash(A, CrashKind::Kill)?;
    await_takeover(lab, B)?;
    let found = lab.run(B, SUMS)?;
    ensure!(
        found == written,
        "the survivor's files are others:\n{found}\ninstead of\n{written}"
    );
    Ok(())
}
