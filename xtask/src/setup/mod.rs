//! Finds or installs what building and the lab need, and does nothing twice.
//!
//! On Debian 12 as root it installs; elsewhere it names each missing thing with the command that
//! fixes it. It never touches a package that is there already.

mod linker;
mod packages;
pub mod toolchain;

use anyhow::{Result, bail};

pub use linker::bpf_linker;
pub(crate) use packages::{is_debian_12, on_path, update_lists_if_absent};

/// What somebody is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Compile the eBPF programs and user space.
    Build,
    /// Boot virtual machines.
    Lab,
    /// Look at what the others made.
    Test,
}

/// Makes the host ready for `purpose`.
///
/// # Errors
/// If something is missing and cannot be installed from here.
pub fn ensure(purpose: Purpose) -> Result<()> {
    let needs = packages::needs(purpose);
    let missing = packages::missing(&needs)?;
    if !missing.is_empty() {
        packages::install(&missing)?;
    }
    if purpose == Purpose::Build {
        if toolchain::find()?.is_none() {
            bail!(
                "no rustc with its own library source was found, which the eBPF build needs.\n  \
                 rustup:    rustup toolchain install nightly --component rust-src\n  \
                 Debian 12: apt-get install rustc-web rust-web-src"
            );
        }
        bpf_linker()?;
    }
    Ok(())
}
