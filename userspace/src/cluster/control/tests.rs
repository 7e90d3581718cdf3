use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::frame::Connection;
use super::*;
use crate::cluster::claim::VolumeClaim;
use crate::events::EventLog;
use crate::ids::RingPos;

fn node(name: &str) -> NodeId {
    NodeId(name.into())
}

fn identity(name: &str, cluster: &str, peer: &str, peer_address: SocketAddr) -> Identity {
    Identity {
        hello: Hello {
            protocol: PROTOCOL,
            cluster: cluster.into(),
            node: node(name),
            boot_id: BootId([name.as_bytes()[0]; 16]),
            config_digest: None,
        },
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        peers: vec![(node(peer), peer_address)],
    }
}

fn anywhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 1))
}

/// Answers who asks, and counts.
#[derive(Default)]
struct Answers {
    asked: AtomicUsize,
}

impl ControlHandler for Answers {
    async fn handle(&self, peer: &Hello, request: Request) -> Response {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match request {
            Request::Ownership { volume } if volume == "data" => Response::OwnershipIs {
                claim: Some(VolumeClaim::first(peer.node.clone())),
                serving: false,
            },
            Request::BeginEpoch { .. } => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                Response::EpochBegun
            }
            _ => Response::Refused {
                reason: "no such volume".into(),
            },
        }
    }
}

/// A server of node `b` that runs until the test ends.
struct Server {
    address: SocketAddr,
    handler: Arc<Answers>,
    state_dir: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start() -> Self {
        Self::of(identity("b", "office", "a", anywhere())).await
    }

    async fn of(identity: Identity) -> Self {
        let state_dir = tempfile::tempdir().unwrap();
        let events = Arc::new(EventLog::open(state_dir.path()).unwrap());
        let server = ControlServer::bind(Arc::new(identity), events)
            .await
            .unwrap();
        let address = server.address().unwrap();
        let handler = Arc::new(Answers::default());
        let task = tokio::spawn(server.serve(Arc::clone(&handler)));
        Self {
            address,
            handler,
            state_dir,
            task,
        }
    }

    fn client(&self, name: &str, cluster: &str, peer: &str) -> ControlClient {
        let identity = identity(name, cluster, peer, self.address);
        ControlClient::new(Arc::new(identity), &node(peer)).unwrap()
    }

    async fn logged(&self, words: &str) -> bool {
        for _ in 0..100 {
            let log = std::fs::read_to_string(self.state_dir.path().join("events.jsonl"));
            if log.unwrap_or_default().contains(words) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }
}

fn ownership() -> Request {
    Request::Ownership {
        volume: "data".into(),
    }
}

#[tokio::test]
async fn requests_are_answered_one_after_the_other() {
    let server = Server::start().await;
    let client = server.client("a", "office", "b");
    for _ in 0..3 {
        let (peer, response) = client.call_peer(ownership()).await.unwrap();
        assert_eq!(peer.boot_id, BootId([b'b'; 16]));
        let claim = Some(VolumeClaim::first(node("a")));
        assert_eq!(
            response,
            Response::OwnershipIs {
                claim,
                serving: false
            }
        );
    }
    let other = client
        .call(Request::Ownership {
            volume: "other".into(),
        })
        .await
        .unwrap_err();
    assert!(matches!(other, ControlError::Refused(reason) if reason == "no such volume"));
    // A refused request costs no connection.
    client.call(ownership()).await.unwrap();
    assert_eq!(server.handler.asked.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn the_wrong_peer_is_refused_in_words_on_both_sides() {
    let server = Server::start().await;
    for (name, cluster, words) in [
        ("a", "home", "is of the cluster `home`"),
        ("c", "office", "the node `c` is not the peer"),
        ("b", "office", "the node `b` is not the peer"),
    ] {
        let server = Server::start().await;
        let client = server.client(name, cluster, "b");
        let error = client.call(ownership()).await.unwrap_err();
        assert!(
            matches!(&error, ControlError::Refused(reason) if reason.contains(words)),
            "{error}"
        );
        assert!(server.logged(words).await, "{words}");
        assert_eq!(server.handler.asked.load(Ordering::SeqCst), 0);
    }
    // The client wants `d` and finds `b`: it refuses, and `b` reads why.
    let error = server
        .client("a", "office", "d")
        .call(ownership())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ControlError::WrongPeer(reason) if reason.contains("(d)")),
        "{error}"
    );
    assert!(
        server
            .logged("the node `b` is not the peer that a is configured for")
            .await
    );
    assert_eq!(server.handler.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn another_protocol_is_refused_with_the_remedy() {
    let server = Server::start().await;
    let mut identity = identity("a", "office", "b", server.address);
    identity.hello.protocol = 2;
    let client = ControlClient::new(Arc::new(identity), &node("b")).unwrap();
    let error = client.call(ownership()).await.unwrap_err().to_string();
    assert!(error.contains("same version on both nodes"), "{error}");
}

#[tokio::test]
async fn an_unknown_address_is_closed_without_a_word() {
    let elsewhere = SocketAddr::from(([192, 0, 2, 9], 7900));
    let server = Server::of(identity("b", "office", "a", elsewhere)).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0);
    assert!(server.logged("no configured node has this address").await);
}

/// Sends raw bytes after a good Hello (or none) and returns what comes back until the end.
async fn answer_to(server: &Server, hello: bool, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    if hello {
        let identity = identity("a", "office", "b", server.address);
        let message = serde_json::to_vec(&Message::Hello {
            hello: identity.hello,
        })
        .unwrap();
        stream
            .write_u32_le(u32::try_from(message.len()).unwrap())
            .await
            .unwrap();
        stream.write_all(&message).await.unwrap();
    }
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer));
    let _ = ended.await.expect("the server must close the connection");
    String::from_utf8_lossy(&answer).into_owned()
}

fn framed(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

#[tokio::test]
async fn hostile_frames_get_an_error_and_a_closed_connection() {
    let server = Server::start().await;
    let deep = "[".repeat(60_000);
    let unknown =
        r#"{"message":"request","id":1,"request":{"ask":"ownership","volume":"x","more":1}}"#;
    for (bytes, words) in [
        (u32::MAX.to_le_bytes().to_vec(), "the limit is 65536"),
        (
            [65_537u32.to_le_bytes().as_slice(), b"x"].concat(),
            "the limit is 65536",
        ),
        (framed(""), "no valid message"),
        (framed("GET / HTTP/1.1"), "no valid message"),
        (framed(&deep), "no valid message"),
        (framed(unknown), "unknown field `more`"),
        (
            framed(r#"{"message":"response","id":1,"response":{"answer":"epoch_begun"}}"#),
            "",
        ),
        (vec![0xff, 0xff], ""),
    ] {
        for hello in [true, false] {
            let answer = answer_to(&server, hello, &bytes).await;
            assert!(answer.contains(words), "{words}: {answer}");
        }
    }
    assert_eq!(server.handler.asked.load(Ordering::SeqCst), 0);
    server
        .client("a", "office", "b")
        .call(ownership())
        .await
        .unwrap();
}

#[tokio::test]
async fn more_connections_than_there_is_room_for_are_closed_and_room_comes_back() {
    let server = Server::start().await;
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    let client = server.client("a", "office", "b");
    client.call(ownership()).await.unwrap_err();
    assert!(server.logged("too many control connections").await);
    drop(silent);
    let mut answered = false;
    for _ in 0..20 {
        answered |= client.call(ownership()).await.is_ok();
    }
    assert!(answered);
}

#[tokio::test]
async fn the_client_comes_back_to_a_restarted_peer_and_backs_off_until_then() {
    let server = Server::start().await;
    let address = server.address;
    let client = server.client("a", "office", "b");
    client.call(ownership()).await.unwrap();
    drop(server);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let started = Instant::now();
    for _ in 0..4 {
        client.call(ownership()).await.unwrap_err();
    }
    // One call finds the old connection broken; the pauses after that are 100, 200, ... ms.
    assert!(
        started.elapsed() >= Duration::from_millis(290),
        "{:?}",
        started.elapsed()
    );
    let mut again = identity("b", "office", "a", anywhere());
    again.address = address;
    let _server = Server::of(again).await;
    let mut answered = false;
    for _ in 0..5 {
        answered = answered || client.call(ownership()).await.is_ok();
    }
    assert!(answered);
}

#[tokio::test]
async fn a_call_that_is_dropped_leaves_no_answer_for_the_next_one() {
    let server = Server::start().await;
    let client = server.client("a", "office", "b");
    client.call(ownership()).await.unwrap();
    let begin = Request::BeginEpoch {
        volume: "data".into(),
        epoch: Epoch(1),
    };
    let dropped = tokio::time::timeout(Duration::from_millis(50), client.call(begin));
    assert!(dropped.await.is_err());
    let response = client.call(ownership()).await.unwrap();
    assert!(matches!(response, Response::OwnershipIs { .. }));
}

#[tokio::test]
async fn an_unreachable_peer_is_named() {
    let identity = identity("a", "office", "b", SocketAddr::from(([127, 0, 0, 1], 1)));
    let client = ControlClient::new(Arc::new(identity.clone()), &node("b")).unwrap();
    let error = client.call(ownership()).await.unwrap_err().to_string();
    assert!(
        error.contains("peer b is not reached at 127.0.0.1:1"),
        "{error}"
    );
    assert!(ControlClient::new(Arc::new(identity), &node("z")).is_err());
}

#[tokio::test]
async fn a_taken_port_is_told() {
    let server = Server::start().await;
    let mut identity = identity("b", "office", "a", anywhere());
    identity.address = server.address;
    let events = Arc::new(EventLog::open(server.state_dir.path()).unwrap());
    let error = ControlServer::bind(Arc::new(identity), events)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("node.address"), "{error}");
}

#[test]
fn every_message_is_read_as_it_was_written() {
    let endpoint = Endpoint::Tcp {
        listen: String::new(),
        token: "00".into(),
        memory_bytes: 0,
    };
    let volume = || "data".to_owned();
    let requests = [
        Request::OpenRegion {
            volume: volume(),
            filesystem_uuid: [7; 16],
            region_bytes: u64::MAX,
            owner_endpoint: endpoint.clone(),
        },
        Request::BeginEpoch {
            volume: volume(),
            epoch: Epoch(u64::MAX),
        },
        Request::CloseEpoch {
            volume: volume(),
            epoch: Epoch(1),
            last_mirrored: Seq(2),
        },
        Request::OpenNodePage {
            endpoint: endpoint.clone(),
        },
        ownership(),
        Request::ChangeOwner {
            volume: volume(),
            claim: VolumeClaim::first(node("a")),
        },
    ];
    let tail = Box::new(Tail::of_epoch(Epoch(3), 4 << 20, RingPos(64)));
    let responses = [
        Response::RegionOpened {
            endpoint: endpoint.clone(),
            epoch: Epoch(3),
            state: RegionState::Open,
            tail: Some(tail),
        },
        Response::EpochBegun,
        Response::EpochClosed,
        Response::NodePageOpened { endpoint },
        Response::OwnershipIs {
            claim: None,
            serving: true,
        },
        Response::OwnerChanged,
        Response::Refused {
            reason: "no".into(),
        },
    ];
    let requests = requests.map(|request| Message::Request { id: 1, request });
    let responses = responses.map(|response| Message::Response { id: 1, response });
    for message in requests.into_iter().chain(responses) {
        let text = serde_json::to_string(&message).unwrap();
        assert_eq!(
            serde_json::from_str::<Message>(&text).unwrap(),
            message,
            "{text}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (mut near, far) = tokio::io::duplex(4096);
            near.write_all(&bytes).await.unwrap();
            near.shutdown().await.unwrap();
            let mut connection = Connection::new(far);
            let read = connection.read(Duration::from_secs(1), "speak").await;
            prop_assert!(read.is_err());
            Ok(())
        })?;
    }
}
