//! Bytes written: the exits of the inner write functions, which run under the inode lock.
//!
//! The bytes are copied at exit (at entry an untouched buffer is not yet mapped, and the copy
//! fails), by walking the `iov_iter` backwards from where the kernel's own copy ended. What cannot
//! be copied becomes a record without bytes: an unreadable page must never become zeros.

use core::ffi::c_void;

use aya_ebpf::bindings::bpf_dynptr;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::*;
use aya_ebpf::macros::fexit;
use aya_ebpf::programs::FExitContext;
use twinwrite_abi::{INLINE_BYTES_MAX, control, flag, op};

use crate::config::*;
use crate::emit::*;

/// Most slices of one write: 1024 segments of eight slices each.
const SLICES_MAX: u32 = 8192 + 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    base: u64,
    len: u64,
}

/// State of a copy that runs from the end of the bytes to their start.
///
/// The 32-bit counters lie on odd words: the verifier does not track their values there, so the
/// loop's callback converges on 6.7 and later instead of being walked once a value.
#[repr(C)]
pub struct Copying {
    pub dynptr: bpf_dynptr,
    /// End of what is still to be copied of the current segment.
    source_end: u64,
    /// The segment after the next one to take.
    segments: u64,
    _0: u32,
    /// End of what is still to be filled in the record.
    to_end: u32,
    _1: u32,
    /// Bytes in segments not yet taken.
    left: u32,
    _2: u32,
    /// Bytes left of the current segment.
    segment_left: u32,
    _3: u32,
    /// Bytes of the current segment; chooses the slice.
    segment_bytes: u32,
    _4: u32,
    failed: u32,
}

impl Copying {
    /// Nothing to copy.
    #[inline(always)]
    pub fn new() -> Self {
        // SAFETY: all members are integers.
        unsafe { core::mem::zeroed() }
    }

    /// Whether bytes are missing from the record.
    #[inline(always)]
    pub fn incomplete(&self) -> bool {
        self.failed != 0 || (self.segment_left | self.left) != 0
    }

    /// Copies `bytes` of kernel memory at `source` to offset `to` of the record.
    #[inline(always)]
    pub fn from_kernel(&mut self, source: u64, to: u32, bytes: u32) {
        self.source_end = source + u64::from(bytes);
        self.to_end = to + bytes;
        self.segment_left = bytes;
        self.segment_bytes = bytes;
        self.left = 0;
        self.run(copy_kernel_slice);
    }

    #[inline(always)]
    fn run(&mut self, step: extern "C" fn(u64, *mut c_void) -> i64) {
        let state = core::ptr::from_mut(self).cast();
        // SAFETY: the callback gets a pointer to this state, which outlives the loop.
        unsafe { bpf_loop(SLICES_MAX, step as *mut c_void, state, 0) };
    }
}

/// Copies the last `N` bytes not yet copied. The first slices of a segment overlap what was copied
/// before them rather than being shorter, so that every slice has a constant length.
#[inline(always)]
fn slice<const N: u32, const KERNEL: bool>(copying: &mut Copying) -> i64 {
    let take = if copying.segment_left >= N {
        N
    } else {
        copying.segment_left
    };
    let to = copying.to_end - take;
    let source = (copying.source_end - u64::from(take)) as *const c_void;
    copying.to_end = to;
    copying.source_end = source as u64;
    copying.segment_left -= take;
    // SAFETY: the dynptr holds a reservation; the kernel checks the range.
    let place =
        unsafe { bpf_dynptr_data((&raw const copying.dynptr).cast_mut().cast(), to, N as _) };
    if place.is_null() {
        copying.failed = 2;
        return 1;
    }
    // SAFETY: `place` has N bytes; a bad source is reported, not followed.
    let error = unsafe {
        if KERNEL {
            bpf_probe_read_kernel_raw(place, N, source)
        } else {
            bpf_probe_read_user(place.cast(), N, source)
        }
    };
    if error != 0 {
        copying.failed = 3;
        return 1;
    }
    0
}

#[inline(always)]
unsafe fn bpf_probe_read_kernel_raw(to: *mut c_void, bytes: u32, source: *const c_void) -> i64 {
    // SAFETY: the caller's.
    unsafe { aya_ebpf::helpers::generated::bpf_probe_read_kernel(to, bytes, source) }
}

/// Copies the next slice. Two slices do for a segment of up to two pages, eight for any other: a
/// call costs more than copying a few hundred bytes twice, and less than copying pages twice.
#[inline(always)]
fn next_slice<const KERNEL: bool>(copying: &mut Copying) -> i64 {
    match copying.segment_bytes {
        131072.. => slice::<32768, KERNEL>(copying),
        65536.. => slice::<16384, KERNEL>(copying),
        32768.. => slice::<8192, KERNEL>(copying),
        4096.. => slice::<4096, KERNEL>(copying),
        2048.. => slice::<2048, KERNEL>(copying),
        1024.. => slice::<1024, KERNEL>(copying),
        512.. => slice::<512, KERNEL>(copying),
        256.. => slice::<256, KERNEL>(copying),
        128.. => slice::<128, KERNEL>(copying),
        64.. => slice::<64, KERNEL>(copying),
        32.. => slice::<32, KERNEL>(copying),
        16.. => slice::<16, KERNEL>(copying),
        8.. => slice::<8, KERNEL>(copying),
        1.. => slice::<1, KERNEL>(copying),
        0 => 1,
    }
}

extern "C" fn copy_kernel_slice(_index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `Copying::run` passes its own state.
    let copying = unsafe { &mut *state.cast::<Copying>() };
    if copying.segment_left == 0 {
        return 1;
    }
    next_slice::<true>(copying)
}

extern "C" fn copy_user_slice(_index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `Copying::run` passes its own state.
    let copying = unsafe { &mut *state.cast::<Copying>() };
    if copying.segment_left == 0 {
        if copying.left == 0 {
            return 1;
        }
        copying.segments -= size_of::<Segment>() as u64;
        // SAFETY: a bad address is reported, not followed.
        let Ok(segment) = (unsafe { bpf_probe_read_kernel(copying.segments as *const Segment) })
        else {
            copying.failed = 1;
            return 1;
        };
        let take = if segment.len > u64::from(copying.left) {
            copying.left
        } else {
            segment.len as u32
        };
        copying.source_end = segment.base + segment.len;
        copying.segment_bytes = take;
        copying.segment_left = take;
        copying.left -= take;
        if take == 0 {
            return 0;
        }
    }
    next_slice::<false>(copying)
}

/// An `iov_iter` through which bytes have gone.
#[derive(Clone, Copy)]
pub struct Iter {
    /// Where it is.
    pub at: *const u8,
    /// Its `iter_type`.
    pub kind: u64,
    /// Its `iov_offset`.
    pub offset: u64,
    /// The buffer, if it is of one only.
    pub buffer: *const c_void,
}

impl Iter {
    /// The one at `at`.
    ///
    /// # Safety
    /// `at` must be a hook's argument.
    #[inline(always)]
    unsafe fn of(at: *const u8) -> Self {
        // SAFETY: the caller's. The buffer's address is not computed with: on 6.1 the verifier takes it
        // for a pointer.
        unsafe {
            Self {
                at,
                kind: u64::from(member::<u8>(at, &ITER_TYPE)),
                offset: member(at, &ITER_OFFSET),
                buffer: member(at, &ITER_UBUF_ADDRESS),
            }
        }
    }
}

/// Sets `copying` to the last `bytes` bytes that went through `iter`; false if eBPF cannot copy
/// from an iterator of this kind.
#[inline(always)]
fn locate(copying: &mut Copying, iter: Iter, bytes: u64) -> bool {
    let Iter { kind, offset, .. } = iter;
    let pointer = |at: u64| {
        // SAFETY: a bad address is reported, not followed. Members of the iterator's union are
        // read this way because the verifier refuses a plain load of some of them.
        unsafe { bpf_probe_read_kernel(iter.at.wrapping_add(at as usize).cast::<u64>()) }
    };
    let (mut source_end, mut segment) = (0, 0);
    if kind == ITER_UBUF.load() {
        let Ok(buffer) = pointer(ITER_UBUF_ADDRESS.load()) else {
            return false;
        };
        source_end = buffer + offset;
        segment = offset;
    } else if kind == ITER_IOVEC.load() {
        let Ok(segments) = pointer(ITER_IOV.load()) else {
            return false;
        };
        copying.segments = segments;
        if offset != 0 {
            // SAFETY: as above.
            let Ok(current) = (unsafe { bpf_probe_read_kernel(segments as *const Segment) }) else {
                return false;
            };
            source_end = current.base + offset;
            segment = offset;
        }
    } else {
        return false;
    }
    if segment > bytes {
        segment = bytes;
    }
    copying.source_end = source_end;
    copying.segment_left = segment as u32;
    copying.segment_bytes = segment as u32;
    copying.left = (bytes - segment) as u32;
    copying.to_end = HEAD_BYTES + bytes as u32;
    true
}

/// One write that the filter let through.
#[derive(Clone, Copy)]
pub struct Write {
    /// The control words.
    pub control: Control,
    /// The file, whose lock is held.
    pub inode: *const u8,
    /// Where it begins.
    pub pos: u64,
    /// How many bytes were written.
    pub bytes: u64,
}

impl Write {
    /// Writes the record's header where it stays.
    ///
    /// # Safety
    /// `place` must have room for a header; `inode` is as in [`member`].
    #[inline(always)]
    unsafe fn header(self, place: *mut Head, flags: u8) {
        // SAFETY: the caller's.
        unsafe {
            let mut head = head_of(op::WRITE, self.inode);
            head.flags = flags;
            head.data_len = self.bytes as u32;
            head.pos = self.pos;
            *place = head;
        }
    }

    /// The flags of a record whose bytes were copied or not; counts those that were not.
    #[inline(always)]
    fn flags(self, copied: bool) -> u8 {
        if copied {
            0
        } else {
            self.control.increment(control::FAULTS);
            flag::NO_BYTES
        }
    }

    /// A record with room for `N` bytes, which one read fills with the `bytes` at `source`.
    #[inline(always)]
    fn emit_at_once<const N: usize>(self, source: *const c_void, bytes: u32) {
        let Some(place) = reserve::<AtOnce<N>>(self.control) else {
            return;
        };
        // SAFETY: the reservation has room for the header and N bytes, which callers make sure
        // `bytes` does not exceed; a bad source is reported, not followed.
        unsafe {
            let error = bpf_probe_read_user((&raw mut (*place).bytes).cast(), bytes, source);
            self.header(&raw mut (*place).head, self.flags(error == 0));
        }
        submit(self.control, place);
    }

    /// Handles the commonest writes, one buffer of up to four lines or of a usual block, without the
    /// dynptr and the loop, which cost more than copying a page. False if this is another write.
    #[inline(always)]
    fn captured_at_once(self, iter: Iter) -> bool {
        if iter.kind != ITER_UBUF.load() || iter.offset != self.bytes {
            return false;
        }
        let source = iter.buffer;
        match self.bytes {
            1..=64 => self.emit_at_once::<64>(source, at_most::<64>(self.bytes)),
            65..=128 => self.emit_at_once::<128>(source, at_most::<128>(self.bytes)),
            129..=192 => self.emit_at_once::<192>(source, at_most::<192>(self.bytes)),
            193..=256 => self.emit_at_once::<256>(source, at_most::<256>(self.bytes)),
            512 => self.emit_at_once::<512>(source, 512),
            1024 => self.emit_at_once::<1024>(source, 1024),
            2048 => self.emit_at_once::<2048>(source, 2048),
            4096 => self.emit_at_once::<4096>(source, 4096),
            8192 => self.emit_at_once::<8192>(source, 8192),
            16384 => self.emit_at_once::<16384>(source, 16384),
            32768 => self.emit_at_once::<32768>(source, 32768),
            65536 => self.emit_at_once::<65536>(source, 65536),
            _ => return false,
        }
        true
    }

    /// Handles any write: a record of a size known only now, filled slice by slice.
    #[inline(always)]
    fn capture_any(self, iter: Iter) {
        let mut copying = Copying::new();
        let inline =
            self.bytes <= u64::from(INLINE_BYTES_MAX) && locate(&mut copying, iter, self.bytes);
        let body = if inline { self.bytes } else { 0 };
        if !reserve_dynptr(self.control, &raw mut copying.dynptr, body) {
            return;
        }
        let mut flags = flag::NO_BYTES;
        if inline {
            copying.run(copy_user_slice);
            flags = self.flags(!copying.incomplete());
        }
        // SAFETY: the dynptr holds a reservation of at least a header.
        let place =
            unsafe { bpf_dynptr_data((&raw mut copying.dynptr).cast(), 0, HEAD_BYTES as _) };
        if !place.is_null() {
            // SAFETY: `place` has room for a header.
            unsafe { self.header(place.cast(), flags) };
        }
        submit_dynptr(self.control, &raw mut copying.dynptr);
    }

    /// Emits its record, with the bytes if eBPF can copy them.
    #[inline(always)]
    pub fn capture(self, iter: Iter) {
        if !self.captured_at_once(iter) {
            self.capture_any(iter);
        }
    }
}

/// A number that is no larger than `N`, in words that the verifier understands.
#[inline(always)]
fn at_most<const N: u64>(bytes: u64) -> u32 {
    let bytes = core::hint::black_box(bytes);
    (if bytes > N { N } else { bytes }) as u32
}

/// A record whose bytes are copied by one read.
#[repr(C)]
struct AtOnce<const N: usize> {
    head: Head,
    bytes: [u8; N],
}

#[inline(always)]
fn written(ctx: &FExitContext) -> Option<()> {
    let kiocb: *const u8 = ctx.arg(0);
    let iter: *const u8 = ctx.arg(1);
    // SAFETY: the arguments of the hooked function.
    let inode: *const u8 = unsafe { member(member(kiocb, &KIOCB_FILP), &FILE_INODE) };
    let control = wanted(inode)?;
    let result: i64 = ctx.ret().ok()?;
    if result <= 0 {
        return None;
    }
    let bytes = result as u64;
    // SAFETY: as above.
    let (pos, iter) = unsafe { (member::<u64>(kiocb, &KIOCB_POS), Iter::of(iter)) };
    let write = Write {
        control,
        inode,
        pos: if control.read(control::POS_IS_END) != 0 {
            pos - bytes
        } else {
            pos
        },
        bytes,
    };
    write.capture(iter);
    Some(())
}

/// ext4 and most others.
#[fexit(function = "generic_perform_write")]
pub fn write_generic(ctx: FExitContext) -> i32 {
    written(&ctx);
    0
}

/// xfs and others on iomap.
#[fexit(function = "iomap_file_buffered_write")]
pub fn write_iomap(ctx: FExitContext) -> i32 {
    written(&ctx);
    0
}
