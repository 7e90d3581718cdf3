//! Beginning an epoch, going on with one, or closing what was left, as `agent::owner` does it.

use std::collections::VecDeque;

use twinwrite::durability::checkpoint::{CheckpointPlanner, CheckpointReason};
use twinwrite::durability::closing::Proven;
use twinwrite::durability::core::LiveLog;
use twinwrite::ids::{Epoch, RingPos};
use twinwrite::mirror::core::MirrorCore;
use twinwrite::region::scan::Tail;

use super::{Ending, Fill, Owner, Pump, State};
use crate::fault::DriverFault;
use crate::kernel::Left;
use crate::ledger::node_id;
use crate::region::Region;
use crate::say;
use crate::wire::Wire;
use crate::world::{World, name};

/// Posts in flight.
const WINDOW: usize = 6;

impl World {
    pub(super) fn begin(&mut self, node: usize, owner: &mut Owner) {
        if self.now_us < owner.retry_us {
            self.drain(node);
            return;
        }
        if owner.unclosed.is_none() {
            match self.open_region(node) {
                Some(opened) => self.begin_new(node, owner, opened),
                None => {
                    owner.retry_us = self.now_us + 20_000;
                    self.drain(node);
                }
            }
            return;
        }
        if self.now_us < owner.resume_until_us {
            match self.open_region(node) {
                Some(opened) => {
                    if self.resume(node, owner, opened) {
                        return;
                    }
                    owner.resume_until_us = self.now_us;
                }
                None => return,
            }
        }
        self.promised = None;
        if let Some(epoch) = owner.unclosed {
            if let Some(kernel) = &mut self.machines[node].kernel {
                kernel.continuity = None;
            }
            owner.gate.hold();
            if self.has(DriverFault::GatesBeforeSentinel) {
                owner.gate.open(&Proven::without_sentinel());
                self.tell_gate(node, &owner.gate);
            }
            let closed = !self.has(DriverFault::ClosedSentinelOmitted);
            let ending = Ending::of(epoch, owner.last_mirrored, closed);
            owner.state = State::Closing(Box::new(ending));
        }
    }

    pub(super) fn drain(&mut self, node: usize) {
        let Some(kernel) = &mut self.machines[node].kernel else {
            return;
        };
        while let Some((at, run)) = kernel.ring.peek() {
            let end = RingPos(at.0 + run.len() as u64);
            kernel.ring.advance_to(end);
            kernel.ring.release_to(end);
        }
    }

    /// Asks the mirror for the region; the link before is shut out by it.
    pub(super) fn open_region(&mut self, node: usize) -> Option<(Epoch, bool, Option<Tail>)> {
        if !self.can_talk() {
            return None;
        }
        let mirror = 1 - node;
        let log_bytes = self.setting.log_bytes;
        let machine = &mut self.machines[mirror];
        let agent = machine.agent.as_mut()?;
        let claims = agent
            .ledger
            .claim()
            .is_some_and(|claim| claim.owner == node_id(mirror));
        if agent.serving || claims || agent.sealed {
            return None;
        }
        let region = machine.region.get_or_insert_with(|| Region::new(log_bytes));
        self.registration += 1;
        agent.exposed = Some(self.registration);
        let opened = region.opened();
        self.machines[node].wire = Some(Wire::new(self.registration));
        say!(
            self,
            "{}: opens its region: epoch {}, {}",
            name(node),
            opened.0,
            if opened.1 { "open" } else { "not open" }
        );
        // The answer may be lost.
        if self.dice.chance(3) {
            self.machines[node].wire = None;
            return None;
        }
        Some(opened)
    }

    fn resume(
        &mut self,
        node: usize,
        owner: &mut Owner,
        opened: (Epoch, bool, Option<Tail>),
    ) -> bool {
        let (epoch, open, tail) = opened;
        let (Some(kernel), Some(tail)) = (self.machines[node].kernel.as_mut(), tail) else {
            return false;
        };
        let (Some(left), Some(position)) = (kernel.continuity, tail.end.ring_pos_end) else {
            return false;
        };
        let same = open && epoch.0 == left.epoch && owner.unclosed == Some(epoch);
        let whole = kernel.ring.drops == left.lost;
        let there = (kernel.ring.consumer()..=kernel.ring.producer()).contains(&position.0);
        if !(same && whole && there) {
            return false;
        }
        kernel.ring.rewind();
        kernel.ring.advance_to(position);
        owner.last_epoch = epoch;
        owner.gate.resume(RingPos(kernel.ring.producer()));
        say!(
            self,
            "{}: goes on with epoch {epoch} behind record {}",
            name(node),
            tail.last_complete_seq()
        );
        self.counts.resumed += 1;
        self.start_pump(node, owner, (&tail, left));
        true
    }

    fn begin_new(&mut self, node: usize, owner: &mut Owner, opened: (Epoch, bool, Option<Tail>)) {
        let claimed = self.machines[node]
            .agent
            .as_ref()
            .and_then(|a| a.ledger.claim())
            .map_or(Epoch(0), |c| c.epoch);
        let epoch = owner.last_epoch.max(opened.0).max(claimed).next();
        let begun = self.can_talk()
            && self.machines[1 - node]
                .region
                .as_mut()
                .is_some_and(|region| region.begin_epoch(epoch));
        if !begun {
            return;
        }
        // Whoever passed before this has its mark in what is drained now, and not in the epoch.
        let producer = self.machines[node]
            .kernel
            .as_ref()
            .map_or(0, |k| k.ring.producer());
        owner.gate.shut(RingPos(producer));
        self.tell_gate(node, &owner.gate);
        self.drain(node);
        let Some(kernel) = self.machines[node].kernel.as_mut() else {
            return;
        };
        // A record stays half written: the gates must not stay shut for it.
        if kernel.ring.cursor() != kernel.ring.producer() {
            owner.unclosed = Some(epoch);
            owner.last_epoch = epoch;
            return;
        }
        let start = kernel.ring.cursor();
        kernel.gaps_seen = kernel.gaps;
        (kernel.gaps_settled, kernel.proven_to) = (None, 0);
        let (lost, gaps) = (kernel.ring.drops, kernel.gaps);
        let left = Left {
            epoch: epoch.0,
            lost,
            gaps,
            at: self.version,
        };
        kernel.continuity = Some(left);
        owner.gate.begin(RingPos(start));
        self.tell_gate(node, &owner.gate);
        owner.last_epoch = epoch;
        self.counts.epochs += 1;
        say!(
            self,
            "{}: epoch {epoch} begins at ring position {start}",
            name(node)
        );
        let tail = Tail::of_epoch(epoch, self.setting.log_bytes, RingPos(start));
        self.start_pump(node, owner, (&tail, left));
    }

    fn start_pump(&mut self, node: usize, owner: &mut Owner, (tail, left): (&Tail, Left)) {
        let core = match MirrorCore::with_small_log(tail, WINDOW, self.now_us) {
            Ok(core) => core,
            Err(error) => {
                say!(
                    self,
                    "{}: the region's end is not believed: {error}",
                    name(node)
                );
                return;
            }
        };
        let mut planner = CheckpointPlanner::new(self.setting.checkpoint_age_us);
        planner.want(CheckpointReason::Requested);
        let mirrored_to = tail.end.ring_pos_end.map_or(0, |at| at.0);
        owner.unclosed = Some(tail.epoch);
        owner.state = State::Mirroring(Box::new(Pump {
            live: LiveLog::new(tail.head.seq, tail.end.next_seq),
            core,
            planner,
            fill: Fill::None,
            lost_at_start: left.lost,
            gaps_at_start: left.gaps,
            gaps_at_checkpoint: left.gaps,
            gaps_proven: left.gaps,
            gaps_proven_before: None,
            proofs_at_checkpoint: 0,
            proofs_whole: 0,
            gaps_whole: left.gaps,
            noticed: Vec::new(),
            covering: Vec::new(),
            begun: self.has(DriverFault::ProtectedTooEarly),
            checkpoint_failed: false,
            gap_in_log: None,
            gap_checkpoint_us: None,
            unlinked_us: None,
            opened: false,
            phase: 0,
            ends: VecDeque::new(),
            mirrored_to: if tail.pending_fill.is_some() {
                0
            } else {
                mirrored_to
            },
            turned_at: self.version,
            covers: 0,
            covered: left.at,
            mirror_boot: self.machines[1 - node].boot,
            whole_at: left.at,
        }));
    }
}
