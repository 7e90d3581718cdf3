//! Memory that another party reads or changes at any time: the region on the mirror's side, the
//! capture ring on the owner's.
//!
//! Neither is ever a plain slice: the peer's writes arrive while this process runs. Bytes are
//! copied out and in by volatile accesses, every range is checked first, and whoever reads trusts
//! a copy, never the memory itself. Nothing here interprets the bytes.

use std::ffi::c_void;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::fcntl::FallocateFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use thiserror::Error;

use crate::ids::RingPos;
use crate::link::LinkError;

/// Why shared memory could not be made or used.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A system call failed.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The file, or what stands for one.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file system has no room for the memory.
    #[error(
        "{path} needs {bytes} bytes of memory and its file system has less: enlarge it (`mount -o remount,size=...`) or lower `region_bytes`"
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes asked for.
        bytes: u64,
    },
    /// The kernel has too few huge pages for the memory.
    #[error(
        "{path} needs {pages} free huge pages of {page_bytes} bytes: raise `vm.nr_hugepages`, or set `region_dir` to a tmpfs"
    )]
    NoHugePages {
        /// The file.
        path: PathBuf,
        /// Pages it takes.
        pages: u64,
        /// Bytes of one page.
        page_bytes: u64,
    },
    /// The file's size is not what it should be.
    #[error(
        "{path} has {found} bytes and should have {wanted}: `region_bytes` changed, or the file is not a region; remove it while the volume is not mirrored here"
    )]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it should have.
        wanted: u64,
    },
    /// A size that cannot be mapped.
    #[error("{path}: {bytes} bytes cannot be mapped")]
    Unmappable {
        /// The file.
        path: PathBuf,
        /// Bytes asked for.
        bytes: u64,
    },
    /// A range outside the memory.
    #[error("{len} bytes at offset {offset} are outside the memory of {memory_bytes} bytes")]
    OutOfBounds {
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: usize,
        /// Bytes of the memory.
        memory_bytes: u64,
    },
}

/// A file on tmpfs or hugetlbfs, or an anonymous one, mapped shared for reading and writing.
///
/// The pages are allocated when it is created, so a full file system is an error then and not a
/// signal later.
#[derive(Debug)]
pub struct SharedMemory {
    base: NonNull<u8>,
    bytes: usize,
    mapped_bytes: NonZeroUsize,
}

// SAFETY: the mapping belongs to this value alone and lives until it is dropped; every access goes
// through volatile copies of checked ranges, which may race without breaking anything but the bytes.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes a file of at least `bytes` bytes (whole huge pages on hugetlbfs), all zero; a file that
    /// is there already is replaced.
    ///
    /// # Errors
    /// What the file system refused, with the remedy where it is known.
    pub fn create(path: &Path, bytes: u64) -> Result<Self, MemoryError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(system("create", path))?;
        Self::allocate(&file, path, bytes)
    }

    /// Maps the whole of an existing file.
    ///
    /// # Errors
    /// As [`SharedMemory::create`].
    pub fn open(path: &Path) -> Result<Self, MemoryError> {
        let (file, found) = open_file(path)?;
        Self::map(&file, path, found, found)
    }

    /// Maps a file that [`SharedMemory::create`] made with `bytes` bytes.
    ///
    /// # Errors
    /// [`MemoryError::WrongSize`] if it was made with another size; else as [`SharedMemory::create`].
    pub fn open_sized(path: &Path, bytes: u64) -> Result<Self, MemoryError> {
        let (file, found) = open_file(path)?;
        let wanted = file_bytes(&file, path, bytes)?.0;
        if found != wanted {
            return Err(MemoryError::WrongSize {
                path: path.into(),
                found,
                wanted,
            });
        }
        Self::map(&file, path, bytes, wanted)
    }

    /// Memory without a name, gone with this value.
    ///
    /// # Errors
    /// As [`SharedMemory::create`].
    pub fn anonymous(bytes: u64) -> Result<Self, MemoryError> {
        let path = Path::new("anonymous memory");
        let fd: OwnedFd = memfd_create(c"twinwrite", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| system("create", path)(errno.into()))?;
        Self::allocate(&File::from(fd), path, bytes)
    }

    fn allocate(file: &File, path: &Path, bytes: u64) -> Result<Self, MemoryError> {
        let (total, huge_page_bytes) = file_bytes(file, path, bytes)?;
        let Ok(end) = i64::try_from(total) else {
            return Err(MemoryError::Unmappable {
                path: path.into(),
                bytes,
            });
        };
        let refused = |source: io::Error| match (source.raw_os_error(), huge_page_bytes) {
            (Some(libc::ENOSPC | libc::ENOMEM), Some(page_bytes)) => MemoryError::NoHugePages {
                path: path.into(),
                pages: total / page_bytes,
                page_bytes,
            },
            (Some(libc::ENOSPC), None) => MemoryError::NoSpace {
                path: path.into(),
                bytes: total,
            },
            _ => MemoryError::System {
                what: "allocate",
                path: path.into(),
                source,
            },
        };
        file.set_len(total).map_err(refused)?;
        nix::fcntl::fallocate(file, FallocateFlags::empty(), 0, end)
            .map_err(|errno| refused(errno.into()))?;
        Self::map(file, path, bytes, total)
    }

    fn map(file: &File, path: &Path, bytes: u64, total: u64) -> Result<Self, MemoryError> {
        Self::map_at(file.as_fd(), 0, path, bytes, total)
    }

    /// Maps `total` bytes of a descriptor from `start` on; `bytes` of them are used.
    pub(super) fn map_at(
        file: BorrowedFd<'_>,
        start: i64,
        path: &Path,
        bytes: u64,
        total: u64,
    ) -> Result<Self, MemoryError> {
        let unmappable = || MemoryError::Unmappable {
            path: path.into(),
            bytes: total,
        };
        let length = usize::try_from(total).ok().and_then(NonZeroUsize::new);
        let mapped_bytes = length.ok_or_else(unmappable)?;
        let bytes = usize::try_from(bytes).map_err(|_| unmappable())?;
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing of this process.
        let base = unsafe {
            mmap(
                None,
                mapped_bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                file,
                start,
            )
        };
        let base = base.map_err(|errno| system("map", path)(errno.into()))?;
        Ok(Self {
            base: base.cast(),
            bytes,
            mapped_bytes,
        })
    }

    /// Bytes that can be read and written.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.bytes as u64
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies bytes out; while the peer writes, the copy may be a mix of old and new.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.place(offset, to.len())?;
        // SAFETY: `place` proved `from .. from + to.len()` to be inside the live mapping, and `to` is ours.
        unsafe { read_volatile_bytes(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.place(offset, from.len())?;
        // SAFETY: `place` proved `to .. to + from.len()` to be inside the live mapping.
        unsafe { write_volatile_bytes(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Makes a range zero.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let zeros = [0_u8; 4096];
        let whole = usize::try_from(len).unwrap_or(usize::MAX);
        self.place(offset, whole)?;
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(4096);
            self.write_at(offset + done, &zeros[..chunk as usize])?;
            done += chunk;
        }
        Ok(())
    }

    /// Receives at most `len` bytes from a socket straight into the memory, without waiting.
    pub(crate) fn receive(
        &self,
        socket: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        let to = self.place(offset, len).map_err(io::Error::other)?;
        let fd = socket.as_raw_fd();
        // SAFETY: `place` proved `to .. to + len` to be inside the live mapping; the kernel writes no more.
        let got = unsafe { libc::recv(fd, to.cast::<c_void>(), len, libc::MSG_DONTWAIT) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Address for a memory registration.
    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn place(&self, offset: u64, len: usize) -> Result<*mut u8, MemoryError> {
        let start = usize::try_from(offset).ok();
        match start.and_then(|at| Some((at, at.checked_add(len)?))) {
            // SAFETY: `at <= end <= bytes <= mapped_bytes`, so the address is inside the mapping or at its end.
            Some((at, end)) if end <= self.bytes => Ok(unsafe { self.base.as_ptr().add(at) }),
            _ => Err(MemoryError::OutOfBounds {
                offset,
                len,
                memory_bytes: self.len(),
            }),
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping `map` made, and nothing can reach it any more: registrations
        // and threads that use it hold an `Arc` of this value.
        if let Err(errno) = unsafe { munmap(self.base.cast(), self.mapped_bytes.get()) } {
            tracing::error!(
                "cannot unmap {} bytes of shared memory: {errno}",
                self.mapped_bytes
            );
        }
    }
}

pub(super) fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MemoryError {
    let path = path.to_owned();
    move |source| MemoryError::System { what, path, source }
}

fn open_file(path: &Path) -> Result<(File, u64), MemoryError> {
    let open = OpenOptions::new().read(true).write(true).open(path);
    let file = open.map_err(system("open", path))?;
    let found = file.metadata().map_err(system("inspect", path))?.len();
    Ok((file, found))
}

/// Bytes the file must have to hold `bytes`, and the size of its huge pages if it has such.
fn file_bytes(file: &File, path: &Path, bytes: u64) -> Result<(u64, Option<u64>), MemoryError> {
    let stat = fstatfs(file.as_fd()).map_err(|errno| system("inspect", path)(errno.into()))?;
    if stat.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok((bytes, None));
    }
    let page_bytes = u64::try_from(stat.block_size()).unwrap_or(0).max(4096);
    let total = bytes.checked_next_multiple_of(page_bytes);
    let total = total.ok_or_else(|| MemoryError::Unmappable {
        path: path.into(),
        bytes,
    })?;
    Ok((total, Some(page_bytes)))
}

/// The capture ring's data, mapped twice in a row, so that a run over its end is one span.
#[derive(Clone)]
pub struct RingSource {
    base: *const u8,
    ring_bytes: usize,
    /// What keeps the mapping alive.
    _keep: Arc<dyn Send + Sync>,
}

// SAFETY: the mapping lives as long as `_keep`, which may be sent and shared, and it is only read,
// by volatile copies or by the kernel.
unsafe impl Send for RingSource {}
// SAFETY: as above.
unsafe impl Sync for RingSource {}

impl fmt::Debug for RingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RingSource({:p}, {} bytes)", self.base, self.ring_bytes)
    }
}

impl RingSource {
    /// Describes a double mapping of `2 * ring_bytes` bytes that starts at `base`; `keep` owns it.
    ///
    /// # Safety
    /// All `2 * ring_bytes` bytes are mapped readable, the second half maps the same pages as the
    /// first, and the mapping stays as it is until `keep` is dropped.
    #[must_use]
    pub unsafe fn new(base: *const u8, ring_bytes: usize, keep: Arc<dyn Send + Sync>) -> Self {
        Self {
            base,
            ring_bytes,
            _keep: keep,
        }
    }

    /// Bytes of the ring, half of what is mapped.
    #[must_use]
    pub const fn ring_bytes(&self) -> usize {
        self.ring_bytes
    }

    pub(super) fn base(&self) -> *const u8 {
        self.base
    }

    /// Where the run is, in the double mapping.
    pub(crate) fn run(&self, pos: RingPos, len: u32) -> Result<*const u8, LinkError> {
        let bytes = self.ring_bytes as u64;
        if bytes == 0 || u64::from(len) > bytes {
            let told = format!("a run of {len} bytes does not fit a ring of {bytes} bytes");
            return Err(LinkError::Refused(told));
        }
        // SAFETY: the place is below `ring_bytes`, and `2 * ring_bytes` are mapped (contract of `new`).
        Ok(unsafe { self.base.add((pos.0 % bytes) as usize) })
    }

    /// Copies a run into shared memory (a registered slab).
    pub(super) fn copy_to(
        &self,
        pos: RingPos,
        len: u32,
        to: &SharedMemory,
        offset: u64,
    ) -> Result<(), LinkError> {
        let from = self.run(pos, len)?;
        let refused = |error: MemoryError| LinkError::Refused(error.to_string());
        let to = to.place(offset, len as usize).map_err(refused)?;
        // SAFETY: `run` and `place` proved both ranges; they are different mappings. The run stays
        // unchanged until its completion (`Body::Ring`), so volatile reads see whole records.
        unsafe { read_volatile_bytes(from, to, len as usize) };
        Ok(())
    }

    /// Sends `prefix` and then a run, as much as the socket takes without waiting; the kernel reads
    /// the ring's own memory.
    pub(crate) fn send(
        &self,
        socket: BorrowedFd<'_>,
        prefix: &[u8],
        pos: RingPos,
        len: u32,
    ) -> io::Result<usize> {
        let run = self.run(pos, len).map_err(io::Error::other)?;
        let mut parts = [
            libc::iovec {
                iov_base: prefix.as_ptr().cast_mut().cast(),
                iov_len: prefix.len(),
            },
            libc::iovec {
                iov_base: run.cast_mut().cast(),
                iov_len: len as usize,
            },
        ];
        // SAFETY: all-zero is a valid `msghdr`: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: both parts are readable for their length (`prefix` is a slice, `run` is proven);
        // sendmsg only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Copies out of memory that others change: each byte is read once.
///
/// # Safety
/// `from` and `to` are valid for `len` bytes and do not overlap.
unsafe fn read_volatile_bytes(from: *const u8, to: *mut u8, len: usize) {
    let head = from.align_offset(8).min(len);
    let words = (len - head) / 8;
    for at in (0..head).chain(head + words * 8..len) {
        // SAFETY: `at < len`; validity is the caller's promise.
        unsafe { to.add(at).write(from.add(at).read_volatile()) };
    }
    for word in 0..words {
        let at = head + word * 8;
        // SAFETY: `at + 8 <= len`, and `from + at` is aligned to 8 by the choice of `head`.
        unsafe {
            let value = from.add(at).cast::<u64>().read_volatile();
            to.add(at).cast::<u64>().write_unaligned(value);
        }
    }
}

/// Copies into memory that others read: each byte is written once.
///
/// # Safety
/// As [`read_volatile_bytes`].
unsafe fn write_volatile_bytes(from: *const u8, to: *mut u8, len: usize) {
    let head = to.align_offset(8).min(len);
    let words = (len - head) / 8;
    for at in (0..head).chain(head + words * 8..len) {
        // SAFETY: `at < len`; validity is the caller's promise.
        unsafe { to.add(at).write_volatile(from.add(at).read()) };
    }
    for word in 0..words {
        let at = head + word * 8;
        // SAFETY: `at + 8 <= len`, and `to + at` is aligned to 8 by the choice of `head`.
        unsafe {
            let value = from.add(at).cast::<u64>().read_unaligned();
            to.add(at).cast::<u64>().write_volatile(value);
        }
    }
}
