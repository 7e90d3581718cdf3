//! The run with mirroring: A is protected, dies, and B takes over by itself.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::metrics::Sample;
use super::report::Report;
use super::timeline::{ClockOffset, moments};
use super::workload::{self, Stream};
use super::{Plan, STREAM_FOR, with_lab};
use crate::lab::config::{MOUNT_POINT, VOLUME};
use crate::lab::{
    AgentAction, AwaitedState, Filesystem, Lab, LinkKind, NodeName, Options, Service,
};
use crate::progress;

const SETTLE_LIMIT: Duration = Duration::from_secs(120);
const TAKEOVER_LIMIT: Duration = Duration::from_secs(180);
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Longer than the run: otherwise a checkpoint would make durable what the replay is to bring back.
const CHECKPOINT_AGE: &str = "checkpoint_age = \"10m\"";
/// The emulated machines of a busy host stand still for seconds; that is not what is shown here.
const LAG_LIMIT: &str = "lag_limit = \"10s\"";
const METRICS: &str = "curl -sf --max-time 10 http://127.0.0.1:9477/metrics";

pub(super) fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    progress::note("First with mirroring: every unflushed write on A has a twin in B's memory.");
    let options = Options {
        volume_settings: vec![CHECKPOINT_AGE.to_owned(), LAG_LIMIT.to_owned()],
        ..plan.options(Service::Agents)
    };
    with_lab(&plan.lab, options, plan.keep, |lab| {
        workload::settle(lab)?;
        let settled_seq = wait_until_mirrored(lab, report)?;
        let offset = ClockOffset::measure(lab, NodeName::B)?;
        let stream = Stream::start(lab)?;
        let sample = stream.run_on(STREAM_FOR, || {
            Sample::read(&lab.run(NodeName::A, METRICS)?, VOLUME)
        })?;
        let crash_ms = progress::step(&format!("Crashing A ({})", report.crash), || {
            lab.crash(NodeName::A, plan.crash)
        })?;
        report.epochs_ended = epochs_ended(lab)?;
        report.lag_records_exported = Some(sample.lag_peak_records);
        report.protection_at_crash = Some(sample.protection);
        let serving_ms = progress::step("B notices, fences A, mounts, replays", || {
            lab.wait(NodeName::B, AwaitedState::Serving, TAKEOVER_LIMIT)
        })?;
        let takeover = volume_status(lab, NodeName::B)?["takeover"].clone();
        report.took_over(moments(
            crash_ms,
            serving_ms,
            &takeover,
            offset,
            &lab.events()?,
        )?);
        report.records_replayed = takeover["records_replayed"].as_u64();
        // Each operation of the stream is one record, so the region's last record says up to which
        // operation all must be there.
        let cut_seq = takeover["cut_seq"].as_u64().context("B tells no cut")?;
        report.stream_operations_in_region = cut_seq.checked_sub(settled_seq);
        let checked = workload::check(lab, report.stream_operations_in_region)?;
        report.with_mirror(&checked);
        report.filesystem_check = Some(check_filesystem(lab, plan.filesystem)?);
        if plan.keep {
            lab.agent(NodeName::B, AgentAction::Start)?;
        }
        Ok(())
    })
}

/// What A's agent said of the ends of epochs.
fn epochs_ended(lab: &Lab) -> Result<Vec<String>> {
    let log = lab.agent_log(NodeName::A);
    let bytes = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let said = text
        .lines()
        .filter(|line| line.contains("is closed at record"));
    Ok(said.map(str::to_owned).collect())
}

fn volume_status(lab: &Lab, node: NodeName) -> Result<Value> {
    let status = lab.agent_status(node)?;
    let volumes = status["volumes"].as_array().map(Vec::as_slice);
    let mut volumes = volumes.unwrap_or_default().iter();
    let volume = volumes.find(|volume| volume["name"] == VOLUME);
    volume
        .cloned()
        .with_context(|| format!("the agent of {node} does not know {VOLUME}"))
}

/// Waits until everything that was captured is in B's memory; gives the last record's number.
fn wait_until_mirrored(lab: &Lab, report: &mut Report) -> Result<u64> {
    progress::step("Waiting until all of it is mirrored", || {
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let status = volume_status(lab, NodeName::A)?;
            let captured = status["captured_seq"].as_u64();
            if status["lag_records"] == 0
                && status["protection"] == "protected"
                && let Some(seq) = captured
                && status["mirrored_seq"] == seq
            {
                report.zero_copy = status["zero_copy"].as_bool();
                report.link = match status["link"].as_str() {
                    Some("rdma") => Some(LinkKind::Rdma),
                    Some("tcp") => Some(LinkKind::Tcp),
                    _ => None,
                };
                return Ok(seq);
            }
            if Instant::now() >= deadline {
                bail!(
                    "after {} s A's volume still lags: {status}\n{}",
                    SETTLE_LIMIT.as_secs(),
                    lab.explain()
                );
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    })
}

/// Has B let the volume go, then checks the disk on the host without changing it.
fn check_filesystem(lab: &Lab, filesystem: Filesystem) -> Result<String> {
    progress::step("Checking the file system itself", || {
        lab.agent(NodeName::B, AgentAction::Stop)?;
        let unmount = format!("if mountpoint -q {MOUNT_POINT}; then umount {MOUNT_POINT}; fi");
        lab.run(NodeName::B, &unmount)?;
        let mut command = filesystem.check();
        let output = command
            .arg(lab.volume_disk())
            .output()
            .with_context(|| format!("cannot start {command:?}"))?;
        if output.status.success() {
            return Ok("clean".to_owned());
        }
        let (out, err) = (&output.stdout, &output.stderr);
        Ok(format!(
            "{}: {}{}",
            output.status,
            String::from_utf8_lossy(out),
            String::from_utf8_lossy(err)
        ))
    })
}
