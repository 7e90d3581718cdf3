//! Bytes from the page cache, for records that carry none.
//!
//! Files are reached by handle, so by identity: a name may already mean another file. It must never
//! return bytes of another file than the one asked for.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::unistd::{Whence, lseek};

use super::{CaptureError, extended, handle};
use crate::ids::Identity;

/// Inode number and generation of what `path` names (a symlink itself, not its target).
///
/// # Errors
/// [`CaptureError::System`].
pub fn identity_of(path: &Path) -> Result<Identity, CaptureError> {
    let what = || format!("asking for the file handle of {}", path.display());
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|error| CaptureError::system(what(), io::Error::from(error)))?;
    match handle::identity_at(rustix::fs::CWD, &name) {
        Ok(Some(identity)) => Ok(identity),
        Ok(None) => Err(CaptureError::system(
            what(),
            io::Error::from(io::ErrorKind::NotFound),
        )),
        Err(source) => Err(CaptureError::system(what(), source)),
    }
}

/// Inode number and generation of an open file.
///
/// # Errors
/// [`CaptureError::System`].
pub fn identity_of_file(file: &File) -> Result<Identity, CaptureError> {
    handle::identity_of(file)
        .map_err(|source| CaptureError::system("asking for an open file's handle", source))
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheRead {
    /// This many bytes; fewer than asked for when the file has become shorter meanwhile.
    Bytes(usize),
    /// The file is gone.
    Gone,
}

/// Reads files of one volume by identity.
#[derive(Debug)]
pub struct PageCache {
    mount: OwnedFd,
    /// The file of the read before: fills come in runs.
    last: Option<(Identity, File)>,
}

impl PageCache {
    /// Opens the mount point.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn open(mount_point: &Path) -> Result<Self, CaptureError> {
        let mount = File::open(mount_point).map_err(|source| {
            CaptureError::system(format!("opening {}", mount_point.display()), source)
        })?;
        Ok(Self {
            mount: mount.into(),
            last: None,
        })
    }

    /// Reads what the file `identity` holds at `pos` now. When it returns, every buffered write that
    /// the bytes may show has its record in the ring.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn read(
        &mut self,
        identity: Identity,
        pos: u64,
        buffer: &mut [u8],
    ) -> Result<CacheRead, CaptureError> {
        let file = match self.last.take() {
            Some((last, file)) if last == identity => file,
            _ => match self.open_by_identity(identity)? {
                Some(file) => file,
                None => return Ok(CacheRead::Gone),
            },
        };
        let mut done = 0;
        while done < buffer.len() {
            match file.read_at(&mut buffer[done..], pos + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(CaptureError::system(
                        format!("reading inode {identity}"),
                        source,
                    ));
                }
            }
        }
        // ext4 reads without the inode lock, so the bytes may be of a write whose hook has not run
        // yet. SEEK_HOLE takes the lock (ext4_llseek), which that write holds until its hook has
        // run; xfs reads under it. The offset itself does not matter, nor that an empty file has none.
        let _ = lseek(&file, 0, Whence::SeekHole);
        self.last = Some((identity, file));
        Ok(CacheRead::Bytes(done))
    }

    /// The extended state that the inode has now, as an EXTENDED record is filled with it; nothing if the
    /// inode is gone.
    ///
    /// # Errors
    /// [`CaptureError::System`], [`CaptureError::Extended`].
    pub fn extended(&self, identity: Identity) -> Result<Vec<u8>, CaptureError> {
        let state = extended::read(&self.mount, identity).map_err(|source| {
            CaptureError::system(
                format!("reading the attributes of inode {identity}"),
                source,
            )
        })?;
        let Some(state) = state else {
            return Ok(Vec::new());
        };
        state
            .encode()
            .map_err(|source| CaptureError::Extended { identity, source })
    }

    /// Asks the programs for a record of what `pages` of the file from number `first` on have become; the file
    /// of the read before is asked through its descriptor.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn ask_for_snapshot(
        &mut self,
        identity: Identity,
        first: u64,
        pages: u64,
    ) -> Result<(), CaptureError> {
        let file = match self.last.take() {
            Some((last, file)) if last == identity => file,
            _ => match self.open_by_identity(identity)? {
                Some(file) => file,
                None => return Ok(()),
            },
        };
        handle::ask_for_snapshot(&file, first, pages);
        self.last = Some((identity, file));
        Ok(())
    }

    /// Lets go of the file of the read before, which otherwise stays open (and its space used, if
    /// it was removed) until the next read.
    pub fn forget(&mut self) {
        self.last = None;
    }

    fn open_by_identity(&self, identity: Identity) -> Result<Option<File>, CaptureError> {
        let flags = libc::O_RDONLY | libc::O_NOATIME | libc::O_NONBLOCK;
        handle::open_linked_or_not(&self.mount, identity, flags)
            .map(|fd| fd.map(File::from))
            .map_err(|source| {
                CaptureError::system(format!("opening inode {identity} by handle"), source)
            })
    }
}
