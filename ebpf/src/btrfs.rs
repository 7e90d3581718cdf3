//! What only btrfs has. Its own functions lie in a module, whose types programs do not know; so its writes
//! and syncs are told by functions of the kernel proper that it calls in the midst of them.

use core::ffi::c_void;

use aya_ebpf::macros::{fentry, fexit, lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::{FEntryContext, FExitContext, LsmContext};
use twinwrite_abi::gap;

use crate::config::*;
use crate::data::{Iter, Write};
use crate::emit::*;
use crate::gate::read_at;
use crate::sync;

/// A write whose place is settled, under the inode's lock.
#[repr(C)]
#[derive(Clone, Copy)]
struct Begun {
    /// The inode's address, which the call holds.
    inode: u64,
    /// Address of the iterator, which the call holds.
    iter: u64,
    /// Where it begins.
    pos: u64,
    /// How many bytes it wants to write.
    count: u64,
}

/// By thread. An entry stays when a write does nothing, or is a direct one; that of a write under way is
/// missed if it was pushed out.
#[map]
static BEGUN: LruHashMap<u64, Begun> = LruHashMap::with_max_entries(16384, 0);

/// Where a write goes: the file's lock is held, and for `O_APPEND` the position is the end.
#[fexit(function = "generic_write_checks")]
pub fn write_btrfs_begin(ctx: FExitContext) -> i32 {
    let (kiocb, iter): (*const u8, *const u8) = (ctx.arg(0), ctx.arg(1));
    // SAFETY: the arguments of the hooked function.
    let inode: *const u8 = unsafe { member(member(kiocb, &KIOCB_FILP), &FILE_INODE) };
    if wanted(inode).is_none() || !matches!(ctx.ret::<i64>(), Ok(bytes) if bytes > 0) {
        return 0;
    }
    // SAFETY: as above.
    let begun = unsafe {
        Begun {
            inode: inode as u64,
            iter: iter as u64,
            pos: member(kiocb, &KIOCB_POS),
            count: member(iter, &ITER_COUNT),
        }
    };
    if BEGUN.insert(&thread(), &begun, 0).is_err() {
        // What lies there is of an earlier write.
        let _ = BEGUN.remove(&thread());
    }
    0
}

/// The iterator of a write, and how many bytes went through it.
#[inline(always)]
fn consumed(begun: &Begun) -> Option<(Iter, u64)> {
    let left: u64 = read_at(begun.iter, &ITER_COUNT)?;
    let buffer: u64 = read_at(begun.iter, &ITER_UBUF_ADDRESS)?;
    let iter = Iter {
        at: begun.iter as *const u8,
        kind: u64::from(read_at::<u8>(begun.iter, &ITER_TYPE)?),
        offset: read_at(begun.iter, &ITER_OFFSET)?,
        buffer: buffer as *const c_void,
    };
    (left < begun.count).then(|| (iter, begun.count - left))
}

#[inline(always)]
fn written(ctx: &FEntryContext) -> Option<()> {
    let inode: *const u8 = ctx.arg(0);
    let to: u64 = ctx.arg(2);
    let control = wanted(inode)?;
    // SAFETY: an argument of the hooked function.
    if unsafe { member::<u64>(inode, &INODE_SIZE) } <= to {
        // A truncation: it tells the new size. A write tells where it begins.
        return None;
    }
    let thread = thread();
    // SAFETY: only this thread writes its entry.
    let begun = unsafe { BEGUN.get(&thread) }.copied();
    let _ = BEGUN.remove(&thread);
    let written = match begun {
        Some(begun) if begun.inode == inode as u64 && begun.pos == to => consumed(&begun),
        _ => None,
    };
    let Some((iter, bytes)) = written else {
        note_gap(control, gap::UNREADABLE, inode);
        return None;
    };
    let write = Write {
        control,
        inode,
        pos: to,
        bytes,
    };
    write.capture(iter);
    Some(())
}

/// The end of every buffered write that wrote anything: all its bytes are in the page cache, size and times
/// are set, and the lock is still held.
#[fentry(function = "pagecache_isize_extended")]
pub fn write_btrfs(ctx: FEntryContext) -> i32 {
    written(&ctx);
    0
}

/// The end of an fsync: tells which file the system call syncs.
#[fentry(function = "file_check_and_advance_wb_err")]
pub fn sync_btrfs(ctx: FEntryContext) -> i32 {
    sync::saw_file(ctx.arg(0));
    0
}

pub const EOPNOTSUPP: i32 = 95;

/// The type of btrfs's ioctls.
const BTRFS: u32 = 0x94;

#[inline(always)]
fn kind_of(command: u32) -> u32 {
    command >> 8 & 0xff
}

/// Ioctls of btrfs that tell something, or change neither bytes nor names.
#[inline(always)]
pub fn is_harmless(command: u32) -> bool {
    matches!(
        command,
        0xd000_9411 // TREE_SEARCH
            | 0xc070_9411 // TREE_SEARCH_V2
            | 0xd000_9412 // INO_LOOKUP
            | 0xc010_9414 // SPACE_INFO
            | 0x8008_9419 // SUBVOL_GETFLAGS
            | 0xc400_941b // SCRUB
            | 0x0000_941c // SCRUB_CANCEL
            | 0xc400_941d // SCRUB_PROGRESS
            | 0xd000_941e // DEV_INFO
            | 0x8400_941f // FS_INFO
            | 0x8400_9422 // BALANCE_PROGRESS
            | 0xc038_9423 // INO_PATHS
            | 0xc038_9424 // LOGICAL_INO
            | 0xc038_943b // LOGICAL_INO_V2
            | 0x8040_942d // QUOTA_RESCAN_STATUS
            | 0xc408_9434 // GET_DEV_STATS
            | 0x8018_9439 // GET_FEATURES
            | 0x8048_9439 // GET_SUPPORTED_FEATURES
            | 0x81f8_943c // GET_SUBVOL_INFO
            | 0xd000_943d // GET_SUBVOL_ROOTREF
            | 0xd000_943e // INO_LOOKUP_USER
            | 0x8080_9440 // ENCODED_READ
    )
}

/// Whether an ioctl would make what cannot be protected: a second tree of files, in which inode numbers
/// begin anew; a second device; bytes that pass the page cache by; or would confirm what no gate holds.
#[inline(always)]
fn is_refused(command: u32) -> bool {
    const SYNC: u32 = 0x0000_9408;
    const WRITES: u32 = 1 << 30;
    const READS: u32 = 1 << 31;
    if kind_of(command) != BTRFS {
        return false;
    }
    if command == SYNC {
        return true;
    }
    // By their numbers: the size of the argument differs in 32-bit programs.
    command & WRITES != 0
        && match command & 0xff {
            1 // SNAP_CREATE
            | 10 // ADD_DEV
            | 11 // RM_DEV
            | 14 // SUBVOL_CREATE
            | 15 // SNAP_DESTROY
            | 19 // DEFAULT_SUBVOL
            | 22 // WAIT_SYNC
            | 23 // SNAP_CREATE_V2
            | 24 // SUBVOL_CREATE_V2
            | 26 // SUBVOL_SETFLAGS
            | 37 // SET_RECEIVED_SUBVOL
            | 53 // DEV_REPLACE
            | 58 // RM_DEV_V2
            | 63 // SNAP_DESTROY_V2
            => true,
            // ENCODED_WRITE; ENCODED_READ also writes into its argument.
            64 => command & READS == 0,
            _ => false,
        }
}

/// Whether the file lies on a btrfs, and the ioctl is refused there.
///
/// # Safety
/// As in [`member`].
#[inline(always)]
pub unsafe fn refuses(inode: *const u8, command: u32) -> bool {
    const MAGIC: u64 = 0x9123_683e;
    // SAFETY: the caller's.
    is_refused(command)
        && unsafe { member::<u64>(member(inode, &INODE_SB), &SB_MAGIC) } == MAGIC
        && wanted_on_volume(inode).is_some()
}

/// io_uring passes commands of its own to the file system (encoded reads and writes, since 6.13): one whose
/// end nobody waits for here is refused.
#[lsm(hook = "uring_cmd")]
pub fn refuse_uring(ctx: LsmContext) -> i32 {
    let before: i32 = ctx.arg(1);
    // SAFETY: the arguments of the hook.
    let inode: *const u8 = unsafe { member(member(ctx.arg(0), &URING_FILE), &FILE_INODE) };
    if before == 0 && wanted_on_volume(inode).is_some() {
        return -EOPNOTSUPP;
    }
    before
}
