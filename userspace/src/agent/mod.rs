//! The agent: one process a node that protects its volumes and mirrors its peer's.
//!
//! Threads: `pulse` and `heartbeat` (signs of life), one keeper a volume (what this node is to it,
//! and the mirroring while it owns it), one checkpoint thread a volume; control port, metrics and
//! the local socket on a small async runtime. Nothing here knows a verb or an eBPF program.

mod checkpointer;
mod clock;
mod closer;
mod door;
mod draining;
pub mod exclusive;
mod filesystem_health;
pub mod filesystem_uuid;
mod filler;
mod fitness;
mod gate_probe;
mod gatekeeper;
mod handler;
mod keeper;
mod ledger;
mod mapper;
mod mending;
pub mod merge;
mod node;
mod owner;
mod preflight;
mod pulse;
mod pump;
mod region_host;
mod relink;
mod reserve;
mod successor;
mod unmounted;
mod volume_io;
mod watch;

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::admin::{self, Answer, Responder};
use crate::board::Board;
use crate::cluster::claim::BootId;
use crate::cluster::control::{ControlClient, ControlServer, Identity};
use crate::cluster::mailbox::{AgentState, RESTART_LIMIT};
use crate::cluster::mounts::{self, MountState};
use crate::cluster::questions::NotTaken;
use crate::config::{Config, TransportKind, Volume};
use crate::events::{Event, EventLog};
use crate::ids::NodeId;
use crate::link::{SharedMemory, open_transport};
use crate::metrics;
use crate::status::PeerState;
use clock::duration;
use exclusive::VolumeLock;
pub use gate_probe::write_and_fsync;
use handler::Handler;
use keeper::Keeper;
use ledger::Ledger;
use node::{Node, NodePage, PeerView, StopOrder, lock};
use region_host::RegionHost;
use volume_io::VolumeIo;

/// Bytes of the memory that the peer's heartbeats arrive in.
const NODE_PAGE_BYTES: u64 = 4096;
/// Longest wait for the volumes' orderly end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stdout().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_target(false)
        .init();
}

/// The host's name, which is this node's name unless one is given.
pub fn host_name() -> String {
    nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Runs the agent until it is told to stop.
///
/// # Errors
/// What kept it from starting, with the remedy.
pub fn run(config_path: &Path, node: Option<&str>) -> anyhow::Result<()> {
    start_logging();
    let config = Config::load(config_path)?;
    let own = config.this_node(node, &host_name())?;
    for warning in config.validate(&own)? {
        tracing::warn!("{warning}");
    }
    let locks: Vec<_> = (config.volumes.iter())
        .map(|volume| VolumeLock::take(&volume.name))
        .collect::<Result<_, _>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(run_on(config, own));
    runtime.shutdown_timeout(Duration::from_secs(1));
    drop(locks);
    result
}

async fn run_on(config: Config, own: NodeId) -> anyhow::Result<()> {
    let node = build(config, own)?;
    preflight::check(&node)?;
    node.events.record(Event::AgentStarted {
        node: node.id.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: node.boot_id.to_string(),
    });
    let responder = Arc::new(Person(Arc::clone(&node)));
    admin::serve(&node.config.cluster.run_dir, responder).await?;
    let registry = metrics::registry(Arc::clone(&node.board));
    metrics::serve(node.config.cluster.metrics_listen, registry).await?;
    let identity = identity(&node.config, &node.id, node.boot_id)?;
    let server = ControlServer::bind(identity, Arc::clone(&node.events)).await?;
    tokio::spawn(server.serve(Arc::new(Handler(Arc::clone(&node)))));
    let keepers = start_threads(&node)?;
    wait_for_the_end(&node).await?;
    if node.restarting() {
        tracing::info!("stopping for a restart: what runs is left to the next agent");
    } else {
        tracing::info!("stopping: epochs are closed and checkpoints proven first");
    }
    node.stop.give();
    let ended = tokio::task::spawn_blocking(move || {
        keepers.into_iter().for_each(|keeper| drop(keeper.join()));
    });
    if tokio::time::timeout(STOP_LIMIT, ended).await.is_err() {
        tracing::error!("a volume did not come to its orderly end in time");
    }
    if node.restarting() {
        // Heard by both paths once more, so that the time begins now.
        tokio::time::sleep(duration(node.config.cluster.heartbeat_interval) * 2).await;
    } else {
        node.ledger.set_state(AgentState::Stopped)?;
    }
    node.ended.give();
    let reason = if node.restarting() {
        "it restarts: what is written meanwhile is captured, and mirrored once the next agent runs"
    } else {
        "it was told to"
    };
    node.events.record(Event::AgentStopped {
        reason: reason.to_owned(),
    });
    Ok(())
}

async fn wait_for_the_end(node: &Node) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = node.told_to_end.notified() => {}
    }
    Ok(())
}

fn identity(config: &Config, own: &NodeId, boot_id: BootId) -> anyhow::Result<Arc<Identity>> {
    let identity = Identity::new(config, own, boot_id);
    Ok(Arc::new(identity.with_context(|| {
        format!("{own} is no node of the configuration")
    })?))
}

fn build(config: Config, own: NodeId) -> anyhow::Result<Arc<Node>> {
    let boot_id = BootId::of_this_machine().context("reading this boot's id")?;
    let cluster = &config.cluster;
    let address = config
        .nodes
        .iter()
        .find(|n| n.name == own)
        .map(|n| n.address);
    let address = address.context("this node has no address")?;
    let names: Vec<NodeId> = config.nodes.iter().map(|n| n.name.clone()).collect();
    let peer = names
        .iter()
        .find(|n| **n != own)
        .cloned()
        .context("there is no peer")?;
    let events = Arc::new(
        EventLog::open(&cluster.state_dir)
            .with_context(|| format!("the event log in {}", cluster.state_dir.display()))?,
    );
    let transport = open_transport(
        cluster.transport,
        cluster.rdma_device.as_deref(),
        address.ip(),
    )?;
    let ledger = Ledger::open(
        &cluster.mailbox,
        &cluster.state_dir,
        &cluster.name,
        &names,
        &own,
        boot_id,
    )?;
    let link = match cluster.transport {
        TransportKind::Rdma => "rdma",
        TransportKind::Tcp => "tcp",
    };
    let shown: Vec<_> = config
        .volumes
        .iter()
        .map(|v| (v.name.clone(), link))
        .collect();
    let board = Arc::new(Board::new(own.clone(), std::slice::from_ref(&peer), &shown));
    board.tell(&events);
    for volume in &config.volumes {
        if let (Some(directory), Some(board)) = (&volume.directory, board.volume(&volume.name)) {
            // It is set here only.
            let _ = board.directory.set(directory.display().to_string());
        }
    }
    let regions: BTreeMap<_, _> = config
        .volumes
        .iter()
        .map(|volume| {
            let host = RegionHost::new(&cluster.name, volume, &own, Arc::clone(&transport));
            (volume.name.clone(), Mutex::new(host))
        })
        .collect();
    let control = ControlClient::new(identity(&config, &own, boot_id)?, &peer)?;
    let memory = Arc::new(SharedMemory::anonymous(NODE_PAGE_BYTES)?);
    Ok(Arc::new(Node {
        id: own,
        peer,
        boot_id,
        board,
        ledger,
        events,
        transport,
        control,
        regions,
        page: Mutex::new(NodePage {
            memory,
            exposed: None,
        }),
        peer_view: Mutex::new(PeerView {
            state: PeerState::Unknown,
            silent_for: Duration::ZERO,
            boot_id: None,
            is_silent: false,
        }),
        serving: Mutex::new(BTreeMap::new()),
        questions: Mutex::default(),
        began: Instant::now(),
        stop: StopOrder::default(),
        ended: StopOrder::default(),
        restarting: AtomicBool::new(false),
        volume_io: VolumeIo::default(),
        told_to_end: Notify::new(),
        runtime: tokio::runtime::Handle::current(),
        config,
    }))
}

/// Before the first heartbeat, which overwrites this node's slot, the words of before are carried
/// over into it.
fn start_threads(node: &Arc<Node>) -> anyhow::Result<Vec<JoinHandle<()>>> {
    for volume in &node.config.volumes {
        refuse_a_mount_nobody_asked_for(node, volume)?;
        node.ledger.carry_over(&volume.name, &volume.owner);
    }
    node.ledger.set_state(AgentState::Running)?;
    volume_io::start(node)?;
    pulse::start(node)?;
    let mut keepers = Vec::new();
    for volume in &node.config.volumes {
        let board = node
            .board
            .volume(&volume.name)
            .context("the board lacks a volume")?;
        let keeper = Keeper::new(Arc::clone(node), volume.clone(), board);
        let name = format!("volume-{}", volume.name);
        keepers.push(
            std::thread::Builder::new()
                .name(name)
                .spawn(move || keeper.run())?,
        );
    }
    Ok(keepers)
}

/// A node that rebooted out of an open epoch promises its peer that it has mounted nothing; so it
/// must be true, or the peer, which then does not fence, would be the second to mount.
fn refuse_a_mount_nobody_asked_for(node: &Node, volume: &Volume) -> anyhow::Result<()> {
    if !node.ledger.left_open_by_earlier_boot(&volume.name) {
        return Ok(());
    }
    let state = mounts::find(volume)?;
    anyhow::ensure!(
        matches!(state, MountState::NotMounted | MountState::Occupied { .. }),
        "volume {} was protected when this machine went down, and somebody mounted it since, before \
         {} could merge what was not flushed: unmount it, take it out of /etc/fstab, start again",
        volume.name,
        node.peer
    );
    Ok(())
}

/// Answers people on the local socket.
struct Person(Arc<Node>);

impl Responder for Person {
    fn respond(&self, request: admin::Request) -> Answer {
        match request {
            admin::Request::Status => Answer::Status {
                status: Box::new(self.0.board.status()),
            },
            admin::Request::ConfirmDead { node } if node != self.0.peer => Answer::Refused {
                reason: format!(
                    "{node} is not the peer of {}; its peer is {}",
                    self.0.id, self.0.peer
                ),
            },
            admin::Request::ConfirmDead { node } => self.peer_is_dead(&node),
            admin::Request::Stop { restart_within_ms } => self.end(restart_within_ms),
            admin::Request::DiscardRegion { volume } => self.region_is_void(&volume),
        }
    }
}

impl Person {
    fn peer_is_dead(&self, peer: &NodeId) -> Answer {
        let node = &self.0;
        let view = *lock(&node.peer_view);
        if !view.may_be_dead() {
            let state = view.state;
            let reason = if state == PeerState::Unknown {
                format!("{peer} was not watched for long enough yet: ask again in a moment")
            } else {
                format!("{peer} is not dead: it looks {state:?}; power it off first")
            };
            return Answer::Refused { reason };
        }
        let taken = lock(&node.questions).peer_is_dead(view.boot_id, node.began.elapsed());
        self.answer(format!("confirm-dead {peer}"), taken)
    }

    fn end(&self, restart_within_ms: Option<u32>) -> Answer {
        let node = &self.0;
        if let Some(ms) = restart_within_ms {
            let within = Duration::from_millis(ms.into());
            if within.is_zero() || within > RESTART_LIMIT {
                let reason = format!("a restart takes up to {} s", RESTART_LIMIT.as_secs());
                return Answer::Refused { reason };
            }
            if let Err(error) = node.ledger.announce_restart(within) {
                let reason = format!("the restart cannot be announced: {error}");
                return Answer::Refused { reason };
            }
            node.restarting.store(true, Ordering::Relaxed);
        }
        node.told_to_end.notify_one();
        Answer::Done
    }

    fn region_is_void(&self, volume: &str) -> Answer {
        let node = &self.0;
        let boot_id = lock(&node.peer_view).boot_id;
        let taken = lock(&node.questions).region_is_void(volume, boot_id, node.began.elapsed());
        let volumes = taken.map(|()| vec![volume.to_owned()]);
        self.answer(format!("discard-region {volume}"), volumes)
    }

    fn answer(&self, word: String, taken: Result<Vec<String>, NotTaken>) -> Answer {
        match taken {
            Ok(volumes) => {
                self.0.events.record(Event::PersonSaid { word, volumes });
                Answer::Done
            }
            Err(error) => Answer::Refused {
                reason: error.to_string(),
            },
        }
    }
}
