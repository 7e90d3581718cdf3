//! The node's pulse: heartbeats out, heartbeats in, and how the peer looks.
//!
//! Two threads, so that a link that hangs never delays the mailbox: one writes this node's slot and
//! judges the peer, the other writes heartbeats into the peer's memory. Neither ever waits for a
//! volume.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::clock::{duration, wall_ns};
use super::node::{Node, lock};
use crate::cluster::claim::BootId;
use crate::cluster::control::{Request, Response};
use crate::cluster::liveness::{Beat, Change, Limits, Liveness, Tidings, Told};
use crate::cluster::mailbox::{told_of, words_of};
use crate::events::Event;
use crate::link::{Body, Link, LinkError, Post, PostId};
use crate::region::layout::{HEARTBEAT_MAGIC, Heartbeat, Sealed};
use crate::status::{Protection, Role};
use zerocopy::IntoBytes;

/// A link that cannot be made is tried again after this long, growing to the longest: well below the
/// shortest time after which a peer that has just restarted would miss it.
const RETRY: Duration = Duration::from_millis(250);
const RETRY_LONGEST: Duration = Duration::from_secs(1);

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
    let mut liveness = Liveness::new(limits, began.elapsed())
        .with_volume_io_limit(node.config.cluster.volume_io_limit.map(duration));
    let mut mailbox_works = true;
    // Until the very end: an agent that closes its epochs before it ends is not silent.
    while !node.ended.is_given() {
        let all = node
            .config
            .volumes
            .iter()
            .map(|volume| volume.name.as_str());
        let served = all.clone().filter(|name| node.is_serving(name));
        node.ledger.note_volume_io(node.volume_io.age(served));
        node.tell_hanging_volumes(limits.dead_after);
        node.ledger.note_exposed(exposed(node));
        let own_volume_io = node.volume_io.age(all) < Some(limits.dead_after);
        let (written, look) = node.ledger.beat();
        let works = written.is_ok();
        if works != mailbox_works {
            let error = written.err().map(|error| error.to_string());
            node.events.record(Event::Mailbox { error });
            mailbox_works = works;
        }
        let now = began.elapsed();
        let heartbeat = read_heartbeat(node);
        let tidings = Tidings {
            link: heartbeat.map(|(_, told)| told).unwrap_or_default(),
            mailbox: node
                .ledger
                .peer_report()
                .map(|r| r.told)
                .unwrap_or_default(),
            own_volume_io,
        };
        let beat = heartbeat.map(|(beat, _)| beat);
        let changes = liveness.look_and_hear(now, beat, look, &tidings);
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
        let told = liveness.told();
        for peer in node.board.peers() {
            peer.set_state(liveness.state());
            peer.volume_io_age_ms.set(
                told.volume_io_age
                    .map_or(0, |age| age.as_millis().try_into().unwrap_or(u64::MAX)),
            );
            peer.restarting
                .store(!told.restart_within.is_zero(), Ordering::Relaxed);
            peer.heartbeat_age_ms
                .set(link_age.as_millis().try_into().unwrap_or(u64::MAX));
            peer.mailbox_age_ms
                .set(mailbox_age.as_millis().try_into().unwrap_or(u64::MAX));
        }
        node.ended.wait(interval);
    }
}

/// The volumes that this node owns and does not protect, whatever their epochs are.
fn exposed(node: &Node) -> BTreeSet<String> {
    let volumes = node.board.volumes();
    let exposed = volumes.filter(|volume| {
        let words = volume.words();
        words.role == Role::Owner && words.protection != Protection::Protected
    });
    exposed.map(|volume| volume.name.clone()).collect()
}

fn read_heartbeat(node: &Node) -> Option<(Beat, Told)> {
    let mut line = [0; size_of::<Heartbeat>()];
    lock(&node.page).memory.read_at(0, &mut line).ok()?;
    let heartbeat = Heartbeat::open(&line)?;
    let beat = Beat {
        boot_id: BootId(heartbeat.boot_id),
        counter: heartbeat.counter,
    };
    Some((beat, told_of(heartbeat.restart_ms, heartbeat.volume_io_ms)))
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
    while !node.ended.is_given() {
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
        node.ended.wait(retry);
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
    while !node.ended.is_given() {
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
        node.ended.wait(interval);
    }
    None
}

fn heartbeat(node: &Node, counter: u64) -> Heartbeat {
    let (restart_ms, volume_io_ms) = words_of(&node.ledger.told());
    Heartbeat {
        magic: HEARTBEAT_MAGIC,
        restart_ms,
        boot_id: node.boot_id.0,
        counter,
        time_ns: wall_ns(),
        volume_io_ms,
        reserved: [0; 4],
        crc32c: 0,
    }
    .seal()
}
