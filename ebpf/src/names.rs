//! Names bound, removed and moved: hooks inside the dentry functions, which run after success and
//! under the directory locks.

use aya_ebpf::bindings::bpf_dynptr;
use aya_ebpf::helpers::generated::bpf_dynptr_data;
use aya_ebpf::macros::{fentry, fexit};
use aya_ebpf::programs::{FEntryContext, FExitContext};
use twinwrite_abi::{NAME_BYTES_MAX, NameBody, TARGET_BYTES_MAX, control, flag, gap, op};

use crate::attributes::emit_attributes;
use crate::config::*;
use crate::data::Copying;
use crate::emit::*;
use crate::extended::emit_inherited;
use crate::subtree::{Side, is_link_within, is_told, note_crossing, side};

const MODE_FORMAT: u32 = 0o170_000;
const MODE_DIRECTORY: u32 = 0o040_000;
const MODE_SYMLINK: u32 = 0o120_000;
/// `Head` and `NameBody`: where the names begin in what a program reserves.
const NAMES_AT: u32 = HEAD_BYTES + size_of::<NameBody>() as u32;

#[repr(C)]
#[derive(Clone, Copy)]
struct NameRecord {
    head: Head,
    body: NameBody,
}

const _: () = assert!(size_of::<NameRecord>() == NAMES_AT as usize);

/// A dentry's name.
#[derive(Clone, Copy)]
struct Name {
    at: u64,
    len: u32,
}

impl Name {
    const NONE: Self = Self { at: 0, len: 0 };

    /// The name of `dentry`, which is stable: the hook runs under its directory's lock.
    #[inline(always)]
    unsafe fn of(dentry: *const u8) -> Self {
        // SAFETY: the caller passes a dentry from the hook's arguments.
        unsafe {
            Self {
                at: member(dentry, &DENTRY_NAME),
                len: member(dentry, &DENTRY_NAME_LEN),
            }
        }
    }

    #[inline(always)]
    fn impossible(self) -> bool {
        self.len > NAME_BYTES_MAX as u32
    }

    /// Copies the name to offset `to` of the record; false if it could not be read.
    #[inline(always)]
    fn copy(self, copying: &mut Copying, to: u32) -> bool {
        if self.len == 0 {
            return true;
        }
        copying.from_kernel(self.at, to, self.len);
        !copying.incomplete()
    }
}

#[inline(always)]
unsafe fn parent_of(dentry: *const u8) -> *const u8 {
    // SAFETY: the caller passes a dentry from the hook's arguments.
    unsafe { member(member(dentry, &DENTRY_PARENT), &DENTRY_INODE) }
}

#[inline(always)]
unsafe fn mtime_ns(inode: *const u8) -> i64 {
    // SAFETY: the caller's.
    unsafe { time_ns(inode, &INODE_MTIME_SEC, &INODE_MTIME_NSEC) }
}

/// Header and body for `inode`; the parent of `dentry` is the (old) parent.
#[inline(always)]
unsafe fn record_of(op: u8, inode: *const u8, parent: *const u8) -> NameRecord {
    // SAFETY: the caller passes inodes reached from the hook's arguments.
    unsafe {
        let mut record = NameRecord {
            head: head_of(op, inode),
            body: NameBody {
                new_parent_ino: 0,
                victim_ino: 0,
                new_parent_generation: 0,
                victim_generation: 0,
                uid: member(inode, &INODE_UID),
                gid: member(inode, &INODE_GID),
                rdev: member(inode, &INODE_RDEV),
                nlink: member(inode, &INODE_NLINK),
                victim_nlink: 0,
                name2_len: 0,
                parent_time_ns: mtime_ns(parent),
                new_parent_time_ns: 0,
            },
        };
        record.head.pos = member(parent, &INODE_INO);
        record.head.arg = u64::from(member::<u32>(parent, &INODE_GENERATION));
        record
    }
}

/// Turns a record whose names could not be read into a gap.
#[inline(always)]
fn unreadable(control: Control, dynptr: *mut bpf_dynptr) {
    control.increment(control::GAPS + gap::UNREADABLE);
    // SAFETY: the dynptr holds a reservation of at least a header.
    let place: *mut Head = unsafe { bpf_dynptr_data(dynptr.cast(), 0, HEAD_BYTES as _) }.cast();
    if !place.is_null() {
        // SAFETY: `place` has room for a header.
        unsafe {
            (*place).op = op::GAP;
            (*place).arg = gap::UNREADABLE as u64;
        }
    }
}

/// Emits a record with one or two names and, for a symlink, the target at `target`.
#[inline(always)]
fn emit_names(
    control: Control,
    mut record: NameRecord,
    inode: *const u8,
    names: [Name; 2],
    target: u64,
) {
    let target_len = record.head.data_len;
    if names[0].impossible() || names[1].impossible() || target_len > TARGET_BYTES_MAX as u32 {
        note_gap(control, gap::UNREADABLE, inode);
        return;
    }
    record.head.name_len = names[0].len as u16;
    record.body.name2_len = names[1].len;
    let mut copying = Copying::new();
    let dynptr = &raw mut copying.dynptr;
    let body = size_of::<NameBody>() as u64
        + u64::from(names[0].len)
        + u64::from(names[1].len)
        + u64::from(target_len);
    if !reserve_dynptr(control, dynptr, body) {
        return;
    }
    // SAFETY: the dynptr holds a reservation of at least a header and a body.
    let place: *mut NameRecord = unsafe { bpf_dynptr_data(dynptr.cast(), 0, NAMES_AT as _) }.cast();
    if !place.is_null() {
        // SAFETY: `place` has room for both.
        unsafe { *place = record };
    }
    let second_at = NAMES_AT + names[0].len;
    let target = Name {
        at: target,
        len: target_len,
    };
    let whole = names[0].copy(&mut copying, NAMES_AT)
        && names[1].copy(&mut copying, second_at)
        && target.copy(&mut copying, second_at);
    if !whole {
        unreadable(control, &raw mut copying.dynptr);
    }
    submit_dynptr(control, &raw mut copying.dynptr);
}

/// A dentry got its inode: a fresh one, or a further name of an old one.
#[inline(always)]
fn instantiated(ctx: &FExitContext) -> Option<()> {
    let dentry: *const u8 = ctx.arg(0);
    let inode: *const u8 = ctx.arg(1);
    let control = wanted_on_volume(inode)?;
    // SAFETY: the arguments of the hooked function.
    unsafe {
        let parent = parent_of(dentry);
        let is_linkable = u64::from(member::<u32>(inode, &INODE_STATE)) & I_LINKABLE.load() != 0;
        let is_link = is_linkable || member::<u32>(inode, &INODE_NLINK) > 1;
        if is_link && !is_link_within(control, inode) || !is_told(control, parent) {
            return None;
        }
        let mut record = record_of(op::CREATE, inode, parent);
        let format = record.head.mode & MODE_FORMAT;
        if record.body.nlink == 0 {
            // d_tmpfile, which has its own hook because this call is inlined there on some kernels.
            return None;
        }
        if is_linkable {
            record.head.op = op::LINK;
            record.head.flags = flag::FROM_TMPFILE;
        } else if record.body.nlink > 1 && format != MODE_DIRECTORY {
            record.head.op = op::LINK;
        } else if format == MODE_SYMLINK {
            // Its target is known at the exit of vfs_symlink.
            return None;
        }
        let is_fresh = record.head.op == op::CREATE;
        emit_names(control, record, inode, [Name::of(dentry), Name::NONE], 0);
        if is_fresh {
            emit_inherited(control, inode, parent);
        }
    }
    Some(())
}

/// xfs; on every file system links.
#[fexit(function = "d_instantiate")]
pub fn name_instantiate(ctx: FExitContext) -> i32 {
    instantiated(&ctx);
    0
}

/// ext4: create, mkdir, mknod, symlink.
#[fexit(function = "d_instantiate_new")]
pub fn name_instantiate_new(ctx: FExitContext) -> i32 {
    instantiated(&ctx);
    0
}

#[inline(always)]
fn unnamed(ctx: &FExitContext) -> Option<()> {
    let inode: *const u8 = ctx.arg(1);
    let control = wanted_on_volume(inode)?;
    // SAFETY: the arguments of the hooked function.
    unsafe {
        // Which directory it was made in its open file's dentry tells; it has no name there.
        let directory = parent_of(member(ctx.arg(0), &FILE_DENTRY));
        if !is_told(control, directory) {
            return None;
        }
        let mut record = record_of(op::TMPFILE, inode, inode);
        record.head.pos = 0;
        record.head.arg = 0;
        record.body.parent_time_ns = 0;
        emit_names(control, record, inode, [Name::NONE, Name::NONE], 0);
        emit_inherited(control, inode, directory);
    }
    Some(())
}

/// `O_TMPFILE`.
#[fexit(function = "d_tmpfile")]
pub fn name_tmpfile(ctx: FExitContext) -> i32 {
    unnamed(&ctx);
    0
}

#[inline(always)]
fn symlinked(ctx: &FExitContext) -> Option<()> {
    let dentry: *const u8 = ctx.arg(2);
    let target: u64 = ctx.arg(3);
    // SAFETY: the arguments of the hooked function.
    let inode: *const u8 = unsafe { member(dentry, &DENTRY_INODE) };
    let control = wanted_on_volume(inode)?;
    let result: i32 = ctx.ret().ok()?;
    // SAFETY: as above.
    if result != 0 || !is_told(control, unsafe { parent_of(dentry) }) {
        return None;
    }
    // SAFETY: as above.
    unsafe {
        let mut record = record_of(op::SYMLINK, inode, parent_of(dentry));
        record.head.data_len = record.head.size_after as u32;
        emit_names(
            control,
            record,
            inode,
            [Name::of(dentry), Name::NONE],
            target,
        );
        emit_inherited(control, inode, parent_of(dentry));
    }
    Some(())
}

/// A symlink with its target.
#[fexit(function = "vfs_symlink")]
pub fn name_symlink(ctx: FExitContext) -> i32 {
    symlinked(&ctx);
    0
}

#[inline(always)]
fn deleted(ctx: &FEntryContext) -> Option<()> {
    let dentry: *const u8 = ctx.arg(0);
    // SAFETY: the arguments of the hooked function.
    unsafe {
        let inode: *const u8 = member(dentry, &DENTRY_INODE);
        let control = wanted_on_volume(inode)?;
        if !is_told(control, parent_of(dentry)) {
            return None;
        }
        let record = record_of(op::UNLINK, inode, parent_of(dentry));
        emit_names(control, record, inode, [Name::of(dentry), Name::NONE], 0);
    }
    Some(())
}

/// unlink and rmdir: called only after success, while the dentry still has its inode.
#[fentry(function = "d_delete")]
pub fn name_delete(ctx: FEntryContext) -> i32 {
    deleted(&ctx);
    0
}

/// Whether a move is to be told. One across the border, which began before those were refused, is a gap.
#[inline(always)]
fn is_told_of_move(control: Control, inode: *const u8, from: *const u8, to: *const u8) -> bool {
    let (from, to) = (side(from), side(to));
    if from != to || from == Side::Unknown {
        note_crossing(control, inode);
        return false;
    }
    from == Side::Inside
}

/// A rename or an exchange, before the dentries change: `dentry` is still at the old name.
#[inline(always)]
fn moved(ctx: &FEntryContext, op: u8) -> Option<()> {
    let dentry: *const u8 = ctx.arg(0);
    let target: *const u8 = ctx.arg(1);
    // SAFETY: the arguments of the hooked function; a null victim reads as zeros.
    unsafe {
        let inode: *const u8 = member(dentry, &DENTRY_INODE);
        let control = wanted_on_volume(inode)?;
        let (parent, new_parent) = (parent_of(dentry), parent_of(target));
        if !is_told_of_move(control, inode, parent, new_parent) {
            return None;
        }
        let mut record = record_of(op, inode, parent);
        record.body.new_parent_ino = member(new_parent, &INODE_INO);
        record.body.new_parent_generation = member(new_parent, &INODE_GENERATION);
        record.body.new_parent_time_ns = mtime_ns(new_parent);
        let victim: *const u8 = member(target, &DENTRY_INODE);
        if !victim.is_null() {
            record.body.victim_ino = member(victim, &INODE_INO);
            record.body.victim_generation = member(victim, &INODE_GENERATION);
            record.body.victim_nlink = member(victim, &INODE_NLINK);
        }
        emit_names(
            control,
            record,
            inode,
            [Name::of(dentry), Name::of(target)],
            0,
        );
    }
    Some(())
}

/// rename, with or without a victim.
#[fentry(function = "d_move")]
pub fn name_move(ctx: FEntryContext) -> i32 {
    moved(&ctx, op::RENAME);
    0
}

/// XFS changes the modification time of a directory that gets another parent. The exchange's record
/// has room for that of one inode only.
#[inline(always)]
fn attributes_of_other(ctx: &FEntryContext) -> Option<()> {
    let target: *const u8 = ctx.arg(1);
    // SAFETY: an argument of the hooked function.
    unsafe {
        let other: *const u8 = member(target, &DENTRY_INODE);
        let control = wanted(other)?;
        if u32::from(member::<u16>(other, &INODE_MODE)) & MODE_FORMAT == MODE_DIRECTORY {
            emit_attributes(control, other, 0);
        }
    }
    Some(())
}

/// rename with `RENAME_EXCHANGE`.
#[fentry(function = "d_exchange")]
pub fn name_exchange(ctx: FEntryContext) -> i32 {
    moved(&ctx, op::EXCHANGE);
    attributes_of_other(&ctx);
    0
}
