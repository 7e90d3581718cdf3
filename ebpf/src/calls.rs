//! System calls by their numbers.

use aya_ebpf::helpers::generated::bpf_task_pt_regs;

use crate::config::*;
use crate::gate;

/// `TS_COMPAT` of `thread_info.status` (arch/x86/include/asm/thread_info.h).
const COMPAT: u32 = 1 << 1;

/// What stands in the register of the result while a call is carried out (arch/x86/entry/entry_64.S).
const ENOSYS: i64 = 38;

/// What a system call is to the gate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Confirms what was written before to all volumes.
    SyncAll,
    /// Confirms what was written before to its file's volume.
    SyncVolume,
    /// Confirms what was written before to its file.
    SyncFile,
    /// `sync_file_range`: waits for what was written before if its fourth argument says so.
    Range,
    /// Writes.
    Write,
    /// None of these.
    Other,
}

/// What the call of this number is; `compat`: of the 32-bit table.
#[inline(always)]
pub fn class(number: u64, compat: bool) -> Class {
    if compat {
        return match number {
            36 => Class::SyncAll,
            344 => Class::SyncVolume,
            118 | 148 => Class::SyncFile,
            314 => Class::Range,
            4 | 146 | 181 | 334 | 379 => Class::Write,
            _ => Class::Other,
        };
    }
    match number {
        162 => Class::SyncAll,
        306 => Class::SyncVolume,
        74 | 75 => Class::SyncFile,
        277 => Class::Range,
        1 | 18 | 20 | 296 | 328 => Class::Write,
        _ => Class::Other,
    }
}

/// Whether the running system call came by the 32-bit entry.
#[inline(always)]
pub fn is_compat() -> bool {
    // SAFETY: the current task is valid.
    unsafe { member::<u32>(gate::current(), &TASK_STATUS) & COMPAT != 0 }
}

/// Whether the running thread is in a system call that returns when its write is done.
#[inline(always)]
pub fn is_in_write() -> bool {
    if gate::task_flags() & gate::CANNOT_STOP != 0 {
        return false;
    }
    // SAFETY: the current task is valid, and so are its registers as long as it runs.
    let (number, result): (u64, i64) = unsafe {
        let regs = bpf_task_pt_regs(gate::current().cast_mut().cast()) as *const u8;
        (member(regs, &REGS_NUMBER), member(regs, &REGS_RESULT))
    };
    // What the call answers replaces this before work that was put off to its end is done, such as an io_uring's.
    result == -ENOSYS && class(number, is_compat()) == Class::Write
}
