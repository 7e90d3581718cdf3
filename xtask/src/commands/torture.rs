//! `cargo xtask torture`

use std::process::ExitCode;

use anyhow::Result;

use crate::build::{self, Profile};
use crate::lab::{Filesystem, KernelRelease};
use crate::setup::{self, Purpose};
use crate::torture::{self, Plan, Regime, Turn};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Operations of each thread.
    #[arg(long, default_value_t = 150)]
    length: u64,
    /// Threads of each seed, every second of them in a process of its own.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=16))]
    threads: u64,
    /// The volume's file system.
    #[arg(long, default_value = "ext4")]
    fs: Filesystem,
    /// The machines' kernel.
    #[arg(long, default_value = "6.12")]
    kernel: KernelRelease,
    /// Only these kinds of operations (`twinwrite-workload torture --help` lists them). Default: all.
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    only: Vec<String>,
    /// Cut the power in the middle of the operations, not once they are mirrored.
    #[arg(long)]
    running: bool,
    /// Seeds to a power cut. Default: 20, and 5 with --running.
    #[arg(long)]
    seeds_per_crash: Option<usize>,
    /// Power cuts to find a shorter case that fails, at the most.
    #[arg(long, default_value_t = 4)]
    shrink_crashes: u64,
    /// Do not compile; put in what an earlier build left.
    #[arg(long)]
    no_build: bool,
}

/// Runs every seed, crashes, compares and tells.
///
/// # Errors
/// If the machines cannot be had.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    setup::ensure(Purpose::Test)?;
    if !arguments.no_build {
        build::build(Profile::Release)?;
    }
    let (regime, seeds_per_crash) = if arguments.running {
        (Regime::Running, 5)
    } else {
        (Regime::Settled, 20)
    };
    let report = torture::run(&Plan {
        seed: arguments.seed,
        seeds: arguments.seeds,
        length: arguments.length,
        threads: arguments.threads,
        filesystem: arguments.fs,
        kernel: arguments.kernel,
        turns: vec![Turn {
            regime,
            only: arguments.only.clone(),
        }],
        seeds_per_crash: arguments.seeds_per_crash.unwrap_or(seeds_per_crash),
        shrink_crashes: arguments.shrink_crashes,
        lab: format!("torture-{}-{}", arguments.fs, arguments.kernel).replace('.', "-"),
    });
    print!("{}", report.told());
    Ok(if report.is_as_it_should_be() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
