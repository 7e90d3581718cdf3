//! The transport: how bytes get from the owner into the mirror's memory.
//!
//! Two implementations with the same semantics: `rdma` (reliable-connected queue pair, one-sided
//! RDMA WRITE) and `tcp` (for hosts without RDMA: the peer's agent places the bytes and then
//! acknowledges). A completed post means that the peer's memory holds the bytes, and all of every
//! post before it. Nothing here knows what the bytes are.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::TransportKind;
use crate::ids::RingPos;

pub mod contract;
pub mod rdma;
pub mod tcp;

pub use rdma::memory::{MemoryError, RingSource, SharedMemory};
pub use rdma::wait_readable;

/// Names one post; the caller's choice, handed back at completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PostId(pub u64);

/// The bytes that follow a post's head.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// None.
    None,
    /// `len` bytes at this position of the capture ring; they stay unchanged until the completion.
    Ring {
        /// Position in the endless stream of ring bytes.
        pos: RingPos,
        /// Bytes.
        len: u32,
    },
    /// Bytes that the link copies before it returns.
    Bytes(&'a [u8]),
}

/// One write into the peer's memory: `head` and `body` side by side at `offset`.
#[derive(Clone, Copy, Debug)]
pub struct Post<'a> {
    /// Handed back at completion.
    pub id: PostId,
    /// Offset in the peer's exposed memory.
    pub offset: u64,
    /// At most [`HEAD_BYTES_MAX`] bytes, copied before the link returns.
    pub head: &'a [u8],
    /// What follows the head.
    pub body: Body<'a>,
}

/// Most bytes of [`Post::head`].
pub const HEAD_BYTES_MAX: usize = 64;
/// Most bytes of one post, head included.
pub const POST_BYTES_MAX: usize = 256 * 1024 + HEAD_BYTES_MAX;
/// Most posts in flight on one link; [`Link::room`] says how many more it takes.
pub const WINDOW_POSTS: usize = 16;

/// Why a link does not work. Every error ends the link: reconnect through a new one.
#[derive(Debug, Error)]
pub enum LinkError {
    /// There is no RDMA device, or not the configured one.
    #[error("{0}")]
    NoDevice(String),
    /// A verb or system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried, in words.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// A work request completed with an error, or the connection broke.
    #[error("the link to the peer broke: {0}")]
    Broken(String),
    /// The peer's endpoint is not one this transport can talk to.
    #[error(
        "the peer offers {offered}, this node is configured for {wanted}: set the same `transport` on both"
    )]
    Mismatch {
        /// What the peer offers.
        offered: String,
        /// What this node wants.
        wanted: String,
    },
    /// A post that breaks the rules of this module.
    #[error("post refused: {0}")]
    Refused(String),
}

/// What one side tells the other over the control connection so that they can connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "snake_case")]
pub enum Endpoint {
    /// A queue pair, and for the exposing side its memory.
    Rdma {
        /// Queue pair number.
        qp_number: u32,
        /// First packet sequence number this side sends.
        psn: u32,
        /// GID, 16 bytes in hex.
        gid: String,
        /// Path MTU this side can do, in bytes.
        mtu_bytes: u32,
        /// Remote key of the exposed memory; 0 from the writing side.
        rkey: u32,
        /// Address of the exposed memory; 0 from the writing side.
        address: u64,
        /// Bytes of the exposed memory; 0 from the writing side.
        memory_bytes: u64,
    },
    /// A TCP port, and a secret that the writer must present.
    Tcp {
        /// Address to connect to, `ip:port`; empty from the writing side.
        listen: String,
        /// 16 bytes in hex, fresh for each exposure; from the writing side the same once connected.
        token: String,
        /// Bytes of the exposed memory; 0 from the writing side.
        memory_bytes: u64,
    },
}

/// The writing side of one connected link to one exposed memory of the peer.
pub trait Link: Send {
    /// How many more posts it takes now.
    fn room(&self) -> usize;
    /// Starts a write. Never blocks.
    ///
    /// # Errors
    /// [`LinkError::Refused`] for a post that breaks the limits or has no room; any other error ends the link.
    fn post(&mut self, post: &Post<'_>) -> Result<(), LinkError>;
    /// Appends the posts that completed since the last call, in the order of posting. Never blocks.
    ///
    /// # Errors
    /// Any error ends the link; posts without a completion are in an unknown state.
    fn poll(&mut self, completed: &mut Vec<PostId>) -> Result<(), LinkError>;
    /// A descriptor that becomes readable when a completion may be there, so that a caller can sleep
    /// (`None`: the caller must poll). Arm it with [`Link::arm`] before sleeping, then poll once more.
    fn event_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>>;
    /// Asks for one event on [`Link::event_fd`] at the next completion of what is posted. `woken`: the descriptor
    /// was seen readable since the last call.
    ///
    /// # Errors
    /// As [`Link::poll`].
    fn arm(&mut self, woken: bool) -> Result<(), LinkError>;
    /// Whether ring bytes go to the wire from the ring's own memory.
    fn zero_copy(&self) -> bool;
}

/// A writing side before it is connected.
pub trait Outgoing: Send {
    /// What the peer needs to know of this side.
    fn endpoint(&self) -> Endpoint;
    /// Connects to the memory the peer exposed. May block up to a few seconds.
    ///
    /// # Errors
    /// [`LinkError::Mismatch`] for another transport's endpoint, else what failed.
    fn connect(self: Box<Self>, target: &Endpoint) -> Result<Box<dyn Link>, LinkError>;
}

/// Memory of this node that one peer may write to.
pub trait Exposed: Send {
    /// What the writer needs to know.
    fn endpoint(&self) -> Endpoint;
    /// Lets this writer in, and no other.
    ///
    /// # Errors
    /// As [`Outgoing::connect`].
    fn accept(&mut self, writer: &Endpoint) -> Result<(), LinkError>;
    /// Shuts the writer out for good: when this returns, no late write can land.
    ///
    /// # Errors
    /// What failed; the memory must then be treated as still writable.
    fn revoke(self: Box<Self>) -> Result<(), LinkError>;
}

/// Makes both sides of links. A link that broke is replaced by a new pair of sides.
pub trait Transport: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> TransportKind;
    /// A writing side; `source` is the ring that [`Body::Ring`] speaks of.
    ///
    /// # Errors
    /// What the system refused.
    fn outgoing(&self, source: Option<RingSource>) -> Result<Box<dyn Outgoing>, LinkError>;
    /// Opens memory to one writer, who is let in by [`Exposed::accept`].
    ///
    /// # Errors
    /// What the system refused.
    fn expose(&self, memory: Arc<SharedMemory>) -> Result<Box<dyn Exposed>, LinkError>;
}

/// Opens the configured transport. `local` is this node's own address: TCP listens on it.
///
/// # Errors
/// [`LinkError::NoDevice`] with the remedy.
pub fn open_transport(
    kind: TransportKind,
    device: Option<&str>,
    local: IpAddr,
) -> Result<Arc<dyn Transport>, LinkError> {
    Ok(match kind {
        TransportKind::Rdma => Arc::new(rdma::RdmaTransport::new(device)?),
        TransportKind::Tcp => Arc::new(tcp::TcpTransport::new(local)),
    })
}

/// The rules for a post, the same on every transport.
fn check_post(post: &Post<'_>, room: usize, memory_bytes: u64) -> Result<(), LinkError> {
    let body = match post.body {
        Body::None => 0,
        Body::Ring { len, .. } => len as usize,
        Body::Bytes(bytes) => bytes.len(),
    };
    let total = post.head.len().saturating_add(body);
    let end = post.offset.checked_add(total as u64);
    let why = if room == 0 {
        format!("{WINDOW_POSTS} posts are in flight already")
    } else if post.head.len() > HEAD_BYTES_MAX {
        format!(
            "a head of {} bytes is over {HEAD_BYTES_MAX}",
            post.head.len()
        )
    } else if total == 0 || total > POST_BYTES_MAX {
        format!("{total} bytes are not between 1 and {POST_BYTES_MAX}")
    } else if end.is_none_or(|end| end > memory_bytes) {
        let offset = post.offset;
        format!("{total} bytes at {offset} are outside the peer's memory of {memory_bytes} bytes")
    } else {
        return Ok(());
    };
    Err(LinkError::Refused(why))
}

fn random_bytes<const N: usize>() -> Result<[u8; N], LinkError> {
    let mut bytes = [0; N];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    match read {
        Ok(()) => Ok(bytes),
        Err(source) => Err(LinkError::System {
            what: "cannot read /dev/urandom".into(),
            source,
        }),
    }
}

fn encode_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode_hex(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}
