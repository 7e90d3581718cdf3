//! A ring like the capture ring, that user space can fill: for `doctor`, which finds out what this
//! kernel lets RDMA read, and for the contract.
//!
//! It must never hold records: it only shows how the kernel treats such a mapping.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::unistd::ftruncate;

use super::memory::{MemoryError, RingSource, SharedMemory, system};

/// `BPF_MAP_CREATE` of bpf(2).
const MAP_CREATE: libc::c_long = 0;
/// `BPF_MAP_TYPE_USER_RINGBUF`: the capture ring's kind of pages, writable by user space (6.1).
const USER_RING: u32 = 31;
/// The consumer's and the producer's position, a page each, come before the data.
const DATA_OFFSET: i64 = 2 * 4096;

/// A ring that is mapped twice in a row read-only, as the capture ring is, and once for filling.
#[derive(Debug)]
pub struct ProbeRing {
    base: NonNull<c_void>,
    mapped_bytes: NonZeroUsize,
    ring_bytes: usize,
    fill: SharedMemory,
}

// SAFETY: the read-only mapping belongs to this value alone and is never dereferenced by it.
unsafe impl Send for ProbeRing {}
// SAFETY: as above.
unsafe impl Sync for ProbeRing {}

/// The start of bpf(2)'s argument for making a map; the rest of it is zero.
#[repr(C)]
#[derive(Debug, Default)]
struct MapAttributes {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries_max: u32,
    rest: [u64; 14],
}

impl ProbeRing {
    /// A ring of the kernel's ring-buffer pages, those that the capture ring is made of.
    /// `ring_bytes` must be a power of two of at least a page.
    ///
    /// # Errors
    /// What the kernel refused; it needs `CAP_BPF` and 6.1.
    pub fn of_kernel_pages(ring_bytes: usize) -> Result<Arc<Self>, MemoryError> {
        let path = Path::new("a BPF user ring buffer");
        let attributes = MapAttributes {
            kind: USER_RING,
            entries_max: u32::try_from(ring_bytes).unwrap_or(0),
            ..MapAttributes::default()
        };
        let size = size_of::<MapAttributes>();
        // SAFETY: bpf(2) reads `size` bytes of an attribute structure that lives across the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, &raw const attributes, size) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(|| system("create", path)(std::io::Error::last_os_error()))?;
        // SAFETY: the system call returned a new descriptor, which nobody else owns.
        let map = unsafe { OwnedFd::from_raw_fd(fd) };
        let twice = whole(path, ring_bytes, 2)?;
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing of this process.
        // The kernel lets the data pages be mapped twice in a row.
        let base = unsafe {
            mmap(
                None,
                twice,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                &map,
                DATA_OFFSET,
            )
        };
        let base = base.map_err(|errno| system("map", path)(errno.into()))?;
        Self::with_fill(base, twice, map.as_fd(), DATA_OFFSET, ring_bytes)
    }

    /// A ring of ordinary shared memory, for machines without BPF.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn of_ordinary_pages(ring_bytes: usize) -> Result<Arc<Self>, MemoryError> {
        let path = Path::new("a ring in anonymous memory");
        let refused = |errno: nix::errno::Errno| system("map", path)(errno.into());
        let file = memfd_create(c"twinwrite-ring", MFdFlags::MFD_CLOEXEC).map_err(refused)?;
        let once = whole(path, ring_bytes, 1)?;
        let twice = whole(path, ring_bytes, 2)?;
        let end = i64::try_from(ring_bytes).unwrap_or(0);
        ftruncate(&file, end).map_err(refused)?;
        // SAFETY: as above; nothing uses the reserved range before it is mapped over.
        let base =
            unsafe { mmap_anonymous(None, twice, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) };
        let base = base.map_err(refused)?;
        for half in 0..2 {
            let at = NonZeroUsize::new(base.as_ptr() as usize + half * ring_bytes);
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: both halves lie in the range reserved above, which belongs to nobody else.
            unsafe { mmap(at, once, ProtFlags::PROT_READ, flags, &file, 0) }.map_err(refused)?;
        }
        Self::with_fill(base, twice, file.as_fd(), 0, ring_bytes)
    }

    fn with_fill(
        base: NonNull<c_void>,
        mapped_bytes: NonZeroUsize,
        file: BorrowedFd<'_>,
        start: i64,
        ring_bytes: usize,
    ) -> Result<Arc<Self>, MemoryError> {
        let bytes = ring_bytes as u64;
        let fill = SharedMemory::map_at(file, start, Path::new("a probe ring"), bytes, bytes)?;
        Ok(Arc::new(Self {
            base,
            mapped_bytes,
            ring_bytes,
            fill,
        }))
    }

    /// The ring's data, for filling.
    #[must_use]
    pub fn fill(&self) -> &SharedMemory {
        &self.fill
    }

    /// The ring as a link's source, which keeps it alive.
    #[must_use]
    pub fn source(self: &Arc<Self>) -> RingSource {
        let base = self.base.cast::<u8>().as_ptr();
        let keep: Arc<Self> = Arc::clone(self);
        // SAFETY: both copies stay mapped until this value is dropped, and the source holds it.
        unsafe { RingSource::new(base, self.ring_bytes, keep) }
    }
}

impl Drop for ProbeRing {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and every source holds an `Arc` of it, so none is left.
        if let Err(errno) = unsafe { munmap(self.base, self.mapped_bytes.get()) } {
            tracing::error!("cannot unmap a probe ring: {errno}");
        }
    }
}

fn whole(path: &Path, ring_bytes: usize, times: usize) -> Result<NonZeroUsize, MemoryError> {
    let page_multiple = ring_bytes.is_multiple_of(4096);
    let bytes = ring_bytes
        .checked_mul(times)
        .filter(|_| page_multiple)
        .and_then(NonZeroUsize::new);
    bytes.ok_or_else(|| MemoryError::Unmappable {
        path: path.into(),
        bytes: ring_bytes as u64,
    })
}
