//! A volume of which only what is below one directory is protected: on which side of its border a file lies.
//!
//! A file stays on its side as long as the programs are there: renames and links across the border are refused, as
//! those from one file system to another are, and the agent has made sure that no file had names on both sides
//! before. So any name tells, it does not matter when it is asked, and the answer is kept. Only of a file that was
//! opened by its handle, whose names nobody has looked up since, nobody can tell: its changes close the epoch until
//! a checkpoint covers them. A crossing that was under way when the programs came is seen when it ends, and
//! withdraws the agent's proof.
//!
//! Dentries are read under RCU and without their locks. Their parents change meanwhile, but never the side.

use core::ffi::c_void;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_loop;
use aya_ebpf::macros::{lsm, map};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::LsmContext;
use twinwrite_abi::{control, gap};

use crate::config::*;
use crate::emit::*;
use crate::gate::{read_at, read_raw};

const EBUSY: i32 = 16;
const EXDEV: i32 = 18;
const MODE_FORMAT: u16 = 0o170_000;
const MODE_DIRECTORY: u16 = 0o040_000;
/// Names of one file that are looked at.
const NAMES_MAX: u32 = 64;
/// Directories on the way up from a name (`PATH_MAX` limits no depth); below deeper ones nobody can tell.
const LEVELS_MAX: u32 = 1 << 16;

/// On which side of the border something lies.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Side {
    /// Below the protected directory or the agent's own, or these themselves.
    Inside = 1,
    /// Not below it.
    Outside = 2,
    /// None of its names is in memory.
    Unknown = 3,
}

/// A walk up from a dentry. What changes in it and is no address lies on odd words, as in `data::Copying`: the
/// verifier does not track values there, so that it looks at a step once.
#[repr(C)]
struct Walk {
    dentry: u64,
    root: u64,
    _0: u32,
    side: u32,
}

#[inline(always)]
fn is_top(inode: u64, ino: &Global<u64>, generation: &Global<u64>) -> bool {
    read_at::<u64>(inode, &INODE_INO) == Some(ino.load())
        && read_at::<u32>(inode, &INODE_GENERATION) == Some(generation.load() as u32)
}

/// One step up; 1 if the walk is over.
extern "C" fn step(_index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `side_of_dentry` passes its own state.
    let walk = unsafe { &mut *state.cast::<Walk>() };
    let dentry = walk.dentry;
    let (Some(inode), Some(parent)) = (
        read_at::<u64>(dentry, &DENTRY_INODE),
        read_at::<u64>(dentry, &DENTRY_PARENT),
    ) else {
        return 1;
    };
    if is_top(inode, &SUBTREE_INO, &SUBTREE_GENERATION) || is_top(inode, &OWN_INO, &OWN_GENERATION)
    {
        walk.side = Side::Inside as u32;
        return 1;
    }
    if dentry == walk.root {
        walk.side = Side::Outside as u32;
        return 1;
    }
    // The top of something that has no place in the tree yet, such as a file that was opened by its handle.
    if parent == dentry {
        return 1;
    }
    walk.dentry = parent;
    0
}

/// The side of what a name is of, or was of.
#[inline(always)]
fn side_of_dentry(dentry: u64, root: u64) -> u32 {
    let mut walk = Walk {
        dentry,
        root,
        _0: 0,
        side: Side::Unknown as u32,
    };
    // SAFETY: the callback gets a pointer to this state, which outlives the loop.
    unsafe { bpf_loop(LEVELS_MAX, step as *mut c_void, (&raw mut walk).cast(), 0) };
    walk.side
}

/// The names of an inode that are in memory.
#[repr(C)]
struct Names {
    inode: u64,
    root: u64,
    /// Address of the next dentry's `d_alias`.
    next: u64,
    _0: u32,
    /// By [`bit`], the sides of those that it has.
    of_names: u32,
    _1: u32,
    /// The sides of those that were removed and are still in use.
    of_removed: u32,
}

#[inline(always)]
fn bit(side: Side) -> u32 {
    1 << side as u32
}

extern "C" fn next_name(_index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `names_of` passes its own state.
    let names = unsafe { &mut *state.cast::<Names>() };
    let node = names.next;
    if node == 0 {
        return 1;
    }
    let dentry = node.wrapping_sub(DENTRY_ALIAS.load());
    names.next = read_raw::<u64>(node).unwrap_or(0);
    // One that was just taken away from it leads nowhere.
    if read_at::<u64>(dentry, &DENTRY_INODE) != Some(names.inode) {
        return 1;
    }
    let side = side_of_dentry(dentry, names.root);
    let bit = if side == Side::Inside as u32 {
        bit(Side::Inside)
    } else if side == Side::Outside as u32 {
        bit(Side::Outside)
    } else {
        return 0;
    };
    // The file system's root is in no hash table either.
    if read_at::<u64>(dentry, &DENTRY_HASHED_BY) == Some(0) && dentry != names.root {
        names.of_removed |= bit;
    } else {
        names.of_names |= bit;
    }
    0
}

/// Looks at so many names of the inode at this address.
#[inline(always)]
fn names_of(inode: u64, most: u32) -> Names {
    let first = read_at::<u64>(inode, &INODE_DENTRIES).unwrap_or(0);
    let root = read_at::<u64>(inode, &INODE_SB).and_then(|sb| read_at::<u64>(sb, &SB_ROOT));
    let mut names = Names {
        inode,
        root: root.unwrap_or(0),
        next: first,
        _0: 0,
        of_names: 0,
        _1: 0,
        of_removed: 0,
    };
    // SAFETY: as in `side_of_dentry`.
    unsafe { bpf_loop(most, next_name as *mut c_void, (&raw mut names).cast(), 0) };
    names
}

#[inline(always)]
fn only(sides: u32) -> Side {
    if sides == bit(Side::Inside) {
        Side::Inside
    } else if sides == bit(Side::Outside) {
        Side::Outside
    } else {
        Side::Unknown
    }
}

/// By inode number and generation: the side, below the number of the proof that holds it there.
#[map]
static SIDES: LruHashMap<[u64; 2], u64> = LruHashMap::with_max_entries(1024, 0);
const SIDE_BITS: u64 = 2;

/// The number of the proof that no file crosses the border, if it holds.
#[inline(always)]
fn proof(control: Control) -> Option<u64> {
    let proof = control.read(control::SUBTREE_PROVEN);
    let seen = control.read(control::SUBTREE_CROSSINGS_SEEN);
    (proof != 0 && seen == control.read(control::SUBTREE_CROSSINGS)).then_some(proof)
}

/// The side of the inode at this address. A global function, which the verifier looks at once and not at each call.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn subtree_look(inode: u64) -> u64 {
    look(inode).unwrap_or(Side::Unknown) as u64
}

#[inline(always)]
fn look(inode: u64) -> Option<Side> {
    let proof = proof(Control::get()?);
    let key = [
        read_at::<u64>(inode, &INODE_INO)?,
        read_at::<u32>(inode, &INODE_GENERATION)?.into(),
    ];
    if let Some(proof) = proof
        // SAFETY: a value is one word.
        && let Some(known) = unsafe { SIDES.get(&key) }
        && *known >> SIDE_BITS == proof
    {
        return Some(if *known & 3 == Side::Inside as u64 {
            Side::Inside
        } else {
            Side::Outside
        });
    }
    let names = names_of(inode, NAMES_MAX);
    if names.of_names != 0 {
        let side = only(names.of_names);
        if let Some(proof) = proof
            && side != Side::Unknown
        {
            let _ = SIDES.insert(&key, &(proof << SIDE_BITS | side as u64), 0);
        }
        return Some(side);
    }
    // One that has names, none of which is in memory, may have got them elsewhere.
    if read_at::<u32>(inode, &INODE_NLINK)? != 0 {
        return None;
    }
    Some(only(names.of_removed))
}

/// Whether the inode at this address has, or had, names on both sides.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn subtree_crosses(inode: u64) -> u64 {
    let names = names_of(inode, NAMES_MAX);
    let both = bit(Side::Inside) | bit(Side::Outside);
    u64::from((names.of_names | names.of_removed) & both == both)
}

/// What global functions take is no pointer, and a pointer that went through a helper is a number.
#[inline(always)]
fn address_of(inode: *const u8) -> u64 {
    let address = inode as u64;
    read_raw::<u64>(&raw const address as u64).unwrap_or(0)
}

/// The side of an inode of the volume.
#[inline(always)]
pub fn side(inode: *const u8) -> Side {
    if SUBTREE_INO.load() == ABSENT {
        return Side::Inside;
    }
    side_at(address_of(inode))
}

/// As [`side`], of the inode at an address that is a number.
#[inline(always)]
pub fn side_at(inode: u64) -> Side {
    if SUBTREE_INO.load() == ABSENT {
        return Side::Inside;
    }
    match subtree_look(inode) {
        1 => Side::Inside,
        2 => Side::Outside,
        _ => Side::Unknown,
    }
}

/// A name was given, or moved, across the border after all, which began before that was refused. Until the agent
/// has looked again nothing it has proven holds.
#[inline(always)]
pub fn note_crossing(control: Control, inode: *const u8) {
    control.increment(control::SUBTREE_CROSSINGS);
    note_gap(control, gap::BORDER, inode);
}

/// Whether a further name that an inode has just got is where its others are; notes if it is not.
#[inline(always)]
pub fn is_link_within(control: Control, inode: *const u8) -> bool {
    if SUBTREE_INO.load() == ABSENT {
        return true;
    }
    let address = address_of(inode);
    if subtree_crosses(address) != 0 {
        note_crossing(control, inode);
        return false;
    }
    // So it is known, also once the name has left the memory.
    let _ = subtree_look(address);
    true
}

/// Whether a change of the inode, or in it, is to be told; notes one of which nobody can say.
#[inline(always)]
pub fn is_told(control: Control, inode: *const u8) -> bool {
    match side(inode) {
        Side::Inside => true,
        Side::Outside => false,
        Side::Unknown => {
            note_gap(control, gap::BORDER, inode);
            false
        }
    }
}

/// The control words, where there is a border on the inode's volume.
#[inline(always)]
fn with_border(inode: *const u8) -> Option<Control> {
    if SUBTREE_INO.load() == ABSENT {
        return None;
    }
    wanted_on_volume(inode)
}

/// What a hook answers about a name of `inode` that is to be in `directory`, where `from` is on its side now. One that
/// stays inside is counted.
#[inline(always)]
fn answer(control: Control, from: *const u8, inode: *const u8, directory: *const u8) -> i32 {
    let (from, to) = (side(from), side(directory));
    if from != to || from == Side::Unknown {
        return -EXDEV;
    }
    if to == Side::Inside {
        note_move(control, inode);
    }
    0
}

/// Whether the inode is the protected directory or one of those above it, which must stay where they are: what
/// is at their path is to be what is protected.
#[inline(always)]
fn is_on_path(control: Control, inode: *const u8) -> bool {
    if inode.is_null() {
        return false;
    }
    // SAFETY: callers pass an inode from the hook's arguments.
    let (ino, generation) = unsafe {
        (
            member::<u64>(inode, &INODE_INO),
            u64::from(member::<u32>(inode, &INODE_GENERATION)),
        )
    };
    let mut index = 0;
    while index < control::SUBTREE_PATH_MAX {
        let slot = control::SUBTREE_PATH + 2 * index;
        if control.read(slot) == ino && control.read(slot + 1) == generation {
            return true;
        }
        index += 1;
    }
    false
}

/// Counts what a search for files with names on both sides could miss because it moves inside meanwhile.
#[inline(always)]
fn note_move(control: Control, inode: *const u8) {
    // SAFETY: callers pass an inode from the hook's arguments.
    let (mode, links) = unsafe {
        (
            member::<u16>(inode, &INODE_MODE),
            member::<u32>(inode, &INODE_NLINK),
        )
    };
    if mode & MODE_FORMAT == MODE_DIRECTORY || links > 1 {
        control.increment(control::SUBTREE_MOVES);
    }
}

#[inline(always)]
unsafe fn inode_of(dentry: *const u8) -> *const u8 {
    // SAFETY: the caller passes a dentry from the hook's arguments.
    unsafe { member(dentry, &DENTRY_INODE) }
}

#[inline(always)]
fn link(ctx: &LsmContext) -> i32 {
    let before: i32 = ctx.arg(3);
    // SAFETY: the hook's arguments.
    let (inode, directory) = unsafe { (inode_of(ctx.arg(0)), ctx.arg(1)) };
    match with_border(directory) {
        Some(control) if before == 0 => answer(control, inode, inode, directory),
        _ => before,
    }
}

/// A further name.
#[lsm(hook = "inode_link")]
pub fn border_link(ctx: LsmContext) -> i32 {
    link(&ctx)
}

#[inline(always)]
fn rename(ctx: &LsmContext) -> i32 {
    let before: i32 = ctx.arg(4);
    let (from, to): (*const u8, *const u8) = (ctx.arg(0), ctx.arg(2));
    // SAFETY: the hook's arguments.
    let (inode, victim) = unsafe { (inode_of(ctx.arg(1)), inode_of(ctx.arg(3))) };
    match with_border(to) {
        Some(control) if before == 0 => {
            if is_on_path(control, inode) || is_on_path(control, victim) {
                return -EBUSY;
            }
            answer(control, from, inode, to)
        }
        _ => before,
    }
}

/// Another name. The hook is called twice for an exchange.
#[lsm(hook = "inode_rename")]
pub fn border_rename(ctx: LsmContext) -> i32 {
    rename(&ctx)
}

/// A directory is to be removed.
#[lsm(hook = "inode_rmdir")]
pub fn border_remove(ctx: LsmContext) -> i32 {
    let before: i32 = ctx.arg(2);
    // SAFETY: the hook's arguments.
    let inode = unsafe { inode_of(ctx.arg(1)) };
    match with_border(inode) {
        Some(control) if before == 0 && is_on_path(control, inode) => -EBUSY,
        _ => before,
    }
}
