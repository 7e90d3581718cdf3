//! `cargo xtask demo`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};

use crate::demo::{self, Plan};
use crate::lab::{CrashKind, Filesystem, KernelRelease, LinkKind, Programs};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// How A's machine dies.
    #[arg(long, default_value = "kill")]
    crash: CrashKind,
    /// The volume's file system.
    #[arg(long, default_value = "ext4")]
    fs: Filesystem,
    /// The machines' kernel.
    #[arg(long, default_value = "6.12")]
    kernel: KernelRelease,
    /// How bytes reach the mirror.
    #[arg(long, default_value = "rdma")]
    link: LinkKind,
    /// Write the figures to this file as JSON, also if the demo fails.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Name of the lab; the one without mirroring has `-control` behind it.
    #[arg(long, default_value = "demo")]
    lab: String,
    /// Leave the machines of the mirrored run up, B serving.
    #[arg(long)]
    keep: bool,
    /// Do not compile; put in what an earlier build left.
    #[arg(long)]
    no_build: bool,
}

/// Runs the demo; prints its figures, and writes them if asked to.
///
/// # Errors
/// If the report cannot be written. A demo that fails is told by the exit status.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(path) = &arguments.report {
        // Told now, not after minutes.
        let directory = path.parent().filter(|parent| *parent != "");
        ensure!(
            directory.is_none_or(std::path::Path::is_dir) && !path.is_dir(),
            "the report cannot be written to {}: its directory must exist, and it must be a file",
            path.display()
        );
    }
    let plan = Plan {
        lab: arguments.lab.clone(),
        crash: arguments.crash,
        filesystem: arguments.fs,
        kernel: arguments.kernel,
        link: arguments.link,
        programs: if arguments.no_build {
            Programs::AsBuilt
        } else {
            Programs::Build
        },
        keep: arguments.keep,
    };
    let report = demo::run(&plan);
    println!("{}", report.told());
    if let Some(path) = &arguments.report {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write the report {}", path.display()))?;
    }
    Ok(if report.pass {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
