//! One of each change that is noticed and not captured, as far as this volume can do it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use twinwrite_abi::gap;

use super::bench::{BLOCK_BYTES, Bench, done};
use crate::capture::probe::bpf_lsm_active;
use crate::capture::{CaptureError, HOOKS, Need};

/// An ioctl that no file system has.
const UNKNOWN_IOCTL: libc::c_ulong = 0x4004_eeee;

/// Tries each reason.
pub(super) fn all(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let file = bench.file_of_blocks("gaps")?;
    done("fsync", file.sync_all())?;
    collapsed(bench, &file)?;
    for (block, read_first) in [(0, false), (1, true)] {
        let operation = if read_first {
            "store after a load"
        } else {
            "store"
        };
        let operation = format!("{operation} through a shared mapping");
        noticed(bench, gap::MAPPING, &operation, || {
            store(&file, block, read_first)
        })?;
    }
    let (from, to) = (bench.path("gaps"), bench.path("gaps-moved"));
    noticed(bench, gap::WHITEOUT, "rename with RENAME_WHITEOUT", || {
        renameat_with(CWD, &from, CWD, &to, RenameFlags::WHITEOUT)?;
        Ok(())
    })?;
    if bpf_lsm_active() {
        noticed(bench, gap::IOCTL, "an unknown ioctl", || {
            // SAFETY: the command is unknown, so nothing reads the argument.
            let _ = unsafe { libc::ioctl(file.as_raw_fd(), UNKNOWN_IOCTL, 0) };
            Ok(())
        })?;
    } else {
        bench.skip("an unknown ioctl", "BPF LSM is not in use");
    }
    Ok(())
}

/// The file becomes shorter in its middle.
fn collapsed(bench: &mut Bench<'_>, file: &File) -> Result<(), CaptureError> {
    let operation = "collapse a range";
    noticed(bench, gap::FALLOCATE, operation, || {
        let block = BLOCK_BYTES as u64;
        fallocate(file, FallocateFlags::COLLAPSE_RANGE, block, block)?;
        Ok(())
    })
}

/// A store into one block; the two ways a page becomes writable differ in the kernel.
pub(super) fn store(file: &File, block: usize, read_first: bool) -> io::Result<()> {
    // SAFETY: a fresh shared mapping of a file longer than one block, written once and unmapped.
    unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            BLOCK_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            (block * BLOCK_BYTES) as libc::off_t,
        );
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let byte = map.cast::<u8>();
        if read_first {
            byte.read_volatile();
        }
        byte.write_volatile(1);
        libc::munmap(map, BLOCK_BYTES);
    }
    Ok(())
}

/// Does `act` and demands that the counter of `reason` has grown.
fn noticed(
    bench: &mut Bench<'_>,
    reason: usize,
    operation: &str,
    act: impl FnOnce() -> io::Result<()>,
) -> Result<(), CaptureError> {
    let name = gap::NAMES.get(reason).copied().unwrap_or("other");
    let before = bench.capture.control().gaps();
    if let Err(error) = act() {
        bench.skip(operation, error);
        return Ok(());
    }
    let after = bench.capture.control().gaps();
    let count = |gaps: &[u64]| gaps.get(reason).copied().unwrap_or_default();
    if count(&after) > count(&before) {
        bench.operations += 1;
        return bench.begin();
    }
    let disabled = bench.capture.disabled();
    if disabled
        .iter()
        .any(|disabled| disabled.hook.need == Need::Notices(reason))
    {
        bench.skip(operation, "this kernel lacks a hook that would notice it");
        return Ok(());
    }
    let hook = HOOKS.iter().find(|hook| hook.need == Need::Notices(reason));
    Err(CaptureError::Calibration {
        hook: hook.map_or("the gap hooks", |hook| hook.function),
        operation: operation.to_owned(),
        expected: format!("one more gap of reason {name}"),
        seen: "none".to_owned(),
    })
}
