//! Bytes and sizes that change without passing through a buffer: fallocate, reflinks and copies by
//! remapping. Their hooks run after the inode's lock was let go, so a record holds no bytes: the agent
//! reads the range later, with whatever other writers left in it until then.

use aya_ebpf::macros::{fentry, fexit};
use aya_ebpf::programs::{FEntryContext, FExitContext};
use twinwrite_abi::{FILLED_BYTES_MAX, flag, gap, op};

use crate::config::*;
use crate::emit::*;
use crate::unnoticed;

const REMAP_FILE_DEDUP: u32 = 1 << 0;

/// Bits of fallocate's mode (include/uapi/linux/falloc.h).
mod falloc {
    pub const KEEP_SIZE: u32 = 0x01;
    pub const PUNCH_HOLE: u32 = 0x02;
    pub const ZERO_RANGE: u32 = 0x10;
    pub const UNSHARE_RANGE: u32 = 0x40;
}

#[inline(always)]
unsafe fn inode_of(file: *const u8) -> *const u8 {
    // SAFETY: the caller passes a file from the hook's arguments.
    unsafe { member(file, &FILE_INODE) }
}

/// Emits a WRITE of an inode whose lock is not held, which tells of the size only that it was not below
/// `size_after`.
///
/// Size and time are read once the record has its place in the log: what changed them before is seen, and what
/// changes them later has a later record.
#[inline(always)]
pub fn emit_steady(control: Control, inode: *const u8, mut head: Head) {
    let Some(place) = reserve::<Head>(control) else {
        return;
    };
    // SAFETY: callers pass an inode from the hook's arguments.
    let now = unsafe { head_of(op::WRITE, inode) };
    // Whoever changes it tells it.
    head.mode = 0;
    head.flags |= flag::SIZE_RAISES;
    head.time_ns = now.time_ns;
    if head.size_after > now.size_after {
        head.size_after = now.size_after;
    }
    // SAFETY: the reservation has room for one `Head` and is 8-byte aligned.
    unsafe { place.write(head) };
    submit(control, place);
}

/// A range of a file that has changed, or may have.
#[derive(Clone, Copy)]
pub struct Range {
    pub pos: u64,
    /// None if only the size may have changed.
    pub bytes: u64,
    /// Where the change ended if the file can have grown to there by it, 0 otherwise.
    pub grown_to: u64,
    /// Of the record, besides those that its bytes need.
    pub flags: u8,
    /// What it is a gap of if it cannot be told.
    pub reason: usize,
}

/// Emits what a range and the time have become.
#[inline(always)]
pub fn emit_range(control: Control, inode: *const u8, range: Range) {
    // SAFETY: callers pass an inode from the hook's arguments.
    let mut head = unsafe { head_of(op::WRITE, inode) };
    let size = head.size_after;
    head.size_after = range.grown_to;
    let end = range.pos.wrapping_add(range.bytes);
    let end = if end > size { size } else { end };
    head.flags = range.flags;
    if end > range.pos {
        if end - range.pos > FILLED_BYTES_MAX {
            note_gap(control, range.reason, inode);
            return;
        }
        head.pos = range.pos;
        head.data_len = (end - range.pos) as u32;
        head.flags |= flag::NO_BYTES;
    }
    emit_steady(control, inode, head);
}

/// Whether a call with this result has only looked whether it can do what it was asked for.
#[inline(always)]
pub fn is_refusal(result: i32) -> bool {
    const EPERM: i32 = 1;
    const EBADF: i32 = 9;
    const EACCES: i32 = 13;
    const ENODEV: i32 = 19;
    const EISDIR: i32 = 21;
    const EINVAL: i32 = 22;
    const ETXTBSY: i32 = 26;
    const EFBIG: i32 = 27;
    const ESPIPE: i32 = 29;
    const EROFS: i32 = 30;
    const EOPNOTSUPP: i32 = 95;
    matches!(
        result.wrapping_neg(),
        EPERM
            | EBADF
            | EACCES
            | ENODEV
            | EISDIR
            | EINVAL
            | ETXTBSY
            | EFBIG
            | ESPIPE
            | EROFS
            | EOPNOTSUPP
    )
}

#[inline(always)]
fn allocated(ctx: &FExitContext) -> Option<()> {
    let mode: u32 = ctx.arg(1);
    let (pos, bytes): (u64, u64) = (ctx.arg(2), ctx.arg(3));
    // SAFETY: the arguments of the hooked function.
    let inode = unsafe { inode_of(ctx.arg(0)) };
    let control = wanted(inode)?;
    if is_refusal(ctx.ret().ok()?) {
        return None;
    }
    let known = falloc::KEEP_SIZE | falloc::PUNCH_HOLE | falloc::ZERO_RANGE | falloc::UNSHARE_RANGE;
    if mode & !known != 0 {
        note_gap(control, gap::FALLOCATE, inode);
        return None;
    }
    let changes_bytes = mode & (falloc::PUNCH_HOLE | falloc::ZERO_RANGE) != 0;
    let can_grow = mode & falloc::KEEP_SIZE == 0;
    let range = Range {
        pos,
        // Blocks without bytes need not be there again.
        bytes: if changes_bytes { bytes } else { 0 },
        grown_to: if can_grow { pos + bytes } else { 0 },
        flags: 0,
        reason: gap::FALLOCATE,
    };
    emit_range(control, inode, range);
    Some(())
}

/// The change can be seen before its record.
#[fentry(function = "vfs_fallocate")]
pub fn space_fallocate_begin(ctx: FEntryContext) -> i32 {
    // SAFETY: the arguments of the hooked function.
    unnoticed::begin(unsafe { inode_of(ctx.arg(0)) }, gap::FALLOCATE);
    0
}

/// Every mode of fallocate.
#[fexit(function = "vfs_fallocate")]
pub fn space_fallocate(ctx: FExitContext) -> i32 {
    allocated(&ctx);
    unnoticed::end();
    0
}

/// Every remap passes here, before it changes anything.
#[fexit(function = "generic_remap_file_range_prep")]
pub fn space_remap_begin(ctx: FExitContext) -> i32 {
    let flags: u32 = ctx.arg(5);
    if matches!(ctx.ret::<i32>(), Ok(0)) && flags & REMAP_FILE_DEDUP == 0 {
        // SAFETY: the arguments of the hooked function.
        unnoticed::begin(unsafe { inode_of(ctx.arg(2)) }, gap::REMAP);
    }
    0
}

/// A remap has happened in this call, if one began.
#[inline(always)]
fn remapped(ctx: &FExitContext) -> Option<()> {
    let pos: u64 = ctx.arg(3);
    // SAFETY: the arguments of the hooked function.
    let inode = unsafe { inode_of(ctx.arg(2)) };
    let control = wanted(inode)?;
    match ctx.ret::<i64>() {
        Ok(bytes) if bytes > 0 => {
            let bytes = bytes as u64;
            let range = Range {
                pos,
                bytes,
                grown_to: pos + bytes,
                flags: 0,
                reason: gap::REMAP,
            };
            emit_range(control, inode, range);
        }
        // There was nothing to remap.
        Ok(0) => {}
        // It may have done a part.
        _ => note_gap(control, gap::REMAP, inode),
    }
    Some(())
}

macro_rules! remaps {
    ($($(#[$m:meta])* $name:ident $function:literal),* $(,)?) => { $(
        $(#[$m])*
        #[fexit(function = $function)]
        pub fn $name(ctx: FExitContext) -> i32 {
            // Before its end is told, so that no fsync trusts the log between.
            if unnoticed::is_under_way() {
                remapped(&ctx);
                unnoticed::end();
            }
            0
        }
    )* };
}

remaps! {
    /// FICLONE and FICLONERANGE.
    space_remap_clone "vfs_clone_file_range",
    /// What overlayfs copies up, before Linux 6.8.
    space_remap_copy_up "do_clone_file_range",
    /// `copy_file_range` that remapped.
    space_remap_copy "vfs_copy_file_range",
}
