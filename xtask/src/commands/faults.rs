//! `cargo xtask faults`

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::build::{self, Profile};
use crate::faults::{self, Table};
use crate::setup::{self, Purpose};

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only the faults of these names.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Write what was found to the table in docs/faults.md; rows of faults that did not run stay.
    #[arg(long)]
    write: bool,
    /// Name the faults and do nothing.
    #[arg(long)]
    list: bool,
    /// Do not compile; put in what an earlier build left.
    #[arg(long)]
    no_build: bool,
}

/// Injects faults on virtual machines and tells what came of it.
///
/// # Errors
/// If one was not told in time, or cost something that was confirmed.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let names: Vec<&str> = faults::all().map(|fault| fault.name).collect();
    if arguments.list {
        for fault in faults::all() {
            println!("{}: {} ({})", fault.name, fault.what, fault.how);
        }
        return Ok(ExitCode::SUCCESS);
    }
    setup::ensure(Purpose::Test)?;
    if !arguments.no_build {
        build::build(Profile::Release)?;
    }
    let mut table = Table::load()?;
    let mut told = 0;
    let failed = faults::run(&arguments.only, |name, row| {
        told += 1;
        table.put(name, row);
        if arguments.write {
            table.write(&names)?;
        }
        Ok(())
    })?;
    println!("{told} told as they must be, {} not", failed.len());
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
