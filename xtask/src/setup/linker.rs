//! bpf-linker, built once into `target/tools`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::toolchain::LLVM_MAJOR;
use crate::{paths, progress};

const VERSION: &str = "0.13.0";

/// The linker's path; builds it if it is not there.
///
/// # Errors
/// If it cannot be built; the error shows the end of the log.
pub fn bpf_linker() -> Result<PathBuf> {
    let tools = paths::tools();
    let linker = tools.join("bin/bpf-linker");
    if is_right_version(&linker) {
        return Ok(linker);
    }
    fs::create_dir_all(&tools).with_context(|| format!("cannot make {}", tools.display()))?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let what = format!("Building bpf-linker {VERSION} (once, one to two minutes)");
    progress::step(&what, || {
        let mut command = Command::new(cargo);
        command
            .args([
                "install",
                "bpf-linker",
                "--version",
                VERSION,
                "--locked",
                "--force",
            ])
            .args([
                "--no-default-features",
                "--features",
                &format!("llvm-{LLVM_MAJOR}"),
            ])
            .arg("--root")
            .arg(&tools)
            .arg("--target-dir")
            .arg(tools.join("build"))
            .env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM_MAJOR}"));
        progress::run_logged(&mut command, &tools.join("bpf-linker.log"))
    })?;
    // Gigabytes of intermediate files that nothing needs again.
    let _ = fs::remove_dir_all(tools.join("build"));
    Ok(linker)
}

fn is_right_version(linker: &std::path::Path) -> bool {
    let Ok(output) = Command::new(linker).arg("--version").output() else {
        return false;
    };
    String::from_utf8_lossy(&output.stdout)
        .trim()
        .ends_with(VERSION)
}
