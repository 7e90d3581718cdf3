//! Handing records to the ring: the filter, the reservation, the submit, the counters.
//!
//! A record is reserved as `round_up(64 + n, 64) - 8` bytes, so that the kernel's ring header and
//! ours make one line. Whatever cannot be handed over is counted here: never dropped in silence.

use core::ffi::c_void;

use aya_ebpf::bindings::bpf_dynptr;
use aya_ebpf::helpers::generated::*;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, RingBuf};
use twinwrite_abi::{
    CONTROL_SLOTS, RECORD_ALIGN, RING_HEADER_BYTES, RecordHeader, TICK_NS, control, flag, gap, op,
};

use crate::config::*;
use crate::gate;
use crate::subtree::{Side, is_told, side};

const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_RB_NO_WAKEUP: u64 = 1;
const BPF_RB_FORCE_WAKEUP: u64 = 2;

/// The capture ring; user space sets its size at load.
#[map]
static RING: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// The control words, see `twinwrite_abi::control`.
#[map]
static CONTROL: Array<[u64; CONTROL_SLOTS]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// [`RecordHeader`] without the kernel's eight bytes: what a program writes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Head {
    pub op: u8,
    pub flags: u8,
    pub name_len: u16,
    pub data_len: u32,
    pub ino: u64,
    pub generation: u32,
    pub mode: u32,
    pub pos: u64,
    pub size_after: u64,
    pub time_ns: i64,
    pub arg: u64,
}

/// Bytes of [`Head`].
pub const HEAD_BYTES: u32 = 56;

const _: () = assert!(size_of::<Head>() == HEAD_BYTES as usize);
const _: () = assert!(core::mem::offset_of!(RecordHeader, op) == 8);
const _: () =
    assert!(core::mem::offset_of!(RecordHeader, arg) == core::mem::offset_of!(Head, arg) + 8);

/// The control words, reached through the map's one element.
#[derive(Clone, Copy)]
pub struct Control(*mut u64);

impl Control {
    /// The words; `None` never happens, but the verifier wants the question.
    #[inline(always)]
    pub fn get() -> Option<Self> {
        CONTROL.get_ptr_mut(0).map(|p| Self(p.cast()))
    }

    /// Reads a word that user space may change at any time.
    #[inline(always)]
    pub fn read(self, slot: usize) -> u64 {
        // SAFETY: every caller passes a constant below CONTROL_SLOTS.
        unsafe { core::ptr::read_volatile(self.0.wrapping_add(slot)) }
    }

    /// Adds one and returns the value before; a full memory barrier.
    #[inline(always)]
    pub fn increment(self, slot: usize) -> u64 {
        self.add(slot, 1)
    }

    /// Adds (wrapping) and returns the value before; a full memory barrier.
    #[inline(always)]
    pub fn add(self, slot: usize, value: u64) -> u64 {
        // SAFETY: as in `read`; the target has no `AtomicU64::fetch_add`.
        unsafe {
            core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
                self.0.wrapping_add(slot),
                value,
            )
        }
    }

    /// Counts a record for which the consumer need not be woken: see [`emit_unhurried`].
    #[inline(always)]
    fn submit_flags_unhurried(self) -> u64 {
        self.increment(control::UNHURRIED);
        core::hint::black_box(self.increment(control::RECORDS));
        BPF_RB_NO_WAKEUP
    }

    /// Writes a word that only programs write.
    #[inline(always)]
    pub fn write(self, slot: usize, value: u64) {
        // SAFETY: as in `read`.
        unsafe { core::ptr::write_volatile(self.0.wrapping_add(slot), value) }
    }

    /// Makes a word no less than `value`; whether that worked, of several threads that try at once.
    #[inline(always)]
    pub fn raise(self, slot: usize, value: u64) -> bool {
        use core::intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg};
        const ATTEMPTS_MAX: u32 = 16;
        let mut attempt = 0;
        while attempt < ATTEMPTS_MAX {
            let before = self.read(slot);
            if before >= value {
                return true;
            }
            // SAFETY: as in `read`.
            let (found, _) = unsafe {
                atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(
                    self.0.wrapping_add(slot),
                    before,
                    value,
                )
            };
            if found == before {
                return true;
            }
            attempt += 1;
        }
        false
    }

    /// How to submit a record: counts it, and only then looks whether the consumer sleeps. The
    /// consumer sets `ASLEEP` and only then looks for records, so one of the two sees the other.
    #[inline(always)]
    pub fn submit_flags(self) -> u64 {
        // The value is used so that the instruction is the fetching one, which is the barrier.
        let before = core::hint::black_box(self.increment(control::RECORDS));
        if self.read(control::ASLEEP) != 0 || before == u64::MAX {
            BPF_RB_FORCE_WAKEUP
        } else {
            BPF_RB_NO_WAKEUP
        }
    }
}

/// Whether this inode is the volume's.
#[inline(always)]
pub fn is_on_volume(inode: *const u8) -> bool {
    // SAFETY: callers pass an inode from the hook's arguments; a null pointer reads as device 0.
    let device: u32 = unsafe {
        let sb: *const u8 = member(inode, &INODE_SB);
        member(sb, &SB_DEV)
    };
    u64::from(device) == TARGET_DEV.load()
}

/// Whether the inode is a file of a subvolume: one made before the programs were there to refuse it, or deleted
/// while somebody had a file of it open. A snapshot's files have the identities of those that it was made of.
#[inline(always)]
fn is_in_other_tree(inode: *const u8) -> bool {
    /// `BTRFS_FS_TREE_OBJECTID` (include/uapi/linux/btrfs_tree.h).
    const TOP: u64 = 5;
    if ROOT_FROM_INODE.load() == ABSENT {
        return false;
    }
    let root = gate::read_raw::<u64>((inode as u64).wrapping_add(ROOT_FROM_INODE.load()));
    let number = root.and_then(|root| gate::read_raw(root.wrapping_add(ROOT_NUMBER.load())));
    number != Some(TOP)
}

/// As [`wanted_on_volume`], for a change of what is protected; of which nobody can say is a gap.
#[inline(always)]
pub fn wanted(inode: *const u8) -> Option<Control> {
    let control = wanted_on_volume(inode)?;
    is_told(control, inode).then_some(control)
}

/// As [`wanted`], for what changes nothing.
#[inline(always)]
pub fn concerned(inode: *const u8) -> Option<Control> {
    let control = wanted_on_volume(inode)?;
    (side(inode) != Side::Outside).then_some(control)
}

/// Whether this inode is the volume's and the change is not the agent's own; the control words. A change of
/// another tree of the volume is a gap.
#[inline(always)]
pub fn wanted_on_volume(inode: *const u8) -> Option<Control> {
    if !is_on_volume(inode) {
        return None;
    }
    let control = Control::get()?;
    if is_agent(control) && control.read(control::CALIBRATING) == 0 {
        return None;
    }
    if is_in_other_tree(inode) {
        gate::note(control, gap::OTHER_TREE);
        return None;
    }
    Some(control)
}

/// The running thread, `thread group << 32 | thread`.
#[inline(always)]
pub fn thread() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_get_current_pid_tgid() }
}

/// Whether the agent is running.
#[inline(always)]
pub fn is_agent(control: Control) -> bool {
    let thread_group = thread() >> 32;
    thread_group == control.read(control::AGENT_TGID)
        && group_start_ticks() == control.read(control::AGENT_START_TICKS)
}

/// When the current thread group began, in clock ticks since boot.
#[inline(always)]
pub fn group_start_ticks() -> u64 {
    // SAFETY: the helper gives the running task, whose leader outlives it.
    unsafe {
        let task = bpf_get_current_task_btf() as *const u8;
        let leader: *const u8 = member(task, &TASK_LEADER);
        member::<u64>(leader, &TASK_STARTED) / TICK_NS
    }
}

/// Reads `sec` and `nsec` members into nanoseconds.
///
/// # Safety
/// As [`member`].
#[inline(always)]
pub unsafe fn time_ns(
    inode: *const u8,
    sec: &aya_ebpf::Global<u64>,
    nsec: &aya_ebpf::Global<u64>,
) -> i64 {
    // SAFETY: the caller's.
    unsafe { member::<i64>(inode, sec) * 1_000_000_000 + i64::from(member::<u32>(inode, nsec)) }
}

/// A header with what every record tells about its inode.
///
/// # Safety
/// `inode` as in [`member`].
#[inline(always)]
pub unsafe fn head_of(op: u8, inode: *const u8) -> Head {
    // SAFETY: the caller's.
    unsafe {
        Head {
            op,
            flags: 0,
            name_len: 0,
            data_len: 0,
            ino: member(inode, &INODE_INO),
            generation: member(inode, &INODE_GENERATION),
            mode: u32::from(member::<u16>(inode, &INODE_MODE)),
            pos: 0,
            size_after: member(inode, &INODE_SIZE),
            time_ns: time_ns(inode, &INODE_MTIME_SEC, &INODE_MTIME_NSEC),
            arg: 0,
        }
    }
}

#[inline(always)]
fn ring() -> *mut c_void {
    (&raw const RING).cast_mut().cast()
}

/// The ring's producer position.
#[inline(always)]
pub fn producer_position() -> u64 {
    const BPF_RB_PROD_POS: u64 = 3;
    // SAFETY: the map is a ring buffer.
    unsafe { bpf_ringbuf_query(ring(), BPF_RB_PROD_POS) }
}

/// Counts an event that found no room.
#[inline(always)]
pub fn dropped(control: Control) {
    control.increment(control::DROPS);
    control.increment(control::GAPS + gap::RING_FULL);
}

/// Reserves a record of a size known only now: `body` bytes behind the header.
/// On `false` the event is counted and `dynptr` released.
#[inline(always)]
pub fn reserve_dynptr(control: Control, dynptr: *mut bpf_dynptr, body: u64) -> bool {
    let align = u64::from(RECORD_ALIGN);
    let bytes = ((64 + body + align - 1) & !(align - 1)) - u64::from(RING_HEADER_BYTES);
    // SAFETY: `dynptr` is on the caller's stack and not in use.
    if unsafe { bpf_ringbuf_reserve_dynptr(ring(), bytes as u32, 0, dynptr.cast()) } != 0 {
        // SAFETY: the verifier wants a failed reservation released as well.
        unsafe { bpf_ringbuf_discard_dynptr(dynptr.cast(), 0) };
        dropped(control);
        return false;
    }
    true
}

/// Submits what [`reserve_dynptr`] reserved.
#[inline(always)]
pub fn submit_dynptr(control: Control, dynptr: *mut bpf_dynptr) {
    let flags = control.submit_flags();
    // SAFETY: `dynptr` holds a reservation.
    unsafe { bpf_ringbuf_submit_dynptr(dynptr.cast(), flags) };
}

/// Reserves a record of constant size; `T` starts with a [`Head`] and its size is a multiple of
/// 64, less the kernel's eight bytes. On `None` the event is counted.
#[inline(always)]
pub fn reserve<T>(control: Control) -> Option<*mut T> {
    const {
        assert!((size_of::<T>() + RING_HEADER_BYTES as usize) % RECORD_ALIGN as usize == 0);
    }
    // SAFETY: the map is a ring buffer, the size a constant.
    let place = unsafe { bpf_ringbuf_reserve(ring(), size_of::<T>() as u64, 0) }.cast::<T>();
    if place.is_null() {
        dropped(control);
        return None;
    }
    Some(place)
}

/// Submits what [`reserve`] reserved.
#[inline(always)]
pub fn submit<T>(control: Control, place: *mut T) {
    let flags = control.submit_flags();
    // SAFETY: `place` is a reservation.
    unsafe { bpf_ringbuf_submit(place.cast(), flags) };
}

/// Reserves, fills and submits a record of constant size, see [`reserve`]; a ring position that is
/// not before its end, `None` if there was no room.
#[inline(always)]
pub fn emit<T: Copy>(control: Control, record: T) -> Option<u64> {
    let place = reserve::<T>(control)?;
    let end = producer_position();
    // SAFETY: the reservation has room for one `T` and is 8-byte aligned.
    unsafe { place.write(record) };
    submit(control, place);
    Some(end)
}

/// [`emit`] for a record that nobody waits for: it goes with the next one, or when the consumer looks the
/// next time. Who comes to wait for it all the same calls [`wake_consumer`].
#[inline(always)]
pub fn emit_unhurried<T: Copy>(control: Control, record: T) -> Option<u64> {
    let place = reserve::<T>(control)?;
    let end = producer_position();
    let flags = control.submit_flags_unhurried();
    // SAFETY: the reservation has room for one `T` and is 8-byte aligned, and it is submitted once.
    unsafe {
        place.write(record);
        bpf_ringbuf_submit(place.cast(), flags);
    }
    Some(end)
}

/// Wakes the consumer if it sleeps, for whoever waits for what it has been told, perhaps unhurriedly, or
/// wants a proof. Only a record can do that: this one is a mark that proves nothing, of no inode.
///
/// After the ring's position, or the count of what is wanted, was read or raised: the consumer sets
/// `ASLEEP` and only then looks at them, so one of the two sees the other.
#[inline(always)]
pub fn wake_consumer(control: Control) {
    // A full memory barrier.
    core::hint::black_box(control.add(control::UNHURRIED, 0));
    if control.read(control::ASLEEP) == 0 {
        return;
    }
    // SAFETY: all members are integers.
    let mut head: Head = unsafe { core::mem::zeroed() };
    head.op = op::FSYNC;
    head.flags = flag::DATASYNC | flag::UNLINKED | flag::TAINTED;
    // No room is no loss: what is in the ring has woken the consumer.
    // SAFETY: the map is a ring buffer, the size a constant.
    let place = unsafe { bpf_ringbuf_reserve(ring(), size_of::<Head>() as u64, 0) }.cast::<Head>();
    if !place.is_null() {
        // SAFETY: the reservation has room for one `Head` and is 8-byte aligned.
        unsafe { place.write(head) };
        submit(control, place);
    }
}

/// Counts a change that is not captured; whether a GAP record must tell it, because it is the first of its
/// reason since the agent acknowledged the ones before.
#[inline(always)]
pub fn count_gap(control: Control, reason: usize) -> bool {
    let before = control.increment(control::GAPS + reason);
    before == control.read(control::GAPS_SEEN + reason)
}

/// Notes a change of an inode that is not captured: counts it, and tells it if need be.
#[inline(always)]
pub fn note_gap(control: Control, reason: usize, inode: *const u8) {
    if !count_gap(control, reason) {
        return;
    }
    // SAFETY: callers pass the inode that `wanted` accepted.
    let mut head = unsafe { head_of(op::GAP, inode) };
    head.arg = reason as u64;
    emit(control, head);
}
