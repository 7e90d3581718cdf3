//! Coverage: what becomes of every operation that a volume can go through, found by doing it.
//!
//! A *column* is a file system on a kernel. In it every probe of `twinwrite-workload` is carried out on a
//! protected volume, and found captured, refused, or such that a checkpoint has to cover it. Then both answers
//! are put to the test: the owner's power is cut, and the survivor must show what a captured operation
//! did although nobody flushed it, and what one did that was only noticed once the volume is protected again.
//! There is no fourth case: an operation that succeeds, is not noticed and is lost fails.

mod column;
pub mod table;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::lab::{Filesystem, KernelRelease};

/// What becomes of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A crash with nothing flushed took nothing of it from the survivor.
    Captured,
    /// It fails, and does not on the same file system without twinwrite.
    Refused,
    /// It was noticed, and the volume is not protected until a checkpoint, of the same epoch or of the next
    /// one, covers it: a crash after that took nothing.
    Covered,
    /// This file system or kernel does not have it.
    NotOffered,
    /// None of these.
    Failed,
}

/// One operation in one column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why the epoch was closed, what was not offered, or what the survivor lacks.
    pub words: String,
}

/// One probe, as `twinwrite-workload probes` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Probe {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub group: String,
    /// The operation makes itself durable.
    pub is_durable: bool,
}

/// Runs one column.
///
/// # Errors
/// If it could not be run to its end; what was found wrong is in the cells.
pub fn run_column(
    filesystem: Filesystem,
    kernel: KernelRelease,
    only: &[String],
) -> Result<Vec<(Probe, Cell)>> {
    column::run(filesystem, kernel, only)
}
