//! What applying a plan needs of a file system: everything by identity.
//!
//! Two implementations: [`super::disk::Disk`], a mounted file system, and the tests' model, so that the
//! same apply code runs on both. A method must never follow a symlink, and never replace or destroy
//! something that it was not told to.

use std::collections::BTreeMap;
use std::io;

use thiserror::Error;

use super::plan::Kind;
use crate::ids::{Epoch, Identity};
use crate::record::extended::InodeFlags;

/// A step on the volume failed.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct VolumeError {
    /// What was tried, naming the thing.
    pub what: String,
    /// The system's answer.
    pub source: io::Error,
}

impl VolumeError {
    /// The volume, or the quota, has no room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(
            self.source.raw_os_error(),
            Some(libc::ENOSPC | libc::EDQUOT)
        )
    }

    /// The file is immutable or append-only.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.source.raw_os_error() == Some(libc::EPERM)
    }

    /// The directory passes on another quota project than the file's.
    #[must_use]
    pub fn is_of_another_project(&self) -> bool {
        self.source.raw_os_error() == Some(libc::EXDEV)
    }
}

/// What an inode is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// `i_mode`.
    pub mode: u32,
    /// Link count.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size.
    pub size: u64,
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// When it was made, nanoseconds since 1970; `None`: the file system does not tell.
    pub born_ns: Option<i64>,
    /// It is immutable or append-only.
    pub is_locked: bool,
}

impl Stat {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }
}

/// Says whose place an inode takes that replay made: kept in an extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The region's epoch; a stamp of another epoch means nothing.
    pub epoch: Epoch,
    /// The identity in the log.
    pub identity: Identity,
}

/// Result of a step.
pub type Step<T> = Result<T, VolumeError>;

/// A file system, reached by identities.
pub trait Volume {
    /// The root directory.
    ///
    /// # Errors
    /// What the system answered; the same holds for every method.
    fn root(&mut self) -> Step<Identity>;
    /// What an inode is; `None` if there is none with this identity, or it has no link.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn stat(&mut self, inode: Identity) -> Step<Option<Stat>>;
    /// Who has this name.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn lookup(&mut self, directory: Identity, name: &[u8]) -> Step<Option<Identity>>;
    /// The names in a directory, but for `.` and `..`.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn list(&mut self, directory: Identity) -> Step<Vec<Vec<u8>>>;
    /// Where a directory (not the root) is: its parent, and its name there.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn place_of(&mut self, directory: Identity) -> Step<(Identity, Vec<u8>)>;
    /// The stamp of an inode that replay made.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn stamp(&mut self, inode: Identity) -> Step<Option<Stamp>>;
    /// Makes an inode under a free name.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn create(&mut self, directory: Identity, name: &[u8], kind: Kind<'_>) -> Step<Identity>;
    /// Lets what is made in `directory` from now on get the quota project that `like` passes on to what is
    /// made in it (`None`: no project), and lets names of every project into it if that is none.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn pass_on_project(&mut self, directory: Identity, like: Option<Identity>) -> Step<()>;
    /// Sets or removes the stamp.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_stamp(&mut self, inode: Identity, stamp: Option<Stamp>) -> Step<()>;
    /// Gives an inode that is no directory a further, free name.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn link(&mut self, inode: Identity, directory: Identity, name: &[u8]) -> Step<()>;
    /// Moves a name to a free name.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn rename(&mut self, from: (Identity, &[u8]), to: (Identity, &[u8])) -> Step<()>;
    /// Removes a name of something that is no directory.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn unlink(&mut self, directory: Identity, name: &[u8]) -> Step<()>;
    /// Removes an empty directory.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn remove_directory(&mut self, directory: Identity, name: &[u8]) -> Step<()>;
    /// Writes bytes.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn write(&mut self, inode: Identity, offset: u64, bytes: &[u8]) -> Step<()>;
    /// Makes `start..end`, which is within the size, read as zeros.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn zero(&mut self, inode: Identity, start: u64, end: u64) -> Step<()>;
    /// Sets the size.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_size(&mut self, inode: Identity, size: u64) -> Step<()>;
    /// Sets owner and group.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_owner(&mut self, inode: Identity, uid: u32, gid: u32) -> Step<()>;
    /// Sets the permission bits (of anything but a symlink).
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_permissions(&mut self, inode: Identity, mode: u32) -> Step<()>;
    /// Sets times; `None` leaves one as it is.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_times(
        &mut self,
        inode: Identity,
        atime_ns: Option<i64>,
        mtime_ns: Option<i64>,
    ) -> Step<()>;
    /// Every extended attribute but twinwrite's own.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn attributes(&mut self, inode: Identity) -> Step<BTreeMap<Vec<u8>, Vec<u8>>>;
    /// One extended attribute.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn attribute(&mut self, inode: Identity, name: &[u8]) -> Step<Option<Vec<u8>>> {
        Ok(self.attributes(inode)?.remove(name))
    }
    /// Sets an extended attribute, or removes it.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_attribute(&mut self, inode: Identity, name: &[u8], value: Option<&[u8]>) -> Step<()>;
    /// Inode flags and project; `None` where there are none.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn flags(&mut self, inode: Identity) -> Step<Option<InodeFlags>>;
    /// Sets inode flags and project.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn set_flags(&mut self, inode: Identity, flags: InodeFlags) -> Step<()>;
    /// Makes everything done so far durable.
    ///
    /// # Errors
    /// See [`Volume::root`].
    fn sync(&mut self) -> Step<()>;
}
