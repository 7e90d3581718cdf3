//! The subvolumes of a btrfs: each is a tree of files in which inode numbers begin anew.
//!
//! No library wraps the call that tells them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

/// `struct btrfs_ioctl_get_subvol_rootref_args`: where to go on, tree and directory of each subvolume, and
/// how many there are.
#[repr(C)]
pub struct Children {
    from: u64,
    children: [[u64; 2]; 255],
    count: u8,
    align: [u8; 7],
}

const _: () = assert!(size_of::<Children>() == 4096);

mod ioctl {
    nix::ioctl_readwrite!(children, 0x94, 61, super::Children);
}

/// Whether there are subvolumes or snapshots below the directory, which is the top of a btrfs.
///
/// # Errors
/// What the kernel answers.
pub fn has_subvolumes(top: &Path) -> io::Result<bool> {
    let directory = File::open(top)?;
    let mut found = Children {
        from: 0,
        children: [[0; 2]; 255],
        count: 0,
        align: [0; 7],
    };
    // SAFETY: BTRFS_IOC_GET_SUBVOL_ROOTREF reads and writes one such structure, and the kernel keeps no
    // pointer after the call.
    let answer = unsafe { ioctl::children(directory.as_raw_fd(), &raw mut found) };
    match answer {
        // There are more than fit.
        Err(nix::errno::Errno::EOVERFLOW) => Ok(true),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(found.count != 0),
    }
}
