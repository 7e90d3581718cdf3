//! `cargo xtask test`

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::build::Profile;
use crate::scenarios::Choice;
use crate::setup::{self, Purpose};
use crate::{build, progress, scenarios};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Of the virtual machines' scenarios only the one that crashes and takes over.
    #[arg(long)]
    quick: bool,
    /// Also the scenarios that repeat others on another kernel or file system.
    #[arg(long, conflicts_with_all = ["quick", "only"])]
    all: bool,
    /// Only the scenario of this name, and nothing else but building.
    #[arg(long, value_name = "NAME", conflicts_with = "quick")]
    only: Option<String>,
    /// Name the scenarios and do nothing.
    #[arg(long)]
    list: bool,
}

/// Packages that are compiled for this host.
const HOST_PACKAGES: &[&str] = &[
    "twinwrite-abi",
    "twinwrite",
    "twinwrite-simulator",
    "twinwrite-tests",
    "xtask",
];

/// Checks and tests, the quick things first.
///
/// # Errors
/// If a check or a test fails.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        for scenario in scenarios::ALL {
            let (name, seconds, proves) = (scenario.name, scenario.seconds, scenario.proves);
            let when = if scenario.is_repeat() {
                ", with --all"
            } else {
                ""
            };
            println!("{name} (about {seconds} s{when}): {proves}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = &arguments.only {
        scenarios::find(name)?;
        return in_machines(Choice::Named(name));
    }
    setup::ensure(Purpose::Build)?;
    setup::ensure(Purpose::Test)?;
    cargo("Formatting", &["fmt", "--all", "--check"])?;
    // User space embeds the eBPF object, so it comes first.
    build::ebpf()?;
    let mut clippy = vec!["clippy", "--all-targets"];
    let packages: Vec<&str> = HOST_PACKAGES
        .iter()
        .flat_map(|name| ["--package", name])
        .collect();
    clippy.extend(&packages);
    clippy.extend(["--", "-D", "warnings"]);
    cargo("Clippy", &clippy)?;
    deny()?;
    if setup::on_path("cargo-nextest") {
        let mut tests = vec!["nextest", "run", "--no-tests=pass"];
        tests.extend(&packages);
        cargo("Tests without virtual machines", &tests)?;
    } else {
        let mut tests = vec!["test"];
        tests.extend(&packages);
        cargo("Tests without virtual machines", &tests)?;
    }
    in_machines(if arguments.quick {
        Choice::Named(scenarios::SMOKE)
    } else if arguments.all {
        Choice::All
    } else {
        Choice::Usual
    })
}

/// Builds what runs in the machines once, then runs the scenarios.
fn in_machines(choice: Choice<'_>) -> Result<ExitCode> {
    setup::ensure(Purpose::Build)?;
    setup::ensure(Purpose::Test)?;
    build::build(Profile::Release)?;
    let outcome = scenarios::run(choice)?;
    println!("{} passed, {} failed", outcome.passed, outcome.failed.len());
    if choice == Choice::Usual {
        let repeats = scenarios::ALL
            .iter()
            .filter(|scenario| scenario.is_repeat());
        let repeats: Vec<&str> = repeats.map(|scenario| scenario.name).collect();
        println!("left out, see --all: {}", repeats.join(", "));
    }
    if !outcome.failed.is_empty() {
        bail!("failed: {}", outcome.failed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

fn deny() -> Result<()> {
    if !setup::on_path("cargo-deny") {
        progress::note("Licences and sources: skipped, cargo-deny is not installed");
        return Ok(());
    }
    cargo(
        "Licences and sources",
        &["deny", "--offline", "check", "bans", "licenses", "sources"],
    )
}

/// Cargo shows its own progress and the tests' closing lines.
fn cargo(what: &str, arguments: &[&str]) -> Result<()> {
    progress::note(&format!("{what} ..."));
    let began = std::time::Instant::now();
    let status = build::cargo_command()
        .args(arguments)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "{what}: `cargo {}` ended with {status}",
            arguments.join(" ")
        );
    }
    progress::note(&format!("{what}: {:.0} s", began.elapsed().as_secs_f32()));
    Ok(())
}
