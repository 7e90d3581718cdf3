//! `cargo xtask setup`

use std::process::ExitCode;

use anyhow::Result;

use crate::progress;
use crate::setup::{self, Purpose};

/// Makes the host ready for everything.
///
/// # Errors
/// If something is missing and cannot be installed from here.
pub fn run() -> Result<ExitCode> {
    setup::ensure(Purpose::Lab)?;
    setup::ensure(Purpose::Build)?;
    setup::ensure(Purpose::Test)?;
    progress::note("nothing is missing");
    Ok(ExitCode::SUCCESS)
}
