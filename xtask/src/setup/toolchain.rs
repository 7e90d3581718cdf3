//! The Rust compiler for the eBPF programs.
//!
//! Their target has no prebuilt `core`, so the compiler must have the library source of its very
//! release beside it, and its LLVM must not be newer than that of bpf-linker.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

/// LLVM release bpf-linker is built against.
pub(crate) const LLVM_MAJOR: u32 = 22;

/// A compiler that can build for eBPF, and the cargo to drive it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// Any cargo of a release that knows the workspace's edition.
    pub cargo: PathBuf,
}

/// The first usable compiler: a rustup nightly with rust-src, else a distribution's.
/// `TWINWRITE_EBPF_RUSTC` names another one.
///
/// # Errors
/// None at present; the compilers are asked one after the other and those that fail are skipped.
pub fn find() -> Result<Option<Toolchain>> {
    let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let named = std::env::var_os("TWINWRITE_EBPF_RUSTC").map(PathBuf::from);
    let system = ["/usr/bin/rustc", "/usr/local/bin/rustc"].map(PathBuf::from);
    let candidates = named.into_iter().chain(rustup_nightly()).chain(system);
    Ok(candidates
        .filter(|rustc| usable(rustc))
        .map(|rustc| Toolchain {
            rustc,
            cargo: cargo.clone(),
        })
        .next())
}

/// Whether rustup has a compiler that needs no distribution package.
pub(super) fn rustup_has_source() -> bool {
    rustup_nightly().is_some_and(|rustc| usable(&rustc))
}

fn rustup_nightly() -> Option<PathBuf> {
    said(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]))
        .map(PathBuf::from)
}

fn usable(rustc: &Path) -> bool {
    let source = said(Command::new(rustc).args(["--print", "sysroot"])).is_some_and(|sysroot| {
        Path::new(&sysroot)
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists()
    });
    source && llvm_major(rustc).is_some_and(|major| major <= LLVM_MAJOR)
}

fn llvm_major(rustc: &Path) -> Option<u32> {
    let version = said(Command::new(rustc).arg("-vV"))?;
    parse_llvm_major(&version)
}

fn parse_llvm_major(version: &str) -> Option<u32> {
    let line = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.parse().ok()
}

fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::parse_llvm_major;

    #[test]
    fn the_llvm_release_is_read_from_the_long_version() {
        let text = "rustc 1.96.0\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.2";
        assert_eq!(parse_llvm_major(text), Some(22));
        assert_eq!(parse_llvm_major("rustc 1.96.0"), None);
    }
}
