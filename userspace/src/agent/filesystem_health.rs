//! Whether a mounted file system still does what it is asked, as far as that can be seen without asking
//! its disk.
//!
//! Since Linux 6.12 an ext4 that gave up its journal does not show itself as read-only, but it counts its
//! errors; an ext4 or XFS that has shut itself down answers a read with an error. An ext4 may also count an
//! error and go on; that it does is shown by checkpoints that began after it.
//!
//! It must never wait for the disk: the count is in memory, and the read is one behind the end of a file,
//! which needs nothing.

use std::fs::File;
use std::io::IoSliceMut;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::capture::ext4::Ext4;

/// Where ext4 counts its errors.
const COUNT: &str = "errors_count";
/// So many proofs after an error was seen the last of them began after it, since one runs at a time.
const PROOFS: u64 = 2;

/// A volume whose health is looked at.
#[derive(Debug)]
pub struct FilesystemHealth {
    mount_point: PathBuf,
    ext4: Option<Ext4>,
    /// A file of the volume, and a place behind its end.
    file: Option<(File, u64)>,
    /// So many errors were there at the beginning, or are proven to be harmless.
    settled: u64,
    seen: Option<Seen>,
    errors: u64,
}

/// Errors that are not settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    errors: u64,
    /// Checkpoints that had proven something when they were seen.
    proofs: u64,
}

impl FilesystemHealth {
    /// Of the volume mounted here, whose device this is, from now on. `file` is one of its files.
    pub fn of(mount_point: &Path, device: u32, file: &Path) -> Self {
        // The file's access time would be a change.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME | OFlags::NOFOLLOW;
        let file = rustix::fs::open(file, flags, Mode::empty()).map(File::from);
        let file = file.ok().and_then(|file| {
            let end = file.metadata().ok()?.len();
            Some((file, end))
        });
        Self::new(mount_point, Ext4::on(device), file)
    }

    fn new(mount_point: &Path, ext4: Option<Ext4>, file: Option<(File, u64)>) -> Self {
        let errors = ext4.as_ref().and_then(|ext4| ext4.number(COUNT));
        let errors = errors.unwrap_or(0);
        Self {
            mount_point: mount_point.to_owned(),
            ext4,
            file,
            settled: errors,
            seen: None,
            errors,
        }
    }

    /// Errors that ext4 has counted, when it was looked at last.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Looks; `proofs` checkpoints have proven something up to now. What is wrong, with the remedy.
    pub fn look(&mut self, proofs: u64) -> Option<String> {
        let count = self.ext4.as_ref().and_then(|ext4| ext4.number(COUNT));
        self.errors = count.unwrap_or(self.errors);
        let new = self.unsettled(proofs);
        let shown = self.mount_point.display();
        let then = "as long as no checkpoint is proven, what is written may be in the mirror's region only. \
                    Look at the kernel log; if this does not pass, power this node off, so that the mirror \
                    takes over, and check the volume";
        let answer = self.file.as_ref().map(|(file, end)| ask(file, *end));
        if let Some(Err(error)) = answer {
            return Some(format!(
                "the file system of the volume at {shown} answers a read with `{error}`: it has shut itself \
                 down, or became read-only after an error ({} counted); {then}",
                self.errors
            ));
        }
        new.map(|new| {
            format!(
            "ext4 has met {new} errors on the volume at {shown}, and may have become read-only; {then}"
        )
        })
    }

    /// How many of its errors may be more than that.
    fn unsettled(&mut self, proofs: u64) -> Option<u64> {
        let errors = self.errors;
        let seen = match self.seen {
            Some(seen) if seen.errors == errors => seen,
            _ => Seen { errors, proofs },
        };
        if errors <= self.settled || proofs >= seen.proofs + PROOFS {
            (self.settled, self.seen) = (errors, None);
            return None;
        }
        self.seen = Some(seen);
        Some(errors - self.settled)
    }
}

/// What the file system says to a read; that it would have to wait says nothing.
fn ask(file: &File, end: u64) -> Result<(), Errno> {
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    match preadv2(file, &mut bytes, end, ReadWriteFlags::NOWAIT) {
        Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
