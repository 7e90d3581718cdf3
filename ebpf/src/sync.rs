//! Durability marks: the successful exits of fsync, fdatasync, msync, O_SYNC and O_DSYNC writes.
//!
//! A mark proves only what was captured before the call began: the ring's position at its entry is
//! kept by thread and travels in the record. All roads lead through `vfs_fsync_range` in the source
//! code, but compilers inline it into its callers in the same file, and which ones differs between
//! kernels (6.1: fdatasync and vfs_fsync; 6.12: vfs_fsync). So the callers are hooked as well; the
//! innermost hook that fires takes the call over from those around it, so that each gives one mark.
//!
//! An exit without a known entry gives no mark; one call must never give a mark for another file.

use aya_ebpf::macros::{fentry, fexit, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::{FEntryContext, FExitContext};
use twinwrite_abi::{control, flag, op};

use crate::config::*;
use crate::emit::*;
use crate::gate;

const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;

/// Which hook answers for the call a thread is in.
mod road {
    /// The system call: its file is not known yet.
    pub const SYSTEM_CALL: u64 = 1;
    /// The system call, and the file it syncs has been seen.
    pub const SYSTEM_CALL_WITH_FILE: u64 = 2;
    /// `vfs_fsync`.
    pub const WHOLE_FILE: u64 = 3;
    /// `vfs_fsync_range`.
    pub const RANGE: u64 = 4;
}

/// The fsync-class call a thread is in.
#[repr(C)]
#[derive(Clone, Copy)]
struct Call {
    /// One of [`road`].
    road: u64,
    /// The ring's position at its entry.
    position: u64,
    /// What to wait for if the log is whole, see `gate::seen_before`; [`UNKNOWN`].
    seen_before: u64,
    /// Address of the file's inode, which the call holds; 0 as long as it is not known.
    inode: u64,
    /// The mark, but for what is known at exit only.
    head: Head,
}

/// No position.
const UNKNOWN: u64 = u64::MAX;

/// Losing an entry costs one mark.
#[map]
static CALLS: LruHashMap<u64, Call> = LruHashMap::with_max_entries(16384, 0);

#[inline(always)]
fn enter(road: u64, seen_before: Option<u64>, inode: *const u8) {
    // SAFETY: all members are integers.
    let mut call: Call = unsafe { core::mem::zeroed() };
    call.road = road;
    call.position = producer_position();
    call.seen_before = seen_before.unwrap_or(UNKNOWN);
    call.inode = inode as u64;
    let _ = CALLS.insert(&thread(), &call, 0);
}

#[inline(always)]
fn enter_file(ctx: &FEntryContext, road: u64) {
    let file: *const u8 = ctx.arg(0);
    // SAFETY: the arguments of the hooked function.
    unsafe {
        let inode = member(file, &FILE_INODE);
        if let Some(control) = concerned(inode) {
            enter(road, gate::seen_before(control, file), inode);
        }
    }
}

/// Ends the thread's call if this hook answers for it; the ring's position at its entry.
#[inline(always)]
fn leave(ctx: &FExitContext, road: u64) -> Option<Call> {
    let thread = thread();
    // SAFETY: only this thread writes its entry.
    let call = *unsafe { CALLS.get(&thread) }?;
    if call.road != road {
        return None;
    }
    let _ = CALLS.remove(&thread);
    (ctx.ret::<i32>().ok()? == 0).then_some(call)
}

/// # Safety
/// `inode` as in [`member`].
#[inline(always)]
unsafe fn mark_of(inode: *const u8, datasync: bool) -> Head {
    // SAFETY: the caller's.
    let (mut head, nlink) = unsafe {
        (
            head_of(op::FSYNC, inode),
            member::<u32>(inode, &INODE_NLINK),
        )
    };
    head.pos = 0;
    head.size_after = i64::MAX as u64;
    if datasync {
        head.flags |= flag::DATASYNC;
    }
    if nlink == 0 {
        head.flags |= flag::UNLINKED;
    }
    head
}

/// Emits a mark, and makes the caller wait for it.
#[inline(always)]
fn mark(control: Control, mut head: Head, call: &Call, by_worker: bool) {
    let generation = gate::generation(control);
    if control.read(control::WRITEBACK_ERRORS) != control.read(control::WRITEBACK_MENDED) {
        head.flags |= flag::TAINTED;
    }
    let is_directory = head.mode & S_IFMT == S_IFDIR;
    let before = (call.seen_before != UNKNOWN).then_some(call.seen_before);
    // To wake the agent for it would cost more than the call has left to do.
    let end = if gate::passes_without_mark(control, generation, before) {
        emit_unhurried(control, head)
    } else {
        emit(control, head)
    };
    gate::require(
        control,
        generation,
        before,
        end,
        is_directory,
        call.inode,
        by_worker,
    );
}

#[inline(always)]
fn leave_file(ctx: &FExitContext, road: u64) -> Option<()> {
    // SAFETY: the arguments of the hooked function.
    let inode: *const u8 = unsafe { member(ctx.arg(0), &FILE_INODE) };
    let control = concerned(inode)?;
    let call = leave(ctx, road)?;
    let range = road == road::RANGE;
    let datasync: i32 = ctx.arg(if range { 3 } else { 1 });
    // SAFETY: as above.
    let mut head = unsafe { mark_of(inode, datasync != 0) };
    if range {
        head.pos = ctx.arg(1);
        head.size_after = ctx.arg(2);
    }
    head.arg = call.position;
    // Workers of io_uring call the innermost function, but for a file system that is stacked on the volume.
    mark(control, head, &call, range);
    Some(())
}

/// The innermost call where it is not inlined.
#[fentry(function = "vfs_fsync_range")]
pub fn sync_range_enter(ctx: FEntryContext) -> i32 {
    enter_file(&ctx, road::RANGE);
    0
}

/// Its end.
#[fexit(function = "vfs_fsync_range")]
pub fn sync_range_exit(ctx: FExitContext) -> i32 {
    leave_file(&ctx, road::RANGE);
    0
}

/// Asynchronous I/O and others.
#[fentry(function = "vfs_fsync")]
pub fn sync_whole_enter(ctx: FEntryContext) -> i32 {
    enter_file(&ctx, road::WHOLE_FILE);
    0
}

/// Its end.
#[fexit(function = "vfs_fsync")]
pub fn sync_whole_exit(ctx: FExitContext) -> i32 {
    leave_file(&ctx, road::WHOLE_FILE);
    0
}

/// The running fsync syncs this file, whose road is not known but for its system call.
#[inline(always)]
pub fn saw_file(file: *const u8) {
    let thread = thread();
    // SAFETY: only this thread writes its entry.
    let Some(call) = CALLS.get_ptr_mut(&thread) else {
        return;
    };
    // SAFETY: as above; callers pass an argument of a hooked function.
    unsafe {
        let inode: *const u8 = member(file, &FILE_INODE);
        if (*call).road == road::SYSTEM_CALL
            && let Some(control) = concerned(inode)
        {
            // Later than at the entry, and so no less is waited for.
            (*call).seen_before = gate::seen_before(control, file).unwrap_or(UNKNOWN);
            (*call).inode = inode as u64;
            (*call).head = mark_of(inode, false);
            (*call).road = road::SYSTEM_CALL_WITH_FILE;
        }
    }
}

/// Most file systems call this in every fsync: it tells which file the system call syncs. (Looking
/// the descriptor up again could find another file by now.)
#[fexit(function = "file_write_and_wait_range")]
pub fn sync_file(ctx: FExitContext) -> i32 {
    saw_file(ctx.arg(0));
    0
}

#[inline(always)]
fn leave_system_call(ctx: &FExitContext, flags: u8) -> Option<()> {
    let Some(call) = leave(ctx, road::SYSTEM_CALL_WITH_FILE) else {
        // One that synced no file of the volume.
        let _ = leave(ctx, road::SYSTEM_CALL);
        return None;
    };
    let mut head = call.head;
    head.flags |= flags;
    head.arg = call.position;
    mark(Control::get()?, head, &call, false);
    Some(())
}

macro_rules! system_calls {
    ($($function:literal $flags:expr, $enter:ident $exit:ident);* $(;)?) => { $(
        /// A system call that may have the rest inlined.
        #[fentry(function = $function)]
        pub fn $enter(_: FEntryContext) -> i32 {
            enter(road::SYSTEM_CALL, None, core::ptr::null());
            0
        }

        /// Its end.
        #[fexit(function = $function)]
        pub fn $exit(ctx: FExitContext) -> i32 {
            leave_system_call(&ctx, $flags);
            0
        }
    )* };
}

system_calls! {
    "__x64_sys_fsync" 0, sync_fsync_enter sync_fsync_exit;
    "__x64_sys_fdatasync" flag::DATASYNC, sync_fdatasync_enter sync_fdatasync_exit;
    "__ia32_sys_fsync" 0, sync_fsync32_enter sync_fsync32_exit;
    "__ia32_sys_fdatasync" flag::DATASYNC, sync_fdatasync32_enter sync_fdatasync32_exit;
}
