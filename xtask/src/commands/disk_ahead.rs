//! `cargo xtask disk-ahead`

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::ahead::disturbance::Disturbance;
use crate::ahead::{self, Plan};
use crate::build::{self, Profile};
use crate::lab::{Filesystem, KernelRelease, Programs};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Crashes of a volume, at least; one power cut is one of each volume. Default: 500, and 50 with
    /// --gate-off.
    #[arg(long)]
    crashes: Option<u64>,
    /// Decides everything that is random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this file system. Default: both, one after the other.
    #[arg(long)]
    fs: Option<Filesystem>,
    /// Only this kernel. Default: both, one after the other.
    #[arg(long)]
    kernel: Option<KernelRelease>,
    /// The negative control: with the gate switched off, something confirmed must be lost; ends there.
    #[arg(long)]
    gate_off: bool,
    /// Begin no round after so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// End with the first failure.
    #[arg(long)]
    stop_at_failure: bool,
    /// Only these kinds of disturbance.
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    only: Vec<Disturbance>,
    /// None of these kinds of disturbance.
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    without: Vec<Disturbance>,
    /// Write everything as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Name of its lab.
    #[arg(long, default_value = "disk-ahead")]
    lab: String,
    /// Do not compile; put in what an earlier build left.
    #[arg(long)]
    no_build: bool,
}

/// Crashes, judges and tells.
///
/// # Errors
/// If the report cannot be written.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.no_build {
        build::build(Profile::Release)?;
    }
    let plan = Plan {
        crashes: arguments
            .crashes
            .unwrap_or(if arguments.gate_off { 50 } else { 500 }),
        seed: arguments.seed,
        filesystems: arguments
            .fs
            .map_or_else(|| vec![Filesystem::Ext4, Filesystem::Xfs], |fs| vec![fs]),
        kernels: arguments.kernel.map_or_else(
            || vec![KernelRelease::V6_12, KernelRelease::V6_1],
            |kernel| vec![kernel],
        ),
        gate_off: arguments.gate_off,
        stop_at_failure: arguments.stop_at_failure || arguments.gate_off,
        time_limit: arguments
            .minutes
            .map(|minutes| Duration::from_secs(60 * minutes)),
        only: arguments.only.clone(),
        without: arguments.without.clone(),
        lab: arguments.lab.clone(),
        programs: Programs::AsBuilt,
    };
    let report = ahead::run(&plan);
    print!("{}", report.told());
    if let Some(path) = &arguments.report {
        fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if report.is_as_it_should_be() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
