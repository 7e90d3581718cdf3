//! What an inode has besides bytes, names and plain attributes: extended attributes, ACLs among them,
//! inode flags and the quota project.
//!
//! A record says only that they have changed; the agent reads what they have become. So it does not matter
//! whether a hook runs under the inode's lock, and one record tells of a change by whatever way.

use aya_ebpf::macros::{fentry, fexit};
use aya_ebpf::programs::{FEntryContext, FExitContext};
use twinwrite_abi::{EXTENDED_BYTES_MAX, flag, gap, op};

use crate::config::*;
use crate::emit::*;
use crate::gate;
use crate::unnoticed;

/// Tells that the extended state of `inode` has changed.
///
/// # Safety
/// `inode` was reached from a hook's arguments.
#[inline(always)]
unsafe fn emit_extended(control: Control, inode: *const u8) {
    // SAFETY: the caller's.
    let mut head = unsafe { head_of(op::EXTENDED, inode) };
    head.flags = flag::NO_BYTES;
    head.data_len = EXTENDED_BYTES_MAX;
    emit(control, head);
}

#[inline(always)]
unsafe fn inode_of(dentry: *const u8) -> *const u8 {
    // SAFETY: the caller passes a dentry from the hook's arguments.
    unsafe { member(dentry, &DENTRY_INODE) }
}

/// Tells what a call has changed, if it has.
///
/// # Safety
/// As [`emit_extended`].
#[inline(always)]
unsafe fn changed(ctx: &FExitContext, inode: *const u8) -> Option<()> {
    let control = wanted(inode)?;
    if ctx.ret::<i32>().ok()? == 0 {
        // SAFETY: the caller's.
        unsafe { emit_extended(control, inode) };
    }
    Some(())
}

macro_rules! locked {
    ($($(#[$m:meta])* $name:ident $function:literal),* $(,)?) => { $(
        $(#[$m])*
        #[fexit(function = $function)]
        pub fn $name(ctx: FExitContext) -> i32 {
            // SAFETY: the arguments of the hooked function.
            unsafe { changed(&ctx, inode_of(ctx.arg(1))) };
            0
        }
    )* };
}

locked! {
    /// An extended attribute set; before Linux 6.2 also an ACL.
    extended_set "__vfs_setxattr_noperm",
    /// An extended attribute removed.
    extended_remove "__vfs_removexattr_locked",
    /// File capabilities taken away by a write.
    extended_drop "__vfs_removexattr",
}

macro_rules! unlocked {
    ($($(#[$m:meta])* $function:literal $reason:ident $begin:ident $end:ident),* $(,)?) => { $(
        $(#[$m])*
        #[fentry(function = $function)]
        pub fn $begin(ctx: FEntryContext) -> i32 {
            // SAFETY: the arguments of the hooked function.
            unnoticed::begin(unsafe { inode_of(ctx.arg(1)) }, gap::$reason);
            0
        }

        /// Its end.
        #[fexit(function = $function)]
        pub fn $end(ctx: FExitContext) -> i32 {
            // SAFETY: the arguments of the hooked function.
            unsafe { changed(&ctx, inode_of(ctx.arg(1))) };
            unnoticed::end();
            0
        }
    )* };
}

/// An ACL set or removed: also by the kernel's NFS server, which passes by the hooks below.
#[fexit(function = "set_posix_acl")]
pub fn extended_acl(ctx: FExitContext) -> i32 {
    // SAFETY: the arguments of the hooked function.
    unsafe {
        let inode = if ACL_BY_DENTRY.load() == 1 {
            inode_of(ctx.arg(1))
        } else {
            ctx.arg(1)
        };
        changed(&ctx, inode);
    }
    0
}

unlocked! {
    /// An ACL set (6.2 and later).
    "vfs_set_acl" XATTR extended_acl_set_begin extended_acl_set,
    /// An ACL removed.
    "vfs_remove_acl" XATTR extended_acl_remove_begin extended_acl_remove,
    /// Inode flags or the project set.
    "vfs_fileattr_set" IOCTL extended_flags_begin extended_flags,
}

/// A fresh inode may have inherited an ACL or flags, or got a security label: told behind its own record.
///
/// # Safety
/// Both inodes were reached from a hook's arguments; the directory's lock is held.
#[inline(always)]
pub unsafe fn emit_inherited(control: Control, inode: *const u8, directory: *const u8) {
    // SAFETY: the caller's.
    unsafe {
        if STATE_OF_NEW.load() != 0 || passes_on_acl(directory) || passes_on_flags(directory) {
            emit_extended(control, inode);
        }
    }
}

/// Whether the directory has flags that what is made in it inherits, a project among them.
#[inline(always)]
fn passes_on_flags(directory: *const u8) -> bool {
    let at = (directory as u64).wrapping_add(FLAGS_FROM_INODE.load());
    gate::read_raw::<u32>(at).is_some_and(|flags| u64::from(flags) & FLAGS_HANDED_ON.load() != 0)
}

/// Whether the directory has a default ACL, which the file system has asked for just before; where the
/// inode does not hold the answer, it may have one.
#[inline(always)]
unsafe fn passes_on_acl(directory: *const u8) -> bool {
    const SB_POSIXACL: u64 = 1 << 16;
    if INODE_DEFAULT_ACL.load() == ABSENT {
        return false;
    }
    // SAFETY: the caller's. The ACL is read as a number, not as a typed pointer.
    unsafe {
        let sb: *const u8 = member(directory, &INODE_SB);
        let acl: u64 = member(directory, &INODE_DEFAULT_ACL);
        acl != 0 && member::<u64>(sb, &SB_FLAGS) & SB_POSIXACL != 0
    }
}
