//! `cargo xtask build`

use std::process::ExitCode;

use anyhow::Result;

use crate::build::{self, Profile};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Compile user space optimised (the default).
    #[arg(long, conflicts_with = "debug")]
    release: bool,
    /// Compile user space quickly and without optimisation.
    #[arg(long)]
    debug: bool,
    /// Compile the eBPF programs only.
    #[arg(long)]
    ebpf_only: bool,
}

/// Builds and prints the programs' paths.
///
/// # Errors
/// If the host lacks something or a compiler fails.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.ebpf_only {
        crate::setup::ensure(crate::setup::Purpose::Build)?;
        println!("{}", build::ebpf()?.display());
        return Ok(ExitCode::SUCCESS);
    }
    let profile = if arguments.debug {
        Profile::Debug
    } else {
        Profile::Release
    };
    for program in build::build(profile)?.programs() {
        println!("{}", program.display());
    }
    Ok(ExitCode::SUCCESS)
}
