//! Keeping one volume: deciding what this node is to it, and being that until something changes.
//!
//! One thread a volume. It must never mount before `cluster::ownership` said that it may.

mod letting_go;

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::closer::{Closer, Meanwhile as _, left};
use super::draining::PinnedGates;
use super::node::{Node, lock};
use super::owner::{Left, Owner};
use super::successor::{Successor, run_serve_command};
use crate::board::VolumeBoard;
use crate::capture::Capture;
use crate::cluster::claim::{EpochState, Phase, VolumeClaim};
use crate::cluster::control::{Request, Response};
use crate::cluster::mailbox::{AgentState, NodeReport};
use crate::cluster::mounts::{self, MountState};
use crate::cluster::ownership::{
    Decision, Facts, LiveAnswer, decide, first_word, is_claimed_by_peer,
};
use crate::cluster::questions::Question;
use crate::cluster::standing::Slot;
use crate::cluster::takeover::{Cause, Progress, Stamp, Takeover, TakeoverDriver as _};
use crate::config::{MountBy, Volume};
use crate::durability::closing::Proven;
use crate::events::Event;
use crate::status::{PeerState, Protection, Role};

const LOOK_EVERY: Duration = Duration::from_millis(200);
const DECIDE_EVERY: Duration = Duration::from_secs(1);
const STEP_RETRY: Duration = Duration::from_secs(2);
/// Longest rest before capture is tried again where it failed.
const CAPTURE_RETRY_MAX: Duration = Duration::from_secs(60);

/// Where a takeover begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// At its first step.
    Claim(Cause),
    /// There, and a person has said already that the owner is dead.
    Confirmed,
    /// Behind the fence, where an earlier agent of this node had come to.
    Merging,
}

/// The keeper of one volume.
pub struct Keeper {
    node: Arc<Node>,
    volume: Volume,
    board: Arc<VolumeBoard>,
    /// A crash could still merge a region into the volume, and no programs hold anybody at a gate.
    unproven: Cell<bool>,
    /// The volume was mounted, and nobody was told yet.
    untold: Cell<bool>,
    /// To let go of the volume the kernel's NFS server was ended, and nobody started it again.
    server_ended: Cell<bool>,
    /// How often capture has failed since it last worked.
    capture_failures: Cell<u32>,
    /// What was open was closed and proven since.
    is_proven_closed: Cell<bool>,
}

/// What follows.
enum Next {
    Decide,
    TakeOver(Begin),
    Serve,
    Stop,
}

impl Keeper {
    /// A keeper; `board` shows what it does.
    pub fn new(node: Arc<Node>, volume: Volume, board: Arc<VolumeBoard>) -> Self {
        Self {
            node,
            volume,
            board,
            unproven: Cell::new(true),
            untold: Cell::new(false),
            server_ended: Cell::new(false),
            capture_failures: Cell::new(0),
            is_proven_closed: Cell::new(false),
        }
    }

    /// Keeps the volume until the agent stops.
    pub fn run(self) {
        let mut next = Next::Decide;
        loop {
            self.node.ask_person(&self.volume.name, None);
            next = match next {
                Next::Decide => self.decide(),
                Next::TakeOver(begin) => self.take_over(begin),
                Next::Serve => self.serve(),
                Next::Stop => return,
            };
            if self.node.stopping() {
                return;
            }
        }
    }

    fn say(&self, role: Role, protection: Protection, reason: &str) {
        self.board.say(role, protection, reason);
    }

    fn ask_peer(&self) -> Option<LiveAnswer> {
        match self.node.ask(Request::Ownership {
            volume: self.volume.name.clone(),
        }) {
            Ok(Response::OwnershipIs { claim, serving }) => Some(LiveAnswer { claim, serving }),
            _ => None,
        }
    }

    fn decide(&self) -> Next {
        let name = &self.volume.name;
        let mut told = None;
        loop {
            if self.node.stopping() {
                return Next::Stop;
            }
            let own = self.node.ledger.own_word(name);
            let peer_slot = self.node.ledger.peer_word(name);
            let peer_live = self.ask_peer();
            let facts = Facts {
                this_node: &self.node.id,
                boot_id: self.node.boot_id,
                configured_owner: &self.volume.owner,
                own: &own,
                peer_slot: &peer_slot,
                peer_live: peer_live.as_ref(),
                captured: self.is_captured(),
            };
            let decision = decide(&facts);
            if told != Some(decision) {
                let (volume, reason) = (name.clone(), reason_of(decision, self));
                self.node.events.record(Event::OwnershipDecided {
                    volume,
                    decision,
                    reason,
                });
                told = Some(decision);
            }
            if let Some(word) = first_word(&facts, decision)
                && self.node.ledger.claim(name).as_ref() != Some(&word)
                && let Err(error) = self.node.ledger.publish(name, &word)
            {
                let reason = format!("this node's word cannot be given: {error}");
                self.say(Role::None, Protection::Suspended, &reason);
                self.node.pause(DECIDE_EVERY);
                continue;
            }
            match decision {
                Decision::Serve(_) => return Next::Serve,
                Decision::Mirror | Decision::TakenOver => return self.mirror(),
                Decision::FinishTakeover => return self.finish_takeover(),
                Decision::WaitForMerge | Decision::Suspended(_) => {
                    let reason = reason_of(decision, self);
                    self.say(Role::None, Protection::Suspended, &reason);
                    if self.is_confirmed() {
                        return Next::TakeOver(Begin::Confirmed);
                    }
                    self.node.pause(DECIDE_EVERY);
                }
            }
        }
    }

    /// The volume is mounted, and what an earlier agent of this boot attached is still there.
    fn is_captured(&self) -> bool {
        Capture::is_pinned(&self.volume.name)
            && matches!(mounts::find(&self.volume), Ok(MountState::Mounted(_)))
    }

    /// An earlier agent of this node had begun it.
    fn finish_takeover(&self) -> Next {
        let claim = self.node.ledger.claim(&self.volume.name);
        if claim.is_some_and(|claim| claim.phase == Phase::Merging) {
            Next::TakeOver(Begin::Merging)
        } else {
            Next::TakeOver(Begin::Claim(Cause::OwnerDead))
        }
    }

    /// A person's word that the peer is dead lifts a doubt about the peer; where only the peer could
    /// have merged, what it held is lost, and the takeover says so.
    fn is_confirmed(&self) -> bool {
        let question = Question::IsPeerDead;
        let may_be_dead = lock(&self.node.peer_view).may_be_dead();
        self.node
            .ask_person(&self.volume.name, may_be_dead.then_some(question));
        self.node.was_told(&self.volume.name, question)
    }

    /// Holds the region until the owner dies.
    fn mirror(&self) -> Next {
        let name = &self.volume.name;
        if !self.let_go() {
            return Next::Decide;
        }
        if let Some(host) = self.node.regions.get(name) {
            lock(host).unseal();
        }
        if let Err(error) = self.refuse_foreign_mount() {
            self.say(Role::None, Protection::Suspended, &error);
            self.node.pause(DECIDE_EVERY);
            return Next::Decide;
        }
        while !self.node.stopping() {
            let slot = self.node.ledger.peer_report();
            let theirs = slot
                .as_ref()
                .and_then(|report| report.volumes.get(name))
                .cloned();
            if let Some(claim) = &theirs
                && claim.owner != self.node.peer
            {
                // The peer gave the volume away or took its claim back.
                self.node.pause(DECIDE_EVERY);
                return Next::Decide;
            }
            if theirs
                .as_ref()
                .is_some_and(|claim| claim.phase == Phase::Unmerged)
            {
                return Next::TakeOver(Begin::Claim(Cause::OwnerRebooted));
            }
            let owned_by_peer = theirs.is_some()
                || self
                    .node
                    .ledger
                    .claim(name)
                    .is_some_and(|c| c.owner == self.node.peer);
            let view = *lock(&self.node.peer_view);
            if owned_by_peer && view.state == PeerState::Dead {
                return Next::TakeOver(Begin::Claim(view.cause()));
            }
            // A node that stopped on purpose, and was powered off then, is never called dead here.
            if owned_by_peer && self.is_confirmed() {
                return Next::TakeOver(Begin::Confirmed);
            }
            self.show_as_mirror(theirs.as_ref(), slot.as_ref());
            self.node.pause(LOOK_EVERY);
        }
        Next::Stop
    }

    /// As a mirror this node knows of the protection what its owner says.
    fn show_as_mirror(&self, theirs: Option<&VolumeClaim>, slot: Option<&NodeReport>) {
        let peer = &self.node.peer;
        let stopped = slot.is_some_and(|report| report.state == AgentState::Stopped);
        let is_open = theirs.is_some_and(|claim| claim.epoch_state == EpochState::Open);
        let is_exposed = slot.is_some_and(|report| report.exposed.contains(&self.volume.name));
        let restarts = slot.is_some_and(|report| !report.told.restart_within.is_zero());
        if stopped {
            let reason = format!(
                "the agent on {peer} was stopped on purpose; power {peer} off and run \
                 `twinwrite takeover --confirm-dead {peer}` to take the volume over"
            );
            self.say(Role::Mirror, Protection::Alone, &reason);
        } else if restarts {
            let reason = format!(
                "the agent on {peer} restarts: what is written there meanwhile is captured, and mirrored \
                 once it is back"
            );
            self.say(Role::Mirror, Protection::Exposed, &reason);
        } else if !is_open {
            let reason = format!("{peer} has no open epoch: see `twinwrite status` there");
            self.say(Role::Mirror, Protection::Exposed, &reason);
        } else if is_exposed {
            let reason = format!(
                "{peer} mirrors and shows the volume as exposed: see `twinwrite status` there"
            );
            self.say(Role::Mirror, Protection::Exposed, &reason);
        } else {
            self.say(Role::Mirror, Protection::Protected, "");
        }
    }

    /// A mirror must not have the volume mounted.
    fn refuse_foreign_mount(&self) -> Result<(), String> {
        match mounts::find(&self.volume) {
            Ok(
                MountState::Mounted(_) | MountState::Twice { .. } | MountState::Elsewhere { .. },
            ) => Err(format!(
                "{} is mounted on this node, which does not own volume {}: unmount it at once",
                self.volume.device.display(),
                self.volume.name
            )),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn take_over(&self, begin: Begin) -> Next {
        let mut driver = Successor::new(Arc::clone(&self.node), self.volume.clone());
        let spoken_of = self.node.ledger.peer_slot();
        // Programs that stay must not hold this process.
        if let Err(error) = Capture::claim(&self.volume.name) {
            tracing::error!(volume = %self.volume.name, "{error}");
        }
        // One that goes on may have mounted the volume for the merge, and an owner serves it.
        if begin == Begin::Merging || self.is_owner() {
            self.keep_or_abandon_capture();
        } else if !self.let_go() {
            return Next::Decide;
        }
        let silent_for = lock(&self.node.peer_view).silent_for;
        let detected: (Stamp, Duration) = (driver.now(), silent_for);
        let mut takeover = self.takeover(begin, detected);
        if begin == Begin::Confirmed {
            self.confirm(&mut takeover, &mut driver, spoken_of);
        }
        self.say(
            Role::Mirror,
            Protection::Suspended,
            "this node takes the volume over",
        );
        let mut retry_at = Instant::now();
        while !self.node.stopping() {
            self.hear_person(&mut takeover, &mut driver);
            if Instant::now() < retry_at {
                self.node.pause(LOOK_EVERY);
                continue;
            }
            let lives = matches!(
                self.node.peer_state(),
                PeerState::Alive | PeerState::LinkSilent
            );
            let rebooted = begin == Begin::Claim(Cause::OwnerRebooted);
            if lives && !rebooted && takeover.can_withdraw() {
                match self.node.runtime.block_on(takeover.withdraw(&mut driver)) {
                    Ok(()) => return Next::Decide,
                    Err(error) => tracing::error!(%error, "the takeover could not be withdrawn"),
                }
            }
            let progress = self.node.runtime.block_on(takeover.advance(&mut driver));
            self.board.tell_takeover(takeover.status().clone());
            match progress {
                Progress::Stepped => {}
                Progress::Serving => {
                    self.unproven.set(false);
                    // Its last step has told.
                    self.untold.set(false);
                    return Next::Serve;
                }
                Progress::Fallen => {
                    let reason = takeover.status().error.clone().unwrap_or_default();
                    self.say(Role::None, Protection::Suspended, &reason);
                    self.node.pause(DECIDE_EVERY);
                    return Next::Decide;
                }
                Progress::WaitsForPerson | Progress::Stopped => {
                    let error = takeover.status().error.clone().unwrap_or_default();
                    self.say(Role::Mirror, Protection::Suspended, &error);
                    retry_at = Instant::now() + STEP_RETRY;
                }
            }
        }
        Next::Stop
    }

    fn takeover(&self, begin: Begin, detected: (Stamp, Duration)) -> Takeover {
        let (name, peer) = (&self.volume.name, &self.node.peer);
        let has_fence = self.node.config.cluster.fence_command.is_some();
        let of = |cause| Takeover::new(name, peer, cause, has_fence, detected);
        match begin {
            Begin::Claim(cause) => of(cause),
            Begin::Confirmed => of(Cause::OwnerDead),
            Begin::Merging => Takeover::resumed(name, peer, detected),
        }
    }

    /// A person says that the owner is dead, whose slot was this when it was said.
    fn confirm(&self, takeover: &mut Takeover, driver: &mut Successor, spoken_of: Slot) {
        let state = self.node.peer_state();
        match takeover.confirm_dead(&self.node.peer, state) {
            Ok(()) => driver.remember_slot(spoken_of),
            Err(error) => tracing::warn!(%error, "the word of a person was not taken"),
        }
    }

    /// This node's own word is that it owns the volume, and no claim that may fall.
    fn is_owner(&self) -> bool {
        let own = self.node.ledger.claim(&self.volume.name);
        own.is_some_and(|own| own.owner == self.node.id && own.phase != Phase::Claiming)
    }

    /// Asks a person what the takeover waits for, and hands it the word that was given.
    fn hear_person(&self, takeover: &mut Takeover, driver: &mut Successor) {
        let name = &self.volume.name;
        let question = if takeover.waits_for_judgement() {
            Some(Question::IsRegionVoid)
        } else if takeover.waits_for_fence() {
            Some(Question::IsPeerDead)
        } else {
            None
        };
        self.node.ask_person(name, question);
        let spoken_of = self.node.ledger.peer_slot();
        match question {
            Some(Question::IsRegionVoid) if self.node.was_told(name, Question::IsRegionVoid) => {
                takeover.discard_region();
            }
            Some(Question::IsPeerDead) if self.node.was_told(name, Question::IsPeerDead) => {
                self.confirm(takeover, driver, spoken_of);
            }
            _ => {}
        }
    }

    /// Mounts the volume, unless it is mounted already.
    fn mount(&self) -> anyhow::Result<bool> {
        if self.volume.mount_by == MountBy::External {
            mounts::require_mounted(&self.volume)?;
            return Ok(false);
        }
        match mounts::find(&self.volume)? {
            MountState::NotMounted => {
                // Programs of an earlier mount would have this agent's own work wait at their gate. Where
                // somebody is held they stay, and know this agent.
                if let Err(error) = Capture::detach(&self.volume.name) {
                    tracing::warn!(volume = %self.volume.name, "{error}");
                }
                std::fs::create_dir_all(&self.volume.mount_point)?;
                mounts::mount(&self.volume)?;
                Ok(true)
            }
            _ => {
                mounts::require_mounted(&self.volume)?;
                Ok(false)
            }
        }
    }

    fn is_claimed_away(&self) -> bool {
        let name = &self.volume.name;
        let peer = self.node.ledger.peer_word(name);
        let own = self.node.ledger.claim(name);
        own.is_some_and(|own| is_claimed_by_peer(&own, &self.node.id, &peer))
    }

    /// Whether the peer claims the volume. Before this node mounts it the answer is read from the
    /// device, after this node's own word was written there.
    fn is_outbid(&self) -> anyhow::Result<bool> {
        if self.is_claimed_away() {
            return Ok(true);
        }
        if !matches!(mounts::find(&self.volume)?, MountState::NotMounted) {
            return Ok(false);
        }
        let stands = self.node.ledger.is_not_outbid(&self.volume.name)?;
        Ok(stands.is_err())
    }

    fn serve_later(&self, error: &anyhow::Error) -> Next {
        self.say(Role::Owner, Protection::Suspended, &format!("{error:#}"));
        self.node.pause(DECIDE_EVERY);
        Next::Serve
    }

    fn serve(&self) -> Next {
        let name = &self.volume.name;
        if let Err(error) = Capture::claim(name) {
            tracing::error!(volume = %name, "{error}");
        }
        match self.is_outbid() {
            Ok(false) => {}
            Ok(true) => {
                self.leave_the_volume();
                self.node.pause(DECIDE_EVERY);
                return Next::Decide;
            }
            Err(error) => return self.serve_later(&error),
        }
        if let Err(error) = self.mount_and_prove() {
            return self.serve_later(&error);
        }
        if self.untold.take()
            && let Err(error) = self
                .node
                .runtime
                .block_on(run_serve_command(&self.node, &self.volume))
        {
            tracing::error!(volume = %name, "{error:#}");
        }
        self.node.set_serving(name, true);
        if self.board.words().protection == Protection::Suspended {
            let reason = "the volume is served; capture is being attached and calibrated";
            self.say(Role::Owner, Protection::Alone, reason);
        }
        let is_proven_closed = self.is_proven_closed.replace(false);
        let board = Arc::clone(&self.board);
        let mut owner = match Owner::new(&self.node, &self.volume, board, is_proven_closed) {
            Ok(owner) => owner,
            Err(error) => {
                let reason = format!("the volume is served without protection: {error:#}");
                self.say(Role::Owner, Protection::Exposed, &reason);
                // Once is enough: nothing opens an epoch without capture.
                let is_closed = is_proven_closed || self.close_without_capture();
                self.is_proven_closed.set(is_closed);
                let failures = self.capture_failures.get();
                self.capture_failures.set(failures.saturating_add(1));
                let rest = STEP_RETRY.saturating_mul(1 << failures.min(10));
                self.node.pause(rest.min(CAPTURE_RETRY_MAX));
                return Next::Serve;
            }
        };
        self.capture_failures.set(0);
        match owner.run() {
            Left::Stopping => Next::Stop,
            Left::CaptureLost => Next::Serve,
            Left::ClaimedByPeer => {
                drop(owner);
                self.leave_the_volume();
                Next::Decide
            }
        }
    }

    /// Mounts the volume, and proves that no region can be merged into it before anybody uses it:
    /// what is confirmed before the programs are attached waits at no gate. That the mailbox calls
    /// the epoch closed is not enough, since its word may be lost with the next crash.
    fn mount_and_prove(&self) -> anyhow::Result<()> {
        let name = &self.volume.name;
        if self.mount()? {
            self.unproven.set(true);
            self.untold.set(true);
        } else if Capture::is_pinned(name) {
            self.unproven.set(false);
        }
        if !self.unproven.get() {
            return Ok(());
        }
        let because = "this node mounted the volume and nothing holds its gates";
        if let Some(unclosed) = left(&self.node, &self.volume, because) {
            let mut gates = PinnedGates(name);
            let closer = Closer::new(&self.node, &self.volume, Arc::clone(&self.board));
            let mut closer = closer.context("the volume is mounted and not served")?;
            anyhow::ensure!(
                closer.close(&unclosed, &mut gates),
                "the volume is mounted and not served: epoch {} could not be closed before",
                unclosed.epoch
            );
        }
        self.unproven.set(false);
        self.is_proven_closed.set(true);
        Ok(())
    }

    /// Nothing will be mirrored: what an earlier agent left open must not be replayed later. Whether
    /// that is proven.
    fn close_without_capture(&self) -> bool {
        let mut closer = match Closer::new(&self.node, &self.volume, Arc::clone(&self.board)) {
            Ok(closer) => closer,
            Err(error) => {
                tracing::error!(volume = %self.volume.name, %error, "cannot close");
                return false;
            }
        };
        let mut gates = PinnedGates(&self.volume.name);
        // One that is closed already is proven again: only then may anything pass.
        match closer.left("capture does not work") {
            Some(unclosed) => closer.close(&unclosed, &mut gates),
            None => {
                gates.open_gates(&Proven::without_sentinel());
                true
            }
        }
    }
}

fn reason_of(decision: Decision, keeper: &Keeper) -> String {
    let (own, peer, volume) = (&keeper.node.id, &keeper.node.peer, &keeper.volume.name);
    match decision {
        Decision::Suspended(doubt) => doubt.told().to_owned(),
        Decision::WaitForMerge => format!(
            "{own} went down while volume {volume} was protected: {peer} must merge what it holds \
             first; start the agent on {peer} if it does not run"
        ),
        Decision::TakenOver => {
            format!("{peer} has taken volume {volume} over; {own} mirrors it now")
        }
        Decision::FinishTakeover => "a takeover that was interrupted goes on".to_owned(),
        Decision::Serve(_) | Decision::Mirror => String::new(),
    }
}
