//! Changes that are noticed and not captured: each closes the epoch until a checkpoint covers it.
//!
//! A hook here may notice too much, never too little.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::bpf_get_current_pid_tgid;
use aya_ebpf::macros::{fentry, fexit, lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::{FEntryContext, FExitContext, LsmContext};
use twinwrite_abi::{control, gap, op};

use crate::config::*;
use crate::emit::*;
use crate::gate;

const RENAME_WHITEOUT: u32 = 1 << 2;
const REMAP_FILE_DEDUP: u32 = 1 << 0;
const IOMAP_DIO_WRITE: u32 = 1 << 30;
/// `VM_FAULT_ERROR`: the fault did not make the page writable.
const FAULT_ERROR: u32 = 0x0008_73;

#[inline(always)]
unsafe fn note_file(file: *const u8, reason: usize) -> Option<()> {
    // SAFETY: the caller passes a file from the hook's arguments.
    let inode: *const u8 = unsafe { member(file, &FILE_INODE) };
    note_gap(wanted(inode)?, reason, inode);
    Some(())
}

#[inline(always)]
unsafe fn note_dentry(dentry: *const u8, reason: usize) -> Option<()> {
    // SAFETY: the caller passes a dentry from the hook's arguments.
    let inode: *const u8 = unsafe { member(dentry, &DENTRY_INODE) };
    note_gap(wanted(inode)?, reason, inode);
    Some(())
}

/// What a thread has noted before it happens, to be noted again once it has happened.
#[repr(C)]
#[derive(Clone, Copy)]
struct Early {
    ino: u64,
    generation: u32,
    reason: u32,
}

#[map]
static EARLY: LruHashMap<u64, Early> = LruHashMap::with_max_entries(4096, 0);

/// Notes a change that is about to happen; [`note_late`] notes it again, so that no checkpoint that
/// ran before it is taken for one that covers it.
#[inline(always)]
unsafe fn note_early(inode: *const u8, reason: usize) -> Option<()> {
    const NEW_ONLY: u64 = 1;
    let control = wanted(inode)?;
    note_gap(control, reason, inode);
    // SAFETY: the helper has no precondition; the caller passes an inode that `wanted` accepted.
    let (thread, early) = unsafe {
        (
            bpf_get_current_pid_tgid(),
            Early {
                ino: member(inode, &INODE_INO),
                generation: member(inode, &INODE_GENERATION),
                reason: reason as u32,
            },
        )
    };
    if EARLY.insert(&thread, &early, NEW_ONLY).is_ok() {
        control.increment(control::EARLY_NOTES);
    }
    Some(())
}

/// Notes again what the thread had noted before it happened.
#[inline(always)]
pub fn note_late(control: Control, thread: u64) -> Option<()> {
    if control.read(control::EARLY_NOTES) == 0 {
        return None;
    }
    // SAFETY: only this thread writes its entry.
    let early = *unsafe { EARLY.get(&thread) }?;
    let _ = EARLY.remove(&thread);
    control.add(control::EARLY_NOTES, u64::MAX);
    let reason = early.reason as usize & (gap::COUNT - 1);
    let before = control.increment(control::GAPS + reason);
    if before == control.read(control::GAPS_SEEN + reason) {
        let head = Head {
            op: op::GAP,
            flags: 0,
            name_len: 0,
            data_len: 0,
            ino: early.ino,
            generation: early.generation,
            mode: 0,
            pos: 0,
            size_after: 0,
            time_ns: 0,
            arg: reason as u64,
        };
        emit(control, head);
    }
    Some(())
}

#[inline(always)]
fn succeeded(ctx: &FExitContext) -> bool {
    matches!(ctx.ret::<i32>(), Ok(0))
}

/// Threads in a fallocate.
#[map]
static FALLOCATES: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);

/// The change can be seen before its end is noticed: until then no fsync trusts the log alone.
#[fentry(function = "vfs_fallocate")]
pub fn gap_fallocate_begin(ctx: FEntryContext) -> i32 {
    // SAFETY: the arguments of the hooked function; the helper has no precondition.
    let (inode, thread) = unsafe {
        (
            member::<*const u8>(ctx.arg(0), &FILE_INODE),
            bpf_get_current_pid_tgid(),
        )
    };
    if let Some(control) = wanted(inode)
        && FALLOCATES.insert(&thread, &1, 0).is_ok()
    {
        control.increment(control::UNNOTICED);
    }
    0
}

/// Every mode of fallocate.
#[fexit(function = "vfs_fallocate")]
pub fn gap_fallocate(ctx: FExitContext) -> i32 {
    if succeeded(&ctx) {
        // SAFETY: the arguments of the hooked function.
        unsafe { note_file(ctx.arg(0), gap::FALLOCATE) };
    }
    // SAFETY: the helper has no precondition.
    let thread = unsafe { bpf_get_current_pid_tgid() };
    if FALLOCATES.remove(&thread).is_ok()
        && let Some(control) = Control::get()
    {
        control.add(control::UNNOTICED, u64::MAX);
    }
    0
}

/// Threads that are between the preparation of a remap and the exit of the call that asked for it.
#[map]
static REMAPS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);

/// Every remap passes here, before it changes anything.
#[fexit(function = "generic_remap_file_range_prep")]
pub fn gap_remap_begin(ctx: FExitContext) -> i32 {
    let flags: u32 = ctx.arg(5);
    if succeeded(&ctx) && flags & REMAP_FILE_DEDUP == 0 {
        // SAFETY: the arguments of the hooked function.
        if unsafe { note_file(ctx.arg(2), gap::REMAP) }.is_some() {
            // SAFETY: the helper has no precondition.
            let thread = unsafe { bpf_get_current_pid_tgid() };
            let _ = REMAPS.insert(&thread, &1, 0);
        }
    }
    0
}

/// Notes the remap again once it has happened, so that no checkpoint falls between.
#[inline(always)]
fn remapped(ctx: &FExitContext) {
    // SAFETY: the helper has no precondition.
    let thread = unsafe { bpf_get_current_pid_tgid() };
    if REMAPS.remove(&thread).is_ok() {
        // SAFETY: the arguments of the hooked function.
        unsafe { note_file(ctx.arg(2), gap::REMAP) };
    }
}

/// FICLONE and FICLONERANGE.
#[fexit(function = "vfs_clone_file_range")]
pub fn gap_remap_clone(ctx: FExitContext) -> i32 {
    remapped(&ctx);
    0
}

/// `copy_file_range` that remapped.
#[fexit(function = "vfs_copy_file_range")]
pub fn gap_remap_copy(ctx: FExitContext) -> i32 {
    remapped(&ctx);
    0
}

/// A page of a shared mapping becomes writable; later stores to it are not seen.
#[fexit(function = "do_page_mkwrite")]
pub fn gap_mapping(ctx: FExitContext) -> i32 {
    let fault: *const u8 = ctx.arg(0);
    if matches!(ctx.ret::<u32>(), Ok(result) if result & FAULT_ERROR == 0) {
        // SAFETY: the arguments of the hooked function.
        unsafe { note_file(member(member(fault, &FAULT_VMA), &VMA_FILE), gap::MAPPING) };
    }
    0
}

/// A direct write is about to drop what the page cache holds of its range, before it asks the device for
/// anything: who submits it is running here, and another thread may reap its answer. So the wait
/// for the end of the epoch begins here, whichever way that answer takes.
#[fentry(function = "invalidate_inode_pages2_range")]
pub fn gap_direct_io_begin(ctx: FEntryContext) -> i32 {
    // SAFETY: the arguments of the hooked function.
    let inode: *const u8 = unsafe { member(ctx.arg(0), &MAPPING_HOST) };
    if let Some(control) = wanted(inode) {
        let generation = gate::generation(control);
        note_gap(control, gap::DIRECT_IO, inode);
        gate::require_closed(control, generation);
    }
    0
}

/// A direct write has reached the device. At entry: the function frees its argument.
#[fentry(function = "iomap_dio_complete")]
pub fn gap_direct_io(ctx: FEntryContext) -> i32 {
    let dio: *const u8 = ctx.arg(0);
    // SAFETY: the arguments of the hooked function.
    unsafe {
        if member::<u32>(dio, &DIO_FLAGS) & IOMAP_DIO_WRITE != 0 {
            let file: *const u8 = member(member(dio, &DIO_IOCB), &KIOCB_FILP);
            let inode: *const u8 = member(file, &FILE_INODE);
            if let Some(control) = wanted(inode) {
                // The epoch may have ended since the write began, and the next one be open.
                let generation = gate::generation(control);
                note_early(inode, gap::DIRECT_IO);
                gate::require_closed(control, generation);
            }
        }
    }
    0
}

/// Its end: extents are converted and the size is set inside.
#[fexit(function = "iomap_dio_complete")]
pub fn gap_direct_io_end(_: FExitContext) -> i32 {
    // SAFETY: the helper has no precondition.
    let thread = unsafe { bpf_get_current_pid_tgid() };
    if let Some(control) = Control::get() {
        note_late(control, thread);
    }
    0
}

macro_rules! dentry_gaps {
    ($($(#[$m:meta])* $name:ident $function:literal $reason:ident),* $(,)?) => { $(
        $(#[$m])*
        #[fexit(function = $function)]
        pub fn $name(ctx: FExitContext) -> i32 {
            if succeeded(&ctx) {
                // SAFETY: the arguments of the hooked function.
                unsafe { note_dentry(ctx.arg(1), gap::$reason) };
            }
            0
        }
    )* };
}

dentry_gaps! {
    /// An extended attribute set.
    gap_xattr_set "__vfs_setxattr_noperm" XATTR,
    /// An extended attribute removed.
    gap_xattr_remove "__vfs_removexattr_locked" XATTR,
    /// File capabilities taken away by a write.
    gap_xattr_drop "__vfs_removexattr" XATTR,
    /// An ACL set (6.2 and later; before, the hooks above see it).
    gap_acl_set "vfs_set_acl" XATTR,
    /// An ACL removed.
    gap_acl_remove "vfs_remove_acl" XATTR,
    /// Inode flags set.
    gap_flags "vfs_fileattr_set" IOCTL,
}

/// A file about to be created inherits the ACL of its directory.
#[fexit(function = "posix_acl_create")]
pub fn gap_acl_inherit(ctx: FExitContext) -> i32 {
    let directory: *const u8 = ctx.arg(0);
    let place = directory.wrapping_add(INODE_DEFAULT_ACL.load() as usize);
    // SAFETY: a bad address is reported, not followed. Read as a number, not as a typed pointer:
    // the hooked function has just asked for the default ACL, and the value says what it got.
    let acl = unsafe { bpf_probe_read_kernel(place.cast::<u64>()) }.unwrap_or(0);
    // Small negative and odd values stand for "not asked yet" (include/linux/posix_acl.h).
    if acl != 0 && acl & 1 == 0 {
        // SAFETY: the arguments of the hooked function.
        unsafe { note_early(directory, gap::XATTR) };
    }
    0
}

/// A rename that left a whiteout behind.
#[fexit(function = "vfs_rename")]
pub fn gap_whiteout(ctx: FExitContext) -> i32 {
    let rename: *const u8 = ctx.arg(0);
    // SAFETY: the arguments of the hooked function.
    unsafe {
        if succeeded(&ctx) && member::<u32>(rename, &RENAME_FLAGS) & RENAME_WHITEOUT != 0 {
            note_dentry(member(rename, &RENAME_OLD_DENTRY), gap::WHITEOUT);
        }
    }
    0
}

/// Whether an ioctl cannot change a volume, or has a hook of its own above.
#[inline(always)]
fn harmless_ioctl(command: u32) -> bool {
    const TERMINAL: u32 = 0x54;
    if (command >> 8) & 0xff == TERMINAL {
        return true;
    }
    matches!(
        command,
        0x0000_0001 // FIBMAP
            | 0x0000_0002 // FIGETBSZ
            | 0x0000_541b // FIONREAD
            | 0x0000_5421 // FIONBIO
            | 0x0000_5450 // FIONCLEX
            | 0x0000_5451 // FIOCLEX
            | 0x0000_5452 // FIOASYNC
            | 0x0000_5460 // FIOQSIZE
            | 0x8008_6601 // FS_IOC_GETFLAGS
            | 0x4008_6602 // FS_IOC_SETFLAGS: vfs_fileattr_set
            | 0x8008_7601 // FS_IOC_GETVERSION
            | 0x801c_581f // FS_IOC_FSGETXATTR
            | 0x401c_5820 // FS_IOC_FSSETXATTR: vfs_fileattr_set
            | 0xc020_660b // FS_IOC_FIEMAP
            | 0x4004_9409 // FICLONE: the remap hooks
            | 0x4020_940d // FICLONERANGE: the remap hooks
            | 0xc018_9436 // FIDEDUPERANGE: changes no content
            | 0xc004_5877 // FIFREEZE
            | 0xc004_5878 // FITHAW
            | 0xc018_5879 // FITRIM
            | 0x8100_9431 // FS_IOC_GETFSLABEL
            | 0x8011_1500 // FS_IOC_GETFSUUID
            | 0x8081_1501 // FS_IOC_GETFSSYSFSPATH
    )
}

/// Ioctls of the file system that are not known to be harmless.
#[lsm(hook = "file_ioctl")]
pub fn gap_ioctl(ctx: LsmContext) -> i32 {
    let before: i32 = ctx.arg(3);
    if before == 0 && !harmless_ioctl(ctx.arg(1)) {
        // SAFETY: the arguments of the hook.
        unsafe { note_early(member(ctx.arg(0), &FILE_INODE), gap::IOCTL) };
    }
    before
}
