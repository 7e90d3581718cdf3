//! The note on the volume that a merge into it is under way.
//!
//! Between its first and its last change a merge leaves the volume half as the disk had it and half as
//! the region says, while the sentinel still says that the epoch is open. If the node that merges dies,
//! another one that holds no region of this epoch must not take the volume for one that merely lost
//! its unflushed writes. So an extended attribute of the sentinel file bears the epoch, durable before
//! the first change: it lies in the inode, so that a full volume takes it, too. It counts only as
//! long as the sentinel is of that epoch, so nobody has to take it away in time.
//!
//! It must never be written without the hold on the sentinel file that every merge needs.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::sentinel::path_on;
use crate::ids::Epoch;

const ATTRIBUTE: &str = "trusted.twinwrite.merging";

/// Notes that the region of this epoch is being merged; when it returns, the note is on the disk.
///
/// # Errors
/// What the system answered: nothing may be merged then.
pub fn begin(mount: &Path, epoch: Epoch) -> io::Result<()> {
    let path = path_on(mount);
    let value = epoch.0.to_le_bytes();
    setxattr(&path, ATTRIBUTE, &value, XattrFlags::empty())?;
    File::open(path)?.sync_all()
}

/// The epoch whose merge was begun last; `None`: none, or the note cannot be read.
#[must_use]
pub fn read(mount: &Path) -> Option<Epoch> {
    let mut value = [0; 8];
    let len = getxattr(path_on(mount), ATTRIBUTE, &mut value).ok()?;
    (len == value.len()).then(|| Epoch(u64::from_le_bytes(value)))
}

/// Takes the note away, once the sentinel is of a later epoch.
///
/// # Errors
/// What the system answered; harmless.
pub fn end(mount: &Path) -> io::Result<()> {
    match removexattr(path_on(mount), ATTRIBUTE) {
        Err(error) if error != Errno::NODATA => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::SentinelFile;

    #[test]
    fn the_note_bears_the_epoch_and_can_be_written_again_and_taken_away() {
        let mount = tempfile::tempdir().unwrap();
        assert_eq!(read(mount.path()), None);
        drop(SentinelFile::open(mount.path()).unwrap());
        begin(mount.path(), Epoch(7)).unwrap();
        begin(mount.path(), Epoch(12)).unwrap();
        assert_eq!(read(mount.path()), Some(Epoch(12)));
        end(mount.path()).unwrap();
        end(mount.path()).unwrap();
        assert_eq!(read(mount.path()), None);
    }

    #[test]
    fn without_a_sentinel_nothing_may_be_merged() {
        let mount = tempfile::tempdir().unwrap();
        assert!(begin(mount.path(), Epoch(1)).is_err());
    }
}
