//! Reaching a file by its identity, whatever it is called now: the kernel's file handles.
//!
//! A handle of ext4 and XFS is the inode number and its generation, which is what a record
//! carries; one of btrfs also holds the number of the subvolume, which is always the mounted one. No library
//! has a safe wrapper of these two calls, nor of those that read and set the quota project of an opened file,
//! so the wrappers are here. It must never return a file of another identity: every descriptor is asked who
//! it is before it is handed out.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::fs::IFlags;
use twinwrite_abi::snapshot;

use crate::ids::Identity;
use crate::record::extended::InodeFlags;

/// `MAX_HANDLE_SZ` of the kernel.
const HANDLE_BYTES_MAX: usize = 128;
/// `FILEID_INO32_GEN`: 32-bit inode number, generation. ext4 always, XFS for small numbers.
const TYPE_INO32: i32 = 1;
/// `FILEID_INO32_GEN | XFS_FILEID_TYPE_64FLAG`: 64-bit inode number, generation.
const TYPE_INO64: i32 = 0x81;
/// `FILEID_BTRFS_WITHOUT_PARENT`: 64-bit inode number, number of the subvolume, generation.
const TYPE_BTRFS: i32 = 0x4d;
/// Where these lie, and how many bytes they are.
const BTRFS_SUBVOLUME_AT: usize = 8;
const BTRFS_GENERATION_AT: usize = 16;
const BTRFS_BYTES: u32 = 20;

/// While a number is being given to a new inode the kernel answers as if it had no memory (`iget_locked` and
/// `iget5_locked` since 4.20, of an inode in `I_CREATING`). That passes, so it is asked again, this often and
/// after a pause that doubles: half a second in all.
const TRIES: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Handle {
    bytes: u32,
    kind: i32,
    body: [u8; HANDLE_BYTES_MAX],
}

impl Handle {
    pub(super) fn of(identity: Identity) -> Self {
        let mut body = [0; HANDLE_BYTES_MAX];
        let generation = identity.generation.to_ne_bytes();
        if let Ok(ino) = u32::try_from(identity.ino) {
            body[..4].copy_from_slice(&ino.to_ne_bytes());
            body[4..8].copy_from_slice(&generation);
            Self {
                bytes: 8,
                kind: TYPE_INO32,
                body,
            }
        } else {
            body[..8].copy_from_slice(&identity.ino.to_ne_bytes());
            body[8..12].copy_from_slice(&generation);
            Self {
                bytes: 12,
                kind: TYPE_INO64,
                body,
            }
        }
    }

    /// A handle as the kernel gives it.
    #[cfg(test)]
    pub(super) fn with_body(kind: i32, bytes: &[u8]) -> Self {
        let mut body = [0; HANDLE_BYTES_MAX];
        body[..bytes.len()].copy_from_slice(bytes);
        Self {
            bytes: bytes.len() as u32,
            kind,
            body,
        }
    }

    /// The handle that this identity has on the file system that this handle is of.
    pub(super) fn sibling(&self, identity: Identity) -> Self {
        if self.kind != TYPE_BTRFS {
            return Self::of(identity);
        }
        let mut body = self.body;
        body[..BTRFS_SUBVOLUME_AT].copy_from_slice(&identity.ino.to_ne_bytes());
        body[BTRFS_GENERATION_AT..BTRFS_BYTES as usize]
            .copy_from_slice(&identity.generation.to_ne_bytes());
        Self {
            bytes: BTRFS_BYTES,
            kind: TYPE_BTRFS,
            body,
        }
    }

    pub(super) fn identity(&self) -> io::Result<Identity> {
        let word = |at: usize| {
            let b = &self.body;
            u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
        };
        let ino = || {
            let mut ino = [0; 8];
            ino.copy_from_slice(&self.body[..8]);
            u64::from_ne_bytes(ino)
        };
        match (self.kind, self.bytes) {
            (TYPE_INO32, 8) => Ok(Identity {
                ino: word(0).into(),
                generation: word(4),
            }),
            (TYPE_INO64, 12) => Ok(Identity {
                ino: ino(),
                generation: word(8),
            }),
            (TYPE_BTRFS, BTRFS_BYTES) => Ok(Identity {
                ino: ino(),
                generation: word(BTRFS_GENERATION_AT),
            }),
            (kind, bytes) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "file handle of type {kind:#x} with {bytes} bytes: only those of ext4, XFS and btrfs are known"
                ),
            )),
        }
    }
}

/// Opens the file with this identity on the file system that `mount` lies on; `None` if there is
/// none (any more), or if it has no link left.
///
/// # Errors
/// As [`open_linked_or_not`].
pub fn open(mount: impl AsFd, identity: Identity, flags: i32) -> io::Result<Option<OwnedFd>> {
    let Some(fd) = open_linked_or_not(mount, identity, flags)? else {
        return Ok(None);
    };
    let linked = rustix::fs::fstat(&fd)?.st_nlink != 0;
    Ok(linked.then_some(fd))
}

/// As [`open`], but also a file that lives only because somebody has it open.
///
/// `flags` are those of open(2); a symlink needs `O_PATH`. Needs `CAP_DAC_READ_SEARCH`.
///
/// # Errors
/// What the kernel answers, but for "stale handle", which is `None`.
pub fn open_linked_or_not(
    mount: impl AsFd,
    identity: Identity,
    flags: i32,
) -> io::Result<Option<OwnedFd>> {
    let mut handle = name_to_handle(&mount, c"", libc::AT_EMPTY_PATH)?.sibling(identity);
    let mut opened = open_handle(&mount, &mut handle, flags);
    for attempt in 1..TRIES {
        match &opened {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                thread::sleep(FIRST_PAUSE * (1 << (attempt - 1)));
            }
            _ => break,
        }
        opened = open_handle(&mount, &mut handle, flags);
    }
    let fd = match opened.map_err(|error| (error.raw_os_error(), error)) {
        Ok(fd) => fd,
        Err((Some(libc::ESTALE | libc::ENOENT), _)) => return Ok(None),
        Err((_, error)) => return Err(error),
    };
    // Generation 0 in a handle matches every generation, so the answer is checked.
    Ok((identity_of(&fd)? == identity).then_some(fd))
}

fn open_handle(mount: impl AsFd, handle: &mut Handle, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: `handle` is a `struct file_handle` followed by `bytes` (8, 12 or 20) valid bytes of body,
    // and lives across the call, which keeps no pointer to it.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_fd().as_raw_fd(),
            (&raw mut *handle).cast(),
            flags | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned `fd`, so it is open and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Who this descriptor's file is (also for `O_PATH`).
///
/// # Errors
/// What the kernel answers; `Unsupported` for a file system whose handles are of another form.
pub fn identity_of(fd: impl AsFd) -> io::Result<Identity> {
    name_to_handle(fd, c"", libc::AT_EMPTY_PATH)?.identity()
}

/// Who has this name in this directory, not following a symlink; `None` if nobody.
///
/// # Errors
/// As [`identity_of`].
pub fn identity_at(directory: impl AsFd, name: &CStr) -> io::Result<Option<Identity>> {
    match name_to_handle(directory, name, 0) {
        Ok(handle) => handle.identity().map(Some),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn name_to_handle(fd: impl AsFd, name: &CStr, flags: i32) -> io::Result<Handle> {
    let mut handle = Handle {
        bytes: HANDLE_BYTES_MAX as u32,
        kind: 0,
        body: [0; HANDLE_BYTES_MAX],
    };
    let mut mount_id = 0;
    // SAFETY: `handle` is a `struct file_handle` with `bytes` (128) writable bytes of body, `name`
    // is NUL-terminated, and the kernel keeps no pointer after the call.
    let status = unsafe {
        libc::name_to_handle_at(
            fd.as_fd().as_raw_fd(),
            name.as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount_id,
            flags,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(handle)
}

/// A path that names a descriptor's file whatever its type, symlinks included.
pub fn magic_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Asks the programs for a record of `pages` of an open file from number `first` on. Where they are not
/// attached nothing happens: the file system does not know the call.
pub fn ask_for_snapshot(fd: impl AsFd, first: u64, pages: u64) {
    let argument = snapshot::argument(first, pages);
    // SAFETY: the command is unknown to every file system, so nobody takes the argument for an address.
    let _ = unsafe {
        libc::ioctl(
            fd.as_fd().as_raw_fd(),
            libc::c_ulong::from(snapshot::COMMAND),
            argument,
        )
    };
}

/// A file's quota project.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Project {
    /// Its number; 0 is none.
    pub number: u32,
    /// What is made in this directory gets the number (and a directory this property), and nothing of
    /// another project is let in.
    pub passed_on: bool,
}

/// `struct fsxattr` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Attributes {
    flags: u32,
    extent_bytes: u32,
    extents: u32,
    project: u32,
    copy_extent_bytes: u32,
    padding: [u8; 8],
}

/// `FS_XFLAG_PROJINHERIT`.
const PROJECT_PASSED_ON: u32 = 0x200;

mod ioctl {
    nix::ioctl_read!(get_attributes, b'X', 31, super::Attributes);
    nix::ioctl_write_ptr!(set_attributes, b'X', 32, super::Attributes);
}

fn attributes_of(fd: impl AsFd) -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: FS_IOC_FSGETXATTR writes one `struct fsxattr`, which `attributes` is, and the kernel keeps
    // no pointer after the call.
    unsafe { ioctl::get_attributes(fd.as_fd().as_raw_fd(), &raw mut attributes) }?;
    Ok(attributes)
}

/// The quota project of a regular file or directory (not `O_PATH`); none on a file system that has no such
/// thing.
///
/// # Errors
/// What the kernel answers.
pub fn project_of(fd: impl AsFd) -> io::Result<Project> {
    match attributes_of(fd) {
        Ok(attributes) => Ok(Project {
            number: attributes.project,
            passed_on: attributes.flags & PROJECT_PASSED_ON != 0,
        }),
        Err(error) if has_no_flags(&error) => Ok(Project::default()),
        Err(error) => Err(error),
    }
}

/// Flags and project of a regular file or directory (not `O_PATH`); `None` where the file system has no
/// such thing.
///
/// # Errors
/// What the kernel answers.
pub fn flags_of(fd: impl AsFd) -> io::Result<Option<InodeFlags>> {
    let attributes = match attributes_of(&fd) {
        Ok(attributes) => attributes,
        Err(error) if has_no_flags(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(InodeFlags {
        flags: rustix::fs::ioctl_getflags(&fd)?.bits(),
        xflags: attributes.flags,
        extent_bytes: attributes.extent_bytes,
        project: attributes.project,
        copy_extent_bytes: attributes.copy_extent_bytes,
    }))
}

/// Flags of `FS_IOC_SETFLAGS` that people set (include/uapi/linux/fs.h): secure deletion, undelete,
/// compression, synchronous, immutable, append-only, no dump, no access times, data journaling, no tail
/// merging, synchronous directory, top of hierarchies, no copy on write. All others are the file system's.
const SETTABLE_FLAGS: u32 = 0x0083_c0ff;
/// Flags of `FS_IOC_FSSETXATTR` that `FS_IOC_SETFLAGS` has no word for (include/uapi/linux/fs.h): inherited
/// hints, no symlinks, no defragmentation, file streams, extent size hints, project.
const SETTABLE_XFLAGS: u32 = 0x0001_7e00;

/// Makes flags and project so; what people cannot set stays as it is.
///
/// # Errors
/// What the kernel answers.
pub fn set_flags(fd: impl AsFd, wanted: InodeFlags) -> io::Result<()> {
    let now = attributes_of(&fd)?;
    let told = Attributes {
        flags: (now.flags & !SETTABLE_XFLAGS) | (wanted.xflags & SETTABLE_XFLAGS),
        extent_bytes: wanted.extent_bytes,
        project: wanted.project,
        copy_extent_bytes: wanted.copy_extent_bytes,
        ..now
    };
    if now != told {
        // An immutable inode takes nothing else; `then` below locks it again if it is to be.
        let told = Attributes {
            flags: told.flags & !InodeFlags::EXTENDED_LOCKS,
            ..told
        };
        // SAFETY: FS_IOC_FSSETXATTR reads one `struct fsxattr`, which `told` is, and the kernel keeps no
        // pointer after the call.
        unsafe { ioctl::set_attributes(fd.as_fd().as_raw_fd(), &raw const told) }?;
    }
    let now = rustix::fs::ioctl_getflags(&fd)?.bits();
    let then = (now & !SETTABLE_FLAGS) | (wanted.flags & SETTABLE_FLAGS);
    if now != then {
        rustix::fs::ioctl_setflags(&fd, IFlags::from_bits_retain(then))?;
    }
    Ok(())
}

fn has_no_flags(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP))
}

/// Sets the quota project of a regular file or directory (not `O_PATH`).
///
/// # Errors
/// What the kernel answers.
pub fn set_project(fd: impl AsFd, project: Project) -> io::Result<()> {
    let mut attributes = attributes_of(&fd)?;
    attributes.project = project.number;
    attributes.flags &= !PROJECT_PASSED_ON;
    if project.passed_on {
        attributes.flags |= PROJECT_PASSED_ON;
    }
    // SAFETY: FS_IOC_FSSETXATTR reads one `struct fsxattr`, which `attributes` is, and the kernel keeps no
    // pointer after the call.
    unsafe { ioctl::set_attributes(fd.as_fd().as_raw_fd(), &raw const attributes) }?;
    Ok(())
}
