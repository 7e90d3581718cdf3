//! What every transport must do, as checks that run against a real one: the tests of this crate
//! run them over TCP on the loopback, virtual machines over an RDMA device.
//!
//! Both ends live in this process. Nothing here knows which transport it is given, but for the way
//! an endpoint is forged. It must never panic: what is wrong is told in an error.

mod access;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::rdma::probe_ring::ProbeRing;
use super::wait_readable;
use super::{
    Body, Exposed, HEAD_BYTES_MAX, Link, LinkError, POST_BYTES_MAX, Post, PostId, SharedMemory,
    Transport, WINDOW_POSTS,
};
use crate::ids::RingPos;

/// Bytes of the exposed memory.
const MEMORY_BYTES: u64 = 8 << 20;
/// Bytes of the ring: smaller than the memory, larger than the largest run.
const RING_BYTES: usize = 1 << 20;
/// What the memory holds before a check.
const UNTOUCHED: u8 = 0xee;
/// A completion that takes longer is missing.
const PATIENCE: Duration = Duration::from_secs(10);
/// A link whose peer is gone must be broken by then.
pub const BROKEN_WITHIN: Duration = Duration::from_secs(5);

type Checked = Result<(), String>;
type Check = fn(&Bench<'_>) -> Checked;
type Connected = (Box<dyn Link>, Box<dyn Exposed>);

/// The parts that a check plays with.
struct Bench<'a> {
    transport: &'a dyn Transport,
    ring: &'a Arc<ProbeRing>,
    memory: Arc<SharedMemory>,
}

/// Runs every check; the names of those that passed.
///
/// # Errors
/// The name of the first check that failed, and what it saw.
pub fn contract(
    transport: &dyn Transport,
    ring: &Arc<ProbeRing>,
) -> Result<Vec<&'static str>, String> {
    let checks: [(&str, Check); 10] = [
        (
            "each kind of body lands where it should, and nowhere else",
            bodies_land,
        ),
        (
            "the window is kept, and completions come in order",
            window_and_order,
        ),
        (
            "a completed post is in the peer's memory",
            completed_is_placed,
        ),
        (
            "random posts leave the memory as a model says",
            random_posts,
        ),
        (
            "posts that break a rule are refused, and the link goes on",
            rules,
        ),
        ("a sleeper is woken by a completion", wake_up),
        (
            "the other transport's endpoint is a mismatch",
            access::mismatch,
        ),
        ("memory takes one writer only", access::one_writer),
        ("a wrong key or token reaches nothing", access::forged),
        (
            "no write lands after revoke, and the writer notices",
            access::revoke,
        ),
    ];
    let mut passed = Vec::new();
    for (name, check) in checks {
        let made = SharedMemory::anonymous(MEMORY_BYTES).map_err(|error| error.to_string())?;
        let bench = Bench {
            transport,
            ring,
            memory: Arc::new(made),
        };
        fill(&bench)?;
        check(&bench).map_err(|why| format!("{name}: {why}"))?;
        passed.push(name);
    }
    Ok(passed)
}

/// Gives ring and memory known bytes.
fn fill(bench: &Bench<'_>) -> Checked {
    let mut numbers = Numbers(7);
    let ring: Vec<u8> = (0..RING_BYTES).map(|_| numbers.next() as u8).collect();
    bench.ring.fill().write_at(0, &ring).map_err(told)?;
    bench
        .memory
        .write_at(0, &vec![UNTOUCHED; MEMORY_BYTES as usize])
        .map_err(told)
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A small generator of numbers that only have to differ (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

impl Bench<'_> {
    fn connect(&self) -> Result<Connected, String> {
        let mut exposed = self
            .transport
            .expose(Arc::clone(&self.memory))
            .map_err(told)?;
        let outgoing = self
            .transport
            .outgoing(Some(self.ring.source()))
            .map_err(told)?;
        exposed.accept(&outgoing.endpoint()).map_err(told)?;
        let link = outgoing.connect(&exposed.endpoint()).map_err(told)?;
        Ok((link, exposed))
    }

    fn ring_bytes(&self, pos: u64, len: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; len];
        let start = (pos % RING_BYTES as u64) as usize;
        let first = len.min(RING_BYTES - start);
        let (left, right) = bytes.split_at_mut(first);
        self.ring.fill().read_at(start as u64, left).map_err(told)?;
        self.ring.fill().read_at(0, right).map_err(told)?;
        Ok(bytes)
    }

    fn placed(&self, offset: u64, len: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; len];
        self.memory.read_at(offset, &mut bytes).map_err(told)?;
        Ok(bytes)
    }

    fn expect(&self, offset: u64, wanted: &[u8]) -> Checked {
        let found = self.placed(offset, wanted.len())?;
        match found
            .iter()
            .zip(wanted)
            .position(|(found, wanted)| found != wanted)
        {
            None => Ok(()),
            Some(at) => Err(format!(
                "byte {at} of {} at {offset} is wrong",
                wanted.len()
            )),
        }
    }
}

/// Polls until `count` posts completed.
fn await_posts(link: &mut dyn Link, count: usize) -> Result<Vec<PostId>, String> {
    let mut completed = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while completed.len() < count {
        link.poll(&mut completed).map_err(told)?;
        if Instant::now() > deadline {
            return Err(format!("{} of {count} posts completed", completed.len()));
        }
    }
    Ok(completed)
}

fn post(id: u64, offset: u64, head: &[u8], body: Body<'_>, link: &mut dyn Link) -> Checked {
    link.post(&Post {
        id: PostId(id),
        offset,
        head,
        body,
    })
    .map_err(told)
}

fn bodies_land(bench: &Bench<'_>) -> Checked {
    let (mut link, _exposed) = bench.connect()?;
    let head = [0xa1; HEAD_BYTES_MAX];
    let mine = vec![0xb2; POST_BYTES_MAX - HEAD_BYTES_MAX];
    let wrap = 5 * RING_BYTES as u64 - 1000;
    let most = (POST_BYTES_MAX - HEAD_BYTES_MAX) as u32;
    let cases: [(&[u8], Body<'_>); 9] = [
        (&head, Body::None),
        (&head[..1], Body::None),
        (&head, Body::Bytes(b"x")),
        (&[], Body::Bytes(&mine[..4097])),
        (&head, Body::Bytes(&mine)),
        (
            &head,
            Body::Ring {
                pos: RingPos(64),
                len: 4096,
            },
        ),
        (
            &head,
            Body::Ring {
                pos: RingPos(wrap),
                len: 4096,
            },
        ),
        (
            &[],
            Body::Ring {
                pos: RingPos(wrap),
                len: 1001,
            },
        ),
        (
            &head,
            Body::Ring {
                pos: RingPos(wrap),
                len: most,
            },
        ),
    ];
    let mut offset = 3;
    for (id, (head, body)) in (0..).zip(cases) {
        let bytes = match body {
            Body::None => Vec::new(),
            Body::Bytes(bytes) => bytes.to_vec(),
            Body::Ring { pos, len } => bench.ring_bytes(pos.0, len as usize)?,
        };
        let whole = [&[UNTOUCHED; 3], head, &bytes, &[UNTOUCHED; 5]].concat();
        post(id, offset, head, body, link.as_mut())?;
        let completed = await_posts(link.as_mut(), 1)?;
        if completed != [PostId(id)] {
            return Err(format!("post {id} completed as {completed:?}"));
        }
        bench.expect(offset - 3, &whole)?;
        offset += whole.len() as u64;
    }
    // The last bytes of the memory belong to it, too.
    post(99, MEMORY_BYTES - 64, &head, Body::None, link.as_mut())?;
    await_posts(link.as_mut(), 1)?;
    bench.expect(MEMORY_BYTES - 64, &head)
}

fn window_and_order(bench: &Bench<'_>) -> Checked {
    let (mut link, _exposed) = bench.connect()?;
    let mut numbers = Numbers(11);
    let mut wanted = Vec::new();
    for _ in 0..20 {
        let mut round = Vec::new();
        for slot in 0..WINDOW_POSTS as u64 {
            if link.room() != WINDOW_POSTS - slot as usize {
                return Err(format!("room is {} after {slot} posts", link.room()));
            }
            let id = numbers.next();
            let len = 1 + numbers.below(60_000) as u32;
            let body = Body::Ring {
                pos: RingPos(numbers.next() >> 8),
                len,
            };
            post(id, slot * 65_536, b"", body, link.as_mut())?;
            round.push(PostId(id));
        }
        let over = Post {
            id: PostId(0),
            offset: 0,
            head: b"x",
            body: Body::None,
        };
        if !matches!(link.post(&over), Err(LinkError::Refused(_))) {
            return Err("a post over the window was taken".into());
        }
        wanted = await_posts(link.as_mut(), WINDOW_POSTS)?;
        if wanted != round {
            return Err("completions are not in the order of posting".into());
        }
    }
    match (link.room(), wanted.len()) {
        (WINDOW_POSTS, WINDOW_POSTS) => Ok(()),
        (room, _) => Err(format!("room is {room} after everything completed")),
    }
}

fn completed_is_placed(bench: &Bench<'_>) -> Checked {
    let (mut link, _exposed) = bench.connect()?;
    let mut completed = Vec::new();
    let mut posted = 0_u64;
    let mut seen = 0_u64;
    let deadline = Instant::now() + PATIENCE;
    while seen < 400 {
        while link.room() > 0 && posted < 400 {
            posted += 1;
            // The same place each time: later posts overwrite earlier ones, in order.
            let bytes = posted.to_le_bytes().repeat(512);
            post(posted, 4096, b"", Body::Bytes(&bytes), link.as_mut())?;
        }
        completed.clear();
        link.poll(&mut completed).map_err(told)?;
        if let Some(PostId(newest)) = completed.last() {
            seen = *newest;
            let bytes = bench.placed(4096, 4096)?;
            for word in bytes.as_chunks::<8>().0 {
                let found = u64::from_le_bytes(*word);
                if found < seen || found > posted {
                    return Err(format!(
                        "post {seen} completed while the memory held {found}"
                    ));
                }
            }
        }
        if Instant::now() > deadline {
            return Err(format!("{seen} of 400 posts completed"));
        }
    }
    Ok(())
}

fn random_posts(bench: &Bench<'_>) -> Checked {
    let (mut link, _exposed) = bench.connect()?;
    let mut model = vec![UNTOUCHED; MEMORY_BYTES as usize];
    let mut numbers = Numbers(13);
    let mut completed = Vec::new();
    let deadline = Instant::now() + 6 * PATIENCE;
    for id in 0..600 {
        while link.room() == 0 {
            link.poll(&mut completed).map_err(told)?;
            if Instant::now() > deadline {
                return Err(format!("{} of 600 posts completed", completed.len()));
            }
        }
        let head = vec![id as u8; numbers.below(HEAD_BYTES_MAX as u64 + 1) as usize];
        let most = 2 << numbers.below(17);
        let len = (1 + numbers.below(most)) as u32;
        let pos = RingPos(numbers.next() >> 8);
        let offset = numbers.below(MEMORY_BYTES - POST_BYTES_MAX as u64);
        let bytes = [head.clone(), bench.ring_bytes(pos.0, len as usize)?].concat();
        post(id, offset, &head, Body::Ring { pos, len }, link.as_mut())?;
        let place = model
            .get_mut(offset as usize..)
            .and_then(|rest| rest.get_mut(..bytes.len()));
        place
            .ok_or("the model is too small")?
            .copy_from_slice(&bytes);
    }
    let rest = 600 - completed.len();
    await_posts(link.as_mut(), rest)?;
    bench.expect(0, &model)
}

fn rules(bench: &Bench<'_>) -> Checked {
    let (mut link, _exposed) = bench.connect()?;
    let long = vec![1; POST_BYTES_MAX + 1];
    let run = |pos, len| Body::Ring {
        pos: RingPos(pos),
        len,
    };
    let cases: [(&str, u64, &[u8], Body<'_>); 7] = [
        ("an empty post", 0, b"", Body::None),
        ("a long head", 0, &long[..=HEAD_BYTES_MAX], Body::None),
        ("a long body", 0, b"", Body::Bytes(&long)),
        ("a long run", 0, b"", run(0, POST_BYTES_MAX as u32 + 1)),
        (
            "one byte over the end",
            MEMORY_BYTES - 3,
            b"1234",
            Body::None,
        ),
        ("an offset that wraps", u64::MAX - 1, b"1234", Body::None),
        ("an endless run", 0, b"h", run(0, u32::MAX)),
    ];
    for (name, offset, head, body) in cases {
        match link.post(&Post {
            id: PostId(1),
            offset,
            head,
            body,
        }) {
            Err(LinkError::Refused(_)) => {}
            other => return Err(format!("{name}: {other:?}")),
        }
    }
    post(2, 0, b"good", Body::None, link.as_mut())?;
    await_posts(link.as_mut(), 1)?;
    bench.expect(0, b"good\xee")?;
    let (mut ringless, _other) = {
        let mut exposed = bench
            .transport
            .expose(Arc::clone(&bench.memory))
            .map_err(told)?;
        let outgoing = bench.transport.outgoing(None).map_err(told)?;
        exposed.accept(&outgoing.endpoint()).map_err(told)?;
        (
            outgoing.connect(&exposed.endpoint()).map_err(told)?,
            exposed,
        )
    };
    let post = Post {
        id: PostId(3),
        offset: 0,
        head: b"",
        body: run(0, 64),
    };
    match ringless.post(&post) {
        Err(LinkError::Refused(_)) if !ringless.zero_copy() => Ok(()),
        other => Err(format!("ring bytes without a ring: {other:?}")),
    }
}

fn wake_up(bench: &Bench<'_>) -> Checked {
    let (mut link, _exposed) = bench.connect()?;
    let mut completed = Vec::new();
    let mut woken = false;
    for id in 0..200 {
        // A large post every now and then: more than a socket buffer takes at once.
        let len = if id % 10 == 0 { 200_000 } else { 64 };
        for slot in 0..(1 + id % 16) {
            let body = Body::Ring {
                pos: RingPos(64),
                len,
            };
            post(id, slot * 200_000, b"", body, link.as_mut())?;
        }
        while link.room() < WINDOW_POSTS {
            link.arm(woken).map_err(told)?;
            link.poll(&mut completed).map_err(told)?;
            woken = false;
            if link.room() == WINDOW_POSTS {
                break;
            }
            let slept = Instant::now();
            woken = wait_readable(link.as_ref(), Duration::from_secs(3)).map_err(told)?;
            if !woken {
                return Err(format!("nobody woke the sleeper for {:?}", slept.elapsed()));
            }
        }
    }
    // With nothing in flight an armed descriptor stays quiet, else a sleeper would spin.
    link.arm(woken).map_err(told)?;
    link.poll(&mut completed).map_err(told)?;
    let woken = wait_readable(link.as_ref(), Duration::from_millis(100)).map_err(told)?;
    link.arm(woken).map_err(told)?;
    match wait_readable(link.as_ref(), Duration::from_millis(200)).map_err(told)? {
        false => Ok(()),
        true => Err("an idle link keeps waking its sleeper".into()),
    }
}
