//! The node's pulse: heartbeats out, heartbeats in, and how the peer looks.
//!
//! Two threads, so that a link that hangs never delays the mailbox: one writes this node's slot and
//! judges the peer, the other writes heartbeats into the peer's memory. Neither ever waits for a
//! volume.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::clock::{duration, wall_ns};
use super::node::{Node, lock};
use crate::cluster::claim::BootId;
use crate::cluster::control::{Request, Response};
use crate::cluster::liveness::{Beat, Change, Limits, Liveness};
use crate::events::Event;
use crate::link::{Body, Link, LinkError, Post, PostId};
use crate::region::layout::{HEARTBEAT_MAGIC, Heartbeat, Sealed};
use zerocopy::IntoBytes;

/// A link that cannot be made is tried again after this long, growing to the longest.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_LONGEST: Duration = Duration::from_secs(5);

/// Starts both threads.
///
/// # Errors
/// When a thread cannot be started.
pub fn start(node: &Arc<Node>) -> std::io::Result<()> {
    let shared = Arc::clone(node);
    std::thread::Builder::new()
        .name("pulse".into())
        .spawn(move || mailbox_pulse(&shared))?;
    let shared = Arc::clone(node);
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || link_pulse(&shared))?;
    Ok(())
}

fn mailbox_pulse(node: &Node) {
    let interval = duration(node.config.cluster.heartbeat_interval);
    let limits = Limits {
        heartbeat_interval: interval,
        dead_after: duration(node.config.cluster.dead_after),
    };
    let began = Instant::now();
    let mut liveness = Liveness::new(limits, began.elapsed());
    let mut mailbox_works = true;
    while !node.stopping() {
        let (written, look) = node.ledger.beat();
        let works = written.is_ok();
        if works != mailbox_works {
            let error = written.err().map(|error| error.to_string());
            node.events.record(Event::Mailbox { error });
            mailbox_works = works;
        }
        let now = began.elapsed();
        let changes = liveness.look(now, read_heartbeat(node), look);
        for change in changes {
            report(node, change);
        }
        let (link_age, mailbox_age) = liveness.ages(now);
        let mut view = lock(&node.peer_view);
        view.state = liveness.state();
        view.silent_for = link_age.min(mailbox_age);
        view.boot_id = liveness.boot_id();
        view.is_silent = liveness.is_silent();
        drop(view);
        for peer in node.board.peers() {
            peer.set_state(liveness.state());
            peer.heartbeat_age_ms
                .set(link_age.as_millis().try_into().unwrap_or(u64::MAX));
            peer.mailbox_age_ms
                .set(mailbox_age.as_millis().try_into().unwrap_or(u64::MAX));
        }
        node.pause(interval);
    }
}

fn read_heartbeat(node: &Node) -> Option<Beat> {
    let mut line = [0; size_of::<Heartbeat>()];
    lock(&node.page).memory.read_at(0, &mut line).ok()?;
    let heartbeat = Heartbeat::open(&line)?;
    Some(Beat {
        boot_id: BootId(heartbeat.boot_id),
        counter: heartbeat.counter,
    })
}

fn report(node: &Node, change: Change) {
    let event = match change {
        Change::State { from, to } => Event::PeerChanged {
            node: node.peer.clone(),
            from,
            to,
        },
        Change::Rebooted { to, .. } => Event::PeerRebooted {
            node: node.peer.clone(),
            boot_id: to.to_string(),
        },
        Change::OwnStall { gap } => Event::OwnStall {
            gap_ms: gap.as_millis().try_into().unwrap_or(u64::MAX),
        },
    };
    node.events.record(event);
}

/// Heartbeats into the peer's memory, over a link of their own.
fn link_pulse(node: &Node) {
    let interval = duration(node.config.cluster.heartbeat_interval);
    let mut retry = RETRY;
    let mut counter = 0;
    while !node.stopping() {
        match connect(node) {
            Ok(mut link) => {
                retry = RETRY;
                let error = beat_until_broken(node, &mut *link, &mut counter, interval);
                if let Some(error) = error {
                    tracing::info!(peer = %node.peer, %error, "heartbeats over the link stopped");
                }
            }
            Err(error) => {
                tracing::debug!(peer = %node.peer, %error, "no link for heartbeats");
                retry = (retry * 2).min(RETRY_LONGEST);
            }
        }
        node.pause(retry);
    }
}

fn connect(node: &Node) -> anyhow::Result<Box<dyn Link>> {
    let outgoing = node.transport.outgoing(None)?;
    let request = Request::OpenNodePage {
        endpoint: outgoing.endpoint(),
    };
    match node.ask(request)? {
        Response::NodePageOpened { endpoint } => Ok(outgoing.connect(&endpoint)?),
        other => anyhow::bail!("an unexpected answer: {other:?}"),
    }
}

fn beat_until_broken(
    node: &Node,
    link: &mut dyn Link,
    counter: &mut u64,
    interval: Duration,
) -> Option<LinkError> {
    let mut completed = Vec::new();
    while !node.stopping() {
        if let Err(error) = link.poll(&mut completed) {
            return Some(error);
        }
        completed.clear();
        if link.room() > 0 {
            *counter += 1;
            let line = heartbeat(node, *counter);
            let post = Post {
                id: PostId(*counter),
                offset: 0,
                head: line.as_bytes(),
                body: Body::None,
            };
            if let Err(error) = link.post(&post) {
                return Some(error);
            }
        }
        // A transport that sends when it is turned is turned once more.
        if let Err(error) = link.poll(&mut completed) {
            return Some(error);
        }
        node.pause(interval);
    }
    None
}

fn heartbeat(node: &Node, counter: u64) -> Heartbeat {
    Heartbeat {
        magic: HEARTBEAT_MAGIC,
        reserved: 0,
        boot_id: node.boot_id.0,
        counter,
        time_ns: wall_ns(),
        reserved2: [0; 5],
        crc32c: 0,
    }
    .seal()
}
