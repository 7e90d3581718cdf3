//! The asking side: one connection to one peer, made when it is needed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until, timeout};

use super::frame::{Connection, FRAME_LIMIT};
use super::server::IDLE_LIMIT;
use super::{ControlError, Hello, Identity, Message, Request, Response};
use crate::ids::NodeId;

/// Limit of one request: opening a large region takes a while.
const CALL_LIMIT: Duration = Duration::from_secs(30);
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// Well below any caller's patience: several callers share the rest between two attempts, and who
/// gives up while it lasts never learns why the peer cannot be had.
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// Asks one peer. Requests go one after the other; a request whose connection broke is not sent
/// again by itself, because the peer may have acted on it.
#[derive(Debug)]
pub struct ControlClient {
    identity: Arc<Identity>,
    peer: NodeId,
    address: SocketAddr,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    open: Option<Open>,
    back_off: ExponentialBackoff,
    not_before: Option<Instant>,
    next_id: u64,
}

#[derive(Debug)]
struct Open {
    connection: Connection<TcpStream>,
    peer: Hello,
    used_at: Instant,
}

impl ControlClient {
    /// For a peer of the configuration; connects with the first request.
    ///
    /// # Errors
    /// If `peer` is not one of the identity's peers.
    pub fn new(identity: Arc<Identity>, peer: &NodeId) -> Result<Self, ControlError> {
        let known = identity.peers.iter().find(|(node, _)| node == peer);
        let address = known.map(|(_, address)| *address).ok_or_else(|| {
            ControlError::WrongPeer(format!("`{peer}` is no peer of the configuration"))
        })?;
        let state = State {
            open: None,
            back_off: back_off(),
            not_before: None,
            next_id: 1,
        };
        Ok(Self {
            identity,
            peer: peer.clone(),
            address,
            state: Mutex::new(state),
        })
    }

    /// Asks, connecting first if need be. After a failed attempt to connect the next one waits a
    /// little longer each time, up to 1 s; calls that come meanwhile wait with it.
    ///
    /// # Errors
    /// [`ControlError::Refused`] also for a [`Response::Refused`]; else what failed.
    pub async fn call(&self, request: Request) -> Result<Response, ControlError> {
        self.call_peer(request).await.map(|(_, response)| response)
    }

    /// As [`ControlClient::call`], with the Hello of the peer that answered (for its boot id).
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub async fn call_peer(&self, request: Request) -> Result<(Hello, Response), ControlError> {
        let mut state = self.state.lock().await;
        // Taken out, so that a call that is dropped half-way leaves no answer behind for the next.
        let fresh = |open: &Open| open.used_at.elapsed() < IDLE_LIMIT / 2;
        let mut open = match state.open.take().filter(fresh) {
            Some(open) => open,
            None => self.connect(&mut state).await?,
        };
        let id = state.next_id;
        state.next_id += 1;
        open.connection
            .write(&Message::Request { id, request })
            .await?;
        let response = match open.connection.read(CALL_LIMIT, "answer").await? {
            Message::Response {
                id: answered,
                response,
            } if answered == id => response,
            _ => {
                return Err(ControlError::Protocol(
                    "no answer to the request".to_owned(),
                ));
            }
        };
        open.used_at = Instant::now();
        let peer = open.peer.clone();
        state.open = Some(open);
        match response {
            Response::Refused { reason } => Err(ControlError::Refused(reason)),
            response => Ok((peer, response)),
        }
    }

    async fn connect(&self, state: &mut State) -> Result<Open, ControlError> {
        if let Some(not_before) = state.not_before {
            sleep_until(not_before).await;
        }
        // Counted before the attempt, so that dropping the call does not undo the back-off.
        let pause = state.back_off.next().unwrap_or(BACK_OFF_MAX);
        state.not_before = Some(Instant::now() + pause);
        let stream = timeout(FRAME_LIMIT, self.dial())
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(|source| ControlError::Unreachable {
                node: self.peer.clone(),
                address: self.address,
                source,
            })?;
        let mut connection = Connection::new(stream);
        connection.say_hello(&self.identity).await?;
        let (connection, peer) = connection
            .expect_hello(&self.identity, Some(&self.peer))
            .await?;
        state.back_off = back_off();
        state.not_before = None;
        Ok(Open {
            connection,
            peer,
            used_at: Instant::now(),
        })
    }

    /// From this node's own address, by which the peer knows it.
    async fn dial(&self) -> std::io::Result<TcpStream> {
        let socket = if self.address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.bind(SocketAddr::new(self.identity.address.ip(), 0))?;
        let stream = socket.connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

fn back_off() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(BACK_OFF_MIN)
        .with_max_delay(BACK_OFF_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}
