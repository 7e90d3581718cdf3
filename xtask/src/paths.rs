//! Where things are: the repository, cargo's target directory, the lab's state and cache.
//!
//! It never creates anything.

use std::env;
use std::path::{Path, PathBuf};

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Where cargo puts what it builds for the host.
#[must_use]
pub fn cargo_target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => env::current_dir().unwrap_or_else(|_| root()).join(dir),
        None => root().join("target"),
    }
}

/// Tools built for this repository (`bin/bpf-linker`).
#[must_use]
pub fn tools() -> PathBuf {
    root().join("target/tools")
}

/// Everything the eBPF build leaves.
#[must_use]
pub fn ebpf_target() -> PathBuf {
    root().join("target/ebpf")
}

/// The finished eBPF object.
#[must_use]
pub fn ebpf_object() -> PathBuf {
    ebpf_target().join("twinwrite.bpf.o")
}

/// Kernels and root images for the lab. `TWINWRITE_LAB_CACHE` moves it, so that several checkouts
/// can share one.
#[must_use]
pub fn lab_cache() -> PathBuf {
    match env::var_os("TWINWRITE_LAB_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => root().join("target/lab-cache"),
    }
}

/// State of all labs, one directory each.
#[must_use]
pub fn labs() -> PathBuf {
    root().join("target/lab")
}
