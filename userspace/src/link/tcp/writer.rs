//! The writing side: frames go out as the socket takes them, acknowledgements come back.
//!
//! Ring bytes are sent from the ring's own memory; the head and other bytes are copied once. A
//! call never blocks after connecting, and never queues more than the window.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use zerocopy::IntoBytes;

use super::{CONNECT_TIMEOUT, FrameHeader, MAGIC, PLACED_BYTES, mismatch, system, tune};
use crate::ids::RingPos;
use crate::link::{
    Body, Endpoint, Link, LinkError, Outgoing, Post, PostId, RingSource, WINDOW_POSTS, check_post,
    decode_hex,
};

/// A writing side before it is connected.
#[derive(Debug)]
pub(super) struct TcpOutgoing {
    source: Option<RingSource>,
}

impl TcpOutgoing {
    pub(super) const fn new(source: Option<RingSource>) -> Self {
        Self { source }
    }
}

impl Outgoing for TcpOutgoing {
    fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp {
            listen: String::new(),
            token: String::new(),
            memory_bytes: 0,
        }
    }

    fn connect(self: Box<Self>, target: &Endpoint) -> Result<Box<dyn Link>, LinkError> {
        let Endpoint::Tcp {
            listen,
            token,
            memory_bytes,
        } = target
        else {
            return Err(mismatch());
        };
        let address: SocketAddr = listen.parse().map_err(|_| {
            LinkError::Refused(format!("the peer offers {listen:?}, which is not ip:port"))
        })?;
        let token = decode_hex(token)
            .ok_or_else(|| LinkError::Refused("the peer's token is not 16 bytes in hex".into()))?;
        let stream = greet(address, &token)?;
        let wake = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .and_then(|epoll| epoll.add(&stream, interest(false)).map(|()| epoll))
            .map_err(|errno| system("cannot watch the link's socket")(errno.into()))?;
        Ok(Box::new(TcpLink {
            stream,
            wake,
            wants_to_send: false,
            source: self.source,
            memory_bytes: *memory_bytes,
            unsent: VecDeque::with_capacity(WINDOW_POSTS),
            in_flight: VecDeque::with_capacity(WINDOW_POSTS),
            posted: 0,
            placed: Partial::default(),
            broken: None,
        }))
    }
}

/// Connects and shows the token; on return the receiver has let this writer in.
fn greet(address: SocketAddr, token: &[u8]) -> Result<TcpStream, LinkError> {
    let what = format!("cannot connect to the peer's memory at {address}");
    let mut stream =
        TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map_err(system(&what))?;
    tune(&stream)?;
    let mut welcome = [0; MAGIC.len()];
    let mut exchange = || -> io::Result<()> {
        stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
        stream.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        stream.write_all(&[&MAGIC, token].concat())?;
        stream.read_exact(&mut welcome)?;
        stream.set_nonblocking(true)
    };
    match exchange() {
        Ok(()) if welcome == MAGIC => Ok(stream),
        Ok(()) => Err(LinkError::Refused(format!(
            "{address} does not speak this version's protocol"
        ))),
        Err(error) if is_hang_up(&error) => Err(LinkError::Refused(format!(
            "the peer at {address} did not let this node write: it was not told of it, or has another writer"
        ))),
        Err(error) => Err(system(&what)(error)),
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::BrokenPipe
            | ErrorKind::WouldBlock
            | ErrorKind::TimedOut
    )
}

fn interest(send: bool) -> EpollEvent {
    let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
    flags.set(EpollFlags::EPOLLOUT, send);
    EpollEvent::new(flags, 0)
}

/// A frame that is not wholly in the socket yet.
#[derive(Debug)]
struct Unsent {
    /// Frame header, head, and bytes that had to be copied.
    prefix: Vec<u8>,
    /// The run behind the prefix.
    run: Option<(RingPos, u32)>,
    /// Bytes of prefix and run that went out.
    sent: usize,
}

impl Unsent {
    fn total(&self) -> usize {
        self.prefix.len() + self.run.map_or(0, |(_, len)| len as usize)
    }
}

/// An acknowledgement as far as it arrived.
#[derive(Debug, Default)]
struct Partial {
    bytes: [u8; PLACED_BYTES],
    have: usize,
}

/// A connected writer. Frames are numbered 1, 2, 3 ...
#[derive(Debug)]
struct TcpLink {
    stream: TcpStream,
    /// Readable when the socket has an acknowledgement, hung up, or takes more of what is unsent.
    wake: Epoll,
    wants_to_send: bool,
    source: Option<RingSource>,
    memory_bytes: u64,
    unsent: VecDeque<Unsent>,
    in_flight: VecDeque<(u64, PostId)>,
    posted: u64,
    placed: Partial,
    /// Why nothing works any more.
    broken: Option<String>,
}

impl TcpLink {
    fn check_alive(&self) -> Result<(), LinkError> {
        self.broken
            .as_ref()
            .map_or(Ok(()), |why| Err(LinkError::Broken(why.clone())))
    }

    fn end(&mut self, why: impl Into<String>) -> LinkError {
        let why = why.into();
        self.broken = Some(why.clone());
        LinkError::Broken(why)
    }

    fn frame(&self, post: &Post<'_>) -> Result<Unsent, LinkError> {
        let (copied, run): (&[u8], _) = match post.body {
            Body::None => (&[], None),
            Body::Bytes(bytes) => (bytes, None),
            Body::Ring { pos, len } => {
                let Some(source) = &self.source else {
                    return Err(LinkError::Refused(
                        "ring bytes on a link without a ring".into(),
                    ));
                };
                source.run(pos, len)?;
                (&[], Some((pos, len)))
            }
        };
        let run_bytes = run.map_or(0, |(_, len)| len);
        let len = (post.head.len() + copied.len()) as u32 + run_bytes;
        let header = FrameHeader {
            offset: post.offset.into(),
            number: (self.posted + 1).into(),
            len: len.into(),
        };
        let prefix = [header.as_bytes(), post.head, copied].concat();
        Ok(Unsent {
            prefix,
            run,
            sent: 0,
        })
    }

    /// Sends as much as the socket takes.
    fn flush(&mut self) -> Result<(), LinkError> {
        while let Some(frame) = self.unsent.front_mut() {
            match send_some(&self.stream, self.source.as_ref(), frame) {
                Ok(0) => return Err(self.end("the socket takes no more bytes")),
                Ok(sent) => {
                    frame.sent += sent;
                    if frame.sent >= frame.total() {
                        self.unsent.pop_front();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.end(words(&error))),
            }
        }
        Ok(())
    }

    /// Reads the acknowledgements that are there.
    fn receive(&mut self, completed: &mut Vec<PostId>) -> Result<(), LinkError> {
        loop {
            let Some(rest) = self.placed.bytes.get_mut(self.placed.have..) else {
                return Ok(());
            };
            match self.stream.read(rest) {
                Ok(0) => return Err(self.end("the peer closed the connection")),
                Ok(got) => self.placed.have += got,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.end(words(&error))),
            }
            if self.placed.have == PLACED_BYTES {
                let number = u64::from_le_bytes(self.placed.bytes);
                self.placed.have = 0;
                self.complete(number, completed)?;
            }
        }
    }

    fn complete(&mut self, number: u64, completed: &mut Vec<PostId>) -> Result<(), LinkError> {
        // What is not wholly sent cannot be placed.
        let sent = self.posted - self.unsent.len() as u64;
        let oldest = self
            .in_flight
            .front()
            .map_or(u64::MAX, |(oldest, _)| *oldest);
        if number > sent || number < oldest {
            let told = format!("the peer acknowledges frame {number}, which is not in flight");
            return Err(self.end(told));
        }
        while let Some((_, id)) = self.in_flight.pop_front_if(|(oldest, _)| *oldest <= number) {
            completed.push(id);
        }
        Ok(())
    }
}

fn words(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::TimedOut => "the peer does not answer".into(),
        _ => error.to_string(),
    }
}

fn send_some(
    mut stream: &TcpStream,
    source: Option<&RingSource>,
    frame: &Unsent,
) -> io::Result<usize> {
    let prefix = frame.prefix.get(frame.sent..).unwrap_or(&[]);
    let (Some((pos, len)), Some(source)) = (frame.run, source) else {
        return stream.write(prefix);
    };
    let gone = frame.sent.saturating_sub(frame.prefix.len()) as u32;
    source.send(
        stream.as_fd(),
        prefix,
        RingPos(pos.0 + u64::from(gone)),
        len.saturating_sub(gone),
    )
}

impl Link for TcpLink {
    fn room(&self) -> usize {
        WINDOW_POSTS.saturating_sub(self.in_flight.len())
    }

    fn post(&mut self, post: &Post<'_>) -> Result<(), LinkError> {
        self.check_alive()?;
        check_post(post, self.room(), self.memory_bytes)?;
        let frame = self.frame(post)?;
        self.posted += 1;
        self.in_flight.push_back((self.posted, post.id));
        self.unsent.push_back(frame);
        self.flush()
    }

    fn poll(&mut self, completed: &mut Vec<PostId>) -> Result<(), LinkError> {
        self.check_alive()?;
        // Acknowledgements first: they count even if the connection is found broken after them.
        self.receive(completed)?;
        self.flush()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.0.as_fd())
    }

    fn arm(&mut self, _woken: bool) -> Result<(), LinkError> {
        self.check_alive()?;
        let wants = !self.unsent.is_empty();
        if wants != self.wants_to_send {
            if let Err(errno) = self.wake.modify(&self.stream, &mut interest(wants)) {
                return Err(self.end(format!("cannot watch the link's socket: {errno}")));
            }
            self.wants_to_send = wants;
        }
        Ok(())
    }

    /// The kernel copies ring bytes into socket buffers.
    fn zero_copy(&self) -> bool {
        false
    }
}
