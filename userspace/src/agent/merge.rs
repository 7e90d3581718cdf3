//! A saved region against a mounted volume: what `twinwrite replay` and a takeover have in common.
//!
//! Reads the copy, scans it, lets `replay` judge, plan and apply. It must never be given the live
//! region, which its owner might still write to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use thiserror::Error;

use crate::ids::{Epoch, Seq};
use crate::region::layout::{RegionHeader, region_state, unpadded};
use crate::region::scan::{self, Scan, ScanError};
use crate::replay::{
    self, LogItem, Outcome, Plan, Progress, RegionClaim, ReplayError, ReplayInput, SentinelFile,
    Verdict, judge, sentinel,
};

/// Why a saved region cannot be merged.
#[derive(Debug, Error)]
pub enum MergeError {
    /// The file cannot be read.
    #[error("cannot read the region {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// Its contents are not whole.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The replay did not come to its end.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

/// A region read from a file, scanned.
pub struct SavedRegion {
    bytes: Vec<u8>,
    /// Its header.
    pub header: RegionHeader,
    /// What it holds.
    pub scan: Scan,
}

/// Reads a file without touching its holes: a log that was never full is mostly holes.
fn read_sparse(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    let end = i64::try_from(len).map_err(io::Error::other)?;
    let mut at = 0;
    while at < end {
        let data = match lseek(&file, at, Whence::SeekData) {
            Ok(data) => data,
            // No data behind this place.
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = lseek(&file, data, Whence::SeekHole)?.min(end);
        let range = usize::try_from(data).map_err(io::Error::other)?
            ..usize::try_from(at).map_err(io::Error::other)?;
        let part = bytes.get_mut(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        file.read_exact_at(part, u64::try_from(data).map_err(io::Error::other)?)?;
    }
    Ok(bytes)
}

impl SavedRegion {
    /// Reads and scans a file.
    ///
    /// # Errors
    /// [`MergeError::Read`], or [`MergeError::Scan`] for a damaged region.
    pub fn load(path: &Path) -> Result<Self, MergeError> {
        let bytes = read_sparse(path).map_err(|source| MergeError::Read {
            path: path.display().to_string(),
            source,
        })?;
        let (header, status, log) = scan::split(&bytes)?;
        let scan = scan::scan(&header, status, log)?;
        Ok(Self {
            header,
            scan,
            bytes,
        })
    }

    /// What it says of itself, for the judge.
    pub fn claim(&self) -> RegionClaim {
        RegionClaim {
            cluster: unpadded(&self.header.cluster),
            volume: unpadded(&self.header.volume),
            filesystem_uuid: self.header.filesystem_uuid,
            epoch: Epoch(self.header.epoch),
            closed: self.header.state != region_state::OPEN,
            last: self.scan.cut,
            marked: self.scan.checkpoint_seq,
        }
    }

    /// Judges it against the volume mounted at `mount`, whose file system has this UUID (`None`: not known,
    /// and not compared).
    pub fn judge(&self, mount: &Path, new_epoch: Epoch, mounted_uuid: Option<[u8; 16]>) -> Verdict {
        let read = sentinel::read(mount);
        judge(
            read.as_ref().map_err(ToString::to_string),
            &self.claim(),
            new_epoch,
            mounted_uuid,
        )
    }

    /// What must be done to merge everything behind `after`, up to the cut.
    ///
    /// # Errors
    /// [`MergeError::Replay`] when the log contradicts itself.
    pub fn plan(&self, after: Seq) -> Result<Plan<'_>, MergeError> {
        let (_, _, log) = scan::split(&self.bytes)?;
        let items = LogItem::up_to_the_cut(&self.scan, log);
        let epoch = Epoch(self.header.epoch);
        Ok(replay::plan(ReplayInput {
            epoch,
            after,
            items,
        })?)
    }

    /// Plans and applies. Whoever holds the sentinel file keeps an agent and any other replay off the
    /// volume, and has to go on holding it until the replay is finished.
    ///
    /// # Errors
    /// [`MergeError::Replay`]: nothing is lost, and it can be run again.
    pub fn merge(
        &self,
        _held: &SentinelFile,
        mount: &Path,
        after: Seq,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Outcome, MergeError> {
        let plan = self.plan(after)?;
        Ok(replay::apply(&plan, mount, progress)?)
    }
}
