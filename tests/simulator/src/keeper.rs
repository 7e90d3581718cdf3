//! Keeping the volume on a node, as `agent::keeper` and `agent::pulse` do it.

use std::time::Duration;

use twinwrite::cluster::claim::{BootId, Phase};
use twinwrite::cluster::liveness::{Beat, Change, Limits, Liveness};
use twinwrite::cluster::mailbox::AgentState;
use twinwrite::cluster::ownership::{Decision, Facts, LiveAnswer, decide, first_word};
use twinwrite::cluster::standing::{Slot, is_not_outbid};
use twinwrite::cluster::takeover::{Cause, Stamp, Takeover};
use twinwrite::ids::NodeId;
use twinwrite::status::PeerState;

use crate::fault::DriverFault;
use crate::ledger::{Ledger, VOLUME, node_id};
use crate::owner::Owner;
use crate::say;
use crate::takeover::Progressing;
use crate::world::{Agent, HEARTBEAT_US, Shown, World, name};

/// Heartbeats of silence after which a peer is dead.
const DEAD_AFTER: u32 = 4;
/// The node that owns the volume while nothing has failed.
const CONFIGURED_OWNER: usize = 0;

/// Where a takeover begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// At its first step.
    Claim(Cause),
    /// There, and a person has said already that the owner is dead.
    Confirmed,
    /// Behind the fence, where an earlier agent of this node had come to.
    Merging,
}

/// What an agent is doing with the volume.
#[derive(Debug, Default)]
pub enum Keeping {
    /// Finds out what it is to it.
    #[default]
    Deciding,
    /// Holds its region.
    Mirroring,
    /// Takes it over.
    TakingOver(Box<Progressing>),
    /// Mounts it; a takeover has proven that no region can be merged into it any more.
    Mounting {
        /// It has.
        proven: bool,
    },
    /// Serves it. The owner is taken out while something works with it.
    Owning(Option<Box<Owner>>),
}

impl Keeping {
    /// The owner, if it is one.
    pub fn owner(&self) -> Option<&Owner> {
        match self {
            Self::Owning(owner) => owner.as_deref(),
            _ => None,
        }
    }

    /// Takes the owner out.
    pub fn take_owner(&mut self) -> Option<Box<Owner>> {
        match self {
            Self::Owning(owner) => owner.take(),
            _ => None,
        }
    }

    /// Puts it back.
    pub fn put_owner(&mut self, owner: Box<Owner>) {
        if let Self::Owning(place) = self {
            *place = Some(owner);
        }
    }
}

impl World {
    /// Starts a node's agent.
    pub fn start_agent(&mut self, node: usize) {
        if !self.runs(node) || self.machines[node].agent.is_some() {
            return;
        }
        let boot_id = self.boot_id(node);
        let now = Duration::from_micros(self.now_us);
        let table = self.machines[node].table.clone();
        let Some(mut ledger) = Ledger::open(node, boot_id, &self.mailbox, table) else {
            return;
        };
        ledger.carry_over(&node_id(CONFIGURED_OWNER));
        ledger.set_state(AgentState::Running);
        let limits = Limits {
            heartbeat_interval: Duration::from_micros(HEARTBEAT_US),
            dead_after: Duration::from_micros(HEARTBEAT_US) * DEAD_AFTER,
        };
        let serving = false;
        self.machines[node].agent = Some(Agent {
            ledger,
            liveness: Liveness::new(limits, now),
            peer_state: PeerState::Unknown,
            keeping: Keeping::Deciding,
            exposed: None,
            sealed: false,
            serving,
            confirmed_dead: false,
            beats: 0,
            heard: (None, None),
            looks: 0,
        });
        say!(self, "{}: the agent starts", name(node));
    }

    /// Time passes: hearts beat, and each node looks at the other.
    pub fn tick(&mut self) {
        self.now_us += HEARTBEAT_US;
        let first = self.dice.below(2);
        for node in [first, 1 - first] {
            if self.runs(node) && self.machines[node].agent.is_some() {
                self.beat(node);
            }
        }
    }

    fn beat(&mut self, node: usize) {
        let linked = self.linked && self.machines[1 - node].up;
        let (boot, now) = (self.machines[node].boot, Duration::from_micros(self.now_us));
        let heard = self.machines[node].page.map(|(boot, counter)| Beat {
            boot_id: BootId([boot * 2 + (1 - node) as u8; 16]),
            counter,
        });
        let Some(agent) = &mut self.machines[node].agent else {
            return;
        };
        let look = agent.ledger.beat(&mut self.mailbox);
        let changes = agent.liveness.look(now, heard, look);
        agent.peer_state = agent.liveness.state();
        agent.beats += 1;
        // What cannot be read is no sign of life.
        let counter = agent.ledger.peer_report().map(|report| report.counter);
        let heard_now = (heard.or(agent.heard.0), counter.or(agent.heard.1));
        agent.looks = if agent.heard == heard_now {
            agent.looks + 1
        } else {
            0
        };
        agent.heard = heard_now;
        let looks = agent.looks;
        let beats = u64::from(boot) << 32 | agent.beats;
        if linked && self.machines[1 - node].agent.is_some() {
            self.machines[1 - node].page = Some((boot, beats));
        }
        let is_death =
            |change: &Change| matches!(change, Change::State { to, .. } if *to == PeerState::Dead);
        if looks + 1 < DEAD_AFTER && changes.iter().any(is_death) {
            self.violate(
                "5, one writer",
                format!(
                    "{} calls its peer dead after {looks} looks that found nothing new",
                    name(node)
                ),
            );
        }
        if self.trace.is_some() {
            for change in changes {
                say!(self, "{}: {change:?}", name(node));
            }
        }
    }

    /// A node's keeper does one thing.
    pub fn keep(&mut self, node: usize) {
        if !self.runs(node) {
            return;
        }
        let Some(agent) = &mut self.machines[node].agent else {
            return;
        };
        let keeping = std::mem::take(&mut agent.keeping);
        let next = match keeping {
            Keeping::Deciding => self.decide(node),
            Keeping::Mirroring => self.mirror(node),
            Keeping::TakingOver(progressing) => self.take_over(node, progressing),
            Keeping::Mounting { proven } => self.serve(node, proven),
            Keeping::Owning(owner) => {
                if self.leaving(node).is_some() {
                    self.leave(node)
                } else {
                    Keeping::Owning(owner)
                }
            }
        };
        if let Some(agent) = &mut self.machines[node].agent {
            agent.keeping = next;
        }
    }

    fn ask_peer(&self) -> impl Fn(usize) -> Option<LiveAnswer> + '_ {
        |node| {
            let peer = self.machines[1 - node]
                .agent
                .as_ref()
                .filter(|_| self.can_talk())?;
            Some(LiveAnswer {
                claim: peer.ledger.claim(),
                serving: peer.serving,
            })
        }
    }

    fn decide(&mut self, node: usize) -> Keeping {
        let configured = node_id(CONFIGURED_OWNER);
        let this_node: NodeId = node_id(node);
        let peer_live = self.ask_peer()(node);
        let Some(agent) = &self.machines[node].agent else {
            return Keeping::Deciding;
        };
        let (own, peer_slot) = (agent.ledger.own_word(), agent.ledger.peer_word());
        let facts = Facts {
            this_node: &this_node,
            boot_id: agent.ledger.boot_id(),
            configured_owner: &configured,
            own: &own,
            peer_slot: &peer_slot,
            peer_live: peer_live.as_ref(),
            captured: self.machines[node]
                .kernel
                .as_ref()
                .is_some_and(|k| k.attached),
        };
        let decision = decide(&facts);
        let word = first_word(&facts, decision);
        let confirmed = agent.confirmed_dead && agent.may_peer_be_dead();
        let known = agent.ledger.claim();
        say!(self, "{}: decides {decision:?}", name(node));
        if let Some(word) = word.filter(|word| known.as_ref() != Some(word)) {
            let machine = &mut self.machines[node];
            let given = machine.agent.as_mut().is_some_and(|agent| {
                agent
                    .ledger
                    .publish(&word, &mut self.mailbox, &mut machine.table)
                    .is_ok()
            });
            if !given {
                return Keeping::Deciding;
            }
        }
        match decision {
            Decision::Serve(_) => Keeping::Mounting { proven: false },
            Decision::Mirror | Decision::TakenOver => {
                if let Some(agent) = &mut self.machines[node].agent {
                    agent.sealed = false;
                }
                Keeping::Mirroring
            }
            Decision::FinishTakeover => {
                let agent = self.machines[node].agent.as_ref();
                let claim = agent.and_then(|agent| agent.ledger.claim());
                let merging = claim.is_some_and(|claim| claim.phase == Phase::Merging);
                let begin = if merging {
                    Begin::Merging
                } else {
                    Begin::Claim(Cause::OwnerDead)
                };
                self.begin_takeover(node, begin)
            }
            Decision::WaitForMerge if self.has(DriverFault::UnmergedServes) => {
                Keeping::Mounting { proven: false }
            }
            Decision::WaitForMerge | Decision::Suspended(_) => {
                if confirmed {
                    return self.begin_takeover(node, Begin::Confirmed);
                }
                Keeping::Deciding
            }
        }
    }

    fn mirror(&mut self, node: usize) -> Keeping {
        if self.machines[node].kernel.is_some() {
            return Keeping::Deciding;
        }
        let Some(agent) = &self.machines[node].agent else {
            return Keeping::Deciding;
        };
        let peer = node_id(1 - node);
        let slot = agent.ledger.peer_report();
        let theirs = slot.and_then(|report| report.volumes.get(VOLUME)).cloned();
        if theirs.as_ref().is_some_and(|claim| claim.owner != peer) {
            return Keeping::Deciding;
        }
        if theirs
            .as_ref()
            .is_some_and(|claim| claim.phase == Phase::Unmerged)
        {
            return self.begin_takeover(node, Begin::Claim(Cause::OwnerRebooted));
        }
        let owned = theirs.is_some() || agent.ledger.claim().is_some_and(|c| c.owner == peer);
        if owned && agent.peer_state == PeerState::Dead {
            return self.begin_takeover(node, Begin::Claim(Cause::OwnerDead));
        }
        if owned && agent.confirmed_dead && agent.may_peer_be_dead() {
            return self.begin_takeover(node, Begin::Confirmed);
        }
        Keeping::Mirroring
    }

    fn begin_takeover(&mut self, node: usize, begin: Begin) -> Keeping {
        say!(self, "{}: a takeover begins: {begin:?}", name(node));
        let stamp = Stamp {
            monotonic: Duration::from_micros(self.now_us),
            wall_ms: 0,
        };
        let (peer, detected) = (node_id(1 - node), (stamp, Duration::ZERO));
        let has_fence = self.setting.has_fence;
        let of = |cause| Takeover::new(VOLUME, &peer, cause, has_fence, detected);
        let takeover = match begin {
            Begin::Claim(cause) => of(cause),
            Begin::Confirmed => {
                let mut takeover = of(Cause::OwnerDead);
                if let Some(agent) = &mut self.machines[node].agent {
                    agent.confirmed_dead = false;
                    let _ = takeover.confirm_dead(&peer, agent.peer_state);
                }
                takeover
            }
            Begin::Merging => Takeover::resumed(VOLUME, &peer, detected),
        };
        let rebooted = begin == Begin::Claim(Cause::OwnerRebooted);
        Keeping::TakingOver(Box::new(Progressing::new(takeover, rebooted)))
    }

    /// Says a node's words once more, then reads its peer's slot; `None` if it does not reach the mailbox.
    pub fn say_and_look(&mut self, node: usize) -> Option<Slot> {
        let agent = self.machines[node].agent.as_mut()?;
        agent.ledger.say_and_look(&mut self.mailbox).ok()
    }

    /// Whether the peer has claimed the volume since this node said that it serves it.
    fn is_outbid(&mut self, node: usize) -> Option<bool> {
        let now = self.say_and_look(node)?;
        let own = self.machines[node].agent.as_ref()?.ledger.claim();
        Some(own.is_some_and(|own| is_not_outbid(&own, VOLUME, &now).is_err()))
    }

    fn serve(&mut self, node: usize, proven: bool) -> Keeping {
        if self.leaving(node).is_some() {
            return self.leave(node);
        }
        if self.machines[node].kernel.is_none() {
            match self.is_outbid(node) {
                Some(false) => self.mount(node),
                Some(true) => return self.leave(node),
                None => return Keeping::Mounting { proven },
            }
        }
        let kernel = self.machines[node].kernel.as_ref();
        let held = kernel.is_some_and(|kernel| kernel.attached);
        if !proven
            && !held
            && !self.has(DriverFault::ServedUnproven)
            && let Some(owner) = self.unproven_owner(node)
        {
            return Keeping::Owning(Some(Box::new(owner)));
        }
        let owner = self.serving_owner(node);
        Keeping::Owning(Some(Box::new(owner)))
    }

    /// From here on anybody may use the volume.
    pub fn serving_owner(&mut self, node: usize) -> Owner {
        if let Some(agent) = &mut self.machines[node].agent {
            agent.serving = true;
        }
        let kernel = self.machines[node].kernel.as_mut();
        if kernel.is_some_and(|kernel| !std::mem::replace(&mut kernel.served, true)) {
            self.check_served(node);
        }
        self.new_owner(node)
    }

    /// Somebody serves the volume as it is mounted, without a merge since the oracle had its say.
    fn check_served(&mut self, node: usize) {
        let Some(kernel) = &self.machines[node].kernel else {
            return;
        };
        let image = kernel.live.clone();
        if self.half_merged {
            self.violate(
                "4, replay is restartable",
                format!("{} serves a volume whose merge was interrupted", name(node)),
            );
        }
        let promised = self.promised.take();
        if let Some(promised) = promised.filter(|promised| !self.has_lost(promised)) {
            self.violate(
                "2, whole up to the cut",
                format!(
                    "epoch {} was protected, and {} serves without merging it",
                    promised.epoch,
                    name(node)
                ),
            );
        }
        if let Err(what) = self.history.check(None, &image, &image) {
            self.violate("0, do no harm", what);
        }
        self.adopt(node);
    }

    /// The memory that held what was promised is gone: two failures, which nobody promised to survive.
    pub fn has_lost(&self, promised: &Shown) -> bool {
        let mirror = &self.machines[1 - promised.node];
        let saved = mirror
            .saved
            .as_ref()
            .and_then(crate::region::Region::header);
        let is_saved = saved.is_some_and(|header| header.epoch == promised.epoch);
        (mirror.boot != promised.mirror_boot || !mirror.up) && !is_saved
    }

    fn leave(&mut self, node: usize) -> Keeping {
        say!(
            self,
            "{}: leaves the volume, which the peer claims",
            name(node)
        );
        self.machines[node].wire = None;
        self.unmount(node);
        if let Some(agent) = &mut self.machines[node].agent {
            agent.serving = false;
        }
        Keeping::Deciding
    }

    /// Nothing but the cluster's own work, until the volume is served and protected, or for long.
    pub fn settle(&mut self) {
        let wants_both = self.dice.chance(70);
        // A machine may be back before anybody takes over.
        if self.dice.chance(25) {
            let node = self.dice.below(2);
            self.run_boot(node);
        }
        for round in 0..60 {
            if self.violation.is_some() {
                return;
            }
            self.settle_round(round, wants_both);
            let served = (0..2).any(|node| {
                let agent = self.machines[node]
                    .agent
                    .as_ref()
                    .filter(|_| self.runs(node));
                let owner = agent.and_then(|agent| agent.keeping.owner());
                owner.is_some_and(|owner| owner.is_protected() || !wants_both && round > 12)
            });
            if served && round > 3 {
                return;
            }
        }
    }

    fn settle_round(&mut self, round: usize, wants_both: bool) {
        if round > 4 {
            self.mailbox.reached = [true, true];
            self.disk.failing = 0;
            if !self.linked {
                self.linked = true;
            }
            for node in 0..2 {
                self.machines[node].paused = false;
            }
        }
        let nobody = (0..2).all(|node| !self.machines[node].up);
        for node in 0..2 {
            if self.machines[node].up && round > 2 {
                self.start_agent(node);
            } else if nobody || wants_both && round > 24 {
                let boots = !nobody || self.dice.chance(50);
                if boots && !self.machines[node].up {
                    self.run_boot(node);
                }
            }
        }
        if round > 20 {
            self.person(round);
        }
        if round.is_multiple_of(2) {
            self.tick();
        }
        for node in 0..2 {
            self.finish_calls(node);
            self.keep(node);
            self.keep(node);
            self.owner_turn(node);
            self.fill_step(node);
            self.checkpoint_step(node);
            self.checkpoint_step(node);
            let late = !self.machines[node].up && self.dice.chance(80);
            if self.linked && self.machines[1 - node].up && !late {
                while self.land_one(node, None) {}
                self.complete_all(node);
            }
            self.now_us += 50;
        }
    }

    /// Calls under way come to their end; no new ones begin.
    fn finish_calls(&mut self, node: usize) {
        if !self.runs(node) {
            return;
        }
        for thread in 0..crate::kernel::THREADS {
            if let Some((kernel, mut under, dice)) = self.kernel_and_under(node) {
                kernel.step(thread, dice, &mut under);
            }
        }
    }

    /// A person looks, says who is dead, and gives up what cannot be had.
    fn person(&mut self, round: usize) {
        for node in 0..2 {
            let peer_down = !self.machines[1 - node].up;
            let Some(agent) = &mut self.machines[node].agent else {
                continue;
            };
            agent.confirmed_dead = round > 36 && peer_down && !agent.serving;
            if round > 44
                && let Keeping::TakingOver(progressing) = &mut agent.keeping
                && progressing.gives_up()
            {
                self.promised = None;
                say!(
                    self,
                    "{}: a person gives up what the region holds",
                    name(node)
                );
            }
        }
    }
}
