//! `cargo xtask coverage`

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::build::{self, Profile};
use crate::coverage::table::{NOT_CAPTURED_MAX, Table};
use crate::coverage::{self, Verdict};
use crate::lab::{Filesystem, KernelRelease};
use crate::progress;
use crate::setup::{self, Purpose};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only this file system. Default: all, one after the other.
    #[arg(long)]
    fs: Option<Filesystem>,
    /// Only this kernel. Default: all, one after the other.
    #[arg(long)]
    kernel: Option<KernelRelease>,
    /// Only these probes.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Write docs/coverage.md and docs/coverage.json.
    #[arg(long)]
    write: bool,
    /// Do not compile; put in what an earlier build left.
    #[arg(long)]
    no_build: bool,
}

/// Carries out every operation, crashes, and tells what became of each.
///
/// # Errors
/// If an operation was neither captured nor refused nor covered later, or too many were not captured.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    setup::ensure(Purpose::Test)?;
    if !arguments.no_build {
        build::build(Profile::Release)?;
    }
    let filesystems = arguments
        .fs
        .map_or_else(|| Filesystem::ALL.to_vec(), |fs| vec![fs]);
    let kernels = arguments
        .kernel
        .map_or_else(|| KernelRelease::ALL.to_vec(), |kernel| vec![kernel]);
    let mut wrong = Vec::new();
    for filesystem in filesystems {
        for kernel in &kernels {
            let column = format!("{filesystem} {kernel}");
            progress::note(&format!("--- {column}"));
            let found = coverage::run_column(filesystem, *kernel, &arguments.only)?;
            let count = |verdict| {
                let is_it = |(_, cell): &&(_, coverage::Cell)| cell.verdict == verdict;
                found.iter().filter(is_it).count()
            };
            println!(
                "{column}: {} operations, {} captured, {} refused, {} covered later, {} not offered, {} lost",
                found.len(),
                count(Verdict::Captured),
                count(Verdict::Refused),
                count(Verdict::Covered),
                count(Verdict::NotOffered),
                count(Verdict::Failed)
            );
            for (probe, cell) in &found {
                if cell.verdict == Verdict::Failed {
                    wrong.push(format!("{column}: {}: {}", probe.name, cell.words));
                }
            }
            // Another run may have written its column meanwhile.
            let mut table = Table::load()?;
            table.put(&column, found, arguments.only.is_empty());
            let not_captured = table.not_captured(&column);
            if not_captured > NOT_CAPTURED_MAX {
                wrong.push(format!(
                    "{column}: {not_captured} operations are not captured, more than {NOT_CAPTURED_MAX}"
                ));
            }
            if arguments.write {
                table.write()?;
            }
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}
