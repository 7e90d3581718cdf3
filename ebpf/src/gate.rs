//! The gate: a call of the fsync class returns to its caller only when a replay would show what it
//! confirms, or the epoch is closed.
//!
//! The hooks at such a call leave, by thread, the ring position that must have passed the gate
//! (`held::position_to_wait_for`). The exit of the system call compares it with the word that the agent
//! publishes. Usually everything before the call's begin is mirrored while the disk flushes. If not, the
//! thread looks at the word for a short while; a tracepoint runs with preemption off, so that nobody
//! else's hook is missed meanwhile. If the word does not get there the thread group is stopped
//! (`hold`), and no processor is busy while the agent is away.
//!
//! Threads of the kernel do not return to user space and cannot be stopped. What an NFS server's thread
//! would answer is refused where it leaves for the network (`server`); those that work for an io_uring
//! belong to the application's thread group, which is stopped for them (`workers`). The others' is a short
//! look only, and an answer that went out too early is a gap, which ends the epoch.
//!
//! A program must never let a thread pass that it cannot account for without noting it.

use core::ffi::c_void;

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::*;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use twinwrite_abi::{control, gap, held, op};

use crate::calls::{self, Class, class};
use crate::config::*;
use crate::emit::*;
use crate::gaps;
use crate::hold::hold;
use crate::server;
use crate::subtree::{Side, side_at};
use crate::unnoticed;
use crate::workers;

/// `PF_IO_WORKER`: also the thread that submits for an io_uring.
pub const IO_WORKER: u32 = 0x0000_0010;
/// `PF_KTHREAD`.
pub const KERNEL_THREAD: u32 = 0x0020_0000;
/// [`KERNEL_THREAD`] and [`IO_WORKER`].
pub const CANNOT_STOP: u32 = KERNEL_THREAD | IO_WORKER;
const O_DIRECT: u32 = 0x4000;
/// Also set by `O_SYNC`.
const O_DSYNC: u32 = 0x1000;
/// `RWSEM_WRITER_LOCKED`.
const WRITER_LOCKED: u64 = 1;
/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAY: u64 = 0x794c_7630;
/// `SYNC_FILE_RANGE_WAIT_BEFORE` and `SYNC_FILE_RANGE_WAIT_AFTER`.
const RANGE_WAITS: u64 = 1 | 4;
/// Bound of the look; the time limit ends it before.
const LOOKS_MAX: u32 = 1 << 20;
/// How long a thread of the kernel looks, which nothing can stop afterwards.
const KERNEL_LOOK_NS: u64 = 2_000_000;

/// What a thread has to wait for at the exit of its system call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Wait {
    /// The ring position.
    pub position: u64,
    /// The control word that must come up to it.
    pub open_word: u64,
    /// The gate's generation when that was said.
    pub generation: u64,
}

impl Wait {
    /// What was captured up to `position` is mirrored, so that every replay contains it.
    #[inline(always)]
    pub fn until_mirrored(position: u64, generation: u64) -> Self {
        Self {
            position,
            open_word: control::GATE_OPEN_TO as u64,
            generation,
        }
    }

    /// A checkpoint of what was captured up to `position` is proven, so that nothing older is replayed.
    #[inline(always)]
    pub fn until_proven(position: u64, generation: u64) -> Self {
        Self {
            position,
            open_word: control::GATE_PROVEN_TO as u64,
            generation,
        }
    }

    /// Nothing of its own: another thread of the group waits.
    #[inline(always)]
    pub fn of_others(control: Control) -> Self {
        Self::until_mirrored(0, generation(control))
    }

    #[inline(always)]
    pub fn is_over(&self, control: Control) -> bool {
        let open_to = if self.open_word == control::GATE_PROVEN_TO as u64 {
            control.read(control::GATE_PROVEN_TO)
        } else {
            control.read(control::GATE_OPEN_TO)
        };
        open_to >= self.position || control.read(control::GATE_GENERATION) != self.generation
    }
}

/// By thread. Not a map that forgets: a forgotten entry would be an open gate.
#[map]
static PENDING: HashMap<u64, Wait> = HashMap::with_max_entries(32768, 0);

/// The monotonic clock.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_ktime_get_ns() }
}

/// The running thread's task.
#[inline(always)]
pub fn current() -> *const u8 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_get_current_task_btf() as *const u8 }
}

/// What kind of thread is running.
#[inline(always)]
pub fn task_flags() -> u32 {
    // SAFETY: the current task is valid.
    unsafe { member(current(), &TASK_FLAGS) }
}

/// To be read before the mark is emitted, or the gap counted, that is to be waited for: whatever
/// ends an epoch after that changes it.
#[inline(always)]
pub fn generation(control: Control) -> u64 {
    control.read(control::GATE_GENERATION)
}

/// Whether no change is unaccounted for that was noticed and not captured, nor may have gone unnoticed
/// just now: the agent looks for skipped programs before it lets anything pass, and a position that
/// was passed already is never looked at again.
#[inline(always)]
pub fn is_log_whole(control: Control) -> bool {
    let mut differs = control.read(control::MAY_SKIP);
    let mut reason = 0;
    while reason < gap::NAMES.len() {
        differs |=
            control.read(control::GAPS + reason) ^ control.read(control::GAPS_SETTLED + reason);
        reason += 1;
    }
    differs == 0
}

/// The ring position before which everything has its record that anybody can see of a file now; `None`
/// if somebody is changing the file, or its directory, and may have no record yet.
///
/// # Safety
/// `file` from the hook's arguments.
#[inline(always)]
pub unsafe fn seen_before(control: Control, file: *const u8) -> Option<u64> {
    // A record is reserved before the inode's lock is given back.
    // SAFETY: the caller's.
    let is_changing = unsafe {
        let inode: *const u8 = member(file, &FILE_INODE);
        let dentry: *const u8 = member(file, &FILE_DENTRY);
        let parent: *const u8 = member(member(dentry, &DENTRY_PARENT), &DENTRY_INODE);
        is_write_locked(inode)
            || is_write_locked(parent)
            || member::<i32>(inode, &INODE_DIRECT_WRITERS) != 0
    };
    if is_changing || control.read(control::UNNOTICED) != 0 {
        return None;
    }
    Some(producer_position())
}

#[inline(always)]
unsafe fn is_write_locked(inode: *const u8) -> bool {
    // SAFETY: the caller's.
    unsafe { member::<u64>(inode, &INODE_LOCK) & WRITER_LOCKED != 0 }
}

/// Whether a call that ends now may pass, whatever becomes of its mark.
#[inline(always)]
pub fn passes_without_mark(control: Control, generation: u64, before: Option<u64>) -> bool {
    before.is_some_and(|before| Wait::until_mirrored(before, generation).is_over(control))
        && is_log_whole(control)
}

/// Whether bytes may have been stored through a mapping that no record shows, and that a record which
/// comes now could be laid over.
#[inline(always)]
fn lacks_stores(control: Control) -> bool {
    control.read(control::GAPS + gap::MAPPING) != control.read(control::GAPS_SETTLED + gap::MAPPING)
}

/// Makes the running call wait for its mark, or for less: see `held::position_to_wait_for`. A mark keeps
/// older records off bytes and attributes, and off no name: what a directory's would have to is proven.
/// So is what a mark does not keep off because its record came only after the call's begin: that of
/// somebody who wrote just then, and whose bytes a store through a mapping may have changed since.
///
/// `inode` is the file's, as an address. No worker of io_uring makes the call unless `by_worker`: a program
/// without that branch is loaded in a tenth of the time.
#[inline(always)]
pub fn require(
    control: Control,
    generation: u64,
    before: Option<u64>,
    mark_end: Option<u64>,
    is_directory: bool,
    inode: u64,
    by_worker: bool,
) {
    let is_whole = is_log_whole(control);
    let for_mark = before.is_none() || !is_whole;
    if for_mark {
        control.increment(control::GATE_FOR_MARK);
    }
    let is_raced = before.is_none() && lacks_stores(control);
    let wait = if is_raced && !is_directory && !is_quiet(control, inode) {
        // That record is still to come, and nothing else would end the epoch.
        note(control, gap::UNGATED);
        Wait::until_mirrored(held::UNTIL_CLOSED, generation)
    } else if for_mark && mark_end.is_some() && (is_directory || is_raced) {
        until_checkpoint(control, generation)
    } else {
        let position = held::position_to_wait_for(before, mark_end, is_whole);
        let wait = Wait::until_mirrored(position, generation);
        if for_mark {
            // It was unhurried if the log was whole until then.
            told(control, wait)
        } else {
            wait
        }
    };
    let flags = task_flags();
    if flags & CANNOT_STOP != 0 {
        if wait.is_over(control) {
            control.increment(control::GATE_PASSED);
            return;
        }
        if server::holds_reply(control, &wait) {
            return;
        }
        let limit_ns = unless_ending(control, KERNEL_LOOK_NS);
        if control.read(control::GATE_OFF) == 0 && !look(control, wait, limit_ns) {
            if by_worker && flags & IO_WORKER != 0 {
                workers::hold_group(control, &wait);
            } else {
                note(control, gap::UNGATED);
            }
        }
        return;
    }
    await_at_exit(control, &wait);
}

/// Makes the running call wait for the end of the epoch, which must have been asked for since
/// `generation` was read: it changes what no mark can keep older records off. Threads of the kernel
/// do not wait here.
#[inline(always)]
pub fn require_closed(control: Control, generation: u64) {
    if control.read(control::GATE_OPEN_TO) == control::GATE_OPEN
        || control.read(control::GATE_OFF) != 0
    {
        return;
    }
    let wait = Wait::until_mirrored(held::UNTIL_CLOSED, generation);
    let flags = task_flags();
    if flags & CANNOT_STOP == 0 {
        await_at_exit(control, &wait);
    } else if flags & IO_WORKER != 0 && !wait.is_over(control) {
        workers::hold_group(control, &wait);
    }
}

/// Makes the running call, which is no thread's of the kernel, wait for what it has told.
#[inline(always)]
pub fn require_wait(control: Control, wait: Wait) {
    await_at_exit(control, &told(control, wait));
}

/// Makes the running thread wait at the end of its system call.
#[inline(always)]
fn await_at_exit(control: Control, wait: &Wait) {
    // Also if it is over already: without an entry the call would count as one that left no mark.
    let thread = thread();
    // SAFETY: only this thread writes its entry.
    let known = unsafe { PENDING.get(&thread) }.copied();
    // A later mark of the same call waits for no less than the one before.
    let mut wait = *wait;
    if let Some(known) = known
        && known.generation == wait.generation
    {
        if known.open_word == wait.open_word {
            if known.position >= wait.position {
                return;
            }
        } else if known.position == held::UNTIL_CLOSED {
            return;
        } else if wait.position != held::UNTIL_CLOSED {
            wait = until_checkpoint(control, wait.generation);
        }
    }
    if PENDING.insert(&thread, &wait, 0).is_err() {
        note(control, gap::UNGATED);
    } else if known.is_none() {
        control.increment(control::GATE_PENDING);
    }
}

/// How long something may keep its processor busy: once an answer went out too early the epoch ends anyway.
#[inline(always)]
pub fn unless_ending(control: Control, limit_ns: u64) -> u64 {
    let ends = control.read(control::GAPS + gap::UNGATED)
        != control.read(control::GAPS_SEEN + gap::UNGATED);
    if ends { 0 } else { limit_ns }
}

/// As [`note_gap`], for a gap that is not about one inode.
#[inline(always)]
pub fn note(control: Control, reason: usize) {
    if !count_gap(control, reason) {
        return;
    }
    // SAFETY: all members are integers.
    let mut head: Head = unsafe { core::mem::zeroed() };
    head.op = op::GAP;
    head.arg = reason as u64;
    emit(control, head);
}

/// A look at the gate.
#[repr(C)]
struct Look {
    wait: Wait,
    until_ns: u64,
    /// On an odd word, which the verifier does not follow: the callback converges.
    _0: u32,
    open: u32,
}

extern "C" fn look_once(_: u64, look: *mut c_void) -> i64 {
    // SAFETY: `look` passes a pointer to its state.
    let look = unsafe { &mut *look.cast::<Look>() };
    let Some(control) = Control::get() else {
        return 1;
    };
    if look.wait.is_over(control) {
        look.open = 1;
        return 1;
    }
    i64::from(now_ns() >= look.until_ns)
}

/// Looks at the gate until it is open or the time is over; whether it is open.
#[inline(always)]
pub fn look(control: Control, wait: Wait, limit_ns: u64) -> bool {
    let since_ns = now_ns();
    let mut look = Look {
        wait,
        until_ns: since_ns + limit_ns,
        _0: 0,
        open: 0,
    };
    let state = core::ptr::from_mut(&mut look).cast();
    // SAFETY: the callback gets a pointer to this state, which outlives the loop.
    unsafe { bpf_loop(LOOKS_MAX, look_once as *mut c_void, state, 0) };
    // SAFETY: the callback wrote it.
    let open = unsafe { core::ptr::read_volatile(&raw const look.open) } != 0;
    if open {
        control.increment(control::GATE_POLLED);
        control.add(control::GATE_POLLED_NS, now_ns() - since_ns);
    }
    open
}

/// A file behind a descriptor.
struct Open {
    inode: u64,
    flags: u32,
}

#[inline(always)]
pub fn read_at<T>(base: u64, offset: &Global<u64>) -> Option<T> {
    read_raw(base + offset.load())
}

#[inline(always)]
pub fn read_raw<T>(at: u64) -> Option<T> {
    // SAFETY: a bad address is reported, not followed.
    unsafe { bpf_probe_read_kernel(at as *const T) }.ok()
}

/// The file behind a descriptor, if it lies on the volume. `None` also if the descriptor was closed
/// meanwhile. `or_overlay`: also one on an overlay, which may lie over the volume.
#[inline(always)]
fn file_on_volume(descriptor: u64, or_overlay: bool) -> Option<Open> {
    // SAFETY: the current task is valid.
    let slot = unsafe {
        let files: *const u8 = member(current(), &TASK_FILES);
        let table: *const u8 = member(files, &FILES_TABLE);
        if descriptor >= u64::from(member::<u32>(table, &TABLE_MAX)) {
            return None;
        }
        let slots: *const u64 = member(table, &TABLE_FILES);
        slots.wrapping_add(descriptor as usize)
    };
    // SAFETY: as in `read_at`.
    let file = unsafe { bpf_probe_read_kernel(slot) }.ok()?;
    let inode = read_at(file, &FILE_INODE)?;
    let superblock = read_at(inode, &INODE_SB)?;
    let device: u32 = read_at(superblock, &SB_DEV)?;
    let is_volume = u64::from(device) == TARGET_DEV.load();
    if !is_volume && !(or_overlay && read_at::<u64>(superblock, &SB_MAGIC)? == OVERLAY) {
        return None;
    }
    let flags = read_at(file, &FILE_FLAGS)?;
    Some(Open { inode, flags })
}

/// What the running call has to wait for where it left no mark.
#[inline(always)]
fn required_by_call(control: Control, regs: *const u8, result: i64) -> Option<Wait> {
    // SAFETY: the tracepoint's argument.
    let number = unsafe { member::<u64>(regs, &REGS_NUMBER) };
    let compat = calls::is_compat();
    let class = class(number, compat);
    if class == Class::Other || result < 0 {
        return None;
    }
    let generation = generation(control);
    // SAFETY: the tracepoint's argument.
    let (first, range_flags): (u64, u64) = unsafe {
        if compat {
            // Two of the four arguments of `sync_file_range` take two registers each there.
            (
                member(regs, &REGS_COMPAT_FIRST),
                member(regs, &REGS_COMPAT_SIXTH),
            )
        } else {
            (member(regs, &REGS_FIRST), member(regs, &REGS_FOURTH))
        }
    };
    // A volume is nobody's lock: a write whose bytes are in the page cache, and whose record is on its way,
    // is confirmed with all the rest.
    if class == Class::SyncAll {
        return Some(until_checkpoint(control, generation));
    }
    let file = file_on_volume(first, class == Class::SyncVolume)?;
    if class != Class::SyncVolume
        && (class != Class::Write || file.flags & (O_DIRECT | O_DSYNC) != 0)
        && side_at(file.inode) == Side::Outside
    {
        return None;
    }
    match class {
        // Its mark was not seen: this kernel can skip a program.
        Class::Write if file.flags & (O_DIRECT | O_DSYNC) == O_DSYNC => Some(until_settled(
            control,
            generation,
            is_quiet(control, file.inode),
        )),
        Class::Write => {
            let (noticed, covered) = (
                control.read(control::GAPS + gap::DIRECT_IO),
                control.read(control::GAPS_SEEN + gap::DIRECT_IO),
            );
            if file.flags & O_DIRECT == 0 {
                return None;
            }
            if noticed == covered {
                // Through the page cache after all, and written back from there at once.
                return Some(until_captured(control, generation));
            }
            Some(Wait::until_mirrored(held::UNTIL_CLOSED, generation))
        }
        // It flushes no disk, so it confirms nothing that older records could take away.
        Class::Range if range_flags & RANGE_WAITS == 0 => None,
        Class::Range => Some(until_captured(control, generation)),
        Class::SyncFile => Some(until_settled(
            control,
            generation,
            is_quiet(control, file.inode),
        )),
        _ => Some(until_checkpoint(control, generation)),
    }
}

/// Whether nobody is changing a file that has no record of that yet.
#[inline(always)]
fn is_quiet(control: Control, inode: u64) -> bool {
    let lock = read_at::<u64>(inode, &INODE_LOCK).unwrap_or(WRITER_LOCKED);
    lock & WRITER_LOCKED == 0 && !unnoticed::is_any_of_others(control)
}

/// A call without a mark clips nothing: if the log lacks something, nothing older may be replayed.
#[inline(always)]
fn until_settled(control: Control, generation: u64, is_quiet: bool) -> Wait {
    if is_quiet && is_log_whole(control) {
        until_captured(control, generation)
    } else {
        until_checkpoint(control, generation)
    }
}

/// Until what was captured so far is mirrored, also what no mark of the running call tells the agent of.
#[inline(always)]
pub fn until_captured(control: Control, generation: u64) -> Wait {
    told(
        control,
        Wait::until_mirrored(producer_position(), generation),
    )
}

/// The agent looks for what somebody is going to wait for.
#[inline(always)]
fn told(control: Control, wait: Wait) -> Wait {
    if !wait.is_over(control) {
        wake_consumer(control);
    }
    wait
}

/// Until nothing that was captured so far can be replayed.
#[inline(always)]
pub fn until_checkpoint(control: Control, generation: u64) -> Wait {
    let position = producer_position();
    // After the position was read: see the agent's side.
    control.increment(control::PROOFS_WANTED);
    told(control, Wait::until_proven(position, generation))
}

/// The end of every system call: where a thread waits.
#[btf_tracepoint(function = "sys_exit")]
pub fn gate_exit(ctx: BtfTracePointContext) -> i32 {
    let Some(control) = Control::get() else {
        return 0;
    };
    let thread = thread();
    gaps::note_late(control, thread);
    unnoticed::end_unseen(control);
    let mut wait = None;
    if control.read(control::GATE_PENDING) != 0 {
        // SAFETY: only this thread writes its entry.
        wait = unsafe { PENDING.get(&thread) }.copied();
        if wait.is_some() {
            let _ = PENDING.remove(&thread);
            control.add(control::GATE_PENDING, u64::MAX);
        }
    }
    if control.read(control::GATE_OPEN_TO) == control::GATE_OPEN
        || control.read(control::GATE_OFF) != 0
        || is_agent(control)
    {
        return 0;
    }
    let wait = match wait {
        Some(wait) => Some(wait),
        None => required_by_call(control, ctx.arg(0), ctx.arg(1)),
    };
    let is_held = match wait {
        None => false,
        Some(wait) if wait.is_over(control) => {
            control.increment(control::GATE_PASSED);
            false
        }
        Some(wait) => !look(control, wait, look_ns(control, &wait)),
    };
    let wait = match wait {
        Some(wait) if is_held => wait,
        _ if workers::is_marked(control) => Wait::of_others(control),
        _ => return 0,
    };
    hold(control, &wait);
    0
}

/// How long a thread looks before it is stopped: what takes a checkpoint is not worth a look.
#[inline(always)]
fn look_ns(control: Control, wait: &Wait) -> u64 {
    if wait.position == held::UNTIL_CLOSED || wait.open_word == control::GATE_PROVEN_TO as u64 {
        return 0;
    }
    control.read(control::GATE_POLL_NS)
}
