//! Taking the volume over, as `agent::successor` does it.

mod judging;

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use twinwrite::cluster::claim::{EpochState, Phase, VolumeClaim};
use twinwrite::cluster::mailbox::word_of;
use twinwrite::cluster::ownership::Word;
use twinwrite::cluster::standing::{Slot, claim_of, is_fenced, is_not_outbid};
use twinwrite::cluster::takeover::{
    Claimed, Fenced, Judged, Judgement, Merged, Mounted as MountedProof, Progress, Replayed,
    Revoked, Saved, Settled, Stamp, StepError, StepResult, Takeover, TakeoverDriver,
};
use twinwrite::events::Event;
use twinwrite::ids::{Epoch, Seq};
use twinwrite::region::layout::region_state;
use twinwrite::replay::apply::{apply_to, tidy_on};
use twinwrite::replay::{LogItem, ReplayInput, Sentinel, plan};
use twinwrite::status::PeerState;

use crate::fault::DriverFault;
use crate::keeper::Keeping;
use crate::ledger::{CLUSTER, VOLUME, node_id};
use crate::say;
use crate::volume::Mounted;
use crate::world::{World, name};

/// A takeover that has begun.
#[derive(Debug)]
pub struct Progressing {
    takeover: Takeover,
    /// The owner rebooted and says so itself.
    rebooted: bool,
    memory: Memory,
}

/// What the driver remembers between steps.
#[derive(Debug, Default)]
struct Memory {
    /// The saved region is to be merged behind this record.
    after: Option<Seq>,
    /// Epoch of the saved region.
    held: Epoch,
    /// Ring position behind the last record of the region, if the region counts.
    cut: Option<u64>,
    /// The volume as it was before the merge.
    before: Option<crate::image::Image>,
    /// The machine died in this step.
    died: bool,
    /// Phase of the word from which this node, which owns the volume, took it over for itself.
    owned: Option<Phase>,
    /// The oracle has had its say.
    checked: bool,
}

impl Progressing {
    /// Nothing has happened yet.
    pub fn new(takeover: Takeover, rebooted: bool) -> Self {
        Self {
            takeover,
            rebooted,
            memory: Memory::default(),
        }
    }

    /// A person gives up what the region holds; false if that is not asked.
    pub fn gives_up(&mut self) -> bool {
        let asked = self.takeover.waits_for_judgement();
        if asked {
            self.takeover.discard_region();
            self.memory.cut = None;
        }
        asked
    }
}

struct Driver<'a> {
    world: &'a mut World,
    node: usize,
    memory: &'a mut Memory,
}

/// Runs what never waits.
fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn failed<T>(why: impl Into<String>) -> StepResult<T> {
    let error: StepError = why.into().into();
    Err(error)
}

impl World {
    /// One step of a takeover.
    pub fn take_over(&mut self, node: usize, mut progressing: Box<Progressing>) -> Keeping {
        let Some(agent) = &mut self.machines[node].agent else {
            return Keeping::Deciding;
        };
        if agent.confirmed_dead
            && progressing.takeover.waits_for_fence()
            && agent.may_peer_be_dead()
        {
            agent.confirmed_dead = false;
            let state = agent.peer_state;
            let _ = progressing.takeover.confirm_dead(&node_id(1 - node), state);
        }
        let lives = matches!(agent.peer_state, PeerState::Alive | PeerState::LinkSilent);
        let Progressing {
            takeover,
            rebooted,
            memory,
        } = &mut *progressing;
        let mut driver = Driver {
            world: self,
            node,
            memory,
        };
        if !*rebooted
            && lives
            && takeover.can_withdraw()
            && let Some(Ok(())) = at_once(takeover.withdraw(&mut driver))
        {
            return Keeping::Deciding;
        }
        let progress = at_once(takeover.advance(&mut driver));
        let error = takeover.status().error.clone();
        if std::mem::take(&mut memory.died) {
            self.half_merged = true;
            self.crash(node, "dies in the middle of it");
            return Keeping::Deciding;
        }
        match progress {
            Some(Progress::Serving) => {
                self.counts.takeovers += 1;
                Keeping::Mounting { proven: true }
            }
            Some(Progress::Stepped) => Keeping::TakingOver(progressing),
            Some(Progress::Fallen) => {
                say!(self, "{}: the takeover is over: {error:?}", name(node));
                Keeping::Deciding
            }
            _ => {
                if let Some(error) = error {
                    say!(self, "{}: the takeover stops: {error}", name(node));
                }
                Keeping::TakingOver(progressing)
            }
        }
    }
}

impl Driver<'_> {
    fn known(&self) -> Vec<VolumeClaim> {
        let Some(agent) = &self.world.machines[self.node].agent else {
            return Vec::new();
        };
        let mut known: Vec<VolumeClaim> = agent.ledger.claim().into_iter().collect();
        for word in [agent.ledger.own_word().word, agent.ledger.peer_word()] {
            if let Word::Says(claim) = word {
                known.push(claim);
            }
        }
        known
    }

    /// The same, and what the peer's slot says now.
    fn known_and(&self, now: &Slot) -> Vec<VolumeClaim> {
        let mut known = self.known();
        if let Word::Says(claim) = word_of(now, VOLUME) {
            known.push(claim);
        }
        known
    }

    fn own(&self) -> Option<VolumeClaim> {
        self.world.machines[self.node]
            .agent
            .as_ref()?
            .ledger
            .claim()
    }

    fn say_and_look(&mut self) -> StepResult<Slot> {
        match self.world.say_and_look(self.node) {
            Some(slot) => Ok(slot),
            None => failed("the mailbox is not reached"),
        }
    }

    /// Whether the peer has claimed the volume since this node did.
    fn look_again(&mut self) -> StepResult {
        let now = self.say_and_look()?;
        match self.own() {
            Some(own) => Ok(is_not_outbid(&own, VOLUME, &now)?),
            None => Ok(()),
        }
    }

    /// What this node took over for itself and has not mounted waits again as it did before.
    fn give_back_to_itself(&mut self, now: &Slot) -> StepResult<bool> {
        let waited = |phase: &Phase| matches!(phase, Phase::Unmerged | Phase::Settled);
        let Some(phase) = self.memory.owned.filter(waited) else {
            return Ok(false);
        };
        let claim = VolumeClaim::change(node_id(self.node), phase, &self.known_and(now));
        self.publish(&claim)?;
        self.memory.owned = None;
        Ok(true)
    }

    fn last_word(&self) -> (Epoch, EpochState) {
        let known = self.known();
        let words = known.iter().map(|claim| (claim.epoch, claim.epoch_state));
        words.max().unwrap_or((Epoch(0), EpochState::None))
    }

    fn publish(&mut self, claim: &VolumeClaim) -> StepResult {
        let world = &mut *self.world;
        let machine = &mut world.machines[self.node];
        let Some(agent) = &mut machine.agent else {
            return failed("no agent");
        };
        match agent
            .ledger
            .publish(claim, &mut world.mailbox, &mut machine.table)
        {
            Ok(()) => Ok(()),
            Err(_) => failed("the mailbox cannot be written"),
        }
    }

    fn new_epoch(&self) -> Epoch {
        let read = self.world.disk.sentinel();
        let on_volume = read.map_or(Epoch(0), |s| if s.closed { Epoch(0) } else { s.epoch });
        self.last_word()
            .0
            .max(self.memory.held)
            .max(on_volume)
            .next()
    }

    fn sentinel(epoch: Epoch) -> Sentinel {
        Sentinel {
            cluster: CLUSTER.to_owned(),
            volume: VOLUME.to_owned(),
            epoch,
            seq: Seq(0),
            closed: true,
            time_ns: 0,
        }
    }

    fn merge_it(&mut self) -> StepResult<Merged> {
        let Some(after) = self.memory.after else {
            return Ok(Merged::default());
        };
        let node = self.node;
        let Some(saved) = self.world.machines[node].saved.clone() else {
            return failed("no saved region");
        };
        let scan = saved.scan()?;
        let log = saved.log();
        let items = LogItem::up_to_the_cut(&scan, log);
        let planned = match plan(ReplayInput {
            epoch: self.memory.held,
            after,
            items,
        }) {
            Ok(planned) => planned,
            Err(error) => {
                if self.world.promised.is_some() {
                    self.world.violate(
                        "2, whole up to the cut",
                        format!("the log cannot be planned: {error}"),
                    );
                }
                return failed(error.to_string());
            }
        };
        if self.world.trace.is_some() {
            for line in planned.to_string().lines() {
                say!(self.world, "    plan: {line}");
            }
        }
        let budget = self
            .world
            .dice
            .chance(25)
            .then(|| self.world.dice.below(40));
        let world = &mut *self.world;
        let Some(kernel) = world.machines[node].kernel.as_mut() else {
            return failed("not mounted");
        };
        let mut mounted = Mounted {
            kernel,
            disk: &mut world.disk,
            version: &mut world.version,
            budget,
            lazy: world.setting.lazy_syncfs,
            births: world.setting.births,
        };
        let outcome = match apply_to(&planned, &mut mounted, &mut |_| ()) {
            Ok(outcome) => outcome,
            Err(error) if mounted.budget == Some(0) => {
                self.memory.died = true;
                return failed(error.to_string());
            }
            Err(error) => {
                if world.promised.is_some() {
                    world.violate(
                        "4, replay is restartable",
                        format!("the merge stops: {error}"),
                    );
                }
                return failed(error.to_string());
            }
        };
        world.counts.merges += 1;
        world.counts.records += outcome.records;
        let new_epoch = self.new_epoch();
        if !self.world.has(DriverFault::SentinelNotWritten) {
            if !self.world.has(DriverFault::SentinelBeforeFlush) {
                self.world.disk.flush();
            }
            self.world.disk.begin_sentinel(Self::sentinel(new_epoch));
            if self.world.dice.chance(5) {
                self.memory.died = true;
                return failed("dies while it writes the sentinel");
            }
            self.world.disk.end_sentinel();
        }
        self.check();
        let world = &mut *self.world;
        if let Some(kernel) = world.machines[node].kernel.as_mut() {
            let mut mounted = Mounted {
                kernel,
                disk: &mut world.disk,
                version: &mut world.version,
                budget: None,
                lazy: world.setting.lazy_syncfs,
                births: world.setting.births,
            };
            let _ = tidy_on(&mut mounted, &outcome);
        }
        say!(self.world, "{}: {outcome}", name(node));
        Ok(Merged {
            records_replayed: outcome.records,
            cut_seq: scan.cut,
            warnings: Vec::new(),
        })
    }

    /// The oracle's word on what the volume shows now; from here on that is what counts.
    fn check(&mut self) {
        if std::mem::replace(&mut self.memory.checked, true) {
            return;
        }
        let world = &mut *self.world;
        let Some(kernel) = &world.machines[self.node].kernel else {
            return;
        };
        if kernel.served {
            // It never stopped: a person's word only settled whose it is.
            world.promised = None;
            return;
        }
        if world.half_merged && self.memory.cut.is_none() {
            world.counts.given_up += 1;
            world.adopt(self.node);
            return;
        }
        let before = self.memory.before.as_ref().unwrap_or(&kernel.live);
        let checked = world.history.check(self.memory.cut, before, &kernel.live);
        if let Err(what) = checked {
            let guarantee = if self.memory.cut.is_some() {
                "0 and 2, after the takeover"
            } else {
                "0, do no harm"
            };
            world.violate(guarantee, what);
        }
        if let (Some(promised), Some(cut)) = (world.promised, self.memory.cut)
            && cut < promised.mirrored
        {
            say!(
                world,
                "the cut is at {cut}, {} was called mirrored",
                promised.mirrored
            );
        }
        world.adopt(self.node);
    }
}

impl TakeoverDriver for Driver<'_> {
    fn now(&self) -> Stamp {
        Stamp {
            monotonic: Duration::from_micros(self.world.now_us),
            wall_ms: 0,
        }
    }

    fn report(&mut self, event: Event) {
        say!(self.world, "{}: {event:?}", name(self.node));
    }

    async fn claim(&mut self) -> StepResult {
        let Some(agent) = &self.world.machines[self.node].agent else {
            return failed("no agent");
        };
        let theirs = agent
            .ledger
            .peer_report()
            .and_then(|r| r.volumes.get(VOLUME).map(|c| c.phase));
        let unmerged = theirs == Some(Phase::Unmerged);
        if !unmerged && matches!(agent.peer_state, PeerState::Alive | PeerState::LinkSilent) {
            return failed("the peer is heard again");
        }
        let own = agent.ledger.claim();
        let now = self.say_and_look()?;
        if let Some(claim) = claim_of(&node_id(self.node), own.as_ref(), &self.known_and(&now))? {
            let own = own.filter(|own| own.owner == claim.owner);
            self.memory.owned = self.memory.owned.or(own.map(|own| own.phase));
            self.publish(&claim)?;
        }
        self.look_again()
    }

    async fn fence(&mut self, _: &Claimed) -> StepResult {
        if self.world.dice.chance(10) {
            return failed("the fence command failed");
        }
        if !self.world.has(DriverFault::ReplayBeforeFence) {
            self.world.crash(1 - self.node, "is fenced");
        }
        Ok(())
    }

    async fn claim_merging(&mut self, fenced: &Fenced) -> StepResult {
        let Some(agent) = &self.world.machines[self.node].agent else {
            return failed("no agent");
        };
        let (judged, own) = (agent.ledger.peer_slot().clone(), agent.ledger.claim());
        let now = self.say_and_look()?;
        let Some(own) = own else {
            return failed("there is no claim");
        };
        if let Err(fallen) = is_fenced(fenced.by(), &own, VOLUME, &judged, &now) {
            self.give_back_to_itself(&now)?;
            return Err(fallen.into());
        }
        if self
            .world
            .update_claim(self.node, |claim| claim.phase = Phase::Merging)
        {
            Ok(())
        } else {
            failed("the mailbox cannot be written")
        }
    }

    async fn revoke(&mut self, _: &Fenced) -> StepResult {
        let omitted = self.world.has(DriverFault::RevokeOmitted);
        if let Some(agent) = &mut self.world.machines[self.node].agent {
            agent.sealed = true;
            if !omitted {
                agent.exposed = None;
            }
        }
        Ok(())
    }

    async fn save_region(&mut self, _: &Revoked) -> StepResult {
        let machine = &mut self.world.machines[self.node];
        let Some(region) = &machine.region else {
            return Ok(());
        };
        if region
            .header()
            .is_some_and(|header| header.state != region_state::EMPTY)
        {
            machine.saved = Some(region.clone());
        }
        Ok(())
    }

    async fn mount(&mut self, _: &Saved) -> StepResult {
        if self.world.machines[self.node].kernel.is_none() {
            self.look_again()?;
            self.world.mount(self.node);
        }
        let kernel = self.world.machines[self.node].kernel.as_ref();
        self.memory.before = kernel.map(|kernel| kernel.live.clone());
        Ok(())
    }

    async fn judge(&mut self, _: &MountedProof) -> StepResult<Judgement> {
        let judgement = self.judge_it();
        say!(self.world, "{}: judges {judgement:?}", name(self.node));
        self.check_promise(&judgement);
        Ok(judgement)
    }

    async fn replay(&mut self, _: &Judged) -> StepResult<Merged> {
        self.merge_it()
    }

    async fn open_epoch(&mut self, _: &Replayed) -> StepResult {
        // As `replay::finish` does: what is not durable is made so before the sentinel says it.
        if let Some(kernel) = &mut self.world.machines[self.node].kernel {
            kernel.sync_all(&mut self.world.disk);
            self.world.disk.commit(self.world.version);
            self.world.disk.flush();
        }
        self.check();
        let last = self.last_word().0;
        let epoch = match self.world.disk.sentinel() {
            Some(found) if found.closed && found.epoch > last => found.epoch,
            _ => {
                let epoch = self.new_epoch();
                if !self.world.has(DriverFault::SentinelNotWritten) {
                    self.world.disk.begin_sentinel(Self::sentinel(epoch));
                    self.world.disk.end_sentinel();
                }
                epoch
            }
        };
        let given = self.world.update_claim(self.node, |claim| {
            claim.phase = Phase::Settled;
            claim.epoch = epoch;
            claim.epoch_state = EpochState::Closed;
            claim.last_mirrored = Seq(0);
        });
        if !given {
            return failed("the mailbox cannot be written");
        }
        self.world.machines[self.node].saved = None;
        Ok(())
    }

    async fn serve(&mut self, _: &Settled) -> StepResult {
        Ok(())
    }

    async fn withdraw(&mut self) -> StepResult {
        let now = self.say_and_look()?;
        if self.give_back_to_itself(&now)? {
            return Ok(());
        }
        let known = self.known_and(&now);
        let claim = VolumeClaim::change(node_id(1 - self.node), Phase::Settled, &known);
        self.publish(&claim)
    }
}
