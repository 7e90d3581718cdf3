//! Owners of the verbs objects that a queue pair stands on: protection domain, registered memory,
//! completion queue with its event channel.
//!
//! Each keeps what it was made from alive and is destroyed once. None of them decides anything.

use std::ffi::{CStr, c_void};
use std::io;
use std::mem::zeroed;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rdma_sys::{
    ibv_access_flags, ibv_ack_cq_events, ibv_alloc_pd, ibv_comp_channel, ibv_cq,
    ibv_create_comp_channel, ibv_create_cq, ibv_dealloc_pd, ibv_dereg_mr, ibv_destroy_comp_channel,
    ibv_destroy_cq, ibv_get_cq_event, ibv_mr, ibv_pd, ibv_poll_cq, ibv_reg_mr, ibv_req_notify_cq,
    ibv_wc, ibv_wc_status, ibv_wc_status_str,
};

use super::device::Device;
use super::memory::{RingSource, SharedMemory};
use crate::link::LinkError;

/// The last system error, with what was tried.
pub(super) fn system_error(what: String) -> LinkError {
    LinkError::System {
        what,
        source: io::Error::last_os_error(),
    }
}

/// Verbs return an errno, or -1 with errno set.
pub(super) fn system_result(result: i32, what: impl FnOnce() -> String) -> Result<(), LinkError> {
    match result {
        0 => Ok(()),
        errno if errno > 0 => Err(LinkError::System {
            what: what(),
            source: io::Error::from_raw_os_error(errno),
        }),
        _ => Err(system_error(what())),
    }
}

/// What memory registrations and queue pairs must share to work together.
#[derive(Debug)]
pub(super) struct ProtectionDomain {
    pointer: NonNull<ibv_pd>,
    device: Arc<Device>,
}

// SAFETY: libibverbs is thread-safe; the domain is freed once.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(super) fn new(device: &Arc<Device>) -> Result<Arc<Self>, LinkError> {
        // SAFETY: the context is open as long as `device` lives.
        let pointer = NonNull::new(unsafe { ibv_alloc_pd(device.context()) });
        let pointer = pointer.ok_or_else(|| {
            system_error(format!(
                "cannot allocate a protection domain on {}",
                device.name()
            ))
        })?;
        Ok(Arc::new(Self {
            pointer,
            device: Arc::clone(device),
        }))
    }

    pub(super) fn pointer(&self) -> *mut ibv_pd {
        self.pointer.as_ptr()
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: everything made from the domain holds an `Arc` of it, so nothing uses it any more.
        let result = unsafe { ibv_dealloc_pd(self.pointer()) };
        if let Err(error) = system_result(result, || "cannot free a protection domain".into()) {
            tracing::error!("{error}");
        }
    }
}

/// Memory the device may read, and for exposed memory the peer may write; `M` keeps it mapped.
#[derive(Debug)]
pub(super) struct MemoryRegion<M> {
    pointer: Option<NonNull<ibv_mr>>,
    keys: (u32, u32),
    _memory: M,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs is thread-safe; the registration is undone once.
unsafe impl<M: Send> Send for MemoryRegion<M> {}

impl MemoryRegion<Arc<SharedMemory>> {
    /// Registers memory for the device to read from; nobody else may touch it.
    pub(super) fn local(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<SharedMemory>,
    ) -> Result<Self, LinkError> {
        Self::shared(domain, memory, ibv_access_flags(0), "the send buffer")
    }

    /// Registers memory that the peer may write to.
    pub(super) fn exposed(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<SharedMemory>,
    ) -> Result<Self, LinkError> {
        let access =
            ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
        Self::shared(
            domain,
            memory,
            access,
            "the region (its directory must be on a tmpfs or hugetlbfs)",
        )
    }

    fn shared(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<SharedMemory>,
        access: ibv_access_flags,
        what: &str,
    ) -> Result<Self, LinkError> {
        let held = Arc::clone(memory);
        let base = memory.base().cast::<c_void>();
        let bytes = memory.len() as usize;
        Self::register(domain, base, bytes, access, held).map_err(|source| LinkError::System {
            what: format!(
                "cannot register {bytes} bytes of {what} with {}",
                domain.device().name()
            ),
            source,
        })
    }
}

impl MemoryRegion<RingSource> {
    /// Registers both copies of the capture ring for the device to read from; `None` where the
    /// kernel does not allow it for a read-only mapping (before 6.2).
    pub(super) fn ring(
        domain: &Arc<ProtectionDomain>,
        ring: &RingSource,
    ) -> Result<Option<Self>, LinkError> {
        let bytes = ring.ring_bytes() * 2;
        let base = ring.base().cast_mut().cast::<c_void>();
        match Self::register(domain, base, bytes, ibv_access_flags(0), ring.clone()) {
            Ok(region) => Ok(Some(region)),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(None),
            Err(source) => Err(LinkError::System {
                what: format!(
                    "cannot register the capture ring ({bytes} bytes) with {}",
                    domain.device().name()
                ),
                source,
            }),
        }
    }
}

impl<M> MemoryRegion<M> {
    /// `memory` keeps the range mapped.
    fn register(
        domain: &Arc<ProtectionDomain>,
        base: *mut c_void,
        bytes: usize,
        access: ibv_access_flags,
        memory: M,
    ) -> io::Result<Self> {
        let access = i32::try_from(access.0).map_err(io::Error::other)?;
        // SAFETY: the range is mapped for as long as `memory` is held (the callers'
        // choice), which is as long as this registration; the kernel checks it again.
        let pointer = unsafe { ibv_reg_mr(domain.pointer(), base, bytes, access) };
        let pointer = NonNull::new(pointer).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: libibverbs returned a live registration.
        let keys = unsafe { (pointer.as_ref().lkey, pointer.as_ref().rkey) };
        let domain = Arc::clone(domain);
        Ok(Self {
            pointer: Some(pointer),
            keys,
            _memory: memory,
            _domain: domain,
        })
    }

    pub(super) fn local_key(&self) -> u32 {
        self.keys.0
    }

    pub(super) fn remote_key(&self) -> u32 {
        self.keys.1
    }

    /// Undoes the registration and says whether that worked.
    pub(super) fn deregister(mut self) -> Result<(), LinkError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), LinkError> {
        let Some(pointer) = self.pointer.take() else {
            return Ok(());
        };
        // SAFETY: the registration is live and taken out, so it is undone once.
        let result = unsafe { ibv_dereg_mr(pointer.as_ptr()) };
        system_result(result, || "cannot undo a memory registration".into())
    }
}

impl<M> Drop for MemoryRegion<M> {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::error!("{error}");
        }
    }
}

/// What became of one work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    pub(super) number: u64,
    status: ibv_wc_status::Type,
}

impl Completion {
    /// The error in words, or `None` for a success.
    pub(super) fn error(&self) -> Option<String> {
        if self.status == ibv_wc_status::IBV_WC_SUCCESS {
            return None;
        }
        // SAFETY: libibverbs answers every status, also an unknown one, with a static C string.
        let words = unsafe { CStr::from_ptr(ibv_wc_status_str(self.status)) };
        let words = words.to_string_lossy();
        let meaning = match self.status {
            ibv_wc_status::IBV_WC_RETRY_EXC_ERR => ", the peer does not answer",
            ibv_wc_status::IBV_WC_REM_ACCESS_ERR => ", the peer has withdrawn its memory",
            _ => "",
        };
        Some(format!("{words}{meaning}"))
    }
}

/// Where completions arrive, with a descriptor to sleep on.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    pointer: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
    _device: Arc<Device>,
}

// SAFETY: libibverbs is thread-safe; queue and channel are destroyed once.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    pub(super) fn new(device: &Arc<Device>, entries: usize) -> Result<Arc<Self>, LinkError> {
        let count = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: the context is open as long as `device` lives.
        let channel = NonNull::new(unsafe { ibv_create_comp_channel(device.context()) });
        let channel =
            channel.ok_or_else(|| system_error("cannot create a completion channel".into()))?;
        // SAFETY: context and channel are live; no user context is passed.
        let pointer =
            unsafe { ibv_create_cq(device.context(), count, null_mut(), channel.as_ptr(), 0) };
        let Some(pointer) = NonNull::new(pointer) else {
            let error = system_error(format!("cannot create a completion queue of {entries}"));
            // SAFETY: nothing uses the channel yet.
            unsafe { ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self {
            pointer,
            channel,
            _device: Arc::clone(device),
        };
        fcntl(queue.event_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| {
            LinkError::System {
                what: "cannot make the completion channel non-blocking".into(),
                source: errno.into(),
            }
        })?;
        Ok(Arc::new(queue))
    }

    pub(super) fn pointer(&self) -> *mut ibv_cq {
        self.pointer.as_ptr()
    }

    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is live as long as `self`, and owns the descriptor.
        unsafe { BorrowedFd::borrow_raw(self.channel.as_ref().fd) }
    }

    /// Takes the completions that are there, at most as many as `found` has room for.
    pub(super) fn poll(&self, found: &mut Vec<Completion>, most: usize) -> Result<(), LinkError> {
        const BATCH: usize = 16;
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut batch: [ibv_wc; BATCH] = unsafe { zeroed() };
        let room = i32::try_from(most.min(BATCH)).unwrap_or(0);
        // SAFETY: the queue is live, and `batch` has at least `room` entries.
        let count = unsafe { ibv_poll_cq(self.pointer(), room, batch.as_mut_ptr()) };
        let Ok(count) = usize::try_from(count) else {
            return Err(LinkError::Broken(format!(
                "the completion queue failed ({count})"
            )));
        };
        let entries = batch.iter().take(count);
        found.extend(entries.map(|entry| Completion {
            number: entry.wr_id,
            status: entry.status,
        }));
        Ok(())
    }

    /// Takes an event off the descriptor, if there is one.
    pub(super) fn take_event(&self) -> Result<(), LinkError> {
        loop {
            let (mut queue, mut context) = (null_mut(), null_mut());
            // SAFETY: the channel is live and non-blocking; both results are ours to fill.
            let result = unsafe {
                ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context)
            };
            if result == 0 {
                // SAFETY: the event belongs to this queue, the only one of the channel.
                unsafe { ibv_ack_cq_events(queue, 1) };
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(()),
                io::ErrorKind::Interrupted => {}
                _ => {
                    let what = "cannot read a completion event".into();
                    return Err(LinkError::System {
                        what,
                        source: error,
                    });
                }
            }
        }
    }

    /// Asks for one event at the next completion.
    pub(super) fn arm(&self) -> Result<(), LinkError> {
        // SAFETY: the queue is live.
        let result = unsafe { ibv_req_notify_cq(self.pointer(), 0) };
        system_result(result, || "cannot arm the completion queue".into())
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs that use the queue hold an `Arc` of it, and every event was acknowledged.
        let result = unsafe { ibv_destroy_cq(self.pointer()) };
        if let Err(error) = system_result(result, || "cannot destroy a completion queue".into()) {
            tracing::error!("{error}");
        }
        // SAFETY: its only queue is gone.
        let result = unsafe { ibv_destroy_comp_channel(self.channel.as_ptr()) };
        if let Err(error) = system_result(result, || "cannot destroy a completion channel".into()) {
            tracing::error!("{error}");
        }
    }
}
