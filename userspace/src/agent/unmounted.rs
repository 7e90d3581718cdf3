//! Whether a file system was unmounted in an orderly way by whoever had it mounted last.
//!
//! A node that dies leaves its journal to be recovered. If nothing is left to recover although its
//! epoch is open, somebody has had the volume since: unmounted it late, or mounted it by hand, perhaps
//! written to it, and unmounted it. The records in the region are then older than what is on the disk.
//!
//! It only reads, with direct I/O, and takes whatever it does not understand for a crash: that leaves
//! the decision to the words that are always there.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::Context as _;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::filesystem_uuid::{Page, super_block};

/// ext4: `s_feature_incompat`, whose bit says that the journal needs recovery.
const EXT4_INCOMPATIBLE_AT: usize = 1024 + 0x60;
const EXT4_RECOVER: u32 = 0x4;

/// XFS, `struct xfs_dsb`, big-endian.
const XFS_BLOCK_BYTES_AT: usize = 4;
const XFS_LOG_BEGIN_AT: usize = 48;
const XFS_GROUP_BLOCKS_AT: usize = 84;
const XFS_LOG_BLOCKS_AT: usize = 96;
const XFS_GROUP_SHIFT_AT: usize = 124;

/// XFS's log consists of basic blocks, each of which begins with the number of the log's round, or
/// with a record's header, which has it behind its magic number.
const BASIC_BYTES: usize = 512;
const RECORD_MAGIC: u32 = 0xfeed_babe;
const RECORD_ROUND_AT: usize = 4;
const RECORD_LENGTH_AT: usize = 12;
const RECORD_OPERATIONS_AT: usize = 40;
const RECORD_HEADER_COVERS_AT: usize = 320;
/// Bytes of a record for which one block of header is enough.
const HEADER_COVERS: u32 = 32 << 10;
/// The flags of a record's first operation.
const OPERATION_FLAGS_AT: usize = 9;
const UNMOUNT: u8 = 0x20;
/// A record is no longer than this.
const RECORD_BLOCKS_MAX: u64 = 1024;

/// Whether the file system of this type on `device`, which is not mounted here, was unmounted.
///
/// # Errors
/// When the device cannot be read.
pub fn was_unmounted(device: &Path, filesystem: &str) -> anyhow::Result<bool> {
    let page = super_block(device, filesystem)?;
    match filesystem {
        "ext4" => Ok(le32(&page, EXT4_INCOMPATIBLE_AT) & EXT4_RECOVER == 0),
        "xfs" => {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
                .open(device)
                .with_context(|| format!("opening {}", device.display()))?;
            let Some(log) = Log::of(&page, file) else {
                return Ok(false);
            };
            let read = log.ends_with_unmount();
            read.with_context(|| format!("reading the log of {}", device.display()))
        }
        // btrfs: what an unmount commits looks like any other commit.
        _ => Ok(false),
    }
}

/// XFS's log inside its file system.
struct Log {
    device: File,
    begin: u64,
    /// Basic blocks.
    blocks: u64,
}

impl Log {
    /// `None`: it lies on a device of its own.
    fn of(page: &[u8], device: File) -> Option<Self> {
        let block_bytes = u64::from(be32(page, XFS_BLOCK_BYTES_AT));
        let at = u64::from_be_bytes(word(page, XFS_LOG_BEGIN_AT));
        let shift = u32::from(*page.get(XFS_GROUP_SHIFT_AT)?);
        let group = at.checked_shr(shift)?;
        let in_group = at.checked_sub(group.checked_shl(shift)?)?;
        let block = group
            .checked_mul(u64::from(be32(page, XFS_GROUP_BLOCKS_AT)))?
            .checked_add(in_group)?;
        let bytes = u64::from(be32(page, XFS_LOG_BLOCKS_AT)).checked_mul(block_bytes)?;
        let blocks = bytes / BASIC_BYTES as u64;
        (at != 0 && blocks > 1).then_some(Self {
            device,
            begin: block.checked_mul(block_bytes)?,
            blocks,
        })
    }

    /// A basic block; the device takes whole pages only.
    fn block(&self, number: u64) -> std::io::Result<[u8; BASIC_BYTES]> {
        let at = self.begin + number * BASIC_BYTES as u64;
        let mut page = Page::new_zeroed();
        let page_bytes = size_of::<Page>() as u64;
        self.device
            .read_exact_at(page.as_mut_bytes(), at - at % page_bytes)?;
        Ok(word(page.as_bytes(), (at % page_bytes) as usize))
    }

    fn round(&self, number: u64) -> std::io::Result<u32> {
        let block = self.block(number)?;
        Ok(match be32(&block, 0) {
            RECORD_MAGIC => be32(&block, RECORD_ROUND_AT),
            round => round,
        })
    }

    /// The block behind the last one that was written.
    fn head(&self) -> std::io::Result<u64> {
        let first = self.round(0)?;
        let (mut same, mut other) = (0, self.blocks);
        if self.round(self.blocks - 1)? == first {
            return Ok(self.blocks);
        }
        while other - same > 1 {
            let middle = same + (other - same) / 2;
            if self.round(middle)? == first {
                same = middle;
            } else {
                other = middle;
            }
        }
        Ok(other)
    }

    /// Whether the last record is the one that an unmount writes, alone in its record.
    fn ends_with_unmount(&self) -> std::io::Result<bool> {
        let head = self.head()?;
        for number in (head.saturating_sub(RECORD_BLOCKS_MAX)..head).rev() {
            let header = self.block(number)?;
            if be32(&header, 0) != RECORD_MAGIC {
                continue;
            }
            let covers = be32(&header, RECORD_HEADER_COVERS_AT);
            let headers = u64::from(covers.div_ceil(HEADER_COVERS).max(1));
            let length = u64::from(be32(&header, RECORD_LENGTH_AT)).div_ceil(BASIC_BYTES as u64);
            if be32(&header, RECORD_OPERATIONS_AT) != 1 || number + headers + length != head {
                return Ok(false);
            }
            let operation = self.block(number + headers)?;
            return Ok(operation[OPERATION_FLAGS_AT] & UNMOUNT != 0);
        }
        Ok(false)
    }
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    at.checked_add(N)
        .and_then(|end| bytes.get(at..end)?.try_into().ok())
        .unwrap_or([0; N])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(word(bytes, at))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(word(bytes, at))
}

#[cfg(test)]
mod tests;
