//! `cargo xtask merge`

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::build;

/// In the names of the tests that it runs.
const RANDOM: &str = "random_histories";

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Random histories that are merged into a model of a disk.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000)]
    cases: u64,
    /// Random histories that are merged into each mounted file system; that takes root.
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    mounted: u64,
    /// Only the history of this number.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Only tests with this in their name, such as `on_xfs`.
    #[arg(long, value_name = "TEXT", default_value = RANDOM)]
    only: String,
}

/// Merges random logs into disks of every kind, and compares what comes of it with what was at the cut.
///
/// # Errors
/// If there is a difference, or the tests cannot be built.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut command = build::cargo_command();
    command
        .env("TWINWRITE_CASES", arguments.cases.to_string())
        .env("TWINWRITE_MOUNTED_CASES", arguments.mounted.to_string())
        .args(["test", "--quiet", "--package", "twinwrite", "--lib"])
        .args(["--", &arguments.only, "--nocapture"]);
    if let Some(seed) = arguments.seed {
        command.env("TWINWRITE_SEED", seed.to_string());
    }
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("a merge did not end as it was at the cut, see above");
    }
    Ok(ExitCode::SUCCESS)
}
