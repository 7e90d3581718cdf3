//! Attributes set: truncate, `O_TRUNC`, chmod, chown, utimes, and bits that a write takes away.

use aya_ebpf::macros::fexit;
use aya_ebpf::programs::FExitContext;
use twinwrite_abi::{AttrBody, gap, op};

use crate::config::*;
use crate::emit::*;
use crate::space::is_refusal;

#[repr(C)]
#[derive(Clone, Copy)]
struct AttributeRecord {
    head: Head,
    body: AttrBody,
}

/// Emits the attributes that `inode` has now; `valid` says which were set on purpose.
///
/// # Safety
/// `inode` was reached from a hook's arguments.
#[inline(always)]
pub unsafe fn emit_attributes(control: Control, inode: *const u8, valid: u32) {
    // SAFETY: the caller's.
    unsafe {
        let mut record = AttributeRecord {
            head: head_of(op::SETATTR, inode),
            body: AttrBody {
                atime_ns: time_ns(inode, &INODE_ATIME_SEC, &INODE_ATIME_NSEC),
                uid: member(inode, &INODE_UID),
                gid: member(inode, &INODE_GID),
                nlink: member(inode, &INODE_NLINK),
                reserved: [0; 11],
            },
        };
        record.head.arg = u64::from(valid);
        emit(control, record);
    }
}

#[inline(always)]
fn changed(ctx: &FExitContext) -> Option<()> {
    let dentry: *const u8 = ctx.arg(1);
    let wish: *const u8 = ctx.arg(2);
    // SAFETY: the arguments of the hooked function, which holds the inode lock.
    unsafe {
        let inode: *const u8 = member(dentry, &DENTRY_INODE);
        let control = wanted(inode)?;
        let result: i32 = ctx.ret().ok()?;
        if result != 0 {
            // It was asked for again later: somebody is to give a delegation back first.
            const EAGAIN: i32 = 11;
            if !is_refusal(result) && result != -EAGAIN {
                note_gap(control, gap::ATTRIBUTES, inode);
            }
            return None;
        }
        emit_attributes(control, inode, member(wish, &IATTR_VALID));
    }
    Some(())
}

/// All of setattr, whoever asks for it.
#[fexit(function = "notify_change")]
pub fn attributes_change(ctx: FExitContext) -> i32 {
    changed(&ctx);
    0
}
