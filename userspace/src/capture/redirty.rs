//! Making pages dirty again whose write-back failed, without changing a byte.
//!
//! After a failed write-back the pages are clean and still hold what was written. A shared mapping
//! whose pages are populated for writing makes them dirty as a store would, and nothing is stored, so
//! that writers may go on meanwhile. It must never read a page from the disk for that: what lies there
//! is the very thing in doubt. A page that was dropped and read again between the error and this call
//! cannot be told from one that was not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use super::handle;
use super::sys::page_bytes;
use crate::ids::Identity;

/// Most bytes that are mapped at a time.
const MAPPED_MAX: u64 = 4 * 1024 * 1024;

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirtied {
    /// All pages that the file still has there are dirty.
    All,
    /// The file is gone: nobody can read its bytes any more.
    Gone,
    /// A page is no longer in the cache, and so neither are the bytes that were written.
    NotCached {
        /// Where.
        at: u64,
    },
}

/// Makes these ranges of a file dirty.
///
/// # Errors
/// What the kernel answers.
pub fn redirty(
    mount: impl AsFd,
    identity: Identity,
    ranges: &[Range<u64>],
) -> io::Result<Redirtied> {
    let Some(fd) = handle::open_linked_or_not(mount, identity, libc::O_RDWR)? else {
        return Ok(Redirtied::Gone);
    };
    let file = File::from(fd);
    for range in ranges {
        if let Some(at) = redirty_range(&file, range)? {
            return Ok(Redirtied::NotCached { at });
        }
    }
    Ok(Redirtied::All)
}

/// Where a page is not in the cache, if one is.
fn redirty_range(file: &File, range: &Range<u64>) -> io::Result<Option<u64>> {
    let page = page_bytes() as u64;
    let mut at = range.start - range.start % page;
    loop {
        // Looked at anew: what is cut off meanwhile needs no write-back.
        let end = range.end.min(file.metadata()?.len());
        if at >= end {
            return Ok(None);
        }
        let bytes = (end - at).min(MAPPED_MAX).next_multiple_of(page);
        match populate(file, at, bytes as usize)? {
            Some(missing) => return Ok(Some(missing)),
            None => at += bytes,
        }
    }
}

/// Maps a part of a file and makes its pages dirty; the first one that is not in the cache, if one is.
fn populate(file: &File, at: u64, bytes: usize) -> io::Result<Option<u64>> {
    let offset = i64::try_from(at).map_err(io::Error::other)?;
    // SAFETY: a fresh mapping at a place of the kernel's choice; the result is checked.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mapped = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at address 0"));
    let outcome = mapped.and_then(|start| populate_mapped(start, at, bytes));
    // SAFETY: the mapping was made above, and nothing points into it.
    unsafe { libc::munmap(start, bytes) };
    outcome
}

fn populate_mapped(start: NonNull<libc::c_void>, at: u64, bytes: usize) -> io::Result<Option<u64>> {
    let page = page_bytes();
    let mut resident = vec![0_u8; bytes.div_ceil(page)];
    // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
    if unsafe { libc::mincore(start.as_ptr(), bytes, resident.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if let Some(index) = resident.iter().position(|byte| byte & 1 == 0) {
        return Ok(Some(at + (index * page) as u64));
    }
    // SAFETY: the range is mapped; nothing is read or written through it, and what cannot be populated
    // (the file was cut off) is an error and not a signal.
    if unsafe { libc::madvise(start.as_ptr(), bytes, libc::MADV_POPULATE_WRITE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn what_is_cached_is_populated_and_keeps_its_bytes() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("file");
        let mut file = File::create_new(&path).unwrap();
        let written: Vec<u8> = (0..20_000_u32).map(|n| n as u8).collect();
        file.write_all(&written).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(redirty_range(&file, &(5000..9000)).unwrap(), None);
        assert_eq!(redirty_range(&file, &(0..u64::MAX)).unwrap(), None);
        assert_eq!(
            redirty_range(&file, &(50_000..60_000)).unwrap(),
            None,
            "behind its end"
        );
        assert_eq!(std::fs::read(&path).unwrap(), written);
    }

    #[test]
    fn a_hole_that_was_never_read_is_not_cached() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("file");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(redirty_range(&file, &(4096..8192)).unwrap(), Some(4096));
    }
}
