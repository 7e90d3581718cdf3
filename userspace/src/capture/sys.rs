//! The few system calls that no crate wraps: mappings of BPF maps, and program information.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::CaptureError;

/// Bytes of a page; the ring's layout is in pages.
#[must_use]
pub(super) fn page_bytes() -> usize {
    // SAFETY: sysconf has no precondition.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// A shared mapping of a BPF map, unmapped on drop.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is memory; what its users read and write concurrently is their own matter and
// goes through atomics or committed records only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, shared.
    ///
    /// # Errors
    /// [`CaptureError::System`] with `what`.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        writable: bool,
        what: &str,
    ) -> Result<Self, CaptureError> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| CaptureError::Options(format!("{what}: too large")))?;
        // SAFETY: a fresh mapping at an address the kernel chooses touches no other memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(CaptureError::last(format!("mapping {what}")));
        }
        let start = NonNull::new(start.cast())
            .ok_or_else(|| CaptureError::last(format!("mapping {what}")))?;
        Ok(Self { start, len })
    }

    /// First byte.
    #[must_use]
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping, and nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// Bytes of `struct bpf_prog_info` up to and with `recursion_misses`.
const PROGRAM_INFO_BYTES: usize = 216;
const RECURSION_MISSES_AT: usize = 208;

#[repr(C)]
#[derive(Default)]
struct GetById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    len: u32,
    info: u64,
}

fn bpf<T>(command: libc::c_long, attribute: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attribute` is a prefix of `union bpf_attr` as the command wants it, and its size is
    // passed; pointers inside it are valid for the call (see the callers).
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attribute),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Opens a loaded program.
///
/// # Errors
/// The system's.
pub(super) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let fd = bpf(
        BPF_PROG_GET_FD_BY_ID,
        &mut GetById {
            id,
            ..GetById::default()
        },
    )?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::other("descriptor out of range"))?;
    // SAFETY: the kernel just gave this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How often a program was skipped because it was already running on that processor.
///
/// # Errors
/// The system's.
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = [0u64; PROGRAM_INFO_BYTES / 8];
    let mut attribute = GetInfo {
        fd: program.as_raw_fd().cast_unsigned(),
        len: PROGRAM_INFO_BYTES as u32,
        info: info.as_mut_ptr() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attribute)?;
    Ok(info[RECURSION_MISSES_AT / 8])
}
