//! Stopping a thread group before the gate, and keeping others from continuing it.
//!
//! A thread that has to wait writes itself into the host's map of held threads and stops its group by
//! a signal, which it meets before it returns to user space. An agent continues the group once every
//! entry of it may pass, of all volumes. While it does, the group's turn word is odd; a thread that
//! comes to a gate just then, or whose stop signal fell between, stops the group once more, or the
//! signal to go on would let it through.
//!
//! A program must never stop a group without an entry in the map, nor let one pass that it cannot
//! account for without noting it.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::*;
use aya_ebpf::macros::{btf_tracepoint, lsm, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::{BtfTracePointContext, LsmContext};
use twinwrite_abi::{TICK_NS, control, gap, held};

use crate::config::*;
use crate::emit::*;
use crate::gate::{Wait, note, now_ns};
use crate::workers;

const BPF_F_MMAPABLE: u32 = 1 << 10;
pub const BPF_NOEXIST: u64 = 1;
/// `JOBCTL_STOP_PENDING`.
pub const STOP_PENDING: u64 = 1 << 17;
const SIGCONT: i32 = 18;
pub const SIGSTOP: i32 = 19;
/// Its bit in a set of signals.
const SIGSTOP_BIT: u64 = 1 << (SIGSTOP - 1);
const SIGTTOU: i32 = 22;
const EPERM: i32 = 1;
/// Bound of the attempts; the time limit ends them before.
pub const ATTEMPTS_MAX: u32 = 1 << 20;
/// A group is continued within microseconds. A thread that comes just then waits so long for the end
/// of that.
pub const TURN_NS: u64 = 20_000_000;

/// Threads stopped before a gate of this host, see `twinwrite_abi::held`.
#[map]
pub static HELD: HashMap<[u64; held::KEY_WORDS], [u64; held::WORDS]> =
    HashMap::with_max_entries(8192, 0);
/// Their thread groups.
#[map]
pub static HELD_GROUPS: HashMap<u32, [u64; held::GROUP_WORDS]> = HashMap::with_max_entries(8192, 0);
/// Words of the host.
#[map]
static HOST: Array<[u64; held::HOST_WORDS]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[inline(always)]
fn host_word(word: usize) -> u64 {
    let Some(words) = HOST.get_ptr(0) else {
        return 0;
    };
    // SAFETY: every caller passes a word below HOST_WORDS.
    unsafe { core::ptr::read_volatile(words.cast::<u64>().wrapping_add(word)) }
}

/// Odd while the group is being continued.
#[inline(always)]
pub fn turn(group: u32) -> u64 {
    host_word(held::TURNS + (group as usize & (held::TURN_COUNT - 1)))
}

/// A full memory barrier: what was written before is seen by whoever sees what is read after.
#[inline(always)]
pub fn barrier(control: Control) {
    core::hint::black_box(control.add(control::GATE_HOLDS, 0));
}

/// The stopping of a group, tried until it is certain or the time is over.
#[repr(C)]
struct Stop {
    until_ns: u64,
    key: [u64; held::KEY_WORDS],
    entry: [u64; held::WORDS],
    ticks: u64,
    /// On odd words, which the verifier does not follow: the callback converges.
    _0: u32,
    signalled: u32,
    _1: u32,
    done: u32,
    _2: u32,
    refused: u32,
    _3: u32,
    entered: u32,
}

extern "C" fn stop_once(_: u64, stop: *mut c_void) -> i64 {
    // SAFETY: `hold` passes a pointer to its state.
    let stop = unsafe { &mut *stop.cast::<Stop>() };
    let Some(control) = Control::get() else {
        return 1;
    };
    let is_over = now_ns() >= stop.until_ns;
    let number = (stop.key[held::THREAD] >> 32) as u32;
    let before = turn(number);
    if before & 1 == 1 && !is_over {
        return 0;
    }
    if enter_group(number, stop.ticks) {
        stop.entered = 1;
    }
    if HELD.insert(&stop.key, &stop.entry, 0).is_err() {
        stop.refused = 1;
        return 1;
    }
    barrier(control);
    if stop.signalled == 0 && turn(number) != before && !is_over {
        return 0;
    }
    if stop.signalled == 0 && stop.entered != 0 {
        heed_others_stop(&stop.key, stop.ticks);
    }
    // SAFETY: the helper has no precondition. Refused while the one before is on its way on this
    // processor, to the first process, and to one that ends.
    if unsafe { bpf_send_signal(SIGSTOP as u32) } == 0 {
        stop.signalled = 1;
        barrier(control);
        if before & 1 == 0 && turn(number) == before {
            stop.done = 1;
            return 1;
        }
    }
    i64::from(is_over)
}

/// Enters a group that is to be held; whether it was not there. What another thread of it has entered
/// stays as it is; what is left of a process that ended, and whose number the group has got, does not.
#[inline(always)]
pub fn enter_group(number: u32, ticks: u64) -> bool {
    let is_other = HELD_GROUPS.get_ptr(&number).is_some_and(|found| {
        // SAFETY: the map's value.
        unsafe { (*found)[held::GROUP_STARTED_TICKS] != ticks }
    });
    let flags = if is_other { 0 } else { BPF_NOEXIST };
    HELD_GROUPS.insert(&number, &[0, ticks], flags).is_ok()
}

/// The search for another entry of a group.
#[repr(C)]
struct Search {
    key: [u64; held::KEY_WORDS],
    ticks: u64,
    /// On an odd word, as in [`Stop`].
    _0: u32,
    found: u32,
}

extern "C" fn is_other_of_group(
    _: *mut c_void,
    key: *const [u64; held::KEY_WORDS],
    entry: *const [u64; held::WORDS],
    search: *mut c_void,
) -> i64 {
    // SAFETY: `heed_others_stop` passes a pointer to its state; the map's key and value.
    let (search, key, ticks) = unsafe {
        (
            &mut *search.cast::<Search>(),
            core::ptr::read_volatile(key),
            core::ptr::read_volatile(entry.cast::<u64>().wrapping_add(held::STARTED_TICKS)),
        )
    };
    let is_own = key[held::THREAD] == search.key[held::THREAD]
        && key[held::DEVICE] == search.key[held::DEVICE]
        && key[held::SINCE_NS] == search.key[held::SINCE_NS];
    let is_of_group = key[held::THREAD] >> 32 == search.key[held::THREAD] >> 32;
    if is_of_group && !is_own && ticks == search.ticks {
        search.found = 1;
        return 1;
    }
    0
}

/// Nobody continues a group that others have stopped, so who has entered it looks whether they are at it.
/// That it is being stopped tells nothing while the group has other entries: then the signal is ours. To be
/// called with the own entry in the map, and no turn since: whoever is about to continue the group finds it.
#[inline(always)]
pub fn heed_others_stop(key: &[u64; held::KEY_WORDS], ticks: u64) {
    if !is_being_stopped() {
        return;
    }
    let mut search = Search {
        key: *key,
        ticks,
        _0: 0,
        found: 0,
    };
    // SAFETY: the callback gets a pointer to this state, which outlives the loop.
    let found = unsafe {
        bpf_for_each_map_elem(
            (&raw const HELD).cast_mut().cast(),
            is_other_of_group as *mut c_void,
            core::ptr::from_mut(&mut search).cast(),
            0,
        );
        core::ptr::read_volatile(&raw const search.found)
    };
    let number = (key[held::THREAD] >> 32) as u32;
    if found == 0
        && let Some(group) = HELD_GROUPS.get_ptr_mut(&number)
    {
        // SAFETY: the map's value; a word is written whole.
        unsafe {
            let word = group.cast::<u64>().wrapping_add(held::GROUP_SIGNAL);
            core::ptr::write_volatile(word, SIGSTOP as u64);
        }
    }
}

/// Whether somebody is stopping the running thread group, or has sent it the signal that will.
#[inline(always)]
fn is_being_stopped() -> bool {
    // SAFETY: the current task is valid; a fault reads as zero.
    unsafe {
        let task = bpf_get_current_task_btf() as *const u8;
        let signal: *const u8 = member(task, &TASK_SIGNAL);
        member::<u64>(task, &TASK_JOB_CONTROL) & STOP_PENDING != 0
            || member::<i32>(signal, &SIGNAL_STOP_COUNT) != 0
            || (member::<u64>(signal, &SIGNAL_PENDING) | member::<u64>(task, &TASK_PENDING))
                & SIGSTOP_BIT
                != 0
    }
}

/// Stops the running thread group before the gate.
#[inline(always)]
pub fn hold(control: Control, wait: &Wait) {
    let ticks = group_start_ticks();
    let since_ns = now_ns();
    let mut stop = Stop {
        until_ns: since_ns + TURN_NS,
        key: [thread(), TARGET_DEV.load(), since_ns],
        entry: [
            wait.position,
            wait.open_word,
            wait.generation,
            ticks,
            held::STOPPING,
        ],
        ticks,
        _0: 0,
        signalled: 0,
        _1: 0,
        done: 0,
        _2: 0,
        refused: 0,
        _3: 0,
        entered: 0,
    };
    let state = core::ptr::from_mut(&mut stop).cast();
    // SAFETY: the callback gets a pointer to this state, which outlives the loop.
    unsafe { bpf_loop(ATTEMPTS_MAX, stop_once as *mut c_void, state, 0) };
    // SAFETY: the callback wrote them.
    let (signalled, done) = unsafe {
        (
            core::ptr::read_volatile(&raw const stop.signalled) != 0,
            core::ptr::read_volatile(&raw const stop.done) != 0,
        )
    };
    if !done {
        note(control, gap::UNGATED);
    }
    if signalled {
        // Only from now on an agent may continue it.
        stop.entry[held::STATE] = held::STOPPED;
        let _ = HELD.insert(&stop.key, &stop.entry, 0);
        // An agent that has just continued the group may have taken its record away.
        enter_group((stop.key[held::THREAD] >> 32) as u32, ticks);
        control.increment(control::GATE_HOLDS);
    } else {
        let _ = HELD.remove(&stop.key);
    }
}

#[inline(always)]
fn is_continuer() -> bool {
    thread() >> 32 == host_word(held::CONTINUER)
        && group_start_ticks() == host_word(held::CONTINUER_TICKS)
}

/// The entry of a task's group, if it is held.
///
/// # Safety
/// `task` from the hook's arguments.
#[inline(always)]
unsafe fn held_group(task: *const u8) -> Option<*mut [u64; held::GROUP_WORDS]> {
    // SAFETY: the caller's.
    let (group, ticks) = unsafe {
        let leader: *const u8 = member(task, &TASK_LEADER);
        (
            member::<u32>(task, &TASK_TGID),
            member::<u64>(leader, &TASK_STARTED) / TICK_NS,
        )
    };
    let found = HELD_GROUPS.get_ptr_mut(&group)?;
    // SAFETY: the map's value.
    (unsafe { (*found)[held::GROUP_STARTED_TICKS] } == ticks).then_some(found)
}

/// A held thread group goes on with the gate and not before. Who stops it meanwhile is heeded.
#[lsm(hook = "task_kill")]
pub fn gate_kill(ctx: LsmContext) -> i32 {
    let (signal, before): (i32, i32) = (ctx.arg(2), ctx.arg(4));
    if before != 0 || !(SIGCONT..=SIGTTOU).contains(&signal) {
        return before;
    }
    // SAFETY: the hook's argument.
    let Some(group) = (unsafe { held_group(ctx.arg(0)) }) else {
        return 0;
    };
    if is_continuer() {
        return 0;
    }
    let stopped_by = if signal == SIGCONT { 0 } else { signal as u64 };
    // SAFETY: the map's value; a word is written whole.
    unsafe {
        let word = group.cast::<u64>().wrapping_add(held::GROUP_SIGNAL);
        // The others may be ignored or handled: they are sent again once the group goes on.
        if stopped_by == 0 || core::ptr::read_volatile(word) != SIGSTOP as u64 {
            core::ptr::write_volatile(word, stopped_by);
        }
    }
    if signal == SIGCONT { -EPERM } else { 0 }
}

/// Ends the turn in which a group is being continued: the signal to go on is sent, and whatever thread
/// of it comes to a gate from now on stops it anew. Here and not by the agent, which the group may have
/// pushed off the processor, while a thread of it waits there for the end of the turn.
#[inline(always)]
fn end_turn(group: u32) {
    let at = held::TURNS + (group as usize & (held::TURN_COUNT - 1));
    if let Some(words) = HOST.get_ptr_mut(0)
        && turn(group) & 1 == 1
    {
        // SAFETY: a word below HOST_WORDS; only who has the host's lock continues groups.
        unsafe {
            core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
                words.cast::<u64>().wrapping_add(at),
                1,
            )
        };
    }
}

/// A signal to go on that nobody asks about: the kernel's own, or where security modules do not run.
#[btf_tracepoint(function = "signal_generate")]
pub fn gate_continued(ctx: BtfTracePointContext) -> i32 {
    let signal: i32 = ctx.arg(0);
    let task: *const u8 = ctx.arg(2);
    if signal == SIGSTOP {
        // SAFETY: the tracepoint's argument.
        unsafe { workers::tick_has_stopped(task, ctx.arg(1)) };
    }
    if signal != SIGCONT {
        return 0;
    }
    // SAFETY: the tracepoint's argument.
    if unsafe { held_group(task) }.is_none() {
        return 0;
    }
    if is_continuer() {
        // Before anybody of the group runs: the sender has their signal lock.
        // SAFETY: as above.
        end_turn(unsafe { member::<u32>(task, &TASK_TGID) });
        return 0;
    }
    if let Some(control) = Control::get()
        && control.read(control::GATE_OPEN_TO) != control::GATE_OPEN
    {
        note(control, gap::UNGATED);
    }
    0
}
