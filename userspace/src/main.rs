//! The `twinwrite` binary: see `twinwrite --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match twinwrite::cli::main() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("twinwrite: {error:#}");
            ExitCode::FAILURE
        }
    }
}
