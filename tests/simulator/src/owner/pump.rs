//! The pump of one epoch, as `agent::pump` turns it, part by part.

use twinwrite::cluster::claim::EpochState;
use twinwrite::durability::checkpoint::{CheckpointReason, ENDING_GAPS};
use twinwrite::ids::RingPos;
use twinwrite::mirror::core::{Action, PostBody};
use twinwrite::record::{RecordMeta, Records, gap};
use twinwrite::status::PeerState;

use super::{Ended, Fill, GAP_CHECKPOINT_EVERY_US, Owner, Proof, Pump, Running, State, Wanted};
use crate::fault::DriverFault;
use crate::kernel::Kernel;
use crate::say;
use crate::wire::{Flying, Payload};
use crate::world::{Shown, World, name};

impl World {
    /// One part of the pump's turn.
    pub(super) fn pump_part(
        &mut self,
        node: usize,
        owner: &mut Owner,
        pump: &mut Pump,
    ) -> Result<(), Ended> {
        let phase = pump.phase;
        pump.phase = (phase + 1) % 7;
        match phase {
            0 => {
                pump.turned_at = self.version;
                pump.core.tick(self.now_us, self.now_us as i64 * 1000);
                self.see_gaps_and_records(node, pump)
            }
            1 => self.poll_link(node, pump),
            2 => self.see_fill(node, pump),
            3 => self.act(node, pump),
            4 => self.see_checkpoint(owner, pump, node),
            5 => {
                self.begin_checkpoint(node, owner, pump);
                self.end_if_unfit(node, pump)?;
                self.open_gate(node, owner, pump);
                Ok(())
            }
            _ => self.look_around(node, owner, pump),
        }
    }

    pub(super) fn kernel(&mut self, node: usize) -> Result<&mut Kernel, Ended> {
        self.machines[node]
            .kernel
            .as_mut()
            .ok_or_else(|| "not mounted".to_owned())
    }

    /// Records that are older than a gap must not be newer than the checkpoint that covers it, or a
    /// replay would lay them over it. So gaps are read before the records.
    fn see_gaps_and_records(&mut self, node: usize, pump: &mut Pump) -> Result<(), Ended> {
        let late = self.has(DriverFault::GapsReadLate);
        let noticed = self.history.noticed();
        let kernel = self.kernel(node)?;
        let (gaps, producer) = (kernel.gaps, kernel.ring.producer());
        let proofs = kernel.proofs_wanted;
        self.take_records(node, pump)?;
        if pump.core.captured_end().0 >= producer && !late {
            pump.gaps_whole = gaps;
            pump.proofs_whole = proofs;
            pump.noticed = noticed;
            pump.whole_at = self.version;
        }
        Ok(())
    }

    pub(super) fn take_records(&mut self, node: usize, pump: &mut Pump) -> Result<(), Ended> {
        let now_us = self.now_us;
        let kernel = self.kernel(node)?;
        let Some((start, run)) = kernel.ring.peek() else {
            return Ok(());
        };
        let end = start.0 + run.len() as u64;
        let mut metas = Vec::new();
        for item in Records::new(run) {
            let (at, view) = item.map_err(|error| error.to_string())?;
            metas.push(RecordMeta::of(&view, RingPos(start.0 + at as u64)));
        }
        let mut in_log = Vec::new();
        let mut seq = pump.core.captured_seq();
        pump.core
            .captured(&metas, now_us)
            .map_err(|error| error.to_string())?;
        for meta in &metas {
            seq = seq.next();
            pump.ends.push_back((seq, meta.ring_end().0));
            if pump
                .live
                .appended(seq, meta)
                .map_err(|error| error.to_string())?
                .is_some()
            {
                pump.planner.want(CheckpointReason::Gap);
                pump.gap_in_log = Some(seq);
                in_log.push(meta.ring_pos.0);
            }
        }
        kernel.ring.advance_to(RingPos(end));
        for at in in_log {
            self.history.uncapture(at);
        }
        let captured = pump.core.captured_seq();
        say!(
            self,
            "{}: takes {} records, the last is {captured}",
            name(node),
            metas.len()
        );
        Ok(())
    }

    pub(super) fn poll_link(&mut self, node: usize, pump: &mut Pump) -> Result<(), Ended> {
        let now_us = self.now_us;
        let Some(wire) = &mut self.machines[node].wire else {
            return Ok(());
        };
        let completed: Vec<_> = wire.completions.drain(..).collect();
        if wire.broken {
            self.machines[node].wire = None;
            say!(self, "{}: the link to the mirror broke", name(node));
        }
        for id in completed {
            if let Some(advance) = pump
                .core
                .completed(id, now_us)
                .map_err(|error| error.to_string())?
            {
                say!(
                    self,
                    "{}: record {} is mirrored",
                    name(node),
                    advance.mirrored
                );
            }
        }
        let purgeable = pump.live.purgeable();
        if purgeable > pump.core.purged_seq() {
            pump.core
                .purge_to(purgeable)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// What every replay of the region would contain may answer. Only after the counters of what was
    /// lost were read: such a change was counted before the mark of the call that confirms it.
    pub(super) fn open_gate(&mut self, node: usize, owner: &mut Owner, pump: &mut Pump) {
        let mirrored = pump.core.mirrored_seq();
        while pump.ends.front().is_some_and(|(seq, _)| *seq <= mirrored) {
            if let Some((_, end)) = pump.ends.pop_front() {
                pump.mirrored_to = end;
            }
        }
        let open_to = if self.has(DriverFault::GateIgnoresFills) {
            RingPos(pump.mirrored_to)
        } else {
            pump.core.gate_open_to()
        };
        owner.gate.mirrored(open_to, RingPos(0));
        self.tell_gate(node, &owner.gate);
    }

    pub(super) fn see_fill(&mut self, node: usize, pump: &mut Pump) -> Result<(), Ended> {
        let at_once = self.has(DriverFault::SafeAtTooEarly);
        let producer = self.kernel(node)?.ring.producer();
        if let Fill::Ready(wanted, bytes) = &pump.fill {
            pump.fill = Fill::Taken(*wanted, bytes.clone(), producer);
        }
        let Fill::Taken(wanted, bytes, end) = &pump.fill else {
            return Ok(());
        };
        if pump.core.captured_end().0 < *end && !at_once {
            return Ok(());
        }
        let gone = bytes.len() < wanted.len as usize;
        let safe_at = if at_once {
            wanted.seq
        } else {
            pump.core.captured_seq()
        };
        pump.core
            .filled(wanted.seq, wanted.fill_offset, bytes.clone(), gone, safe_at)
            .map_err(|error| error.to_string())?;
        say!(
            self,
            "{}: record {} gets {} bytes as of record {safe_at}",
            name(node),
            wanted.seq,
            bytes.len()
        );
        pump.fill = Fill::None;
        Ok(())
    }

    /// The filler reads; then waits until nobody is between a change and its hook.
    pub fn fill_step(&mut self, node: usize) {
        self.with_owner(node, |world, owner| {
            let (State::Mirroring(pump), Some(kernel)) =
                (&mut owner.state, &world.machines[node].kernel)
            else {
                return;
            };
            pump.fill = match std::mem::replace(&mut pump.fill, Fill::None) {
                Fill::Asked(wanted) => {
                    let bytes = kernel.read(wanted.inode, wanted.pos, wanted.len);
                    Fill::Read(wanted, bytes)
                }
                Fill::Read(wanted, bytes) if !kernel.is_locked(wanted.inode) => {
                    Fill::Ready(wanted, bytes)
                }
                other => other,
            };
        });
    }

    pub(super) fn act(&mut self, node: usize, pump: &mut Pump) -> Result<(), Ended> {
        loop {
            let machine = &mut self.machines[node];
            let (Some(kernel), Some(wire)) = (&mut machine.kernel, &mut machine.wire) else {
                return Ok(());
            };
            let ring = &kernel.ring;
            let Some(action) = pump
                .core
                .next_action(|at, len| crc32c::crc32c(ring.bytes(at, len)))
            else {
                return Ok(());
            };
            match action {
                Action::Post {
                    id,
                    offset,
                    head,
                    body,
                    kind,
                } => {
                    let body = match body {
                        PostBody::None => Payload::Bytes(Vec::new()),
                        PostBody::Bytes(bytes) => Payload::Bytes(bytes),
                        PostBody::Ring { pos, len } => Payload::Ring { at: pos.0, len },
                    };
                    wire.flying.push_back(Flying {
                        id,
                        offset,
                        head,
                        body,
                        landed: false,
                    });
                    say!(self, "{}: posts {} ({kind:?})", name(node), id.0);
                }
                Action::NeedFill {
                    seq,
                    identity,
                    pos,
                    len,
                    fill_offset,
                    ..
                } => {
                    pump.fill = Fill::Asked(Wanted {
                        seq,
                        inode: identity,
                        pos,
                        len,
                        fill_offset,
                    });
                }
                Action::ReleaseRing(position) => kernel.ring.release_to(position),
                Action::RegionHalf => pump.planner.want(CheckpointReason::RegionHalf),
                Action::RegionFull => {
                    pump.planner.want(CheckpointReason::RegionFull);
                    say!(self, "{}: the region is full", name(node));
                }
            }
        }
    }

    pub(super) fn see_checkpoint(
        &mut self,
        owner: &mut Owner,
        pump: &mut Pump,
        node: usize,
    ) -> Result<(), Ended> {
        let Some((proof, behind, proven)) = owner.outcome.take() else {
            return Ok(());
        };
        if proof.epoch != pump.core.epoch() {
            return Ok(());
        }
        if !proven {
            pump.planner.failed(self.now_us);
            pump.checkpoint_failed = true;
            return Ok(());
        }
        self.counts.checkpoints += 1;
        pump.checkpoint_failed = false;
        pump.planner.succeeded(self.now_us);
        pump.gaps_proven = pump.gaps_at_checkpoint;
        pump.covered = pump.covers;
        self.history.settle_up_to(behind, &pump.covering);
        let settled = pump.gaps_proven_before.replace(pump.gaps_proven);
        let kernel = self.kernel(node)?;
        kernel.gaps_seen = pump.gaps_proven;
        kernel.proven_to = kernel.proven_to.max(behind);
        // A page of a mapping that was noticed before this checkpoint began could be changed unseen until
        // the checkpoint had written it, also after a newer record of it: the next one covers that.
        if settled.is_some() {
            kernel.gaps_settled = settled;
        }
        pump.begun |= kernel.gaps_settled.is_some();
        pump.gap_in_log = pump.gap_in_log.filter(|seq| *seq > proof.seq);
        pump.core
            .checkpoint_mark(proof.seq, 0)
            .map_err(|error| error.to_string())?;
        pump.live
            .checkpoint(proof.seq)
            .map_err(|error| error.to_string())?;
        let purgeable = pump.live.purgeable();
        if purgeable > pump.core.purged_seq() {
            pump.core
                .purge_to(purgeable)
                .map_err(|error| error.to_string())?;
        }
        say!(
            self,
            "{}: the checkpoint up to record {} is proven",
            name(node),
            proof.seq
        );
        Ok(())
    }

    pub(super) fn begin_checkpoint(&mut self, node: usize, owner: &mut Owner, pump: &mut Pump) {
        if owner.running.is_some() || owner.outcome.is_some() {
            return;
        }
        let Some(kernel) = &self.machines[node].kernel else {
            return;
        };
        let gaps = kernel.gaps;
        let rested = pump
            .gap_checkpoint_us
            .is_none_or(|at| self.now_us >= at + GAP_CHECKPOINT_EVERY_US);
        if kernel.gaps_settled != Some(gaps) && rested {
            pump.planner.want(CheckpointReason::Gap);
        }
        if kernel.proofs_wanted != pump.proofs_at_checkpoint {
            pump.planner.want(CheckpointReason::Requested);
        }
        let Some(reason) = pump
            .planner
            .poll(self.now_us, pump.core.oldest_unflushed_age_us())
        else {
            return;
        };
        if self.has(DriverFault::GapsReadLate) {
            pump.gaps_whole = gaps;
            pump.noticed = self.history.noticed();
            pump.whole_at = self.version;
        }
        pump.gaps_at_checkpoint = pump.gaps_whole;
        pump.proofs_at_checkpoint = pump.proofs_whole;
        pump.covering.clone_from(&pump.noticed);
        pump.covers = pump.whole_at;
        if reason == CheckpointReason::Gap {
            pump.gap_checkpoint_us = Some(self.now_us);
        }
        let proof = Proof {
            epoch: pump.core.epoch(),
            seq: pump.core.captured_seq(),
            closed: false,
        };
        owner.running = Some(Running {
            proof,
            behind: pump.core.captured_end().0,
            written_at: self.version,
            stage: 0,
            began_at: self.version,
        });
        say!(
            self,
            "{}: a checkpoint up to record {} begins ({reason:?})",
            name(node),
            proof.seq
        );
    }

    pub(super) fn end_if_unfit(&mut self, node: usize, pump: &mut Pump) -> Result<(), Ended> {
        let now_us = self.now_us;
        let lag_limit_us = self.setting.lag_limit_us;
        let loss_ignored = self.has(DriverFault::LossIgnored);
        let gaps_ignored = self.has(DriverFault::GapsDoNotClose);
        let linked = self.machines[node].wire.is_some();
        let kernel = self.kernel(node)?;
        if kernel.ring.drops != pump.lost_at_start && !loss_ignored {
            return Err("events were lost".to_owned());
        }
        let ending = |reason: &&usize| {
            kernel.gaps[**reason] != pump.gaps_at_start[**reason]
                && !(loss_ignored && **reason == gap::RING_FULL)
        };
        if let Some(reason) = ENDING_GAPS.iter().find(ending)
            && !gaps_ignored
        {
            return Err(format!(
                "a change that is not captured: {}",
                gap::NAMES[*reason]
            ));
        }
        if pump.core.lag_us() > lag_limit_us {
            return Err(format!("the lag is {} us", pump.core.lag_us()));
        }
        if linked {
            pump.unlinked_us = None;
        } else if *pump.unlinked_us.get_or_insert(now_us) + lag_limit_us < now_us {
            return Err("the link could not be made again in time".to_owned());
        }
        Ok(())
    }

    pub(super) fn look_around(
        &mut self,
        node: usize,
        owner: &mut Owner,
        pump: &mut Pump,
    ) -> Result<(), Ended> {
        if let Some(left) = self.leaving(node) {
            return Err(left.to_owned());
        }
        let peer = self.machines[node]
            .agent
            .as_ref()
            .map(|agent| agent.peer_state);
        if matches!(peer, Some(PeerState::Dead | PeerState::LinkSilent)) {
            return Err("the mirror is silent on the link".to_owned());
        }
        if self.machines[node].wire.is_none()
            && self.dice.chance(50)
            && let Some((epoch, open, tail)) = self.open_region(node)
        {
            match tail {
                Some(tail) if open && epoch == pump.core.epoch() => {
                    pump.fill = Fill::None;
                    pump.core.relink(&tail).map_err(|error| error.to_string())?;
                    say!(
                        self,
                        "{}: linked again behind record {}",
                        name(node),
                        tail.last_complete_seq()
                    );
                }
                _ => return Err("the mirror no longer has the region of this epoch".to_owned()),
            }
        }
        self.show(node, owner, pump)
    }

    /// Says what the protection is; the first time it holds, everybody is told.
    pub(super) fn show(
        &mut self,
        node: usize,
        owner: &mut Owner,
        pump: &mut Pump,
    ) -> Result<(), Ended> {
        let ignored = self.has(DriverFault::GapsIgnored);
        let kernel = self.kernel(node)?;
        let open_gap = kernel
            .gaps
            .iter()
            .zip(&pump.gaps_proven)
            .any(|(now, proven)| now > proven);
        let weak = (open_gap || pump.gap_in_log.is_some()) && !ignored;
        let protected = pump.begun && !weak && !pump.checkpoint_failed;
        if !protected {
            self.promised = None;
            return Ok(());
        }
        let uncovered = kernel
            .uncaptured
            .iter()
            .any(|at| *at > pump.covered && *at <= pump.turned_at);
        if uncovered {
            self.violate(
                "6, loud",
                "the volume is called protected with an open gap".to_owned(),
            );
        }
        let epoch = pump.core.epoch();
        if !pump.opened {
            let given = self.update_claim(node, |claim| {
                claim.epoch = epoch;
                claim.epoch_state = EpochState::Open;
            });
            if !given {
                return Err("the start of the epoch could not be told".to_owned());
            }
            pump.opened = true;
            say!(self, "{}: protected in epoch {epoch}", name(node));
        }
        owner.last_mirrored = pump.core.mirrored_seq();
        self.promised = Some(Shown {
            node,
            mirrored: pump.mirrored_to,
            epoch: epoch.0,
            mirror_boot: pump.mirror_boot,
        });
        Ok(())
    }
}
