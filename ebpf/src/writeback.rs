//! Write-backs that failed: the kernel marks such pages clean, and a later sync succeeds.
//!
//! Runs where the I/O ends, in whatever task was interrupted, so nobody's own work is left out.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use twinwrite_abi::{WRITEBACK_NAMED_MAX, control, gap, op};

use crate::config::*;
use crate::emit::*;

const S_IFMT: u16 = 0o170_000;
const S_IFBLK: u16 = 0o060_000;

/// An error is noted at a mapping: of a file of the volume, or of its device, which is anybody's.
#[btf_tracepoint(function = "filemap_set_wb_err")]
pub fn writeback_error(ctx: BtfTracePointContext) -> i32 {
    note(&ctx);
    0
}

#[inline(always)]
fn note(ctx: &BtfTracePointContext) -> Option<()> {
    // SAFETY: the arguments of the tracepoint.
    let inode: *const u8 = unsafe { member(ctx.arg(0), &MAPPING_HOST) };
    // SAFETY: as above; a null pointer reads as device 0.
    let (device, rdev, mode) = unsafe {
        (
            member::<u32>(member(inode, &INODE_SB), &SB_DEV),
            member::<u32>(inode, &INODE_RDEV),
            member::<u16>(inode, &INODE_MODE),
        )
    };
    let volume = TARGET_DEV.load();
    let is_file = u64::from(device) == volume;
    if !is_file && (mode & S_IFMT != S_IFBLK || u64::from(rdev) != volume) {
        return None;
    }
    let control = Control::get()?;
    // First the count: an error whose record is seen has been counted.
    let before = control.increment(control::WRITEBACK_ERRORS);
    // The others are told by the count alone, and are then anybody's.
    let untold = before.wrapping_sub(control.read(control::WRITEBACK_LOOKED));
    if is_file && untold < WRITEBACK_NAMED_MAX {
        // SAFETY: as above.
        let mut head = unsafe { head_of(op::GAP, inode) };
        head.arg = gap::WRITEBACK as u64;
        emit(control, head);
    }
    Some(())
}
