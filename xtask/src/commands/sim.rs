//! `cargo xtask sim`

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::{build, paths};

/// The profile that the simulator is built with.
const PROFILE: &str = "sim";

/// Its arguments.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// For the simulator: `--seed N`, `--seeds COUNT`, `--steps M`, `--fault NAME`, `--list-faults`,
    /// `--faults`, `--threads T`, `--endurance RECORDS`, `--help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    simulator: Vec<String>,
}

/// Builds the simulator, optimised, and becomes it.
///
/// # Errors
/// If the build fails or the simulator cannot be started.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let status = build::cargo_command()
        .args(["build", "--quiet", "--profile", PROFILE])
        .args(["--package", "twinwrite-simulator"])
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the simulator could not be built: cargo ended with {status}");
    }
    let program = paths::cargo_target().join(PROFILE).join("twinwrite-sim");
    let error = Command::new(&program).args(&arguments.simulator).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
