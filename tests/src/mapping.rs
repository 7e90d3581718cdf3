//! A file mapped for sharing. Unsafe code, because there is no safe way to store through a mapping.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

/// The mapping of a whole file.
pub(crate) struct Mapping {
    address: NonNull<std::ffi::c_void>,
    bytes: NonZeroUsize,
}

impl Mapping {
    /// Maps the first `bytes` of a file that stays at least so long.
    pub(crate) fn new(file: &File, bytes: NonZeroUsize) -> Result<Self, Errno> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses an address that nothing else in this process uses.
        let address = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { address, bytes })
    }

    /// Stores bytes at an offset; nothing if they do not fit.
    pub(crate) fn store(&mut self, offset: usize, content: &[u8]) -> bool {
        let fits = offset
            .checked_add(content.len())
            .is_some_and(|end| end <= self.bytes.get());
        if fits {
            let to = self.address.cast::<u8>();
            // SAFETY: the range lies inside the mapping, which is writable and lives as long as
            // `self`; `content` is this process's own memory and so lies elsewhere.
            unsafe {
                to.add(offset)
                    .copy_from_nonoverlapping(NonNull::from(content).cast(), content.len());
            }
        }
        fits
    }

    /// `msync(MS_SYNC)` of a range that begins on a page.
    pub(crate) fn sync(&self, offset: usize, bytes: usize) -> Result<(), Errno> {
        let end = offset.checked_add(bytes).ok_or(Errno::EINVAL)?;
        if end > self.bytes.get() {
            return Err(Errno::EINVAL);
        }
        // SAFETY: the range lies inside the mapping, which lives as long as `self`.
        unsafe { msync(self.address.byte_add(offset), bytes, MsFlags::MS_SYNC) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and nobody else unmaps it.
        let unmapped = unsafe { munmap(self.address, self.bytes.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
