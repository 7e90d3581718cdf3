//! Closing an epoch: the driver of `durability::closing`.
//!
//! Every step runs on a thread of its own, so that a mailbox, a disk or a mirror that hangs holds up
//! nothing but what must wait for it. Needs no capture, so that an epoch which an earlier agent left
//! open can be closed even where capture no longer works. It must not call an epoch closed before
//! the core does.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::checkpointer::{Checkpoint, CheckpointError, Checkpointer};
use super::clock::wall_ns;
use super::mending::{LeftUnproven, Mending};
use super::node::Node;
use super::reserve::Reserve;
use crate::board::VolumeBoard;
use crate::capture::Capture;
use crate::cluster::claim::{EpochState, Phase};
use crate::cluster::control::{Request, Response};
use crate::cluster::ownership::is_claimed_by_peer;
use crate::config::Volume;
use crate::durability::closing::{Closing, Next, Proven, Step};
use crate::events::Event;
use crate::ids::{Epoch, Seq};
use crate::replay::sentinel;
use crate::status::{Protection, Role};

/// Longest sleep before results, and the order to stop, are looked for.
const LOOK: Duration = Duration::from_millis(20);
/// The same while the checkpoint runs, whose end everybody at the gates waits for.
const LOOK_CHECKPOINT: Duration = Duration::from_millis(1);
/// An agent that is told to stop tries for this long.
const STOPPING_LIMIT: Duration = Duration::from_secs(20);

/// What goes on beside the closing.
pub trait Meanwhile {
    /// The gates may open to all: no region can be merged any more.
    fn open_gates(&mut self, proven: &Proven);
    /// Called every few milliseconds.
    fn turn(&mut self);
}

/// An epoch that is not proven closed.
#[derive(Clone, Debug)]
pub struct Unclosed {
    /// The epoch.
    pub epoch: Epoch,
    /// Why it ends; `None`: it ended before, and only its proof is made again.
    pub reason: Option<String>,
}

/// Ends a volume's epochs, and makes its checkpoints.
pub struct Closer<'a> {
    node: &'a Arc<Node>,
    volume: &'a Volume,
    board: Arc<VolumeBoard>,
    checkpointer: Checkpointer,
    left: LeftUnproven,
}

type Told = (Step, Result<(), String>);

impl<'a> Closer<'a> {
    /// For a mounted volume.
    ///
    /// # Errors
    /// When the volume or its sentinel cannot be opened.
    pub fn new(
        node: &'a Arc<Node>,
        volume: &'a Volume,
        board: Arc<VolumeBoard>,
    ) -> Result<Self, CheckpointError> {
        let cluster = &node.config.cluster.name;
        let reserve = Reserve::of(&volume.mount_point, Arc::clone(&board));
        let checkpointer =
            Checkpointer::start(cluster, &volume.name, &volume.mount_point, reserve)?;
        // Programs that an earlier agent left have counted on.
        if let Some(control) = Capture::pinned_control(&volume.name) {
            checkpointer.errors().watch(&control);
        }
        Ok(Self {
            node,
            volume,
            board,
            checkpointer,
            left: LeftUnproven::default(),
        })
    }

    /// For checkpoints within an epoch.
    pub fn checkpointer(&mut self) -> &mut Checkpointer {
        &mut self.checkpointer
    }

    /// Where the unproven bytes of an epoch that ends are put, for its closing checkpoint.
    pub fn left_unproven(&self) -> LeftUnproven {
        self.left.clone()
    }

    /// What an earlier agent left: an epoch that either place calls open is open, since the mailbox
    /// may not have been told of an end, or the checkpoint of an end not have been proven. One that
    /// is closed may stand so in the page cache only, and is proven again.
    pub fn left(&self, because: &str) -> Option<Unclosed> {
        left(self.node, self.volume, because)
    }

    /// Closes an epoch; whether it came to its end. If not, because the agent stops or the volume
    /// was taken over, it is to be closed again from the beginning.
    pub fn close(&mut self, unclosed: &Unclosed, meanwhile: &mut dyn Meanwhile) -> bool {
        let last_mirrored = Seq(self.board.mirrored_seq.get());
        let reason = unclosed.reason.as_deref().unwrap_or("proven again");
        let closing = Closing::new(unclosed.epoch, last_mirrored, reason);
        let is_news = unclosed.reason.is_some();
        self.tell(&closing, is_news, None);
        let (tell, told) = channel();
        let run = Run {
            closing,
            is_news,
            checkpoint: Checkpoint {
                epoch: unclosed.epoch,
                seq: last_mirrored,
                closed: true,
            },
            wanted: false,
            errors: 0,
            trouble: None,
            began: Instant::now(),
            tell,
            told,
        };
        self.drive(run, meanwhile)
    }

    fn drive(&mut self, mut run: Run, meanwhile: &mut dyn Meanwhile) -> bool {
        let mut stopping_since: Option<Instant> = None;
        loop {
            self.turn_checkpoint(&mut run);
            match run.closing.next(run.now_us()) {
                Next::Begin(Step::Checkpoint) => run.wanted = true,
                Next::Begin(step) => self.begin(step, &run),
                Next::OpenGates(proven) => {
                    meanwhile.open_gates(&proven);
                    self.proven(&run);
                }
                Next::Closed => return true,
                Next::Wait { until_us } => {
                    let trouble = run.closing.trouble(run.now_us());
                    if trouble != run.trouble {
                        self.tell(&run.closing, run.is_news, trouble.as_deref());
                        run.trouble = trouble;
                    }
                    if self.node.stopping() {
                        let since = *stopping_since.get_or_insert_with(Instant::now);
                        if since.elapsed() > STOPPING_LIMIT {
                            return false;
                        }
                    }
                    if self.is_claimed_away() {
                        return false;
                    }
                    meanwhile.turn();
                    let look = if self.checkpointer.busy() {
                        LOOK_CHECKPOINT
                    } else {
                        LOOK
                    };
                    run.wait(until_us, look);
                }
            }
        }
    }

    fn is_claimed_away(&self) -> bool {
        let name = &self.volume.name;
        let peer = self.node.ledger.peer_word(name);
        let own = self.node.ledger.claim(name);
        own.is_some_and(|own| is_claimed_by_peer(&own, &self.node.id, &peer))
    }

    /// Begins the checkpoint once an earlier one has ended, and sees its outcome.
    fn turn_checkpoint(&mut self, run: &mut Run) {
        if let Some((done, result)) = self.checkpointer.outcome()
            && done == run.checkpoint
        {
            match &result {
                Ok(()) => self.checkpointer.errors().mended(run.errors),
                Err(error) => {
                    self.board.checkpoint_failures.add(1);
                    tracing::error!(volume = %self.volume.name, %error, "checkpoint failed");
                }
            }
            let result = result.map_err(|error| error.to_string());
            run.closing.ended(Step::Checkpoint, result, run.now_us());
        }
        if run.wanted && !self.checkpointer.busy() {
            run.wanted = false;
            let mending = Mending::at_close(self.checkpointer.errors(), &self.left, run.is_news);
            run.errors = mending.errors;
            if !(self.checkpointer).begin(run.checkpoint, wall_ns(), mending) {
                let gone = Err(CheckpointError::Gone.to_string());
                run.closing.ended(Step::Checkpoint, gone, run.now_us());
            }
        }
    }

    /// Carries out a step on a thread of its own.
    fn begin(&self, step: Step, run: &Run) {
        let (node, name) = (Arc::clone(self.node), self.volume.name.clone());
        let (epoch, last_mirrored) = (run.closing.epoch(), run.closing.last_mirrored());
        let tell = run.tell.clone();
        let work = move || {
            let result = match step {
                Step::Mirror => tell_mirror(&node, name, epoch, last_mirrored),
                Step::Mailbox | Step::Checkpoint => {
                    tell_mailbox(&node, &name, epoch, last_mirrored)
                }
            };
            // Nobody waits for it if the closing was given up.
            tell.send((step, result)).ok();
        };
        let thread = std::thread::Builder::new().name(format!("close-{}", self.volume.name));
        if let Err(error) = thread.spawn(work) {
            run.tell.send((step, Err(error.to_string()))).ok();
        }
    }

    fn proven(&self, run: &Run) {
        self.board.proved();
        if !run.is_news {
            return;
        }
        self.board.epochs_closed.add(1);
        self.node.events.record(Event::EpochClosed {
            volume: self.volume.name.clone(),
            epoch: run.closing.epoch(),
            last_mirrored: run.closing.last_mirrored(),
            reason: run.closing.reason().to_owned(),
        });
    }

    fn tell(&self, closing: &Closing, is_news: bool, trouble: Option<&str>) {
        let (epoch, reason) = (closing.epoch(), closing.reason());
        let text = match trouble {
            Some(trouble) => format!("epoch {epoch} ended ({reason}); {trouble}"),
            None if is_news => format!("epoch {epoch} ended: {reason}"),
            None => return,
        };
        self.board.say(Role::Owner, Protection::Exposed, &text);
    }
}

/// As [`Closer::left`], for a volume that may not let a sentinel be written.
pub fn left(node: &Node, volume: &Volume, because: &str) -> Option<Unclosed> {
    let on_volume = sentinel::read(&volume.mount_point).ok();
    let open_on_volume = on_volume.as_ref().filter(|s| !s.closed).map(|s| s.epoch);
    let open = open_epoch(node, volume).max(open_on_volume);
    let closed = || on_volume.as_ref().map(|s| (s.epoch, None));
    open.map(|epoch| (epoch, Some(because.to_owned())))
        .or_else(closed)
        .filter(|(epoch, _)| *epoch > Epoch(0))
        .map(|(epoch, reason)| Unclosed { epoch, reason })
}

/// The epoch that this node said is open, if there is one.
fn open_epoch(node: &Node, volume: &Volume) -> Option<Epoch> {
    let claim = node.ledger.claim(&volume.name)?;
    let own = claim.owner == node.id && claim.phase == Phase::Settled;
    (own && claim.epoch_state == EpochState::Open).then_some(claim.epoch)
}

/// One closing under way.
struct Run {
    closing: Closing,
    /// It ends just now, and did not before.
    is_news: bool,
    checkpoint: Checkpoint,
    /// It is to be begun as soon as an earlier one has ended.
    wanted: bool,
    /// For so many failed write-backs the one under way answers.
    errors: u64,
    trouble: Option<String>,
    began: Instant,
    tell: Sender<Told>,
    told: Receiver<Told>,
}

impl Run {
    fn now_us(&self) -> u64 {
        self.began
            .elapsed()
            .as_micros()
            .try_into()
            .unwrap_or(u64::MAX)
    }

    /// Waits for a result, or for the time at which the core goes on without one.
    fn wait(&mut self, until_us: u64, longest: Duration) {
        let left = Duration::from_micros(until_us.saturating_sub(self.now_us()));
        match self.told.recv_timeout(left.min(longest)) {
            Ok((step, result)) => self.closing.ended(step, result, self.now_us()),
            // The other end cannot go: this one holds it.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }
}

fn tell_mailbox(node: &Node, volume: &str, epoch: Epoch, last_mirrored: Seq) -> Result<(), String> {
    let said = node.ledger.update(volume, |claim| {
        claim.epoch = claim.epoch.max(epoch);
        claim.epoch_state = EpochState::Closed;
        claim.last_mirrored = last_mirrored;
    });
    said.map_err(|error| error.to_string())
}

fn tell_mirror(
    node: &Node,
    volume: String,
    epoch: Epoch,
    last_mirrored: Seq,
) -> Result<(), String> {
    let request = Request::CloseEpoch {
        volume: volume.clone(),
        epoch,
        last_mirrored,
    };
    match node.ask(request) {
        Ok(Response::EpochClosed) => Ok(()),
        Ok(other) => Err(format!("an unexpected answer: {other:?}")),
        Err(error) => {
            tracing::debug!(%volume, %error, "the mirror cannot be told that the epoch ended");
            Err(error.to_string())
        }
    }
}
