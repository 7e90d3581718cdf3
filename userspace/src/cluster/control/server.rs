//! The answering side.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::frame::Connection;
use super::{ControlError, Hello, Identity, Message, Request, Response};
use crate::events::{Event, EventLog};

/// A connection without a request for so long is closed.
pub(super) const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Most connections at a time.
const CONNECTIONS_MAX: usize = 8;
/// Refusals go into the event log no more often than this.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// What an agent does when its peer asks; the integrator's side of the connection.
pub trait ControlHandler: Send + Sync + 'static {
    /// Answers one request of a peer whose Hello was checked. Requests of one connection come one
    /// after the other.
    fn handle(&self, peer: &Hello, request: Request) -> impl Future<Output = Response> + Send;
}

/// The listening control port.
#[derive(Debug)]
pub struct ControlServer {
    listener: TcpListener,
    identity: Arc<Identity>,
    events: Arc<EventLog>,
}

impl ControlServer {
    /// Opens the port.
    ///
    /// # Errors
    /// If the address is not this machine's, or the port is taken.
    pub async fn bind(
        identity: Arc<Identity>,
        events: Arc<EventLog>,
    ) -> Result<Self, ControlError> {
        let address = identity.address;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ControlError::Listen { address, source })?;
        Ok(Self {
            listener,
            identity,
            events,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until it is dropped; its connections end with it.
    pub async fn serve<H: ControlHandler>(self, handler: Arc<H>) {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut sessions = JoinSet::new();
        let mut told_at: Option<Instant> = None;
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(ended) = sessions.join_next() => {
                    if let Ok(Err((address, error))) = ended {
                        self.tell(&mut told_at, address, &error);
                    }
                    continue;
                }
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, or the connection is gone already: neither is for ever.
                    tracing::warn!("cannot accept a control connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Strangers must not take the peers' places, nor be worth a task.
            let known = self
                .identity
                .peers
                .iter()
                .any(|(_, peer)| peer.ip() == address.ip());
            let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
                self.tell(
                    &mut told_at,
                    address,
                    &refused("too many control connections"),
                );
                continue;
            };
            if !known {
                let reason = "no configured node has this address";
                self.tell(&mut told_at, address, &refused(reason));
                continue;
            }
            let (identity, handler) = (Arc::clone(&self.identity), Arc::clone(&handler));
            sessions.spawn(async move {
                let ended = session(prepared(stream), &identity, handler.as_ref()).await;
                drop(place);
                ended.map_err(|error| (address, error))
            });
        }
    }

    fn tell(&self, told_at: &mut Option<Instant>, address: SocketAddr, error: &ControlError) {
        let (address, reason) = (address.to_string(), error.to_string());
        let due = told_at.is_none_or(|told| told.elapsed() >= TELL_INTERVAL);
        if due && !matches!(error, ControlError::Broken(_)) {
            *told_at = Some(Instant::now());
            self.events.record(Event::PeerRefused { address, reason });
        } else {
            tracing::debug!("control connection from {address} ended: {reason}");
        }
    }
}

fn refused(reason: &str) -> ControlError {
    ControlError::WrongPeer(reason.to_owned())
}

fn prepared(stream: TcpStream) -> TcpStream {
    // Only a matter of speed; a connection on which it fails will tell so by itself.
    let _ = stream.set_nodelay(true);
    stream
}

/// One connection from Hello to its end; `Ok`: the peer closed it between two requests.
pub(super) async fn session<S, H>(
    stream: S,
    identity: &Identity,
    handler: &H,
) -> Result<(), ControlError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    H: ControlHandler,
{
    let (mut connection, peer) = Connection::new(stream).expect_hello(identity, None).await?;
    connection.say_hello(identity).await?;
    loop {
        match connection.read(IDLE_LIMIT, "ask").await {
            Ok(Message::Request { id, request }) => {
                let response = handler.handle(&peer, request).await;
                connection
                    .write(&Message::Response { id, response })
                    .await?;
            }
            Ok(_) => {
                connection.refuse("only requests are expected here").await;
                return Err(ControlError::Protocol(
                    "something else than a request".to_owned(),
                ));
            }
            Err(ControlError::TimedOut("ask")) => return Ok(()),
            Err(ControlError::Broken(error))
                if error.kind() == std::io::ErrorKind::UnexpectedEof =>
            {
                return Ok(());
            }
            Err(error) => {
                if let ControlError::Protocol(what) = &error {
                    connection.refuse(&format!("it sent {what}")).await;
                }
                return Err(error);
            }
        }
    }
}
