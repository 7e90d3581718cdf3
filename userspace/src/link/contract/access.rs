//! Who may write: one peer, of the same transport, with the key, and until it is revoked.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    BROKEN_WITHIN, Bench, Checked, MEMORY_BYTES, PATIENCE, UNTOUCHED, await_posts, post, told,
};
use crate::link::{Body, Endpoint, Link, LinkError, Post, PostId, encode_hex};

pub(super) fn mismatch(bench: &Bench<'_>) -> Checked {
    let other = |endpoint: &Endpoint| match endpoint {
        Endpoint::Tcp { .. } => Endpoint::Rdma {
            qp_number: 1,
            psn: 1,
            gid: encode_hex(&[0; 16]),
            mtu_bytes: 1024,
            rkey: 1,
            address: 4096,
            memory_bytes: 4096,
        },
        Endpoint::Rdma { .. } => Endpoint::Tcp {
            listen: "127.0.0.1:1".into(),
            token: "00".into(),
            memory_bytes: 1,
        },
    };
    let mut exposed = bench
        .transport
        .expose(Arc::clone(&bench.memory))
        .map_err(told)?;
    let outgoing = bench.transport.outgoing(None).map_err(told)?;
    let foreign = other(&exposed.endpoint());
    let accepted = exposed.accept(&foreign);
    let connected = outgoing.connect(&foreign).map(|_| ());
    match (accepted, connected) {
        (Err(LinkError::Mismatch { .. }), Err(LinkError::Mismatch { .. })) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

pub(super) fn one_writer(bench: &Bench<'_>) -> Checked {
    let (mut link, mut exposed) = bench.connect()?;
    let second = bench.transport.outgoing(None).map_err(told)?;
    match exposed.accept(&second.endpoint()) {
        Err(LinkError::Refused(_)) => {}
        other => return Err(format!("a second writer: {other:?}")),
    }
    // The second may try all the same; it must not write, and must not disturb the first.
    if let Ok(mut intruder) = second.connect(&exposed.endpoint()) {
        post(1, 100, b"intruder", Body::None, intruder.as_mut())?;
        expect_broken(intruder.as_mut())?;
    }
    post(2, 200, b"first", Body::None, link.as_mut())?;
    await_posts(link.as_mut(), 1)?;
    bench.expect(100, &[UNTOUCHED; 8])?;
    bench.expect(200, b"first\xee")
}

pub(super) fn forged(bench: &Bench<'_>) -> Checked {
    let mut exposed = bench
        .transport
        .expose(Arc::clone(&bench.memory))
        .map_err(told)?;
    let outgoing = bench.transport.outgoing(None).map_err(told)?;
    exposed.accept(&outgoing.endpoint()).map_err(told)?;
    let mut target = exposed.endpoint();
    match &mut target {
        Endpoint::Rdma { rkey, .. } => *rkey ^= 0x5500,
        Endpoint::Tcp { token, .. } => *token = encode_hex(&[0x5a; 16]),
    }
    match outgoing.connect(&target) {
        Err(LinkError::Refused(_)) => {}
        Err(other) => return Err(format!("{other:?}")),
        Ok(mut link) => {
            post(1, 0, b"forged", Body::None, link.as_mut())?;
            expect_broken(link.as_mut())?;
        }
    }
    bench.expect(0, &[UNTOUCHED; 64])
}

/// Polls until the link says that it is broken, and checks that it stays so.
fn expect_broken(link: &mut dyn Link) -> Checked {
    let began = Instant::now();
    let mut completed = Vec::new();
    while began.elapsed() < BROKEN_WITHIN {
        match link.poll(&mut completed) {
            Ok(()) if completed.is_empty() => {}
            Ok(()) => return Err("a write that must not land completed".into()),
            Err(LinkError::Broken(_)) => {
                let again = Post {
                    id: PostId(0),
                    offset: 0,
                    head: b"x",
                    body: Body::None,
                };
                return match (link.poll(&mut completed), link.post(&again)) {
                    (Err(LinkError::Broken(_)), Err(LinkError::Broken(_))) => Ok(()),
                    other => Err(format!("a broken link answered {other:?}")),
                };
            }
            Err(other) => return Err(format!("{other:?} instead of a broken link")),
        }
    }
    Err(format!("the link is not broken after {BROKEN_WITHIN:?}"))
}

pub(super) fn revoke(bench: &Bench<'_>) -> Checked {
    let (mut link, exposed) = bench.connect()?;
    let mut completed = Vec::new();
    let mut posted = 0_u64;
    let began = Instant::now();
    let mut exposed = Some(exposed);
    let mut frozen: Option<Vec<u8>> = None;
    loop {
        while link.room() > 0 {
            posted += 1;
            let bytes = posted.to_le_bytes().repeat(4096);
            let offset = (posted % 64) * 32_768;
            let post = Post {
                id: PostId(posted),
                offset,
                head: b"",
                body: Body::Bytes(&bytes),
            };
            if link.post(&post).is_err() {
                break;
            }
        }
        if posted > 300
            && let Some(exposed) = exposed.take()
        {
            exposed.revoke().map_err(told)?;
            frozen = Some(bench.placed(0, MEMORY_BYTES as usize)?);
        }
        match link.poll(&mut completed) {
            Ok(()) => {}
            Err(LinkError::Broken(_)) => break,
            Err(other) => return Err(format!("{other:?} instead of a broken link")),
        }
        if began.elapsed() > 2 * PATIENCE {
            return Err("the writer does not notice".into());
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    let frozen = frozen.ok_or("the link broke before revoke")?;
    bench.expect(0, &frozen)?;
    // The same memory can be exposed again, to a new link.
    let (mut link, _exposed) = bench.connect()?;
    post(1, 0, b"again", Body::None, link.as_mut())?;
    await_posts(link.as_mut(), 1)?;
    bench.expect(0, b"again")
}
