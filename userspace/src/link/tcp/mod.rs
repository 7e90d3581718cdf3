//! Mirroring over TCP, for hosts without RDMA, with the semantics of RDMA: a completed post means
//! that the peer's memory holds the bytes, and all of every post before it.
//!
//! ```text
//! writer -> receiver   hello: magic 8 | token 16        receiver -> writer   welcome: magic 8
//! writer -> receiver   frame: offset u64 | number u64 | len u32, then len bytes (head, then body)
//! receiver -> writer   placed: number u64 of the newest frame placed; all before it are, too
//! ```
//!
//! Integers are little-endian; numbers are 1, 2, 3 ... `writer` sends, `receiver` places. Whatever
//! comes from the network is checked before use, and a wrong frame closes the connection. The
//! receiver must never acknowledge what it has not placed, nor place anything once revoked.

mod receiver;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Exposed, LinkError, Outgoing, RingSource, SharedMemory, Transport};
use crate::config::TransportKind;

/// First bytes in both directions; the last one is the version.
const MAGIC: [u8; 8] = *b"TWLINK\0\x01";
/// Bytes of the secret.
const TOKEN_BYTES: usize = 16;
/// Bytes of an acknowledgement.
const PLACED_BYTES: usize = 8;
/// Unacknowledged bytes older than this, or an idle peer silent for this long, break the link.
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// Limit for connecting and for the greeting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What comes before a frame's bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct FrameHeader {
    offset: U64,
    number: U64,
    len: U32,
}

const _: () = assert!(size_of::<FrameHeader>() == 20);

/// Links over TCP connections.
#[derive(Clone, Copy, Debug)]
pub struct TcpTransport {
    local: IpAddr,
}

impl TcpTransport {
    /// `local` is the address that exposed memory is offered on.
    #[must_use]
    pub const fn new(local: IpAddr) -> Self {
        Self { local }
    }
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn outgoing(&self, source: Option<RingSource>) -> Result<Box<dyn Outgoing>, LinkError> {
        Ok(Box::new(writer::TcpOutgoing::new(source)))
    }

    fn expose(&self, memory: Arc<SharedMemory>) -> Result<Box<dyn Exposed>, LinkError> {
        Ok(Box::new(receiver::TcpExposed::new(self.local, memory)?))
    }
}

fn mismatch() -> LinkError {
    LinkError::Mismatch {
        offered: "rdma".into(),
        wanted: "tcp".into(),
    }
}

fn system(what: &str) -> impl FnOnce(io::Error) -> LinkError {
    let what = what.to_owned();
    move |source| LinkError::System { what, source }
}

/// Sends at once, and notices a dead peer with and without bytes on the way.
fn tune(socket: &impl AsFd) -> Result<(), LinkError> {
    let dead_after_ms = u32::try_from(DEAD_AFTER.as_millis()).unwrap_or(3000);
    let set = || -> nix::Result<()> {
        setsockopt(socket, sockopt::TcpNoDelay, &true)?;
        setsockopt(socket, sockopt::TcpUserTimeout, &dead_after_ms)?;
        setsockopt(socket, sockopt::KeepAlive, &true)?;
        setsockopt(socket, sockopt::TcpKeepIdle, &1)?;
        setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
        setsockopt(socket, sockopt::TcpKeepCount, &3)
    };
    set().map_err(|errno| system("cannot set TCP options")(errno.into()))
}
