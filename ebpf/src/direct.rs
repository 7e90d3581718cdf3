//! Direct writes: what reaches the device past the page cache.
//!
//! One that the caller waits for has a record without bytes, which the agent fills, and its caller waits
//! until that is mirrored: unlike a buffered one it may be on the disk before older bytes of the log. Any
//! other closes the epoch: its answer reaches somebody on a way on which nobody can be stopped.

use aya_ebpf::macros::{fentry, fexit, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::{FEntryContext, FExitContext};
use twinwrite_abi::{FILLED_BYTES_MAX, flag, gap, held, op};

use crate::calls;
use crate::config::*;
use crate::emit::*;
use crate::gaps::{note_around, note_late};
use crate::gate::{self, Wait};
use crate::subtree::{Side, side};
use crate::unnoticed;

const IOMAP_DIO_WRITE: u32 = 1 << 30;

/// A direct write whose bytes are on the device, and whose end is under way.
#[repr(C)]
#[derive(Clone, Copy)]
struct Written {
    /// The address of what describes it: in an interrupt a thread may end direct reads of others.
    dio: u64,
    /// The inode's address, which the call holds.
    inode: u64,
    pos: u64,
    bytes: u64,
}

/// By thread. A write that finds no room in it closes the epoch.
#[map]
static WRITTEN: HashMap<u64, Written> = HashMap::with_max_entries(4096, 0);

/// A direct write is about to drop what the page cache holds of its range, before it asks the device for
/// anything. If its answer may be reaped by another thread, the wait for the end of the epoch begins here,
/// where who submits it is running.
#[fentry(function = "invalidate_inode_pages2_range")]
pub fn direct_submit(ctx: FEntryContext) -> i32 {
    // SAFETY: the arguments of the hooked function.
    let inode: *const u8 = unsafe { member(ctx.arg(0), &MAPPING_HOST) };
    if let Some(control) = concerned(inode)
        && (!calls::is_in_write() || side(inode) == Side::Unknown)
    {
        let generation = gate::generation(control);
        note_gap(control, gap::DIRECT_IO, inode);
        gate::require_closed(control, generation);
    }
    0
}

/// Notes a write that the caller waits for; false if this is another one.
#[inline(always)]
unsafe fn is_waited_for(dio: *const u8, iocb: *const u8, inode: *const u8) -> bool {
    // SAFETY: the caller passes what it reached from the hook's arguments.
    let (error, bytes, completion) = unsafe {
        (
            member::<i32>(dio, &DIO_ERROR),
            member::<u64>(dio, &DIO_BYTES),
            member::<u64>(iocb, &KIOCB_COMPLETION),
        )
    };
    if completion != 0 || error != 0 || bytes == 0 || bytes > FILLED_BYTES_MAX {
        return false;
    }
    if !calls::is_in_write() {
        return false;
    }
    let written = Written {
        dio: dio as u64,
        inode: inode as u64,
        // SAFETY: as above.
        pos: unsafe { member(iocb, &KIOCB_POS) },
        bytes,
    };
    if WRITTEN.insert(&thread(), &written, 0).is_err() {
        return false;
    }
    // Others can read it before its record.
    unnoticed::begin(inode, gap::DIRECT_IO);
    true
}

/// A direct write has reached the device. At entry: the function frees its argument.
#[fentry(function = "iomap_dio_complete")]
pub fn direct_end_begin(ctx: FEntryContext) -> i32 {
    let dio: *const u8 = ctx.arg(0);
    // SAFETY: the arguments of the hooked function.
    unsafe {
        if member::<u32>(dio, &DIO_FLAGS) & IOMAP_DIO_WRITE == 0 {
            return 0;
        }
        let iocb: *const u8 = member(dio, &DIO_IOCB);
        let inode: *const u8 = member(member(iocb, &KIOCB_FILP), &FILE_INODE);
        if let Some(control) = concerned(inode)
            && (side(inode) == Side::Unknown || !is_waited_for(dio, iocb, inode))
        {
            // The epoch may have ended since the write began, and the next one be open.
            let generation = gate::generation(control);
            note_around(control, inode, gap::DIRECT_IO);
            gate::require_closed(control, generation);
        }
    }
    0
}

/// The record of a write that is done, or a gap where its size is set only later (ext4, in
/// `ext4_handle_inode_extension`).
#[inline(always)]
fn emit_written(control: Control, written: &Written) -> Option<()> {
    let size: u64 = gate::read_at(written.inode, &INODE_SIZE)?;
    let mut head = Head {
        op: op::WRITE,
        flags: flag::NO_BYTES | flag::SIZE_RAISES,
        name_len: 0,
        data_len: written.bytes as u32,
        ino: gate::read_at(written.inode, &INODE_INO)?,
        generation: gate::read_at(written.inode, &INODE_GENERATION)?,
        mode: 0,
        pos: written.pos,
        // Others may be changing the size: on XFS writers of one file share its lock.
        size_after: written.pos + written.bytes,
        time_ns: gate::read_at::<i64>(written.inode, &INODE_MTIME_SEC)? * 1_000_000_000
            + i64::from(gate::read_at::<u32>(written.inode, &INODE_MTIME_NSEC)?),
        arg: 0,
    };
    let generation = gate::generation(control);
    if written.pos + written.bytes > size {
        if count_gap(control, gap::DIRECT_IO) {
            head.op = op::GAP;
            head.flags = 0;
            head.data_len = 0;
            head.pos = 0;
            head.arg = gap::DIRECT_IO as u64;
            emit(control, head);
        }
        gate::require_closed(control, generation);
        return Some(());
    }
    let wait = Wait::until_mirrored(
        emit(control, head).unwrap_or(held::UNTIL_CLOSED),
        generation,
    );
    gate::require_wait(control, wait);
    Some(())
}

/// Its end: extents are converted inside, and on XFS the size is set.
#[fexit(function = "iomap_dio_complete")]
pub fn direct_end(ctx: FExitContext) -> i32 {
    let thread = thread();
    let dio: *const u8 = ctx.arg(0);
    let Some(control) = Control::get() else {
        return 0;
    };
    // SAFETY: only this thread writes its entry.
    if let Some(written) = unsafe { WRITTEN.get(&thread) }.copied()
        && written.dio == dio as u64
    {
        let _ = WRITTEN.remove(&thread);
        if emit_written(control, &written).is_none() {
            gate::note(control, gap::DIRECT_IO);
        }
        unnoticed::end();
    }
    note_late(control, thread);
    0
}
