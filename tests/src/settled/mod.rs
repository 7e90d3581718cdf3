//! The workload that is given time to settle: copies a tree of real files onto the volume, changes
//! it in every way an application can and twinwrite captures, and writes down what is there then.
//!
//! It uses no fsync, fallocate, mapping, direct I/O, extended attribute or clone: what of those
//! twinwrite does not capture would end the protection that the test is about.

mod change;
mod copy;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::error::{Error, Told};
use crate::manifest::Manifest;
use crate::walk::describe;

/// Where the workload works, below the volume's root.
pub const PREFIX: &str = "settled";
/// Regular files a source must have for a run that counts.
pub const FILES_MIN: usize = 2_000;

/// What was done, for the workload's own output.
#[derive(Debug)]
pub struct Summary {
    /// Regular files copied.
    pub files_copied: usize,
    /// Bytes copied.
    pub bytes_copied: u64,
    /// How often each kind of change was made.
    pub changes: BTreeMap<&'static str, u64>,
}

/// Runs the workload below `root`, which must not have a `settled` directory yet.
///
/// # Errors
/// [`Error::File`] for the first system call that fails; [`Error::Source`] if the source has fewer
/// than `files_min` files that fit.
pub fn run(root: &Path, source: &Path, files_min: usize) -> Result<(Summary, Manifest), Error> {
    let top = root.join(PREFIX);
    let chosen = copy::choose(source, files_min)?;
    fs::create_dir(&top).told("make directory", &top)?;
    let copied = copy::copy(source, &chosen, &top.join("copy"))?;
    let (files_copied, bytes_copied) = (copied.files.len(), copied.bytes);
    let changes = change::change(&top, copied)?;
    let manifest = describe(root, Path::new(PREFIX))?;
    Ok((
        Summary {
            files_copied,
            bytes_copied,
            changes,
        },
        manifest,
    ))
}
