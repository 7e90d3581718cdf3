//! The disk-ahead suite: what an application was told is durable must survive every crash, above all
//! where the disk is ahead of the mirror and a replay could lay older records over newer content.
//!
//! Two machines share a few volumes, one case on each. In every round the owner's applications write,
//! are disturbed, and confirm; the owner's power is cut at a random instant; its peer takes all volumes
//! over and the oracle compares them with what the applications were told. Then the roles change: the
//! dead machine comes back as the mirror, and the next cut is its peer's. The disks lose what was not
//! flushed.

pub mod disturbance;
mod foreign;
mod judgement;
mod pair;
pub mod report;
mod round;
mod witness;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::lab::{DiskKind, Filesystem, KernelRelease, Lab, Lifetime, Options, Programs, Service};
use crate::progress;
use crate::random::Random;
use disturbance::Disturbance;
use pair::Pair;
use report::Report;

/// What an application does on its volume, by the name that `twinwrite-workload` knows.
pub const CASES: &[&str] = &[
    "fsync",
    "sync-write",
    "direct",
    "msync",
    "rename",
    "sqlite-delete",
    "sqlite-wal",
    POSTGRES,
];
/// The one that is prepared once and used in every round.
const POSTGRES: &str = "postgres";

/// XFS makes no smaller file system.
const VOLUME_BYTES: u64 = 320 << 20;

/// The least that the configuration takes; the cut must be what a round waits for, not the clock.
const CLUSTER_SETTINGS: &[&str] = &["dead_after = \"3s\""];
/// No checkpoint by age: what is not flushed stays so. Small, for there are many.
const VOLUME_SETTINGS: &[&str] = &[
    "checkpoint_age = \"10m\"",
    "region_bytes = \"16MiB\"",
    "ring_bytes = \"4MiB\"",
];

/// What a run does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Volume-crashes, at least.
    pub crashes: u64,
    /// Decides everything that is random.
    pub seed: u64,
    /// File systems, in turn.
    pub filesystems: Vec<Filesystem>,
    /// Kernels, in turn.
    pub kernels: Vec<KernelRelease>,
    /// Start the agents with the gate switched off: the negative control.
    pub gate_off: bool,
    /// End with the first failure.
    pub stop_at_failure: bool,
    /// Begin no round after so long; the file systems are checked all the same.
    pub time_limit: Option<Duration>,
    /// Only these kinds of disturbance; none: all.
    pub only: Vec<Disturbance>,
    /// None of these kinds.
    pub without: Vec<Disturbance>,
    /// Name of the lab.
    pub lab: String,
    /// Which programs go into the machines.
    pub programs: Programs,
}

impl Plan {
    fn has(&self, kind: Disturbance) -> bool {
        (self.only.is_empty() || self.only.contains(&kind)) && !self.without.contains(&kind)
    }
}

/// Runs it. What was found is in the report also where the run itself could not go on.
#[must_use]
pub fn run(plan: &Plan) -> Report {
    let mut report = Report::new(plan);
    let began = Instant::now();
    let until = plan.time_limit.map(|limit| began + limit);
    let result = run_parts(plan, &mut report, until);
    report.seconds = began.elapsed().as_secs_f64();
    report.error = result.err().map(|error| format!("{error:#}"));
    report
}

fn run_parts(plan: &Plan, report: &mut Report, until: Option<Instant>) -> Result<()> {
    let parts: Vec<(KernelRelease, Filesystem)> = plan
        .kernels
        .iter()
        .flat_map(|kernel| plan.filesystems.iter().map(|fs| (*kernel, *fs)))
        .collect();
    Lab::prepare()?;
    let mut random = Random::new(plan.seed);
    for (index, (kernel, filesystem)) in parts.iter().enumerate() {
        let share = plan.crashes * (index as u64 + 1) / parts.len() as u64;
        let seed = random.number();
        let name = format!("{filesystem} on {kernel}");
        progress::note(&format!("--- {name}, up to {share} crashes"));
        let end = PartEnd { share, until };
        run_part(plan, report, (*kernel, *filesystem), seed, end)
            .with_context(|| format!("in the part with {name}"))?;
        if plan.stop_at_failure && report.failures() > 0 {
            break;
        }
    }
    Ok(())
}

/// When a part is over.
#[derive(Clone, Copy)]
struct PartEnd {
    /// After so many crashes of a volume in all parts up to it.
    share: u64,
    until: Option<Instant>,
}

impl PartEnd {
    fn is_reached(self, report: &Report) -> bool {
        report.crashes() >= self.share || self.until.is_some_and(|until| Instant::now() >= until)
    }
}

fn run_part(
    plan: &Plan,
    report: &mut Report,
    (kernel, filesystem): (KernelRelease, Filesystem),
    seed: u64,
    end: PartEnd,
) -> Result<()> {
    if end.is_reached(report) {
        return Ok(());
    }
    let owned = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
    let options = Options {
        filesystem,
        kernel,
        service: Service::Nothing,
        programs: plan.programs,
        lifetime: Lifetime::ThisProcess,
        cluster_settings: owned(CLUSTER_SETTINGS),
        volume_settings: owned(VOLUME_SETTINGS),
        disks: DiskKind::Volatile,
        disk_seed: seed,
        more_volumes: CASES.len() - 1,
        volume_bytes: Some(VOLUME_BYTES),
        spare_disk: true,
        ..Options::default()
    };
    let lab = Lab::up(&plan.lab, options)?;
    let ending = Ending(&lab);
    let mut pair = Pair::begin(&lab, filesystem, plan.gate_off, seed)?;
    let mut number = 0;
    while !end.is_reached(report) {
        number += 1;
        let round = round::run(&mut pair, plan, number).with_context(|| {
            format!("in round {number}; the logs: {}", lab.directory().display())
        })?;
        progress::note(&round.line(report.crashes()));
        report.rounds.push(round);
        if plan.stop_at_failure && report.failures() > 0 {
            return Ok(());
        }
    }
    report.checked.push(pair.check_filesystems()?);
    drop(ending);
    Ok(())
}

/// Ends a lab also if its part fails or panics.
struct Ending<'a>(&'a Lab);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.down() {
            progress::note(&format!("lab {}: {error:#}", self.0.name()));
        }
    }
}
