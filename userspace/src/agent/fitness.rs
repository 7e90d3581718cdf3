//! What cannot be protected: file systems, and ways of mounting them, on which an fsync proves
//! nothing, changes pass unseen, or a replay would not find its files.
//!
//! Judged from the super block and from what the kernel says of the mount, not from the
//! configuration: mount options come from many places. It must never let pass what it cannot read.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use procfs::process::{MountInfo, Process};
use thiserror::Error;

use super::filesystem_uuid::super_block;
use crate::capture::{bpf_lsm_active, has_subvolumes};
use crate::cluster::mounts::{KernelDev, is_of, unescaped};
use crate::config::Volume;

#[cfg(test)]
mod tests;

/// Where ext4's super block begins, and fields of `struct ext4_super_block`.
const EXT4_AT: usize = 1024;
const EXT4_MAGIC_AT: usize = EXT4_AT + 0x38;
const EXT4_INODE_BYTES_AT: usize = EXT4_AT + 0x58;
const EXT4_COMPATIBLE_AT: usize = EXT4_AT + 0x5c;
const EXT4_INCOMPATIBLE_AT: usize = EXT4_AT + 0x60;
const EXT4_DEFAULT_OPTIONS_AT: usize = EXT4_AT + 0x100;
const EXT4_MAGIC: u16 = 0xef53;
/// Smaller inodes have no `i_crtime`.
const EXT4_INODE_BYTES_MIN: u16 = 256;
const EXT4_HAS_JOURNAL: u32 = 0x4;
const EXT4_ENCRYPT: u32 = 0x1_0000;
const EXT4_CASEFOLD: u32 = 0x2_0000;
const EXT4_DEFAULT_NO_BARRIER: u32 = 0x100;

/// Fields of `struct xfs_dsb`, which begins at byte 0 and is big-endian.
const XFS_REALTIME_BLOCKS_AT: usize = 16;
const XFS_VERSION_AT: usize = 100;
/// Its low four bits; inodes of earlier versions have no `di_crtime`.
const XFS_VERSION_MASK: u16 = 0xf;
const XFS_VERSION_MIN: u16 = 5;
/// Names are compared without regard to case.
const XFS_CASELESS: u16 = 0x4000;

/// Fields of `struct btrfs_super_block`, little-endian.
const BTRFS_MAGIC_AT: usize = 0x40;
const BTRFS_MAGIC: &[u8] = b"_BHRfS_M";
const BTRFS_DEVICES_AT: usize = 0x88;
const BTRFS_FEATURES_AT: usize = 0xbc;
/// A device that must be written in order.
const BTRFS_ZONED: u32 = 1 << 12;

/// Why a volume cannot be protected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unfit {
    /// Its super block is of something else.
    #[error("{0} holds no {1}: correct `volume.device` or `volume.filesystem`")]
    OtherFilesystem(String, String),
    /// ext4 without a journal.
    #[error(
        "its ext4 has no journal, so a crash leaves nothing that a replay could rely on: unmount it and \
         add one (tune2fs -O has_journal, then e2fsck -f)"
    )]
    NoJournal,
    /// The journal is there and not replayed.
    #[error(
        "it is mounted with `{0}`, so its journal is not recovered: mount it without that option"
    )]
    NoRecovery(String),
    /// Directories may be casefolded.
    #[error(
        "its names may be compared without regard to case ({0}), and a replay takes two names for two \
         files: make a file system without that"
    )]
    Caseless(&'static str),
    /// Files may be encrypted.
    #[error(
        "its ext4 has the feature `encrypt` (fscrypt), and the other node could not replay into \
         directories whose key it lacks: make a file system without it, and encrypt the device \
         (dm-crypt) on both nodes"
    )]
    Encrypt,
    /// Inodes have no time of birth.
    #[error(
        "its files have no time of birth ({0}), by which a replay tells a file that was moved to a name from          one that was made there: make a file system with it ({1})"
    )]
    NoBirth(&'static str, &'static str),
    /// More than the one device that is configured.
    #[error(
        "its btrfs lies on {0} devices, and a takeover fences and mounts one: make a file system on one \
         device (which may be a RAID of md or dm)"
    )]
    Devices(u64),
    /// A zoned btrfs.
    #[error("its btrfs is zoned, which nobody has tried: make a file system on an ordinary device")]
    Zoned,
    /// Inode numbers are not unique.
    #[error(
        "its btrfs has subvolumes or snapshots, in each of which inode numbers begin anew, so that the \
         programs and a replay would take one file for another: delete them, or give each a file system \
         of its own"
    )]
    Subvolumes,
    /// Nothing keeps subvolumes from being made.
    #[error(
        "its btrfs could get subvolumes and snapshots, which only BPF LSM programs can refuse: boot with \
         `bpf` in the lsm= list"
    )]
    NoRefusal,
    /// Bytes may live on a realtime device.
    #[error(
        "its XFS has a realtime device, whose files the programs do not follow: make a file system \
         without one"
    )]
    Realtime,
    /// Stores may reach the medium without the page cache.
    #[error(
        "its files may bypass the page cache (DAX: {0}), so their changes pass unseen: mount it with \
         `dax=never`"
    )]
    Dax(String),
    /// An fsync does not reach the medium.
    #[error(
        "it is mounted without barriers ({0}), so an fsync proves nothing: mount it with `barrier`; or, \
         if the device has no volatile cache, say so with `allow_no_barriers = true`"
    )]
    NoBarriers(&'static str),
}

/// How the kernel mounted it.
pub type MountOptions = HashMap<String, Option<String>>;

/// Refuses a volume that cannot be protected; what its mount options are is only looked at while it
/// is mounted.
///
/// # Errors
/// All that is wrong, with the remedies; or what could not be read.
pub fn check(volume: &Volume) -> anyhow::Result<()> {
    let page = super_block(&volume.device, &volume.filesystem)?;
    let mut found = of_super_block(volume, &page);
    if let Some(mount) = mount_of(&volume.device)? {
        let options = &mount.super_options;
        found.extend(of_mount(volume, &page, options, has_dax(&volume.device)?));
        if volume.filesystem == "btrfs" {
            found.extend(of_btrfs(&unescaped(&mount.mount_point))?);
        }
    }
    let told: Vec<String> = found.iter().map(ToString::to_string).collect();
    anyhow::ensure!(
        told.is_empty(),
        "volume {} cannot be protected: {}",
        volume.name,
        told.join("; ")
    );
    Ok(())
}

/// A mount of the file system on `device`; `None`: it is not mounted.
fn mount_of(device: &Path) -> anyhow::Result<Option<MountInfo>> {
    let dev = device_number(device)?;
    let mounts = Process::myself()?.mountinfo()?.0;
    Ok(mounts.into_iter().find(|mount| is_of(mount, dev)))
}

/// What a mounted btrfs has, or may get.
fn of_btrfs(mount_point: &Path) -> anyhow::Result<Vec<Unfit>> {
    let has_subvolumes = has_subvolumes(mount_point)
        .with_context(|| format!("asking for the subvolumes of {}", mount_point.display()))?;
    let found = [
        has_subvolumes.then_some(Unfit::Subvolumes),
        (!bpf_lsm_active()).then_some(Unfit::NoRefusal),
    ];
    Ok(found.into_iter().flatten().collect())
}

fn device_number(device: &Path) -> anyhow::Result<KernelDev> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata =
        std::fs::metadata(device).with_context(|| format!("looking at {}", device.display()))?;
    Ok(KernelDev::from_stat(metadata.rdev()))
}

/// Whether the device can do DAX at all. A partition has no queue of its own: its disk's counts.
fn has_dax(device: &Path) -> anyhow::Result<bool> {
    let dev = device_number(device)?;
    let block = format!("/sys/dev/block/{}:{}", dev.major, dev.minor);
    let told = ["queue/dax", "../queue/dax"]
        .iter()
        .find_map(|file| std::fs::read_to_string(Path::new(&block).join(file)).ok());
    Ok(told.is_some_and(|text| text.trim() == "1"))
}

fn word<const N: usize>(page: &[u8], at: usize) -> [u8; N] {
    page.get(at..at + N)
        .and_then(|bytes| bytes.try_into().ok())
        .unwrap_or([0; N])
}

fn le32(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(word(page, at))
}

fn of_super_block(volume: &Volume, page: &[u8]) -> Vec<Unfit> {
    let is_it = match volume.filesystem.as_str() {
        "xfs" => page.starts_with(b"XFSB"),
        "btrfs" => page
            .get(BTRFS_MAGIC_AT..)
            .is_some_and(|rest| rest.starts_with(BTRFS_MAGIC)),
        _ => u16::from_le_bytes(word(page, EXT4_MAGIC_AT)) == EXT4_MAGIC,
    };
    if !is_it {
        let device = volume.device.display().to_string();
        return vec![Unfit::OtherFilesystem(device, volume.filesystem.clone())];
    }
    match volume.filesystem.as_str() {
        "xfs" => of_xfs(page),
        "btrfs" => {
            let devices = u64::from_le_bytes(word(page, BTRFS_DEVICES_AT));
            let is_zoned = le32(page, BTRFS_FEATURES_AT) & BTRFS_ZONED != 0;
            let found = [
                (devices != 1).then_some(Unfit::Devices(devices)),
                is_zoned.then_some(Unfit::Zoned),
            ];
            found.into_iter().flatten().collect()
        }
        _ => of_ext4(page),
    }
}

fn of_xfs(page: &[u8]) -> Vec<Unfit> {
    let realtime = u64::from_be_bytes(word(page, XFS_REALTIME_BLOCKS_AT)) != 0;
    let caseless = u16::from_be_bytes(word(page, XFS_VERSION_AT)) & XFS_CASELESS != 0;
    let version = u16::from_be_bytes(word(page, XFS_VERSION_AT)) & XFS_VERSION_MASK;
    let found = [
        realtime.then_some(Unfit::Realtime),
        (version < XFS_VERSION_MIN).then_some(Unfit::NoBirth("an old XFS", "mkfs.xfs -m crc=1")),
        caseless.then_some(Unfit::Caseless("ascii-ci")),
    ];
    found.into_iter().flatten().collect()
}

fn of_ext4(page: &[u8]) -> Vec<Unfit> {
    let journal = le32(page, EXT4_COMPATIBLE_AT) & EXT4_HAS_JOURNAL != 0;
    let features = le32(page, EXT4_INCOMPATIBLE_AT);
    let inode_bytes = u16::from_le_bytes(word(page, EXT4_INODE_BYTES_AT));
    let found = [
        (!journal).then_some(Unfit::NoJournal),
        (inode_bytes < EXT4_INODE_BYTES_MIN)
            .then_some(Unfit::NoBirth("inodes of 128 bytes", "mkfs.ext4 -I 256")),
        (features & EXT4_CASEFOLD != 0).then_some(Unfit::Caseless("casefold")),
        (features & EXT4_ENCRYPT != 0).then_some(Unfit::Encrypt),
    ];
    found.into_iter().flatten().collect()
}

fn of_mount(
    volume: &Volume,
    page: &[u8],
    options: &MountOptions,
    device_has_dax: bool,
) -> Vec<Unfit> {
    let mut found = Vec::new();
    for option in ["norecovery", "noload", "nologreplay", "rescue"] {
        if options.contains_key(option) {
            found.push(Unfit::NoRecovery(option.to_owned()));
        }
    }
    if volume.filesystem == "xfs" && options.contains_key("rtdev") {
        found.push(Unfit::Realtime);
    }
    // Without an option of its own a file may ask for it, if the device can, and the file system.
    let may_ask = device_has_dax && volume.filesystem != "btrfs";
    let asked = options
        .get("dax")
        .map(|how| how.as_deref().unwrap_or("dax"));
    match asked {
        Some("never") => {}
        Some("inode") | None if may_ask => {
            found.push(Unfit::Dax("by the files' own flags".to_owned()));
        }
        Some("inode") | None => {}
        Some(how) => found.push(Unfit::Dax(format!("mounted with {how}"))),
    }
    if !volume.allow_no_barriers
        && let Some(by) = without_barriers(volume, page, options)
    {
        found.push(Unfit::NoBarriers(by));
    }
    found
}

/// By what barriers are off. ext4 shows only what differs from the defaults in its super block.
fn without_barriers(volume: &Volume, page: &[u8], options: &MountOptions) -> Option<&'static str> {
    let barrier = options.get("barrier").map(|value| value.as_deref());
    match barrier {
        Some(Some("0")) => return Some("the mount option barrier=0"),
        Some(_) => return None,
        None if options.contains_key("nobarrier") => return Some("the mount option nobarrier"),
        None => {}
    }
    let default = volume.filesystem == "ext4"
        && le32(page, EXT4_DEFAULT_OPTIONS_AT) & EXT4_DEFAULT_NO_BARRIER != 0;
    default.then_some("a default in its super block; tune2fs -o ^nobarrier takes it away")
}
