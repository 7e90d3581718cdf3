//! The extended state of inodes, read and set by identity: attributes, ACLs among them, flags, project.
//!
//! Everything goes through a descriptor that was reached by handle, so a name that means another file by now
//! cannot lead astray. Attributes of twinwrite itself are nobody's state: they are neither read nor removed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::handle;
use crate::ids::Identity;
use crate::record::extended::{Extended, ExtendedError, InodeFlags, VALUE_BYTES_MAX};

/// Attributes whose names begin so are twinwrite's own.
pub const OWN_PREFIX: &[u8] = b"trusted.twinwrite.";
/// Longest list of names (`XATTR_LIST_MAX`).
const LIST_BYTES_MAX: usize = 64 * 1024;

/// Extended attributes, by their names.
pub type Attributes = BTreeMap<Vec<u8>, Vec<u8>>;

/// As [`Extended`], but holds its attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtendedState {
    /// `i_mode`.
    pub mode: u32,
    /// Flags and project; `None` for what has none.
    pub flags: Option<InodeFlags>,
    /// Every extended attribute but twinwrite's own.
    pub attributes: Attributes,
}

impl ExtendedState {
    /// The bytes that an EXTENDED record is filled with.
    ///
    /// # Errors
    /// [`ExtendedError::TooLarge`].
    pub fn encode(&self) -> Result<Vec<u8>, ExtendedError> {
        let attributes = self.attributes.iter();
        Extended {
            mode: self.mode,
            flags: self.flags,
            attributes: attributes.map(|(n, v)| (&n[..], &v[..])).collect(),
        }
        .encode()
    }
}

/// What the inode has now; `None` if it is gone, linked or not.
///
/// # Errors
/// What the kernel answers.
pub fn read(mount: impl AsFd, identity: Identity) -> io::Result<Option<ExtendedState>> {
    let Some(fd) = find(&mount, identity)? else {
        return Ok(None);
    };
    let mode = rustix::fs::fstat(&fd)?.st_mode;
    Ok(Some(ExtendedState {
        mode,
        flags: flags_of(&mount, identity, mode)?,
        attributes: attributes_of(&fd)?,
    }))
}

/// Every attribute but twinwrite's own that the inode has now; `None` if it is gone, linked or not.
///
/// # Errors
/// What the kernel answers.
pub fn read_attributes(mount: impl AsFd, identity: Identity) -> io::Result<Option<Attributes>> {
    let fd = find(mount, identity)?;
    fd.map(|fd| attributes_of(&fd)).transpose()
}

/// Flags and project that the inode has now; `None` for what has none, or is gone, linked or not.
///
/// # Errors
/// What the kernel answers.
pub fn read_flags(mount: impl AsFd, identity: Identity) -> io::Result<Option<InodeFlags>> {
    let Some(fd) = find(&mount, identity)? else {
        return Ok(None);
    };
    flags_of(mount, identity, rustix::fs::fstat(&fd)?.st_mode)
}

fn find(mount: impl AsFd, identity: Identity) -> io::Result<Option<OwnedFd>> {
    handle::open_linked_or_not(mount, identity, libc::O_PATH | libc::O_NOFOLLOW)
}

/// That takes a descriptor on which an ioctl reaches the file system: symlinks and special files have none.
fn flags_of(mount: impl AsFd, identity: Identity, mode: u32) -> io::Result<Option<InodeFlags>> {
    if !matches!(mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR) {
        return Ok(None);
    }
    let how = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOATIME;
    match handle::open_linked_or_not(mount, identity, how)? {
        Some(fd) => handle::flags_of(fd),
        None => Ok(None),
    }
}

/// All attributes but twinwrite's own; one that goes meanwhile is not among them.
fn attributes_of(fd: &OwnedFd) -> io::Result<Attributes> {
    let path = handle::magic_path(fd);
    let mut names = vec![0; LIST_BYTES_MAX];
    let len = match rustix::fs::listxattr(&path, &mut names[..]) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    names.truncate(len);
    let mut attributes = BTreeMap::new();
    let mut value = vec![0; VALUE_BYTES_MAX];
    for name in names.split(|byte| *byte == 0) {
        if name.is_empty() || name.starts_with(OWN_PREFIX) {
            continue;
        }
        match rustix::fs::getxattr(&path, name, &mut value[..]) {
            Ok(len) => {
                let bytes = value.get(..len).unwrap_or_default().to_vec();
                attributes.insert(name.to_vec(), bytes);
            }
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(attributes)
}

/// Sets one attribute of an inode that has a link, or removes it.
///
/// # Errors
/// What the kernel answers; `ESTALE` if there is no such inode.
pub fn set_attribute(
    mount: impl AsFd,
    identity: Identity,
    name: &[u8],
    value: Option<&[u8]>,
) -> io::Result<()> {
    let fd = handle::open(mount, identity, libc::O_PATH | libc::O_NOFOLLOW)?
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
    let path = handle::magic_path(&fd);
    match value {
        Some(value) => Ok(rustix::fs::setxattr(
            path,
            name,
            value,
            XattrFlags::empty(),
        )?),
        None => match rustix::fs::removexattr(path, name) {
            Ok(()) | Err(Errno::NODATA) => Ok(()),
            Err(error) => Err(error.into()),
        },
    }
}

/// Sets flags and project of a regular file or directory that has a link.
///
/// # Errors
/// What the kernel answers; `ESTALE` if there is no such inode.
pub fn set_flags(mount: impl AsFd, identity: Identity, flags: InodeFlags) -> io::Result<()> {
    let how = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let fd = handle::open(mount, identity, how)?
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
    handle::set_flags(fd, flags)
}
