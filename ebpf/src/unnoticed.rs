//! Calls whose change others can see before its record, or its gap, is in the ring, because the hook that
//! writes it runs after the inode's lock was let go. While one is under way no fsync trusts the log alone.

use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use twinwrite_abi::{control, gap};

use crate::emit::*;
use crate::gate;

/// Threads in such a call, and what its change is a gap of. Not one that forgets: an entry also says that a
/// change is to be told.
#[map]
static UNDER_WAY: HashMap<u64, u64> = HashMap::with_max_entries(16384, 0);

/// Such a call on `inode` begins. `reason`: what the change is a gap of if there is no room for the thread.
#[inline(always)]
pub fn begin(inode: *const u8, reason: usize) {
    const NEW_ONLY: u64 = 1;
    const EXISTS: i64 = -17;
    let Some(control) = wanted(inode) else {
        return;
    };
    match UNDER_WAY.insert(&thread(), &(reason as u64), NEW_ONLY) {
        Ok(()) => {
            control.increment(control::UNNOTICED);
        }
        Err(error) if i64::from(error) == EXISTS => {}
        Err(_) => note_gap(control, reason, inode),
    }
}

/// Whether the thread is in such a call.
#[inline(always)]
pub fn is_under_way() -> bool {
    // SAFETY: only this thread writes its entry.
    unsafe { UNDER_WAY.get(&thread()) }.is_some()
}

/// Whether another thread is in such a call.
#[inline(always)]
pub fn is_any_of_others(control: Control) -> bool {
    match control.read(control::UNNOTICED) {
        0 => false,
        1 => !is_under_way(),
        _ => true,
    }
}

/// The system call ends in which one was under way that was not seen to end.
#[inline(always)]
pub fn end_unseen(control: Control) {
    if control.read(control::UNNOTICED) == 0 {
        return;
    }
    // SAFETY: only this thread writes its entry.
    if let Some(reason) = unsafe { UNDER_WAY.get(&thread()) }.copied() {
        gate::note(control, reason as usize & (gap::COUNT - 1));
        end();
    }
}

/// It has ended, and what it changed has its record.
#[inline(always)]
pub fn end() {
    if UNDER_WAY.remove(&thread()).is_ok()
        && let Some(control) = Control::get()
    {
        control.add(control::UNNOTICED, u64::MAX);
    }
}
