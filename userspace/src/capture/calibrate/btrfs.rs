//! What is different on a btrfs: it must not get a second tree of files while it is protected, and not every
//! direct write is one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::bench::{Bench, done, write_blocks};
use super::known::Item;
use crate::capture::CaptureError;

/// `BTRFS_IOC_SUBVOL_CREATE`, and its argument: a descriptor that is not used, and the name.
const SUBVOL_CREATE: libc::c_ulong = 0x5000_940e;
const ARGUMENT_BYTES: usize = 4096;
const NAME_AT: usize = 8;
const NAME: &[u8] = b"subvolume";

/// The name of the file that direct writes are tried on.
pub(super) const DIRECT: &str = "direct";

/// A file of blocks that a direct write reaches past the page cache: newer kernels do not let one do so to a
/// file with checksums, which one that is written over in place does not have.
pub(super) fn direct_file(bench: &mut Bench<'_>) -> Result<Item, CaptureError> {
    let file = done("create", File::create(bench.path(DIRECT)))?;
    let item = bench.hold(DIRECT)?;
    let flags = done("lsattr", ioctl_getflags(&file))?;
    done("chattr +C", ioctl_setflags(&file, flags | IFlags::NOCOW))?;
    write_blocks(&file)?;
    done("fsync", file.sync_all())?;
    bench.begin()?;
    Ok(item)
}

/// Tries to make a subvolume.
pub(super) fn no_subvolume(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let directory = done("open", File::open(bench.path(".")))?;
    let mut argument = [0u8; ARGUMENT_BYTES];
    argument[NAME_AT..NAME_AT + NAME.len()].copy_from_slice(NAME);
    // SAFETY: the kernel reads an argument of this size, and keeps no pointer to it.
    let answer = unsafe {
        libc::ioctl(
            directory.as_raw_fd(),
            SUBVOL_CREATE,
            argument.as_ptr().cast::<libc::c_void>(),
        )
    };
    let seen = match (answer, io::Error::last_os_error()) {
        (0, _) => "a subvolume".to_owned(),
        (_, error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            bench.operations += 1;
            return bench.begin();
        }
        (_, error) => error.to_string(),
    };
    Err(CaptureError::Calibration {
        hook: "file_ioctl",
        operation: "making a subvolume".to_owned(),
        expected: "a refusal".to_owned(),
        seen,
    })
}
