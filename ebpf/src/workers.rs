//! Answers that a worker of io_uring hands over: its thread group is stopped for them, by its other threads.
//!
//! A worker runs in the application's thread group and never returns to user space, so no signal can
//! keep it from posting what it has done, and a signal that it sends itself comes too late. So it enters
//! the map of held threads without sending one, and marks its group: from then on every other thread of
//! the group stops it as soon as it is about to run in user space. One that sleeps in a system call does
//! so at the call's end, one that runs there already at the next tick of its timer. The worker goes on,
//! and posts its answer, once each of the others sleeps in a call or is stopped. What could not be
//! brought about in time is a gap.
//!
//! A program must never let a worker post an answer that another thread may see before the gate has let
//! it pass, without noting it.

use core::ffi::c_void;

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::*;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use twinwrite_abi::{control, gap, held};

use crate::config::*;
use crate::emit::*;
use crate::gate::{self, CANNOT_STOP, IO_WORKER, Wait, current, note, now_ns, unless_ending};
use crate::hold::*;

/// Thread groups for whose other threads a worker waits, see `twinwrite_abi::held`.
#[map]
static MARKED_GROUPS: HashMap<u32, [u64; held::MARKED_WORDS]> = HashMap::with_max_entries(8192, 0);

/// `PF_EXITING` and [`IO_WORKER`]: never in user space again.
const NEVER_RETURNS: u32 = 0x0000_0004 | IO_WORKER;
/// `TASK_INTERRUPTIBLE`.
const SLEEPS: u32 = 1;
/// `__TASK_STOPPED`.
const STOPPED: u32 = 4;
/// `SEND_SIG_PRIV`: who sends the signal is the kernel, as for a program.
const BY_KERNEL: u64 = 1;
/// The longest a worker waits for the other threads. A tick comes within 10 ms; but a thread may have to
/// wait for a processor, and a virtual one for a real one.
const OTHERS_LIMIT_NS: u64 = 250_000_000;
/// Bound of the looks at them (`BPF_MAX_LOOPS`); the time limit ends them before.
const LOOKS_MAX: u32 = 1 << 23;

/// Whether any group is marked on this volume.
#[inline(always)]
fn are_marks(control: Control) -> bool {
    control.read(control::MARKS) != control.read(control::MARKS_SETTLED)
}

#[inline(always)]
fn is_group_marked(number: u32, ticks: u64) -> bool {
    let Some(group) = MARKED_GROUPS.get_ptr(&number) else {
        return false;
    };
    // SAFETY: the map's value.
    let (started, marks) = unsafe {
        let words = group.cast::<u64>();
        (
            core::ptr::read_volatile(words.wrapping_add(held::MARKED_STARTED_TICKS)),
            core::ptr::read_volatile(words.wrapping_add(held::MARKED_BY)),
        )
    };
    started == ticks && marks & held::mark_of(TARGET_DEV.load()) != 0
}

/// Whether the running thread must not return to user space, because of an answer that is no thread's own.
#[inline(always)]
pub fn is_marked(control: Control) -> bool {
    are_marks(control) && is_group_marked((thread() >> 32) as u32, group_start_ticks())
}

/// The marking of a group, tried until it is certain or the time is over.
#[repr(C)]
struct Mark {
    until_ns: u64,
    key: [u64; held::KEY_WORDS],
    entry: [u64; held::WORDS],
    /// On odd words, which the verifier does not follow: the callback converges.
    _0: u32,
    done: u32,
    _1: u32,
    entered: u32,
}

/// Adds this volume's mark to the group's. What is left of a process that ended, and whose number the group
/// has got, is replaced.
#[inline(always)]
fn mark_group(number: u32, ticks: u64) {
    let is_other = MARKED_GROUPS.get_ptr(&number).is_some_and(|found| {
        // SAFETY: the map's value.
        unsafe { (*found)[held::MARKED_STARTED_TICKS] != ticks }
    });
    let flags = if is_other { 0 } else { BPF_NOEXIST };
    let _ = MARKED_GROUPS.insert(&number, &[ticks, 0], flags);
    if let Some(group) = MARKED_GROUPS.get_ptr_mut(&number) {
        // SAFETY: the map's value. If it is another group's by now, that one is stopped once for nothing.
        unsafe {
            core::intrinsics::atomic_or::<u64, u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
                group.cast::<u64>().wrapping_add(held::MARKED_BY),
                held::mark_of(TARGET_DEV.load()),
            )
        };
    }
}

extern "C" fn mark_once(_: u64, mark: *mut c_void) -> i64 {
    // SAFETY: `enter` passes a pointer to its state.
    let mark = unsafe { &mut *mark.cast::<Mark>() };
    let Some(control) = Control::get() else {
        return 1;
    };
    let is_over = now_ns() >= mark.until_ns;
    let number = (mark.key[held::THREAD] >> 32) as u32;
    let before = turn(number);
    if before & 1 == 1 {
        return i64::from(is_over);
    }
    let ticks = mark.entry[held::STARTED_TICKS];
    if enter_group(number, ticks) {
        mark.entered = 1;
    }
    mark_group(number, ticks);
    if HELD.insert(&mark.key, &mark.entry, 0).is_err() {
        return 1;
    }
    barrier(control);
    // Whoever continues the group from now on finds the entry.
    if turn(number) == before {
        if mark.entered != 0 {
            heed_others_stop(&mark.key, ticks);
        }
        mark.done = 1;
        return 1;
    }
    i64::from(is_over)
}

/// Marks the running thread's group until a wait is over; whether that succeeded.
#[inline(always)]
fn enter(control: Control, wait: &Wait) -> bool {
    let since_ns = now_ns();
    let mut mark = Mark {
        until_ns: since_ns + TURN_NS,
        key: [thread(), TARGET_DEV.load(), since_ns],
        entry: [
            wait.position,
            wait.open_word,
            wait.generation,
            group_start_ticks(),
            held::STOPPED,
        ],
        _0: 0,
        done: 0,
        _1: 0,
        entered: 0,
    };
    let state = core::ptr::from_mut(&mut mark).cast();
    // SAFETY: the callback gets a pointer to this state, which outlives the loop.
    unsafe { bpf_loop(ATTEMPTS_MAX, mark_once as *mut c_void, state, 0) };
    // Counted also if it failed: an entry may be left.
    control.increment(control::MARKS);
    control.increment(control::GATE_HOLDS);
    // SAFETY: the callback wrote it.
    unsafe { core::ptr::read_volatile(&raw const mark.done) != 0 }
}

#[inline(always)]
fn read_at<T: Default>(base: u64, offset: &Global<u64>) -> T {
    gate::read_at(base, offset).unwrap_or_default()
}

/// The look at the other threads of a group, one after the other.
#[repr(C)]
struct Others {
    wait: Wait,
    until_ns: u64,
    /// Head of the list of threads.
    head: u64,
    /// The link that is looked at.
    at: u64,
    /// From a thread's stack to the registers that it entered the kernel with.
    to_registers: u64,
    ticks: u64,
    /// On an odd word, as in [`Mark`].
    _0: u32,
    done: u32,
}

/// Whether a system call may let its thread sleep when `sys_exit` has passed already: the last use of a
/// file ends on the way to user space. `close`, `dup2`, `dup3` and `close_range` of both tables.
#[inline(always)]
fn may_sleep_behind_the_gate(number: i64) -> bool {
    matches!(number, 3 | 6 | 33 | 63 | 292 | 330 | 436)
}

/// Whether a thread will stop before it sees anything in user space: it sleeps in a system call, whose
/// end is a gate, or it is being stopped and does not run.
#[inline(always)]
fn is_kept(task: u64, to_registers: u64) -> bool {
    let flags: u32 = read_at(task, &TASK_FLAGS);
    if flags & NEVER_RETURNS != 0 {
        return true;
    }
    let state: u32 = read_at(task, &TASK_STATE);
    let on_processor: u32 = read_at(task, &TASK_ON_PROCESSOR);
    if on_processor != 0 {
        return false;
    }
    let job_control: u64 = read_at(task, &TASK_JOB_CONTROL);
    if state & STOPPED != 0 || job_control & STOP_PENDING != 0 {
        return true;
    }
    let stack: u64 = read_at(task, &TASK_STACK);
    // Not a call but an interrupt or a fault has negative ones.
    let number: i64 = read_at(stack + to_registers, &REGS_NUMBER);
    state & SLEEPS != 0 && number >= 0 && !may_sleep_behind_the_gate(number)
}

extern "C" fn look_at_one(_: u64, others: *mut c_void) -> i64 {
    // SAFETY: `are_others_kept` passes a pointer to its state.
    let others = unsafe { &mut *others.cast::<Others>() };
    let Some(control) = Control::get() else {
        return 1;
    };
    if others.at == others.head {
        // Gone if the wait is over; or a thread that had a dead process's record before its eyes has put its
        // own in the place of ours.
        if is_group_marked((thread() >> 32) as u32, others.ticks) || others.wait.is_over(control) {
            others.done = 1;
        }
        return 1;
    }
    // Whom it finds kept stays so: the mark was there before.
    if is_kept(others.at - TASK_IN_GROUP.load(), others.to_registers) {
        // SAFETY: a bad address is reported, not followed.
        others.at = unsafe { bpf_probe_read_kernel(others.at as *const u64) }.unwrap_or(0);
        return i64::from(others.at == 0);
    }
    if others.wait.is_over(control) {
        others.done = 1;
        return 1;
    }
    i64::from(now_ns() >= others.until_ns)
}

/// A pointer that the verifier follows, as a number.
#[inline(always)]
fn number_of(pointer: u64) -> u64 {
    let pointer = core::hint::black_box(pointer);
    // SAFETY: it lies on the stack.
    unsafe { bpf_probe_read_kernel(&raw const pointer) }.unwrap_or(0)
}

/// Waits until no other thread of the running group can see anything in user space, or until it may;
/// false if neither came in time.
#[inline(always)]
fn are_others_kept(wait: &Wait, limit_ns: u64) -> bool {
    let task = current();
    let signal: u64 = read_from(task, &TASK_SIGNAL);
    let stack: u64 = read_from(task, &TASK_STACK);
    // SAFETY: the current task is valid.
    let registers = number_of(unsafe { bpf_task_pt_regs(task.cast_mut().cast()) } as u64);
    let head = signal + SIGNAL_THREADS.load();
    let mut others = Others {
        wait: *wait,
        until_ns: now_ns() + limit_ns,
        head,
        // SAFETY: a bad address is reported, not followed.
        at: unsafe { bpf_probe_read_kernel(head as *const u64) }.unwrap_or(0),
        to_registers: registers - stack,
        ticks: group_start_ticks(),
        _0: 0,
        done: 0,
    };
    let state = core::ptr::from_mut(&mut others).cast();
    // SAFETY: the callback gets a pointer to this state, which outlives the loop; the programs run as
    // readers of RCU, so no thread's structure goes away meanwhile.
    unsafe { bpf_loop(LOOKS_MAX, look_at_one as *mut c_void, state, 0) };
    // SAFETY: the callback wrote it.
    unsafe { core::ptr::read_volatile(&raw const others.done) != 0 }
}

/// As [`read_at`], from a pointer that the verifier knows.
#[inline(always)]
fn read_from(base: *const u8, offset: &Global<u64>) -> u64 {
    let place = base.wrapping_add(offset.load() as usize).cast::<u64>();
    // SAFETY: a bad address is reported, not followed.
    unsafe { bpf_probe_read_kernel(place) }.unwrap_or(0)
}

/// Makes the running worker's group wait for what the worker is about to answer.
#[inline(always)]
pub fn hold_group(control: Control, wait: &Wait) {
    let limit_ns = unless_ending(control, OTHERS_LIMIT_NS);
    if !enter(control, wait) || !are_others_kept(wait, limit_ns) {
        note(control, gap::UNGATED);
    }
}

/// The timer's tick meets threads that make no system call.
#[btf_tracepoint(function = "hrtimer_expire_exit")]
pub fn gate_tick(_: BtfTracePointContext) -> i32 {
    let Some(control) = Control::get() else {
        return 0;
    };
    if !are_marks(control)
        || control.read(control::GATE_OPEN_TO) == control::GATE_OPEN
        || control.read(control::GATE_OFF) != 0
    {
        return 0;
    }
    if gate::task_flags() & CANNOT_STOP == 0 && !is_agent(control) && is_marked(control) {
        stop_by_tick(control);
    }
    0
}

/// Stops the running group, if nobody is continuing it just now: the next tick comes soon. The signal
/// is sent only when the interrupt is over.
#[inline(always)]
fn stop_by_tick(control: Control) {
    let (thread, ticks) = (thread(), group_start_ticks());
    let number = (thread >> 32) as u32;
    let before = turn(number);
    if before & 1 == 1 {
        return;
    }
    let key = [thread, TARGET_DEV.load(), held::BY_TICK];
    let wait = Wait::of_others(control);
    let entry = [
        wait.position,
        wait.open_word,
        wait.generation,
        ticks,
        held::STOPPING,
    ];
    // There already if the tick before has stopped it.
    if HELD.insert(&key, &entry, BPF_NOEXIST).is_err() {
        return;
    }
    barrier(control);
    // From now on nobody continues it without having seen the entry.
    if turn(number) == before
        && is_group_marked(number, ticks)
        // SAFETY: the helper has no precondition.
        && unsafe { bpf_send_signal(SIGSTOP as u32) } == 0
    {
        control.increment(control::GATE_HOLDS);
    } else {
        let _ = HELD.remove(&key);
    }
}

/// The signal of [`stop_by_tick`] is sent: from now on the group may be continued.
///
/// # Safety
/// `task` from the hook's arguments.
#[inline(always)]
pub unsafe fn tick_has_stopped(task: *const u8, sender: u64) {
    if sender != BY_KERNEL {
        return;
    }
    // SAFETY: the caller's.
    let (group, thread) = unsafe {
        (
            member::<u32>(task, &TASK_TGID),
            member::<u32>(task, &TASK_THREAD_NUMBER),
        )
    };
    let thread = u64::from(group) << 32 | u64::from(thread);
    let key = [thread, TARGET_DEV.load(), held::BY_TICK];
    if let Some(entry) = HELD.get_ptr_mut(&key) {
        // SAFETY: the map's value; a word is written whole, and no agent touches a STOPPING entry.
        unsafe {
            let state = entry.cast::<u64>().wrapping_add(held::STATE);
            if core::ptr::read_volatile(state) == held::STOPPING {
                core::ptr::write_volatile(state, held::STOPPED);
            }
        }
    }
}
