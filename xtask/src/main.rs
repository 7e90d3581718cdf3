//! `cargo xtask`: see `cargo xtask help`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::commands::{
    build, coverage, demo, disk_ahead, faults, merge, run, setup, sim, test, torture, vm,
};
use xtask::lab::daemon;

/// Builds, tests, demonstrates and runs twinwrite.
#[derive(Parser)]
#[command(name = "cargo xtask", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and the lab need.
    Setup,
    /// Compile the eBPF programs, the agent and the workloads.
    Build(build::Arguments),
    /// Build, then run the agent on this host.
    Run(run::Arguments),
    /// Show that an unflushed write survives its machine, and what happens without twinwrite.
    Demo(demo::Arguments),
    /// Run the cores against models of kernel, disk, network and crash, seed by seed.
    Sim(sim::Arguments),
    /// Merge random logs into models of disks and into mounted file systems, seed by seed.
    Merge(merge::Arguments),
    /// Crash machines whose disk is ahead of the mirror, and look for what was confirmed.
    DiskAhead(disk_ahead::Arguments),
    /// Drive the volume with random operations seed by seed, crash, and compare the whole tree.
    Torture(torture::Arguments),
    /// Carry out every operation that a volume can go through, crash, and write what became of each.
    Coverage(coverage::Arguments),
    /// Inject faults on virtual machines, and write the table of what was told and lost.
    Faults(faults::Arguments),
    /// Check, and test with and without virtual machines.
    Test(test::Arguments),
    /// The lab: two virtual machines with a shared disk.
    Vm(vm::Arguments),
    /// The background process of a lab.
    #[command(hide = true)]
    LabDaemon {
        /// Start it as nobody's child and return.
        #[arg(long)]
        launch: bool,
        /// The process it ends with.
        #[arg(long)]
        owner: Option<String>,
        /// The lab's directory.
        lab: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::run(),
        Command::Build(arguments) => build::run(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Sim(arguments) => sim::run(&arguments),
        Command::Merge(arguments) => merge::run(&arguments),
        Command::DiskAhead(arguments) => disk_ahead::run(&arguments),
        Command::Torture(arguments) => torture::run(&arguments),
        Command::Coverage(arguments) => coverage::run(&arguments),
        Command::Faults(arguments) => faults::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Vm(arguments) => vm::run(&arguments),
        Command::LabDaemon {
            launch: true,
            owner,
            lab,
        } => daemon::launch(&lab, owner.as_deref()).map(|()| ExitCode::SUCCESS),
        Command::LabDaemon {
            launch: false,
            owner,
            lab,
        } => daemon::run(&lab, owner.as_deref()).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
