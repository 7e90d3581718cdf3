//! What the agent's threads share.
//!
//! Each field has one kind of user: the ledger is this node's word, the hosts are its memory for
//! the peer, the view is how the peer looks. Nothing here decides.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::ledger::Ledger;
use super::region_host::RegionHost;
use super::volume_io::VolumeIo;
use crate::board::Board;
use crate::cluster::claim::BootId;
use crate::cluster::control::{ControlClient, ControlError, Request, Response};
use crate::cluster::questions::{Question, Questions};
use crate::cluster::takeover::Cause;
use crate::config::{Config, Volume};
use crate::events::EventLog;
use crate::ids::NodeId;
use crate::link::{Exposed, SharedMemory, Transport};
use crate::status::PeerState;

/// Longest wait for the peer's answer to one request.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for a region to be opened.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Locks plain data that no thread leaves half-written.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the peer looks, as the pulse found it.
#[derive(Clone, Copy, Debug)]
pub struct PeerView {
    /// Its state.
    pub state: PeerState,
    /// How long it has been silent, at the last look.
    pub silent_for: Duration,
    /// Its boot, as last heard.
    pub boot_id: Option<BootId>,
    /// Both paths were watched for long enough to know that it is silent.
    pub is_silent: bool,
}

impl PeerView {
    /// Whether a person's word that it is dead can be true as far as this node sees.
    pub fn may_be_dead(&self) -> bool {
        match self.state {
            PeerState::Dead => true,
            PeerState::Unknown => self.is_silent,
            PeerState::Alive | PeerState::LinkSilent | PeerState::MailboxSilent => false,
        }
    }

    /// Why a dead peer's volumes are taken over.
    pub const fn cause(&self) -> Cause {
        if self.is_silent {
            Cause::OwnerDead
        } else {
            Cause::OwnerLostVolumes
        }
    }
}

/// The memory the peer's heartbeats arrive in.
pub struct NodePage {
    /// The memory.
    pub memory: Arc<SharedMemory>,
    /// The peer's way in.
    pub exposed: Option<Box<dyn Exposed>>,
}

/// The order to end, which wakes whoever sleeps.
#[derive(Debug, Default)]
pub struct StopOrder {
    given: Mutex<bool>,
    changed: Condvar,
}

impl StopOrder {
    /// Gives it.
    pub fn give(&self) {
        *lock(&self.given) = true;
        self.changed.notify_all();
    }

    /// Whether it was given.
    pub fn is_given(&self) -> bool {
        *lock(&self.given)
    }

    /// Sleeps until it is given, but no longer than this.
    pub fn wait(&self, longest: Duration) {
        let given = lock(&self.given);
        // Whether it was given or the time is over makes no difference to a sleeper.
        drop(
            self.changed
                .wait_timeout_while(given, longest, |given| !*given),
        );
    }
}

/// One agent.
pub struct Node {
    /// The configuration.
    pub config: Config,
    /// This node.
    pub id: NodeId,
    /// The other one.
    pub peer: NodeId,
    /// This boot.
    pub boot_id: BootId,
    /// What is shown.
    pub board: Arc<Board>,
    /// This node's word.
    pub ledger: Ledger,
    /// What happened.
    pub events: Arc<EventLog>,
    /// How bytes travel.
    pub transport: Arc<dyn Transport>,
    /// The way to the peer's agent.
    pub control: ControlClient,
    /// Regions this node holds, by volume.
    pub regions: BTreeMap<String, Mutex<RegionHost>>,
    /// Where the peer's heartbeats arrive.
    pub page: Mutex<NodePage>,
    /// How the peer looks.
    pub peer_view: Mutex<PeerView>,
    /// Volumes mounted and served here.
    pub serving: Mutex<BTreeMap<String, bool>>,
    /// What waits for a person.
    pub questions: Mutex<Questions>,
    /// When the agent started.
    pub began: Instant,
    /// The order to end.
    pub stop: StopOrder,
    /// Everything has ended but the signs of life.
    pub ended: StopOrder,
    /// This agent leaves what runs to the next one, instead of closing its epochs.
    pub restarting: AtomicBool,
    /// A person told the agent to end.
    pub told_to_end: Notify,
    /// When the volumes' devices last answered.
    pub volume_io: VolumeIo,
    /// For waiting on futures from threads.
    pub runtime: Handle,
}

impl Node {
    /// Whether the agent is to end.
    pub fn stopping(&self) -> bool {
        self.stop.is_given()
    }

    /// Asks the peer's agent, from a thread of its own.
    ///
    /// # Errors
    /// As [`ControlClient::call`]; also when the answer takes too long.
    pub fn ask(&self, request: Request) -> Result<Response, ControlError> {
        // A region's mirror scans it before it answers.
        let limit = match request {
            Request::OpenRegion { .. } => OPEN_LIMIT,
            _ => ANSWER_LIMIT,
        };
        self.runtime.block_on(async {
            tokio::time::timeout(limit, self.control.call(request))
                .await
                .unwrap_or(Err(ControlError::TimedOut("answer")))
        })
    }

    /// Whether what runs is left to the next agent.
    pub fn restarting(&self) -> bool {
        self.restarting.load(Ordering::Relaxed)
    }

    /// How the peer looks.
    pub fn peer_state(&self) -> PeerState {
        lock(&self.peer_view).state
    }

    /// Says what this volume waits for a person for; `None`: for nothing.
    pub fn ask_person(&self, volume: &str, question: Option<Question>) {
        lock(&self.questions).ask(volume, question);
    }

    /// Whether a person has answered this question of the volume; the word is used up by that. That the
    /// peer is dead is not believed while it is heard.
    pub fn was_told(&self, volume: &str, question: Question) -> bool {
        let view = *lock(&self.peer_view);
        let may_be = question != Question::IsPeerDead || view.may_be_dead();
        let now = self.began.elapsed();
        lock(&self.questions).take(volume, question, view.boot_id, now) && may_be
    }

    /// The configured volume of this name.
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.config
            .volumes
            .iter()
            .find(|volume| volume.name == name)
    }

    /// Whether this node has the volume mounted and serves it.
    pub fn is_serving(&self, volume: &str) -> bool {
        lock(&self.serving).get(volume).copied().unwrap_or(false)
    }

    /// Notes whether it serves the volume.
    pub fn set_serving(&self, volume: &str, serving: bool) {
        lock(&self.serving).insert(volume.to_owned(), serving);
    }

    /// Sleeps, but not beyond the order to stop.
    pub fn pause(&self, longest: Duration) {
        self.stop.wait(longest);
    }
}
