//! The UUID of a file system, from its super block.
//!
//! Read with direct I/O, so that no buffered copy of the device stays behind on a node that does
//! not have it mounted.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use procfs::process::Process;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, makedev, statx};
use zerocopy::{FromZeros, IntoBytes, KnownLayout};

#[derive(zerocopy::FromBytes, IntoBytes, KnownLayout, zerocopy::Immutable)]
#[repr(C, align(4096))]
pub(super) struct Page([u8; 4096]);

/// ext4: `s_uuid` of `struct ext4_super_block`, which begins at byte 1024.
const EXT4_UUID_AT: usize = 1024 + 0x68;
/// xfs: `sb_uuid` of `struct xfs_dsb`, which begins at byte 0.
const XFS_UUID_AT: usize = 32;
/// btrfs: `fsid` of `struct btrfs_super_block`.
const BTRFS_UUID_AT: usize = 0x20;
/// Where that begins on the device (`BTRFS_SUPER_INFO_OFFSET`).
const BTRFS_SUPER_BLOCK_AT: u64 = 0x1_0000;

/// The UUID of the file system of this type on `device`.
///
/// # Errors
/// When the device cannot be read.
pub fn filesystem_uuid(device: &Path, filesystem: &str) -> anyhow::Result<[u8; 16]> {
    let page = super_block(device, filesystem)?;
    let at = match filesystem {
        "xfs" => XFS_UUID_AT,
        "btrfs" => BTRFS_UUID_AT,
        _ => EXT4_UUID_AT,
    };
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&page[at..at + 16]);
    Ok(uuid)
}

/// The page of `device` that holds the super block of a file system of this type: the first one, but for
/// btrfs.
///
/// # Errors
/// When the device cannot be read.
pub fn super_block(device: &Path, filesystem: &str) -> anyhow::Result<[u8; 4096]> {
    let at = if filesystem == "btrfs" {
        BTRFS_SUPER_BLOCK_AT
    } else {
        0
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(device)
        .with_context(|| format!("opening {}", device.display()))?;
    let mut page = Page::new_zeroed();
    file.read_exact_at(page.as_mut_bytes(), at)
        .with_context(|| format!("reading the super block of {}", device.display()))?;
    Ok(page.0)
}

/// The UUID of the file system that is mounted at `mount_point`.
///
/// # Errors
/// When nothing is mounted there, it lies on no block device, or the device cannot be read.
pub fn mounted_uuid(mount_point: &Path) -> anyhow::Result<[u8; 16]> {
    let place = mount_point.display();
    let found = statx(CWD, mount_point, AtFlags::empty(), StatxFlags::MNT_ID)
        .with_context(|| format!("looking at {place}"))?;
    ensure!(
        found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
        "{place} is no mount point: mount the volume, and name the place where it is mounted"
    );
    let mounts = Process::myself()?.mountinfo()?.0;
    let mount = mounts
        .iter()
        .find(|mount| u64::try_from(mount.mnt_id) == Ok(found.stx_mnt_id))
        .with_context(|| format!("the mount at {place} is not in /proc/self/mountinfo"))?;
    let device = makedev(found.stx_dev_major, found.stx_dev_minor);
    // The files of a btrfs bear the number of no device; what it lies on is what it names as its source.
    let is_btrfs = mount.fs_type == "btrfs";
    let is_it = |path: &PathBuf| {
        std::fs::metadata(path)
            .is_ok_and(|m| m.rdev() == device || is_btrfs && m.file_type().is_block_device())
    };
    let source = mount.mount_source.as_ref().map(PathBuf::from);
    let by_number = PathBuf::from("/dev/block").join(&mount.majmin);
    let path = source
        .into_iter()
        .chain([by_number])
        .find(is_it)
        .with_context(|| format!("no device node of {} (at {place}) in /dev", mount.majmin))?;
    filesystem_uuid(&path, &mount.fs_type)
}
