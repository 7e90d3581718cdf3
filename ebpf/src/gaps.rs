//! Changes that are noticed and not captured: each closes the epoch until a checkpoint covers it.
//!
//! A hook here may notice too much, never too little.

use aya_ebpf::macros::{fexit, lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::{FExitContext, LsmContext};
use twinwrite_abi::{control, gap, op};

use crate::btrfs;
use crate::config::*;
use crate::emit::*;
use crate::mapping;

const RENAME_WHITEOUT: u32 = 1 << 2;
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
pub unsafe fn note_around(control: Control, inode: *const u8, reason: usize) {
    const NEW_ONLY: u64 = 1;
    note_gap(control, reason, inode);
    // SAFETY: the caller passes an inode that `wanted` accepted.
    let early = unsafe {
        Early {
            ino: member(inode, &INODE_INO),
            generation: member(inode, &INODE_GENERATION),
            reason: reason as u32,
        }
    };
    if EARLY.insert(&thread(), &early, NEW_ONLY).is_ok() {
        control.increment(control::EARLY_NOTES);
    }
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
    if count_gap(control, reason) {
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
fn is_harmless_ioctl(command: u32) -> bool {
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
            | 0x4008_6602 // FS_IOC_SETFLAGS: see `extended`
            | 0x8008_7601 // FS_IOC_GETVERSION
            | 0x801c_581f // FS_IOC_FSGETXATTR
            | 0x401c_5820 // FS_IOC_FSSETXATTR: see `extended`
            | 0xc020_660b // FS_IOC_FIEMAP
            | 0x4004_9409 // FICLONE: see `space`
            | 0x4020_940d // FICLONERANGE: see `space`
            | 0xc018_9436 // FIDEDUPERANGE: changes no content
            | 0xc004_5877 // FIFREEZE
            | 0xc004_5878 // FITHAW
            | 0xc018_5879 // FITRIM
            | 0x8100_9431 // FS_IOC_GETFSLABEL
            | 0x8011_1500 // FS_IOC_GETFSUUID
            | 0x8081_1501 // FS_IOC_GETFSSYSFSPATH
    ) || btrfs::is_harmless(command)
}

#[inline(always)]
fn ioctl(ctx: &LsmContext) -> i32 {
    let before: i32 = ctx.arg(3);
    let (command, argument): (u32, u64) = (ctx.arg(1), ctx.arg(2));
    if before != 0 || is_harmless_ioctl(command) {
        return before;
    }
    // SAFETY: the arguments of the hook.
    unsafe {
        let inode = member(ctx.arg(0), &FILE_INODE);
        if btrfs::refuses(inode, command) {
            return -btrfs::EOPNOTSUPP;
        }
        // By a file on one side of the border one may change files on the other.
        if !mapping::is_snapshot(inode, command, argument)
            && let Some(control) = wanted_on_volume(inode)
        {
            note_around(control, inode, gap::IOCTL);
        }
    }
    0
}

/// Ioctls of the file system that are not known to be harmless, and the refusal of those that make what
/// cannot be protected.
#[lsm(hook = "file_ioctl")]
pub fn gap_ioctl(ctx: LsmContext) -> i32 {
    ioctl(&ctx)
}

/// Those of 32-bit programs, since Linux 6.8; before that they pass the other hook.
#[lsm(hook = "file_ioctl_compat")]
pub fn gap_ioctl_compat(ctx: LsmContext) -> i32 {
    ioctl(&ctx)
}
