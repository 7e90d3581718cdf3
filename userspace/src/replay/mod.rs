//! Replay: merging a region into a volume after its owner's death.
//!
//! [`judge()`] says whether a region may be merged at all, [`plan()`] computes from its records what names,
//! bytes and attributes must finally be, [`apply()`] makes them so on the mounted file system. After it the
//! caller calls [`finish`], which makes everything durable and then writes the sentinel with the new epoch,
//! and [`tidy`]. Every step can be interrupted and begun again from the start:
//!
//! ```text
//! sentinel::read -> judge -> plan -> apply -> finish (sync, sentinel with the new epoch) -> tidy
//! ```
//!
//! What `apply` does first is to give back the blocks of the [`reserve`]; whoever called [`tidy`] sets some
//! aside again.
//!
//! What replay makes anew carries the extended attribute [`disk::STAMP_ATTRIBUTE`] with the region's epoch
//! and the identity it stands for, so that a restart knows it. A stamp of another epoch means nothing: a
//! crash between `finish` and `tidy` may leave some, and the epoch in them keeps a later replay from
//! taking them for its own. An inode that ends immutable or append-only loses it before it is locked, to a note in
//! `.twinwrite/staging`.
//!
//! Change times (ctime) and birth times are not restored: no system call sets them.
//!
//! Replay must never undo what an fsync confirmed, never destroy what the log does not prove dead, and never
//! merge a region that the sentinel does not ask for.

pub mod apply;
pub mod disk;
pub mod extents;
mod gather;
pub mod judge;
pub mod plan;
pub mod reserve;
pub mod sentinel;
#[cfg(test)]
mod tests;
pub mod underway;
pub mod volume;

use std::path::Path;

use thiserror::Error;

pub use apply::{Outcome, Progress, Stage};
pub use gather::plan;
pub use judge::{NothingToDo, Refusal, RegionClaim, Verdict, judge};
pub use plan::Plan;
pub use sentinel::{Sentinel, SentinelError, SentinelFile};

use crate::ids::{Epoch, RingPos, Seq};
use crate::record::RecordView;
use crate::region::scan::{Scan, ScannedRecord};
use volume::{Volume, VolumeError};

/// The bytes of a record that came without them.
#[derive(Clone, Debug, Default)]
pub struct Fill<'a> {
    /// Offset within the record's data, and bytes; not overlapping.
    pub pieces: Vec<(u32, &'a [u8])>,
    /// What is missing was removed or truncated meanwhile and has no effect in the final state.
    pub gone: bool,
}

/// One record of a region, borrowed from the region's bytes.
#[derive(Clone, Debug)]
pub struct LogItem<'a> {
    /// Its number.
    pub seq: Seq,
    /// Its position in the capture ring: what a mark's `arg` is compared with.
    pub ring_pos: RingPos,
    /// The record.
    pub record: RecordView<'a>,
    /// Its bytes, if it came without them.
    pub fill: Option<Fill<'a>>,
}

impl<'a> LogItem<'a> {
    /// A record that the scan found, with what of its fill lies in `log`.
    fn of(record: &ScannedRecord<'a>, log: &'a [u8]) -> Self {
        let fill = record.view.needs_fill().then(|| Fill {
            pieces: record
                .payload()
                .filter_map(|part| {
                    let start = usize::try_from(part.log_offset).ok()?;
                    let bytes = log.get(start..start.checked_add(part.len as usize)?)?;
                    Some((part.data_offset, bytes))
                })
                .collect(),
            // A complete fill with fewer bytes than the record: the file no longer had them.
            gone: record
                .fill
                .iter()
                .map(|fill| u64::from(fill.len))
                .sum::<u64>()
                < u64::from(record.view.header.data_len),
        });
        Self {
            seq: record.seq,
            ring_pos: record.ring_pos,
            record: record.view,
            fill,
        }
    }

    /// The records of a region from its head to the cut, in order.
    pub fn up_to_the_cut(scan: &'a Scan, log: &'a [u8]) -> impl Iterator<Item = Self> {
        scan.records(log)
            .take_while(|record| record.seq <= scan.cut)
            .map(move |record| Self::of(&record, log))
    }
}

/// What [`plan()`] needs.
#[derive(Clone, Debug)]
pub struct ReplayInput<I> {
    /// The region's epoch.
    pub epoch: Epoch,
    /// The sentinel's S, from [`Verdict::Merge`].
    pub after: Seq,
    /// The records from the region's head to the cut, in order.
    pub items: I,
}

/// Why a replay did not come to its end. The volume and the region can be used for another run.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// The records are not one log.
    #[error(
        "record {seq} follows {after}: the region was not read in order or has a hole; verify it with `twinwrite region dump`"
    )]
    Order {
        /// The record.
        seq: Seq,
        /// The one before it.
        after: Seq,
    },
    /// A record's bytes are not there.
    #[error(
        "record {seq} has no bytes and no complete fill follows it: the cut lies before it, or the region is damaged"
    )]
    BytesMissing {
        /// The record.
        seq: Seq,
    },
    /// Two records cannot both be true.
    #[error("the log up to record {seq} contradicts itself: {what}; nothing was merged")]
    Contradiction {
        /// The record at which it shows.
        seq: Seq,
        /// What is wrong.
        what: String,
    },
    /// No room.
    #[error(
        "volume full during replay ({0}): free space on it or grow it, then run the replay again; nothing was lost"
    )]
    Full(VolumeError),
    /// An immutable or append-only file is in the way.
    #[error(
        "{0}: probably an immutable or append-only file: clear the flag (chattr -ia), then run the replay again"
    )]
    Locked(VolumeError),
    /// A file and the directory it belongs into are of different quota projects.
    #[error(
        "{0}: the directory passes on a quota project that this file cannot be given: take the property from the directory (chattr -P), then run the replay again"
    )]
    Project(VolumeError),
    /// Any other step failed.
    #[error("{0}; the replay can be run again")]
    Volume(VolumeError),
    /// It could not be noted that a merge is under way.
    #[error(
        "cannot note on the volume that a merge is under way: {0}; the replay can be run again"
    )]
    Note(std::io::Error),
    /// The sentinel could not be written.
    #[error(transparent)]
    Sentinel(#[from] SentinelError),
}

impl From<VolumeError> for ReplayError {
    fn from(error: VolumeError) -> Self {
        if error.is_full() {
            Self::Full(error)
        } else if error.is_locked() {
            Self::Locked(error)
        } else if error.is_of_another_project() {
            Self::Project(error)
        } else {
            Self::Volume(error)
        }
    }
}

/// Makes `plan` so on the file system mounted at `mount`, and syncs it.
///
/// # Errors
/// [`ReplayError`]: nothing is lost, and it can be run again.
pub fn apply(
    plan: &Plan<'_>,
    mount: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Outcome, ReplayError> {
    let mut disk = disk::Disk::open(mount)?;
    underway::begin(mount, plan.epoch).map_err(ReplayError::Note)?;
    // Without it the merge may still find the room it needs.
    if let Err(error) = reserve::release(mount) {
        tracing::warn!(%error, "the reserve cannot be given back to the volume");
    }
    apply::apply_to(plan, &mut disk, progress)
}

/// Makes everything durable and then writes `sentinel` (with the new epoch): from here on the region is
/// merged for good and may be released. Takes hold of the sentinel file itself.
///
/// # Errors
/// [`ReplayError::Volume`] or [`ReplayError::Sentinel`]: the replay does not count as done.
pub fn finish(mount: &Path, sentinel: &Sentinel) -> Result<(), ReplayError> {
    finish_held(mount, &mut SentinelFile::open(mount)?, sentinel)
}

/// As [`finish`], for a caller who holds the sentinel file of the volume already.
///
/// # Errors
/// As [`finish`].
pub fn finish_held(
    mount: &Path,
    held: &mut SentinelFile,
    sentinel: &Sentinel,
) -> Result<(), ReplayError> {
    disk::Disk::open(mount)?.sync()?;
    held.write(sentinel)?;
    Ok(())
}

/// Removes the stamps and the staging directory after [`finish`]. What it leaves behind after an error is
/// harmless: the epoch in a stamp keeps it from ever being taken for another's.
///
/// # Errors
/// The first step that failed.
pub fn tidy(mount: &Path, outcome: &Outcome) -> Result<(), ReplayError> {
    let mut disk = disk::Disk::open(mount)?;
    apply::tidy_on(&mut disk, outcome)?;
    underway::end(mount).map_err(ReplayError::Note)
}
