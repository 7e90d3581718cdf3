//! One of each change that is noticed and not captured, as far as this volume can do it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use twinwrite_abi::gap;

use super::bench::{Bench, done};
use super::operations::rename_with;
use crate::capture::probe::bpf_lsm_active;
use crate::capture::{CaptureError, HOOKS, Need};

const BLOCK_BYTES: usize = 4096;
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
const FS_NODUMP_FLAG: libc::c_long = 0x40;
const FICLONE: libc::c_ulong = 0x4004_9409;
/// An ioctl that no file system has.
const UNKNOWN_IOCTL: libc::c_ulong = 0x4004_eeee;

/// Tries each reason.
pub(super) fn all(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let file = done(
        "create",
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(bench.path("gaps")),
    )?;
    done("write", file.write_all_at(&[7; 4 * BLOCK_BYTES], 0))?;
    done("fsync", file.sync_all())?;
    let fd = file.as_raw_fd();

    // SAFETY: plain system calls on an open descriptor; the pointers are valid for the calls.
    unsafe {
        noticed(bench, gap::FALLOCATE, "fallocate", || {
            checked(libc::fallocate(fd, 0, 0, 8 * BLOCK_BYTES as libc::off_t))
        })?;
        noticed(bench, gap::XATTR, "setxattr", || {
            let value = b"1";
            checked(libc::fsetxattr(
                fd,
                c"user.twinwrite".as_ptr(),
                value.as_ptr().cast(),
                1,
                0,
            ))
        })?;
        noticed(bench, gap::XATTR, "removexattr", || {
            checked(libc::fremovexattr(fd, c"user.twinwrite".as_ptr()))
        })?;
        noticed(bench, gap::IOCTL, "FS_IOC_SETFLAGS", || {
            let mut flags: libc::c_long = 0;
            checked(libc::ioctl(fd, FS_IOC_GETFLAGS, &raw mut flags))?;
            flags |= FS_NODUMP_FLAG;
            checked(libc::ioctl(fd, FS_IOC_SETFLAGS, &raw const flags))
        })?;
    }
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
    let path = bench.path("gaps");
    noticed(bench, gap::DIRECT_IO, "write with O_DIRECT", || {
        let direct = File::options()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)?;
        direct.write_all_at(&AlignedBlock([9; BLOCK_BYTES]).0, 0)
    })?;
    let clone = bench.path("clone");
    noticed(bench, gap::REMAP, "FICLONE", || {
        let target = File::create(&clone)?;
        // SAFETY: a plain system call on open descriptors.
        checked(unsafe { libc::ioctl(target.as_raw_fd(), FICLONE, fd) })
    })?;
    let (from, to) = (bench.path("gaps"), bench.path("gaps-moved"));
    inherited_acl(bench)?;
    noticed(bench, gap::WHITEOUT, "rename with RENAME_WHITEOUT", || {
        rename_with(&from, &to, libc::RENAME_WHITEOUT)
    })?;
    if bpf_lsm_active() {
        noticed(bench, gap::IOCTL, "an unknown ioctl", || {
            // SAFETY: the command is unknown, so nothing reads the argument.
            let _ = unsafe { libc::ioctl(fd, UNKNOWN_IOCTL, 0) };
            Ok(())
        })?;
    } else {
        bench.skip("an unknown ioctl", "BPF LSM is not in use");
    }
    Ok(())
}

/// A directory gets a default ACL, then a file is created in it.
fn inherited_acl(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    // Version 2; owner rwx, owning group r-x, others none (include/uapi/linux/posix_acl_xattr.h).
    let entries: [(u16, u16); 3] = [(0x01, 7), (0x04, 5), (0x20, 0)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    let directory = bench.path("acl");
    done("mkdir", std::fs::create_dir(&directory))?;
    let opened = done("open", File::open(&directory))?;
    noticed(bench, gap::XATTR, "set a default ACL", || {
        let name = c"system.posix_acl_default";
        // SAFETY: the name is a C string, the value is as long as said.
        checked(unsafe {
            libc::fsetxattr(
                opened.as_raw_fd(),
                name.as_ptr(),
                acl.as_ptr().cast(),
                acl.len(),
                0,
            )
        })?;
        Ok(())
    })?;
    noticed(
        bench,
        gap::XATTR,
        "create a file that inherits an ACL",
        || File::create(directory.join("heir")).map(drop),
    )
}

#[repr(C, align(4096))]
struct AlignedBlock([u8; BLOCK_BYTES]);

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A store into one block; the two ways a page becomes writable differ in the kernel.
fn store(file: &File, block: usize, read_first: bool) -> io::Result<()> {
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
