//! `cargo xtask run`

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::build::{self, Profile};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// For `twinwrite run`, for example `--config FILE`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    agent: Vec<String>,
}

/// Builds and becomes the agent, as root. What the kernel lacks the agent itself tells.
///
/// # Errors
/// If the build fails or the agent cannot be started.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let built = build::build(Profile::Release)?;
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new(&built.twinwrite)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg(&built.twinwrite);
        sudo
    };
    let error = command.arg("run").args(&arguments.agent).exec();
    Err(error).context("cannot start the agent")
}
