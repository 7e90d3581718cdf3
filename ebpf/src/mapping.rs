//! Stores through shared mappings. The kernel tells only when a page becomes writable; what is stored into it
//! afterwards nobody sees. So a record tells of the page, and the agent asks for a snapshot of it again and
//! again until the page was written back, which makes it read-only once more.

use aya_ebpf::macros::{fexit, lsm};
use aya_ebpf::programs::{FExitContext, LsmContext};
use twinwrite_abi::{MAPPED_PAGE_BYTES, control, flag, gap, op, snapshot};

use crate::config::*;
use crate::emit::*;
use crate::gate::read_at;
use crate::space::{self, Range};

/// `VM_FAULT_ERROR`: the fault did not make the page writable.
const FAULT_ERROR: u32 = 0x0000_0873;

#[inline(always)]
fn became_writable(ctx: &FExitContext) -> Option<()> {
    let fault: *const u8 = ctx.arg(0);
    if ctx.ret::<u32>().ok()? & FAULT_ERROR != 0 {
        return None;
    }
    // SAFETY: the arguments of the hooked function.
    unsafe {
        let file: *const u8 = member(member(fault, &FAULT_VMA), &VMA_FILE);
        let inode: *const u8 = member(file, &FILE_INODE);
        let control = wanted(inode)?;
        // The log lacks what will be stored: whoever syncs the file waits for its mark, which clips.
        control.increment(control::GAPS + gap::MAPPING);
        let page: u64 = member(fault, &FAULT_PAGE);
        let (first, pages) = mapped_at_once(member(fault, &FAULT_PAGE_STRUCT)).unwrap_or((page, 1));
        let mut head = head_of(op::WRITE, inode);
        head.flags = flag::MAPPED;
        head.pos = first * MAPPED_PAGE_BYTES;
        head.arg = pages * MAPPED_PAGE_BYTES;
        head.size_after = 0;
        space::emit_steady(control, inode, head);
    }
    Some(())
}

/// First page and number of pages of the folio that a page belongs to, if it is as large as a page of a
/// page table's middle level: it may have become writable as a whole (`do_set_pmd`, mm/memory.c).
#[inline(always)]
fn mapped_at_once(page: u64) -> Option<(u64, u64)> {
    const TAIL: u64 = 1;
    const LARGE_ORDER: u8 = 9;
    const ORDER_MAX: u8 = 20;
    let compound: u64 = read_at(page, &PAGE_COMPOUND)?;
    let folio = if compound & TAIL != 0 {
        compound - TAIL
    } else {
        page
    };
    let flags: u64 = read_at(folio, &FOLIO_FLAGS)?;
    if flags >> PAGE_IS_HEAD.load() & 1 == 0 {
        return None;
    }
    let order: u8 = read_at(folio, &FOLIO_ORDER)?;
    if !(LARGE_ORDER..=ORDER_MAX).contains(&order) {
        return None;
    }
    Some((read_at(folio, &FOLIO_INDEX)?, 1 << order))
}

/// A page of a shared mapping becomes writable; its file's times change with it.
#[fexit(function = "do_page_mkwrite")]
pub fn mapping_writable(ctx: FExitContext) -> i32 {
    became_writable(&ctx);
    0
}

const PROT_WRITE: u64 = 0x2;
const MAP_SHARED: u64 = 0x1;
const VM_SHARED: u64 = 0x8;
const EOPNOTSUPP: i32 = 95;

/// What a hook answers about a file that is to be mapped so that it can be changed.
#[inline(always)]
unsafe fn answer(file: *const u8) -> i32 {
    // SAFETY: the caller passes a file from the hook's arguments.
    let inode: *const u8 = unsafe { member(file, &FILE_INODE) };
    match concerned(inode) {
        Some(control) if control.read(control::MAPPINGS_REFUSED) != 0 => -EOPNOTSUPP,
        _ => 0,
    }
}

/// A file is to be mapped. Without one it is anonymous memory.
#[lsm(hook = "mmap_file")]
pub fn mapping_refuse(ctx: LsmContext) -> i32 {
    let file: *const u8 = ctx.arg(0);
    let (protection, flags, before): (u64, u64, i32) = (ctx.arg(2), ctx.arg(3), ctx.arg(4));
    // Also `MAP_SHARED_VALIDATE`.
    if before != 0 || file.is_null() || protection & PROT_WRITE == 0 || flags & MAP_SHARED == 0 {
        return before;
    }
    // SAFETY: the hook's argument.
    unsafe { answer(file) }
}

/// A mapping is to become writable.
#[lsm(hook = "file_mprotect")]
pub fn mapping_refuse_upgrade(ctx: LsmContext) -> i32 {
    let mapping: *const u8 = ctx.arg(0);
    let (protection, before): (u64, i32) = (ctx.arg(2), ctx.arg(3));
    if before != 0 || protection & PROT_WRITE == 0 {
        return before;
    }
    // SAFETY: the hook's arguments.
    unsafe {
        let file: *const u8 = member(mapping, &VMA_FILE);
        if file.is_null() || member::<u64>(mapping, &VMA_FLAGS) & VM_SHARED == 0 {
            return 0;
        }
        answer(file)
    }
}

/// Whether an ioctl is the agent's wish for a snapshot, which is then carried out.
///
/// # Safety
/// `inode` was reached from a hook's arguments.
#[inline(always)]
pub unsafe fn is_snapshot(inode: *const u8, command: u32, argument: u64) -> bool {
    if command != snapshot::COMMAND {
        return false;
    }
    let Some(control) = Control::get() else {
        return false;
    };
    if !is_on_volume(inode) || !is_agent(control) {
        return false;
    }
    let (pos, bytes) = snapshot::range(argument);
    let range = Range {
        pos,
        bytes,
        grown_to: 0,
        flags: flag::MAPPED,
        reason: gap::MAPPING,
    };
    space::emit_range(control, inode, range);
    true
}
