//! The reserve: blocks of the volume that nobody but a merge gets.
//!
//! ```text
//! <mount>/.twinwrite/reserve    allocated, never written: its content means nothing
//! ```
//!
//! A merge needs blocks that the dead owner did not need: for its staging directory, for names, and for
//! bytes that replace others before those are given up. On a volume that is full to the last block there would
//! be none, so they are set aside while it is not. A merge gives them back once it is noted as under way,
//! which may happen any number of times; while no epoch is open nobody can need them.
//!
//! It must never take the last free blocks away from those who write to the volume, and never keep a
//! volume from being protected or merged into.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use thiserror::Error;

use crate::capture::ext4::Ext4;
use crate::capture::to_kernel_device;

use super::sentinel::{
    OWN_DIRECTORY, SentinelError, failed, open_directory, open_in, open_mount, require_own,
};

const FILE: &str = "reserve";
/// Which share of the volume is set aside, and how much at least and at most.
const SHARE: u64 = 256;
const BYTES_MIN: u64 = 1 << 20;
const BYTES_MAX: u64 = 64 << 20;
/// On a volume with little room it may be smaller; less than this would help nobody.
const BYTES_LEAST: u64 = 256 << 10;
/// What is left to those who write to the volume: this share of what is set aside.
const LEFT_SHARE: u64 = 8;

/// Why there is no reserve.
#[derive(Debug, Error)]
pub enum ReserveError {
    /// The volume has no room for it.
    #[error(
        "the volume is full: {free_bytes} bytes are free, and {BYTES_LEAST} are the least that can be set aside"
    )]
    Full {
        /// What is free.
        free_bytes: u64,
    },
    /// The file cannot be used, or the system refused.
    #[error(transparent)]
    File(#[from] SentinelError),
}

/// What is to be set aside on a volume of this size.
fn wanted(volume_bytes: u64) -> u64 {
    (volume_bytes / SHARE).clamp(BYTES_MIN, BYTES_MAX)
}

/// What is free on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    volume_bytes: u64,
    /// For root, who merges.
    free_bytes: u64,
    /// For everybody.
    users_bytes: u64,
}

impl Room {
    fn of(file: &File) -> io::Result<Self> {
        let stat = rustix::fs::fstatvfs(file)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        // Nobody gets these for data or for a directory, and they count as free.
        let device = to_kernel_device(file.metadata()?.dev());
        let kept = Ext4::on(device).and_then(|ext4| ext4.number("reserved_clusters"));
        Ok(Self {
            volume_bytes: bytes(stat.f_blocks),
            free_bytes: bytes(stat.f_bfree.saturating_sub(kept.unwrap_or(0))),
            users_bytes: bytes(stat.f_bavail),
        })
    }

    /// The largest size, at most `wanted`, that a reserve which has `held` bytes can be given; `None`: it
    /// stays as it is. Where only root has room left, nobody is the poorer for it.
    fn affords(self, wanted: u64, held: u64) -> Option<u64> {
        std::iter::successors(Some(wanted), |size| Some(size / 2))
            .take_while(|size| *size >= BYTES_LEAST && *size > held)
            .find(|size| {
                let (more, left) = (size - held, size / LEFT_SHARE);
                more <= self.free_bytes
                    && (self.users_bytes == 0 || more + left <= self.users_bytes)
            })
    }
}

/// Bytes from the file's start that have blocks.
fn held(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    Ok(metadata.len().min(metadata.blocks().saturating_mul(512)))
}

fn open(mount: &Path, flags: OFlags) -> Result<(File, File), SentinelError> {
    let path = mount.join(OWN_DIRECTORY).join(FILE);
    let directory = open_directory(&open_mount(mount)?, mount)?;
    let file = open_in(&directory, FILE, &path, OFlags::RDWR | flags)?;
    let is_file = file.metadata().map_err(failed(&path, "stat"))?.is_file();
    require_own(&file, &path, is_file)?;
    Ok((file, directory))
}

/// Sets blocks aside on the volume mounted at `mount`, as many as are wanted or there is room for, unless
/// they are there already. Gives how many bytes are set aside then.
///
/// # Errors
/// [`ReserveError`]: there is none.
pub fn make(mount: &Path) -> Result<u64, ReserveError> {
    let path = mount.join(OWN_DIRECTORY).join(FILE);
    let (file, directory) = open(mount, OFlags::CREATE)?;
    let held = held(&file).map_err(failed(&path, "stat"))?;
    let room = Room::of(&file).map_err(failed(&path, "statvfs"))?;
    let mut most = wanted(room.volume_bytes);
    while let Some(size) = room.affords(most, held) {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
            Ok(()) => {
                for made in [&file, &directory] {
                    made.sync_all().map_err(failed(&path, "fsync"))?;
                }
                return Ok(size);
            }
            Err(error) => {
                // What was found before there was no more goes back, also beyond the end of the file.
                file.set_len(held).map_err(failed(&path, "truncate"))?;
                if !matches!(error, Errno::NOSPC | Errno::DQUOT) {
                    return Err(failed(&path, "fallocate")(error.into()).into());
                }
                most = size / 2;
            }
        }
    }
    if held >= BYTES_LEAST {
        Ok(held)
    } else {
        let free_bytes = room.free_bytes;
        Err(ReserveError::Full { free_bytes })
    }
}

/// Gives the blocks back to the file system; when it returns they can be allocated. Only for a merge that is
/// under way, or while no epoch is open.
///
/// # Errors
/// What the system answered.
pub fn release(mount: &Path) -> Result<(), SentinelError> {
    let path = mount.join(OWN_DIRECTORY).join(FILE);
    let (file, _) = match open(mount, OFlags::empty()) {
        Err(SentinelError::Missing(_)) => return Ok(()),
        other => other?,
    };
    if file.metadata().map_err(failed(&path, "stat"))?.len() == 0 {
        return Ok(());
    }
    file.set_len(0).map_err(failed(&path, "truncate"))?;
    // The blocks of what a transaction frees can be had only once it is committed.
    rustix::fs::syncfs(&file).map_err(|error| failed(&path, "syncfs")(error.into()))
}

/// Bytes that root can still allocate on the volume mounted at `mount`.
///
/// # Errors
/// What the system answered.
pub fn free_bytes(mount: &Path) -> io::Result<u64> {
    Ok(Room::of(&File::open(mount)?)?.free_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_small_share_is_wanted_within_bounds() {
        assert_eq!(wanted(24 * MIB), MIB);
        assert_eq!(wanted(1024 * MIB), 4 * MIB);
        assert_eq!(wanted(1 << 50), 64 * MIB);
    }

    /// Where everybody may have all that is free.
    fn room(bytes: u64) -> Room {
        Room {
            volume_bytes: 1024 * MIB,
            free_bytes: bytes,
            users_bytes: bytes,
        }
    }

    #[test]
    fn a_full_volume_gives_less_or_nothing_and_keeps_some_for_its_users() {
        let of = |bytes| room(bytes).affords(4 * MIB, 0);
        assert_eq!(of(100 * MIB), Some(4 * MIB));
        assert_eq!(of(4 * MIB), Some(2 * MIB));
        assert_eq!(of(9 * MIB / 2), Some(4 * MIB));
        assert_eq!(of(300 << 10), Some(256 << 10));
        assert_eq!(of(256 << 10), None);
        assert_eq!(of(0), None);
    }

    #[test]
    fn what_only_root_may_use_is_taken_once_the_others_have_nothing() {
        let of = |users_bytes| {
            let all = room(50 * MIB);
            Room { users_bytes, ..all }.affords(4 * MIB, 0)
        };
        assert_eq!(of(0), Some(4 * MIB));
        assert_eq!(of(64 << 10), None);
        assert_eq!(of(2 * MIB), Some(MIB));
    }

    #[test]
    fn one_that_is_too_small_grows_and_none_shrinks() {
        assert_eq!(room(4 * MIB).affords(4 * MIB, MIB), Some(4 * MIB));
        assert_eq!(room(2 * MIB).affords(4 * MIB, MIB), Some(2 * MIB));
        assert_eq!(room(MIB).affords(4 * MIB, MIB), None);
        assert_eq!(room(100 * MIB).affords(4 * MIB, 4 * MIB), None);
        assert_eq!(room(100 * MIB).affords(4 * MIB, 64 * MIB), None);
    }

    #[test]
    fn it_is_made_once_given_back_and_made_again() {
        let mount = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
        let mount = mount.path();
        assert!(make(mount).is_err(), "no directory for it");
        drop(super::super::SentinelFile::open(mount).expect("open"));
        release(mount).expect("there is none");
        let bytes = make(mount).expect("there is room");
        assert!((BYTES_LEAST..=BYTES_MAX).contains(&bytes));
        assert_eq!(make(mount).expect("it is there"), bytes);
        let path = mount.join(OWN_DIRECTORY).join(FILE);
        let blocks = || std::fs::metadata(&path).expect("stat").blocks() * 512;
        assert!(blocks() >= bytes);
        release(mount).expect("given back");
        release(mount).expect("again");
        assert_eq!(blocks(), 0);
        assert_eq!(make(mount).expect("there is room"), bytes);
    }

    #[test]
    fn what_others_may_have_made_is_not_touched() {
        let mount = tempfile::tempdir().expect("a directory");
        let mount = mount.path();
        drop(super::super::SentinelFile::open(mount).expect("open"));
        let precious = mount.join("precious");
        std::fs::write(&precious, b"as it was").expect("write");
        std::os::unix::fs::symlink(&precious, mount.join(OWN_DIRECTORY).join(FILE)).expect("link");
        assert!(make(mount).is_err() && release(mount).is_err());
        assert_eq!(std::fs::read(&precious).expect("read"), b"as it was");
    }
}
