//! The replies of the kernel's NFS server, which wait at the gate as a process does.
//!
//! A thread of the server sends its reply itself. While what a reply may confirm has not passed the gate,
//! sending fails; the server then closes the connection, and its client, which never saw the reply,
//! connects and sends the request again. A reply waits on the processor as long as the gate moves, up to a
//! limit. Nobody looks longer at a gate that stands still, so that such a round is all that this costs.
//!
//! A request that is sent again may be answered by any thread, from the server's cache of replies (or
//! the slot of a session), without another fsync. So what is waited for is kept by volume, not by
//! thread: a reply leaves when everything that the server was told to wait for so far has passed.
//!
//! A program must never refuse anything but what such a thread sends to the network: not a packet of
//! another part of the kernel, nor of the agent.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_get_current_comm;
use aya_ebpf::helpers::generated::bpf_loop;
use aya_ebpf::macros::{lsm, raw_tracepoint};
use aya_ebpf::programs::{LsmContext, RawTracePointContext};
use twinwrite_abi::{control, gap, held};

use crate::config::*;
use crate::emit::*;
use crate::gate::{self, KERNEL_THREAD, Wait, note};
use crate::subtree::{Side, side_at};

/// `PF_MEMALLOC`: what drivers of network disks set where they send for whoever waits for the disk.
const FOR_A_DISK: u32 = 0x0000_0800;
/// What the server's threads are called. No thread of the kernel can be given another name.
const SERVER: [u8; 5] = *b"nfsd\0";
/// The server asks a daemon of its own host.
const AF_UNIX: u16 = 1;
const EAGAIN: i32 = 11;
/// How long a reply waits on the processor for a gate that does not move: a refused one costs its client
/// seconds.
const REPLY_STILL_NS: u64 = 10_000_000;
/// How long it waits in all. Nothing else runs on its processor meanwhile, where the kernel does not preempt
/// itself.
const REPLY_LOOK_NS: u64 = 150_000_000;
/// Bounds of the look (the first is `BPF_MAX_LOOPS`); the time limits end it before.
const LOOKS_MAX: u32 = 1 << 23;
const ROUNDS_MAX: u32 = 8;

/// Whether the running thread is one of the kernel's NFS server.
#[inline(always)]
fn is_server() -> bool {
    if gate::task_flags() & (KERNEL_THREAD | FOR_A_DISK) != KERNEL_THREAD {
        return false;
    }
    let Ok(name) = bpf_get_current_comm() else {
        return false;
    };
    let mut at = 0;
    let mut differs = 0;
    while at < SERVER.len() {
        differs |= name[at] ^ SERVER[at];
        at += 1;
    }
    differs == 0
}

/// Makes the server's replies wait for what its running thread has to wait for; `false` if this is no
/// thread of it, or its replies cannot be refused.
#[inline(always)]
pub fn holds_reply(control: Control, wait: &Wait) -> bool {
    if control.read(control::SERVER_HELD) == 0 || !is_server() {
        return false;
    }
    // The position first: with the generation of an earlier one it would count as passed.
    let raised = if wait.position == held::UNTIL_CLOSED {
        control.raise(control::SERVER_CLOSED, wait.generation + 1)
    } else if wait.open_word == control::GATE_PROVEN_TO as u64 {
        control.raise(control::SERVER_PROVEN, wait.position)
            && control.raise(control::SERVER_PROVEN_GENERATION, wait.generation)
    } else {
        control.raise(control::SERVER_MIRRORED, wait.position)
            && control.raise(control::SERVER_MIRRORED_GENERATION, wait.generation)
    };
    if !raised {
        note(control, gap::UNGATED);
    }
    true
}

/// A reply's look at the gate.
#[repr(C)]
struct Look {
    wait: Wait,
    until_ns: u64,
    /// Where the gate stood at the last look, and since when.
    stands_at: u64,
    stands_since_ns: u64,
    /// On odd words, which the verifier does not follow: the callback converges.
    _0: u32,
    open: u32,
    _1: u32,
    over: u32,
}

extern "C" fn look_once(_: u64, look: *mut c_void) -> i64 {
    // SAFETY: `is_reached` passes a pointer to its state.
    let look = unsafe { &mut *look.cast::<Look>() };
    let Some(control) = Control::get() else {
        return 1;
    };
    if look.wait.is_over(control) {
        look.open = 1;
        look.over = 1;
        return 1;
    }
    let now_ns = gate::now_ns();
    let stands_at = control.read(control::GATE_OPEN_TO);
    if stands_at != look.stands_at {
        look.stands_at = stands_at;
        look.stands_since_ns = now_ns;
    }
    if now_ns >= look.until_ns || now_ns >= look.stands_since_ns + REPLY_STILL_NS {
        look.over = 1;
        return 1;
    }
    0
}

/// Looks at the gate as long as it moves; whether it came to where `wait` is over. While it lags behind all
/// the time, a client that was refused would find it lagging again.
#[inline(always)]
fn is_reached(control: Control, wait: Wait) -> bool {
    let now_ns = gate::now_ns();
    let mut look = Look {
        wait,
        until_ns: now_ns + REPLY_LOOK_NS,
        stands_at: control.read(control::GATE_OPEN_TO),
        stands_since_ns: now_ns,
        _0: 0,
        open: 0,
        _1: 0,
        over: 0,
    };
    let state: *mut Look = &raw mut look;
    let mut round = 0;
    while round < ROUNDS_MAX {
        // SAFETY: the callback gets a pointer to this state, which outlives the loop.
        unsafe { bpf_loop(LOOKS_MAX, look_once as *mut c_void, state.cast(), 0) };
        // SAFETY: the callback wrote it.
        if unsafe { core::ptr::read_volatile(&raw const (*state).over) } != 0 {
            break;
        }
        round += 1;
    }
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const (*state).open) != 0 }
}

/// Whether everything has passed that the server was told to wait for, or does while the gate moves.
#[inline(always)]
fn may_reply(control: Control) -> bool {
    let closed = control.read(control::SERVER_CLOSED);
    let until_closed = Wait::until_mirrored(held::UNTIL_CLOSED, closed.wrapping_sub(1));
    if closed != 0 && !until_closed.is_over(control) {
        return false;
    }
    let until_proven = Wait::until_proven(
        control.read(control::SERVER_PROVEN),
        control.read(control::SERVER_PROVEN_GENERATION),
    );
    if !until_proven.is_over(control) {
        return false;
    }
    let until_mirrored = Wait::until_mirrored(
        control.read(control::SERVER_MIRRORED),
        control.read(control::SERVER_MIRRORED_GENERATION),
    );
    if until_mirrored.is_over(control) {
        return true;
    }
    let stands_still =
        control.read(control::SERVER_STALLED_AT) == control.read(control::GATE_OPEN_TO);
    !stands_still && is_reached(control, until_mirrored)
}

/// Whether this socket leads to the network.
///
/// # Safety
/// `socket` from the hook's arguments.
#[inline(always)]
unsafe fn is_network(socket: *const u8) -> bool {
    // SAFETY: the caller's; newer verifiers want the question.
    unsafe {
        let sock: *const u8 = member(socket, &SOCKET_SOCK);
        sock.is_null() || member::<u16>(sock, &SOCK_FAMILY) != AF_UNIX
    }
}

/// Everything that is sent through a socket passes here.
#[lsm(hook = "socket_sendmsg")]
pub fn gate_reply(ctx: LsmContext) -> i32 {
    let before: i32 = ctx.arg(3);
    if before != 0 || !is_server() {
        return before;
    }
    let Some(control) = Control::get() else {
        return 0;
    };
    if control.read(control::GATE_OPEN_TO) == control::GATE_OPEN
        || control.read(control::GATE_OFF) != 0
    {
        return 0;
    }
    // SAFETY: the hook's argument.
    if !unsafe { is_network(ctx.arg(0)) } || may_reply(control) {
        return 0;
    }
    control.write(
        control::SERVER_STALLED_AT,
        control.read(control::GATE_OPEN_TO),
    );
    control.increment(control::SERVER_REFUSED);
    -EAGAIN
}

/// The server makes a name or an attribute durable, of an ext4 that is exported with `sync`. What it did
/// has its record: the hooks run before the lock is given back. No mark keeps older records off a name, so
/// that a log that is not whole needs a proof.
#[raw_tracepoint(tracepoint = "ext4_nfs_commit_metadata")]
pub fn gate_server_metadata(ctx: RawTracePointContext) -> i32 {
    let device = gate::read_at::<u64>(ctx.arg(0), &INODE_SB)
        .and_then(|superblock| gate::read_at::<u32>(superblock, &SB_DEV));
    if device.map(u64::from) != Some(TARGET_DEV.load()) || side_at(ctx.arg(0)) == Side::Outside {
        return 0;
    }
    let Some(control) = Control::get() else {
        return 0;
    };
    let generation = gate::generation(control);
    if control.read(control::GATE_OPEN_TO) == control::GATE_OPEN {
        return 0;
    }
    let wait = if gate::is_log_whole(control) {
        gate::until_captured(control, generation)
    } else {
        gate::until_checkpoint(control, generation)
    };
    if !wait.is_over(control)
        && !holds_reply(control, &wait)
        && control.read(control::GATE_OFF) == 0
    {
        note(control, gap::UNGATED);
    }
    0
}
