use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::{FrameHeader, MAGIC, TcpTransport};
use crate::link::contract::contract;
use crate::link::rdma::probe_ring::ProbeRing;
use crate::link::{
    Body, Endpoint, Exposed, Link, LinkError, POST_BYTES_MAX, Post, PostId, SharedMemory,
    Transport, decode_hex, encode_hex,
};

const MEMORY_BYTES: u64 = 1 << 20;

fn transport() -> TcpTransport {
    TcpTransport::new(Ipv4Addr::LOCALHOST.into())
}

fn writer_endpoint() -> Endpoint {
    Endpoint::Tcp {
        listen: String::new(),
        token: String::new(),
        memory_bytes: 0,
    }
}

/// Exposed memory full of 0xee that a writer is let into, and what the writer needs.
fn exposed() -> (Arc<SharedMemory>, Box<dyn Exposed>, String, [u8; 16]) {
    let memory = Arc::new(SharedMemory::anonymous(MEMORY_BYTES).unwrap());
    memory
        .write_at(0, &vec![0xee; MEMORY_BYTES as usize])
        .unwrap();
    let mut exposed = transport().expose(Arc::clone(&memory)).unwrap();
    exposed.accept(&writer_endpoint()).unwrap();
    let Endpoint::Tcp {
        listen,
        token,
        memory_bytes,
    } = exposed.endpoint()
    else {
        panic!()
    };
    assert_eq!(memory_bytes, MEMORY_BYTES);
    (memory, exposed, listen, decode_hex(&token).unwrap())
}

/// A hand-made writer that was let in.
fn raw_writer(listen: &str, token: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(listen).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream.write_all(&[&MAGIC, token].concat()).unwrap();
    let mut welcome = [0; 8];
    stream.read_exact(&mut welcome).unwrap();
    assert_eq!(welcome, MAGIC);
    stream
}

fn frame(offset: u64, number: u64, len: u32, bytes: &[u8]) -> Vec<u8> {
    let header = FrameHeader {
        offset: offset.into(),
        number: number.into(),
        len: len.into(),
    };
    [header.as_bytes(), bytes].concat()
}

/// Whether the other side has closed; `Err` if it does not within the stream's timeout.
fn is_closed(stream: &mut TcpStream) -> Result<(), String> {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn untouched(memory: &SharedMemory, from: u64) {
    let mut bytes = vec![0; (MEMORY_BYTES - from) as usize];
    memory.read_at(from, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0xee));
}

fn await_broken(link: &mut dyn Link, within: Duration) -> (Duration, String) {
    let began = Instant::now();
    let mut completed = Vec::new();
    loop {
        match link.poll(&mut completed) {
            Err(LinkError::Broken(why)) => return (began.elapsed(), why),
            Err(other) => panic!("{other}"),
            Ok(()) => assert!(began.elapsed() < within, "not broken after {within:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_contract_holds() {
    let ring = ProbeRing::of_ordinary_pages(1 << 20).unwrap();
    let passed = contract(&transport(), &ring).unwrap();
    assert_eq!(passed.len(), 10);
}

#[test]
fn a_hostile_frame_closes_the_connection_and_places_nothing() {
    let most = POST_BYTES_MAX as u32;
    let cases = [
        (
            "a byte over the end",
            frame(MEMORY_BYTES - 7, 1, 8, b"12345678"),
        ),
        ("far outside", frame(1 << 40, 1, 8, b"12345678")),
        (
            "an offset that wraps",
            frame(u64::MAX - 3, 1, 8, b"12345678"),
        ),
        ("no bytes", frame(0, 1, 0, b"")),
        ("too many bytes", frame(0, 1, most + 1, &[1; 100])),
        ("endless", frame(0, 1, u32::MAX, &[1; 100])),
        ("a number that was not due", frame(0, 2, 8, b"12345678")),
        ("number zero", frame(0, 0, 8, b"12345678")),
        ("noise", vec![0xff; 4096]),
    ];
    for (name, bytes) in cases {
        let (memory, exposed, listen, token) = exposed();
        let mut stream = raw_writer(&listen, &token);
        stream.write_all(&bytes).unwrap();
        is_closed(&mut stream).unwrap_or_else(|why| panic!("{name}: {why}"));
        untouched(&memory, 0);
        exposed.revoke().unwrap();
    }
}

#[test]
fn a_writer_that_hangs_up_in_mid_frame_is_not_acknowledged() {
    let (memory, exposed, listen, token) = exposed();
    let mut stream = raw_writer(&listen, &token);
    stream.write_all(&frame(0, 1, 1000, &[7; 999])).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    is_closed(&mut stream).unwrap();
    untouched(&memory, 999);
    exposed.revoke().unwrap();
}

#[test]
fn acknowledgements_come_after_placing_and_name_the_newest_frame() {
    let (memory, _exposed, listen, token) = exposed();
    let mut stream = raw_writer(&listen, &token);
    for number in 1..=50_u64 {
        let bytes = number.to_le_bytes();
        // In two halves: a frame that is not whole must not be acknowledged.
        let whole = frame(number * 8, number, 8, &bytes);
        stream.write_all(&whole[..24]).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(10)))
            .unwrap();
        let mut placed = [0; 8];
        assert!(
            stream.read(&mut placed).is_err(),
            "frame {number} was acknowledged by halves"
        );
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream.write_all(&whole[24..]).unwrap();
        stream.read_exact(&mut placed).unwrap();
        assert_eq!(u64::from_le_bytes(placed), number);
        let mut found = [0; 8];
        memory.read_at(number * 8, &mut found).unwrap();
        assert_eq!(found, bytes);
    }
}

#[test]
fn a_wrong_greeting_is_refused_and_the_right_writer_still_gets_in() {
    let (memory, _exposed, listen, token) = exposed();
    let mut near = token;
    near[15] ^= 1;
    let wrong: [&[u8]; 4] = [
        &[&MAGIC[..], &near].concat(),
        &[&MAGIC[..], &[0; 16]].concat(),
        &[b"GET / HT", &token[..]].concat(),
        &[0; 24],
    ];
    for hello in wrong {
        let mut stream = TcpStream::connect(&listen).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream.write_all(hello).unwrap();
        is_closed(&mut stream).unwrap();
    }
    // One that says nothing only delays the others.
    let _silent = TcpStream::connect(&listen).unwrap();
    let _stream = raw_writer(&listen, &token);
    assert!(
        TcpStream::connect(&listen).is_err(),
        "the port stays open beside the writer"
    );
    untouched(&memory, 0);
}

#[test]
fn nobody_is_let_in_before_accept() {
    let memory = Arc::new(SharedMemory::anonymous(4096).unwrap());
    let exposed = transport().expose(memory).unwrap();
    let outgoing = transport().outgoing(None).unwrap();
    let began = Instant::now();
    let connected = outgoing.connect(&exposed.endpoint()).map(|_| ());
    assert!(
        matches!(connected, Err(LinkError::Refused(_))),
        "{connected:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(6));
    exposed.revoke().unwrap();
}

#[test]
fn bytes_on_the_way_at_revoke_do_not_land() {
    for _ in 0..20 {
        let (memory, exposed, listen, token) = exposed();
        let mut stream = raw_writer(&listen, &token);
        // Half a frame: the receiver is in the middle of placing it when it is revoked.
        stream
            .write_all(&frame(0, 1, 200_000, &[7; 100_000]))
            .unwrap();
        exposed.revoke().unwrap();
        let mut before = vec![0; MEMORY_BYTES as usize];
        memory.read_at(0, &mut before).unwrap();
        // Either the system refuses the rest, or it takes it and nobody reads it.
        let _ = stream.write_all(&[8; 100_000]);
        let _ = stream.write_all(&frame(0, 2, 8, b"12345678"));
        std::thread::sleep(Duration::from_millis(10));
        let mut after = vec![0; MEMORY_BYTES as usize];
        memory.read_at(0, &mut after).unwrap();
        assert!(before == after);
    }
}

#[test]
fn a_peer_that_closes_breaks_the_link_at_once() {
    let (_memory, exposed, listen, token) = exposed();
    let target = Endpoint::Tcp {
        listen,
        token: encode_hex(&token),
        memory_bytes: MEMORY_BYTES,
    };
    let mut link = transport()
        .outgoing(None)
        .unwrap()
        .connect(&target)
        .unwrap();
    drop(exposed);
    let (after, why) = await_broken(link.as_mut(), Duration::from_secs(2));
    assert!(after < Duration::from_secs(1), "{after:?} {why}");
}

/// A peer of the writer under test, in the hand of the test.
fn fake_peer(play: impl FnOnce(TcpStream) + Send + 'static) -> Box<dyn Link> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; 24];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&MAGIC).unwrap();
        play(stream);
    });
    let token = encode_hex(&[1; 16]);
    let target = Endpoint::Tcp {
        listen,
        token,
        memory_bytes: MEMORY_BYTES,
    };
    transport()
        .outgoing(None)
        .unwrap()
        .connect(&target)
        .unwrap()
}

#[test]
fn an_acknowledgement_of_what_is_not_in_flight_breaks_the_link() {
    for lie in [0_u64, 2, u64::MAX] {
        let mut link = fake_peer(move |mut stream| {
            let mut frame = [0; 28];
            stream.read_exact(&mut frame).unwrap();
            stream.write_all(&lie.to_le_bytes()).unwrap();
            let _ = stream.read(&mut frame);
        });
        let post = Post {
            id: PostId(5),
            offset: 0,
            head: b"12345678",
            body: Body::None,
        };
        link.post(&post).unwrap();
        let (_, why) = await_broken(link.as_mut(), Duration::from_secs(2));
        assert!(why.contains(&lie.to_string()), "{why}");
    }
}

#[test]
fn a_peer_that_stops_reading_breaks_the_link_in_about_three_seconds() {
    // Its system takes no more bytes once its buffers are full, as when its machine hangs.
    let mut link = fake_peer(|stream| {
        std::thread::sleep(Duration::from_secs(20));
        drop(stream);
    });
    let bytes = vec![1; POST_BYTES_MAX];
    while link.room() > 0 {
        let post = Post {
            id: PostId(0),
            offset: 0,
            head: b"",
            body: Body::Bytes(&bytes),
        };
        link.post(&post).unwrap();
    }
    let (after, why) = await_broken(link.as_mut(), Duration::from_secs(10));
    assert!(after > Duration::from_secs(2), "{after:?} {why}");
    assert!(why.contains("does not answer"), "{why}");
}
