//! Links over reliable connections: one post is one signalled RDMA write.
//!
//! The head goes through a registered slab; ring bytes go to the wire from the ring's own memory
//! where the kernel lets it be registered, else through the slab too. A slot of the slab, and ring
//! bytes, are in the device's hands until their completion: never touch them before.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::device::{Device, Gid};
use super::memory::{MemoryError, RingSource, SharedMemory};
use super::queue_pair::{PSN_MASK, PeerMay, Piece, QueuePair, Remote, Target};
use super::verbs::{Completion, CompletionQueue, MemoryRegion, ProtectionDomain};
use crate::config::TransportKind;
use crate::link::{
    Body, Endpoint, Exposed, Link, LinkError, Outgoing, POST_BYTES_MAX, Post, PostId, Transport,
    WINDOW_POSTS, check_post, decode_hex, encode_hex, random_bytes,
};

/// Bytes of one slot of the slab: the largest post, in whole pages.
const SLOT_BYTES: u64 = (POST_BYTES_MAX as u64).next_multiple_of(4096);

/// One-sided RDMA writes over one device.
#[derive(Debug)]
pub struct RdmaTransport {
    device: Arc<Device>,
}

impl RdmaTransport {
    /// Opens the named device, or the first with an active port.
    ///
    /// # Errors
    /// [`LinkError::NoDevice`] with the remedy.
    pub fn new(device: Option<&str>) -> Result<Self, LinkError> {
        Ok(Self {
            device: Device::open(device)?,
        })
    }

    /// Names of this machine's RDMA devices.
    ///
    /// # Errors
    /// [`LinkError::NoDevice`] where RDMA is not loaded.
    pub fn devices() -> Result<Vec<String>, LinkError> {
        Device::names()
    }

    /// Name of the device in use.
    #[must_use]
    pub fn device(&self) -> &str {
        self.device.name()
    }

    /// Whether the kernel lets the device read the ring's own memory.
    ///
    /// # Errors
    /// [`LinkError::System`] if the registration fails for another reason.
    pub fn can_register(&self, source: &RingSource) -> Result<bool, LinkError> {
        let domain = ProtectionDomain::new(&self.device)?;
        Ok(MemoryRegion::ring(&domain, source)?.is_some())
    }
}

impl Transport for RdmaTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn outgoing(&self, source: Option<RingSource>) -> Result<Box<dyn Outgoing>, LinkError> {
        let domain = ProtectionDomain::new(&self.device)?;
        // One more than the window: completions and events never fill the queue.
        let completions = CompletionQueue::new(&self.device, WINDOW_POSTS + 1)?;
        let psn = random_psn()?;
        let depth = WINDOW_POSTS as u32;
        let pair = QueuePair::new(&domain, &completions, depth, psn, PeerMay::Nothing)?;
        let bytes = SLOT_BYTES * WINDOW_POSTS as u64;
        let slab = Arc::new(
            SharedMemory::anonymous(bytes).map_err(|error| LinkError::System {
                what: "send buffer".into(),
                source: std::io::Error::other(error),
            })?,
        );
        let slab_region = MemoryRegion::local(&domain, &slab)?;
        let ring_region = match &source {
            Some(ring) => MemoryRegion::ring(&domain, ring)?,
            None => None,
        };
        if source.is_some() && ring_region.is_none() {
            tracing::info!(
                "this kernel does not let RDMA read the capture ring (before 6.2): each run is copied once"
            );
        }
        let sender = Sender {
            pair,
            slab,
            slab_region,
            ring: source,
            ring_region,
        };
        Ok(Box::new(RdmaOutgoing {
            sender,
            completions,
            device: Arc::clone(&self.device),
        }))
    }

    fn expose(&self, memory: Arc<SharedMemory>) -> Result<Box<dyn Exposed>, LinkError> {
        let domain = ProtectionDomain::new(&self.device)?;
        let completions = CompletionQueue::new(&self.device, 1)?;
        let psn = random_psn()?;
        let pair = QueuePair::new(&domain, &completions, 1, psn, PeerMay::Write)?;
        let region = MemoryRegion::exposed(&domain, &memory)?;
        let device = Arc::clone(&self.device);
        Ok(Box::new(RdmaExposed {
            pair,
            region,
            memory,
            device,
            writer: Writer::None,
        }))
    }
}

fn random_psn() -> Result<u32, LinkError> {
    Ok(u32::from_le_bytes(random_bytes()?) & PSN_MASK)
}

fn endpoint(device: &Device, pair: &QueuePair) -> Endpoint {
    let port = device.port();
    Endpoint::Rdma {
        qp_number: pair.number(),
        psn: pair.psn(),
        gid: encode_hex(&port.gid.0),
        mtu_bytes: port.mtu_bytes,
        rkey: 0,
        address: 0,
        memory_bytes: 0,
    }
}

/// The exposed memory of the peer.
#[derive(Clone, Copy, Debug)]
struct Exposure {
    key: u32,
    address: u64,
    bytes: u64,
}

fn read_endpoint(endpoint: &Endpoint) -> Result<(Remote, Exposure), LinkError> {
    let Endpoint::Rdma {
        qp_number,
        psn,
        gid,
        mtu_bytes,
        rkey,
        address,
        memory_bytes,
    } = endpoint
    else {
        return Err(LinkError::Mismatch {
            offered: "tcp".into(),
            wanted: "rdma".into(),
        });
    };
    let gid = decode_hex(gid).ok_or_else(|| {
        LinkError::Refused(format!("the peer's GID {gid:?} is not 16 bytes in hex"))
    })?;
    if address.checked_add(*memory_bytes).is_none() {
        return Err(LinkError::Refused("the peer's memory wraps around".into()));
    }
    let remote = Remote {
        qp_number: *qp_number,
        psn: *psn,
        gid: Gid(gid),
        mtu_bytes: *mtu_bytes,
    };
    Ok((
        remote,
        Exposure {
            key: *rkey,
            address: *address,
            bytes: *memory_bytes,
        },
    ))
}

/// What writes: the queue pair first, so that it is destroyed before the memory it reads from.
#[derive(Debug)]
struct Sender {
    pair: QueuePair,
    slab_region: MemoryRegion<Arc<SharedMemory>>,
    ring_region: Option<MemoryRegion<RingSource>>,
    slab: Arc<SharedMemory>,
    ring: Option<RingSource>,
}

impl Sender {
    /// Sends nothing more from here on, and is taken down on a thread of its own: the kernel waits there
    /// until nobody holds a packet any more, with soft-RoCE and a peer that stands still for up to 50 s.
    /// Whoever has lost this link must tell of it before.
    fn end(self) {
        if let Err(error) = self.pair.stop() {
            tracing::warn!(%error, "the link is taken down while it may still send");
        }
        let thread = std::thread::Builder::new().name("link-end".into());
        // Without a thread it is taken down right here.
        if let Err(error) = thread.spawn(move || drop(self)) {
            tracing::warn!(%error, "no thread takes the link down");
        }
    }
}

#[derive(Debug)]
struct RdmaOutgoing {
    sender: Sender,
    completions: Arc<CompletionQueue>,
    device: Arc<Device>,
}

impl Outgoing for RdmaOutgoing {
    fn endpoint(&self) -> Endpoint {
        endpoint(&self.device, &self.sender.pair)
    }

    fn connect(self: Box<Self>, target: &Endpoint) -> Result<Box<dyn Link>, LinkError> {
        let (remote, exposure) = read_endpoint(target)?;
        self.sender.pair.connect(&remote)?;
        Ok(Box::new(RdmaLink {
            sender: Some(self.sender),
            completions: self.completions,
            exposure,
            in_flight: VecDeque::with_capacity(WINDOW_POSTS),
            posted: 0,
            found: Vec::with_capacity(WINDOW_POSTS),
            is_armed: false,
            is_event_due: false,
            broken: None,
        }))
    }
}

/// A connected writer. Posts are numbered 0, 1, 2 ...; number modulo the window is the slab's slot.
#[derive(Debug)]
struct RdmaLink {
    /// Until it is dropped.
    sender: Option<Sender>,
    completions: Arc<CompletionQueue>,
    exposure: Exposure,
    in_flight: VecDeque<(u64, PostId)>,
    posted: u64,
    found: Vec<Completion>,
    /// The next completion gives an event: none was seen since the queue was armed.
    is_armed: bool,
    /// A completion was seen that gave, or is about to give, an event.
    is_event_due: bool,
    /// Why nothing works any more.
    broken: Option<String>,
}

impl RdmaLink {
    fn check_alive(&self) -> Result<(), LinkError> {
        self.broken
            .as_ref()
            .map_or(Ok(()), |why| Err(LinkError::Broken(why.clone())))
    }

    fn end(&mut self, why: String) -> LinkError {
        self.broken = Some(why.clone());
        LinkError::Broken(why)
    }

    /// Takes the event that is there, and asks for the next one where something may give it. Each is a system
    /// call, and an fsync's writes come one by one.
    fn take_event_and_arm(&mut self, woken: bool) -> Result<(), LinkError> {
        if woken || self.is_event_due {
            // One for each arming; a later one wakes again.
            self.completions.take_event()?;
            (self.is_event_due, self.is_armed) = (false, false);
        }
        if !self.is_armed && !self.in_flight.is_empty() {
            self.completions.arm()?;
            self.is_armed = true;
        }
        Ok(())
    }

    /// Puts a post's bytes where the device finds them.
    fn prepare(
        sender: &Sender,
        post: &Post<'_>,
        slot: u64,
    ) -> Result<([Piece; 2], usize), LinkError> {
        let refused = |error: MemoryError| LinkError::Refused(error.to_string());
        let start = slot * SLOT_BYTES;
        sender.slab.write_at(start, post.head).map_err(refused)?;
        let head_bytes = post.head.len() as u64;
        let after_head = start + head_bytes;
        let mut in_slab = post.head.len() as u32;
        let mut run = Piece {
            address: 0,
            len: 0,
            key: 0,
        };
        match (post.body, &sender.ring, &sender.ring_region) {
            (Body::None, ..) => {}
            (Body::Bytes(bytes), ..) => {
                sender.slab.write_at(after_head, bytes).map_err(refused)?;
                in_slab += bytes.len() as u32;
            }
            (Body::Ring { pos, len }, Some(ring), Some(region)) => {
                let address = ring.run(pos, len)? as u64;
                run = Piece {
                    address,
                    len,
                    key: region.local_key(),
                };
            }
            (Body::Ring { pos, len }, Some(ring), None) => {
                ring.copy_to(pos, len, &sender.slab, after_head)?;
                in_slab += len;
            }
            (Body::Ring { .. }, None, _) => {
                return Err(LinkError::Refused(
                    "ring bytes on a link without a ring".into(),
                ));
            }
        }
        let address = sender.slab.base() as u64 + start;
        let slab = Piece {
            address,
            len: in_slab,
            key: sender.slab_region.local_key(),
        };
        Ok(match (in_slab, run.len) {
            (0, _) => ([run, slab], 1),
            (_, 0) => ([slab, run], 1),
            _ => ([slab, run], 2),
        })
    }
}

impl Link for RdmaLink {
    fn room(&self) -> usize {
        WINDOW_POSTS.saturating_sub(self.in_flight.len())
    }

    fn post(&mut self, post: &Post<'_>) -> Result<(), LinkError> {
        self.check_alive()?;
        check_post(post, self.room(), self.exposure.bytes)?;
        let Some(sender) = &mut self.sender else {
            return Err(LinkError::Broken("the link has ended".into()));
        };
        let (pieces, count) = Self::prepare(sender, post, self.posted % WINDOW_POSTS as u64)?;
        let target = Target {
            address: self.exposure.address + post.offset,
            key: self.exposure.key,
        };
        let pieces = pieces.get(..count).unwrap_or(&pieces);
        if let Err(error) = sender.pair.post_write(self.posted, pieces, target) {
            self.broken = Some(error.to_string());
            return Err(error);
        }
        self.in_flight.push_back((self.posted, post.id));
        self.posted += 1;
        Ok(())
    }

    fn poll(&mut self, completed: &mut Vec<PostId>) -> Result<(), LinkError> {
        self.check_alive()?;
        self.found.clear();
        if let Err(error) = self.completions.poll(&mut self.found, WINDOW_POSTS) {
            self.broken = Some(error.to_string());
            return Err(error);
        }
        if !self.found.is_empty() {
            self.is_event_due |= std::mem::take(&mut self.is_armed);
        }
        for index in 0..self.found.len() {
            let Some(completion) = self.found.get(index).copied() else {
                break;
            };
            if let Some(words) = completion.error() {
                return Err(self.end(words));
            }
            match self.in_flight.pop_front() {
                Some((number, id)) if number == completion.number => completed.push(id),
                _ => {
                    let number = completion.number;
                    return Err(self.end(format!("write {number} completed out of order")));
                }
            }
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.completions.event_fd())
    }

    fn arm(&mut self, woken: bool) -> Result<(), LinkError> {
        self.check_alive()?;
        self.take_event_and_arm(woken)
            .inspect_err(|error| self.broken = Some(error.to_string()))
    }

    fn zero_copy(&self) -> bool {
        let sender = self.sender.as_ref();
        sender.is_some_and(|sender| sender.ring_region.is_some())
    }
}

impl Drop for RdmaLink {
    fn drop(&mut self) {
        if let Some(sender) = self.sender.take() {
            sender.end();
        }
    }
}

/// Who was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// Nobody yet.
    None,
    /// The one writer.
    Accepted,
}

/// Registered memory and the queue pair that alone may write to it: both stand in one protection
/// domain of their own. Dropping destroys the queue pair first.
#[derive(Debug)]
struct RdmaExposed {
    pair: QueuePair,
    region: MemoryRegion<Arc<SharedMemory>>,
    memory: Arc<SharedMemory>,
    device: Arc<Device>,
    writer: Writer,
}

impl Exposed for RdmaExposed {
    fn endpoint(&self) -> Endpoint {
        let mut told = endpoint(&self.device, &self.pair);
        if let Endpoint::Rdma {
            rkey,
            address,
            memory_bytes,
            ..
        } = &mut told
        {
            *rkey = self.region.remote_key();
            *address = self.memory.base() as u64;
            *memory_bytes = self.memory.len();
        }
        told
    }

    fn accept(&mut self, writer: &Endpoint) -> Result<(), LinkError> {
        let (remote, _) = read_endpoint(writer)?;
        if self.writer == Writer::Accepted {
            return Err(LinkError::Refused(
                "this memory has a writer already".into(),
            ));
        }
        self.pair.connect(&remote)?;
        self.writer = Writer::Accepted;
        Ok(())
    }

    fn revoke(self: Box<Self>) -> Result<(), LinkError> {
        let Self { pair, region, .. } = *self;
        let shut = pair.destroy();
        let hidden = region.deregister();
        match (shut, hidden) {
            (Err(shut), Err(hidden)) => Err(LinkError::Broken(format!("{shut}; {hidden}"))),
            (shut, hidden) => shut.and(hidden),
        }
    }
}
