//! The exposing side: one thread places one writer's frames and acknowledges each once it is placed.
//!
//! The thread ends when the writer breaks a rule, hangs up, or the exposure is revoked; it never
//! comes back, and a new writer needs a new exposure.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use zerocopy::{FromZeros, IntoBytes};

use super::{FrameHeader, MAGIC, TOKEN_BYTES, mismatch, system, tune};
use crate::link::{
    Endpoint, Exposed, LinkError, POST_BYTES_MAX, SharedMemory, encode_hex, random_bytes,
};

/// A connection that does not show the token in this time makes way for the next.
const GREETING_TIMEOUT: Duration = Duration::from_millis(500);

/// Memory offered on a port, to whoever knows the token and was accepted.
#[derive(Debug)]
pub(super) struct TcpExposed {
    address: SocketAddr,
    token: [u8; TOKEN_BYTES],
    memory: Arc<SharedMemory>,
    stop: Arc<EventFd>,
    state: State,
}

/// How far the exposure has come.
#[derive(Debug)]
enum State {
    /// The port is open; nobody is let in.
    Listening(TcpListener),
    /// The thread waits for the writer or serves it.
    Serving(JoinHandle<()>),
    /// The thread is gone.
    Over,
}

impl TcpExposed {
    pub(super) fn new(local: IpAddr, memory: Arc<SharedMemory>) -> Result<Self, LinkError> {
        let listener = TcpListener::bind((local, 0)).map_err(system(&format!(
            "cannot listen on this node's address {local}"
        )))?;
        listener
            .set_nonblocking(true)
            .map_err(system("cannot listen without blocking"))?;
        let address = listener
            .local_addr()
            .map_err(system("cannot read the listening port"))?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| system("cannot create an event descriptor")(errno.into()))?;
        let token = random_bytes()?;
        let state = State::Listening(listener);
        Ok(Self {
            address,
            token,
            memory,
            stop: Arc::new(stop),
            state,
        })
    }

    /// Ends the thread; when this returns it has placed its last byte.
    fn shut(&mut self) -> Result<(), LinkError> {
        let State::Serving(thread) = std::mem::replace(&mut self.state, State::Over) else {
            return Ok(());
        };
        self.stop
            .write(1)
            .map_err(|errno| system("cannot stop the receiver")(errno.into()))?;
        thread
            .join()
            .map_err(|_| LinkError::Broken("the receiver's thread panicked".into()))
    }
}

impl Exposed for TcpExposed {
    fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp {
            listen: self.address.to_string(),
            token: encode_hex(&self.token),
            memory_bytes: self.memory.len(),
        }
    }

    fn accept(&mut self, writer: &Endpoint) -> Result<(), LinkError> {
        if !matches!(writer, Endpoint::Tcp { .. }) {
            return Err(mismatch());
        }
        let listener = match std::mem::replace(&mut self.state, State::Over) {
            State::Listening(listener) => listener,
            other => {
                self.state = other;
                return Err(LinkError::Refused(
                    "this memory has a writer already".into(),
                ));
            }
        };
        let receiver = Receiver {
            token: self.token,
            memory: Arc::clone(&self.memory),
            stop: Arc::clone(&self.stop),
        };
        let thread = std::thread::Builder::new()
            .name("tcp-receiver".into())
            .spawn(move || receiver.run(listener))
            .map_err(system("cannot start the receiver"))?;
        self.state = State::Serving(thread);
        Ok(())
    }

    fn revoke(mut self: Box<Self>) -> Result<(), LinkError> {
        self.shut()
    }
}

impl Drop for TcpExposed {
    fn drop(&mut self) {
        if let Err(error) = self.shut() {
            tracing::error!("{error}");
        }
    }
}

/// Why the receiver stopped.
#[derive(Debug)]
enum End {
    /// The exposure was revoked.
    Revoked,
    /// The writer hung up between frames.
    HungUp,
    /// The connection failed.
    Failed(io::Error),
    /// The writer sent what it must not.
    Hostile(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

#[derive(Debug)]
struct Receiver {
    token: [u8; TOKEN_BYTES],
    memory: Arc<SharedMemory>,
    stop: Arc<EventFd>,
}

impl Receiver {
    fn run(&self, listener: TcpListener) {
        let served = self.admit(listener).and_then(|stream| self.serve(&stream));
        match served {
            Ok(()) | Err(End::Revoked) => {}
            Err(End::HungUp) => tracing::info!("the writer closed its link to this node's memory"),
            Err(End::Failed(error)) => {
                tracing::warn!("the link into this node's memory broke: {error}");
            }
            Err(End::Hostile(why)) => {
                tracing::warn!("closed the link into this node's memory: {why}");
            }
        }
    }

    /// Waits for the connection that shows the token; then the port is closed.
    fn admit(&self, listener: TcpListener) -> Result<TcpStream, End> {
        loop {
            self.wait(listener.as_fd(), None)?;
            let (stream, from) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if is_retry(&error) => continue,
                Err(error) => return Err(error.into()),
            };
            match self.greet(&stream) {
                Ok(()) => {
                    // Once the writer is told that it is in, nobody else can try.
                    drop(listener);
                    self.write_all(&stream, &MAGIC)?;
                    return Ok(stream);
                }
                Err(End::Revoked) => return Err(End::Revoked),
                Err(why) => tracing::warn!("refused {from} at this node's memory: {why:?}"),
            }
        }
    }

    fn greet(&self, stream: &TcpStream) -> Result<(), End> {
        stream.set_nonblocking(true)?;
        tune(stream).map_err(io::Error::other)?;
        let mut hello = [0; MAGIC.len() + TOKEN_BYTES];
        let deadline = Instant::now() + GREETING_TIMEOUT;
        self.read_exact(stream, &mut hello, Some(deadline))?;
        let (magic, token) = hello.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(End::Hostile("it does not speak this protocol".into()));
        }
        if !same_secret(token, &self.token) {
            return Err(End::Hostile("its token is wrong".into()));
        }
        Ok(())
    }

    fn serve(&self, stream: &TcpStream) -> Result<(), End> {
        let mut header = FrameHeader::new_zeroed();
        let mut number = 0_u64;
        loop {
            self.read_exact(stream, header.as_mut_bytes(), None)?;
            number += 1;
            let (offset, len) = self.check(&header, number)?;
            self.place(stream, offset, len)?;
            self.write_all(stream, &number.to_le_bytes())?;
        }
    }

    /// What the header asks for, if it may.
    fn check(&self, header: &FrameHeader, number: u64) -> Result<(u64, usize), End> {
        let (offset, told) = (header.offset.get(), header.number.get());
        let len = header.len.get() as usize;
        let bytes = self.memory.len();
        if told != number {
            return Err(End::Hostile(format!(
                "frame {told} came instead of {number}"
            )));
        }
        if len == 0 || len > POST_BYTES_MAX {
            return Err(End::Hostile(format!("frame {number} has {len} bytes")));
        }
        match offset.checked_add(len as u64) {
            Some(end) if end <= bytes => Ok((offset, len)),
            _ => Err(End::Hostile(format!(
                "frame {number} wants {len} bytes at {offset}, outside the memory of {bytes} bytes"
            ))),
        }
    }

    fn place(&self, stream: &TcpStream, offset: u64, len: usize) -> Result<(), End> {
        let mut done = 0;
        while done < len {
            self.wait(stream.as_fd(), None)?;
            match self
                .memory
                .receive(stream.as_fd(), offset + done as u64, len - done)
            {
                Ok(0) => return Err(End::Hostile("it hung up in the middle of a frame".into())),
                Ok(got) => done += got,
                Err(error) if is_retry(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn read_exact(
        &self,
        mut stream: &TcpStream,
        buffer: &mut [u8],
        deadline: Option<Instant>,
    ) -> Result<(), End> {
        let mut rest = buffer;
        let whole = rest.len();
        while !rest.is_empty() {
            self.wait(stream.as_fd(), deadline)?;
            match stream.read(rest) {
                Ok(0) if rest.len() == whole => return Err(End::HungUp),
                Ok(0) => return Err(End::Hostile("it hung up in the middle of a frame".into())),
                Ok(got) => rest = rest.get_mut(got..).unwrap_or_default(),
                Err(error) if is_retry(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends a few bytes. A writer that does not read its acknowledgements fills the socket: hostile.
    fn write_all(&self, mut stream: &TcpStream, bytes: &[u8]) -> Result<(), End> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match stream.write(rest) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Err(End::Hostile("it does not read its acknowledgements".into()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits until `fd` is readable; a revoked exposure goes first, so that nothing is placed after.
    fn wait(&self, fd: BorrowedFd<'_>, deadline: Option<Instant>) -> Result<(), End> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = match left {
                None => PollTimeout::NONE,
                Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
            };
            let mut fds = [
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(fd, PollFlags::POLLIN),
            ];
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(io::Error::from(ErrorKind::TimedOut).into()),
                Ok(_) if fds[0].any().unwrap_or(true) => return Err(End::Revoked),
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
    )
}

/// Compares in a time that does not tell where they differ.
fn same_secret(left: &[u8], right: &[u8]) -> bool {
    let differing = left
        .iter()
        .zip(right)
        .fold(0, |sum, (left, right)| sum | (left ^ right));
    left.len() == right.len() && differing == 0
}
