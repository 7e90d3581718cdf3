//! Moving records from the ring to the mirror's region: the driver around `mirror::core` and
//! `durability::core`.
//!
//! One thread turns it. It takes committed records, posts what the core says, releases the ring
//! when completions arrive, reads fills from the page cache, and begins checkpoints. Whatever the
//! core cannot go on from ends the epoch with a reason; nothing is dropped in silence.

mod doubt;
mod mapped;
mod outcome;
mod parts;
mod progress;

use std::sync::Arc;
use std::time::{Duration, Instant};

use twinwrite_abi::gap;

use super::checkpointer::{Checkpoint, CheckpointError, Checkpointer};
use super::clock::Clock;
use super::filler::{Filler, Wanted};
use super::gatekeeper::Gatekeeper;
use super::mapper::Mapper;
use crate::board::VolumeBoard;
use crate::capture::{Control, GapCounts, RingConsumer, Woken};
use crate::durability::checkpoint::{CheckpointPlanner, CheckpointReason, ENDING_GAPS};
use crate::durability::core::LiveLog;
use crate::ids::{RingPos, Seq};
use crate::link::{Body, Link, LinkError, Post, PostId, WINDOW_POSTS};
use crate::mirror::core::{Action, MirrorCore, PostBody};
use crate::record::{RecordMeta, Records, op};
use crate::region::scan::Tail;
use doubt::Doubt;
use mapped::tell_mapper;
pub use outcome::{Ended, Standing, Turn};
pub use parts::{Limits, Parts};
use progress::{Peak, count};

/// Most ring bytes looked at in one turn.
const RUN_BYTES: usize = 4 * 1024 * 1024;
/// A volume with gaps is covered by a checkpoint no more often than this.
const GAP_CHECKPOINT_EVERY: Duration = Duration::from_millis(500);
/// How often the slower numbers of the board are refreshed.
const REFRESH: Duration = Duration::from_millis(50);
/// How often is looked for bytes that are being read.
const FILL_LOOK: Duration = Duration::from_millis(1);

/// The machinery of one epoch.
pub struct Pump<'a> {
    ring: &'a mut RingConsumer,
    control: &'a Control,
    filler: &'a mut Filler,
    mapper: Option<&'a Mapper>,
    /// Gaps of mappings from before this pump, of which the mapper does not know.
    mapped_before: u64,
    /// Bytes that were read, and the ring position behind every change they may show.
    filled: Option<(Wanted, Vec<u8>, RingPos)>,
    checkpointer: &'a mut Checkpointer,
    gatekeeper: &'a Gatekeeper,
    /// Where the gate stands, and where it may stand once the counters were read again.
    gate_open_to: RingPos,
    gate_next: RingPos,
    may_skip_hooks: bool,
    board: Arc<VolumeBoard>,
    clock: Clock,
    core: MirrorCore,
    live: LiveLog,
    link: Option<Box<dyn Link>>,
    woken_by_link: bool,
    completed: Vec<PostId>,
    metas: Vec<RecordMeta>,
    limits: Limits,
    /// Events lost when the epoch began.
    lost_at_start: u64,
    /// Gap counts from before the newest records were taken that are older than they.
    gaps_whole: GapCounts,
    /// Gap counts that the checkpoint under way covers, and the last proven one.
    gaps_at_checkpoint: GapCounts,
    gaps_proven: GapCounts,
    /// What a checkpoint before the last proven one covered already.
    gaps_proven_before: Option<GapCounts>,
    gaps_at_start: GapCounts,
    /// Proofs wanted: from before the newest records were taken, and of the last checkpoint begun.
    proofs_whole: u64,
    proofs_at_checkpoint: u64,
    /// Where the ring stood when the checkpoint under way began.
    ring_at_checkpoint: RingPos,
    begun: bool,
    planner: CheckpointPlanner,
    gap_checkpoint_at: Option<Instant>,
    checkpoint_failure: Option<String>,
    /// A captured change that the region cannot bring back, until a checkpoint has covered it.
    gap_in_log: Option<(Seq, String)>,
    /// What failed write-backs leave in doubt.
    doubt: Doubt,
    refreshed: Instant,
    peak: Peak,
}

/// Events lost since the programs were loaded, by every way of losing them that is not a gap of
/// its own.
pub fn events_lost(control: &Control, recursion_misses: u64) -> u64 {
    control.drops().saturating_add(recursion_misses)
}

impl<'a> Pump<'a> {
    /// A pump that goes on at `tail`, over `link`. `resumed`: the epoch was begun by an earlier
    /// agent, so that its first checkpoint is behind it and only checkpoints purge the old records.
    ///
    /// # Errors
    /// [`Ended::Core`] when the tail contradicts itself.
    pub fn new(
        parts: Parts<'a>,
        tail: &Tail,
        link: Box<dyn Link>,
        limits: Limits,
        lost_at_start: u64,
        gaps_proven: GapCounts,
    ) -> Result<Self, Ended> {
        let clock = Clock::start();
        let core = MirrorCore::new(tail, WINDOW_POSTS, clock.now_us())?;
        let now = Instant::now();
        let age_limit_us = limits
            .checkpoint_age
            .as_micros()
            .try_into()
            .unwrap_or(u64::MAX);
        let doubt = Doubt::new(parts.control, core.captured_end(), parts.left_unproven);
        let mapped_before = parts.control.gaps()[gap::MAPPING];
        if let Some(mapper) = parts.mapper {
            mapper.begun();
        }
        let mut planner = CheckpointPlanner::new(age_limit_us);
        // What was dirty before the epoch is nobody's record, so the epoch begins with one.
        planner.want(CheckpointReason::Requested);
        parts
            .board
            .zero_copy
            .store(link.zero_copy(), std::sync::atomic::Ordering::Relaxed);
        Ok(Self {
            ring: parts.ring,
            control: parts.control,
            filler: parts.filler,
            mapper: parts.mapper,
            mapped_before,
            filled: None,
            checkpointer: parts.checkpointer,
            gatekeeper: parts.gatekeeper,
            gate_open_to: RingPos(0),
            gate_next: RingPos(0),
            may_skip_hooks: parts.may_skip_hooks,
            board: parts.board,
            clock,
            live: LiveLog::new(tail.head.seq, tail.end.next_seq),
            core,
            link: Some(link),
            woken_by_link: false,
            completed: Vec::new(),
            metas: Vec::new(),
            limits,
            lost_at_start,
            gaps_whole: gaps_proven,
            gaps_at_checkpoint: gaps_proven,
            gaps_proven,
            gaps_proven_before: None,
            gaps_at_start: gaps_proven,
            proofs_whole: 0,
            proofs_at_checkpoint: 0,
            ring_at_checkpoint: RingPos(0),
            begun: false,
            planner,
            gap_checkpoint_at: None,
            checkpoint_failure: None,
            gap_in_log: None,
            doubt,
            refreshed: now,
            peak: Peak::new(now),
        })
    }

    /// Asks for a checkpoint that begins after this call.
    pub fn want_checkpoint(&mut self) {
        self.planner.want(CheckpointReason::Requested);
    }

    /// Whether there is a link now.
    pub fn is_linked(&self) -> bool {
        self.link.is_some()
    }

    /// Goes on over a new link, where the region ends.
    ///
    /// # Errors
    /// [`Ended::Core`] when the region does not continue this log.
    pub fn relink(&mut self, tail: &Tail, link: Box<dyn Link>) -> Result<(), Ended> {
        self.core.relink(tail)?;
        self.link = Some(link);
        Ok(())
    }

    /// Does what can be done without waiting.
    ///
    /// # Errors
    /// [`Ended`] when the epoch cannot go on. A broken link does not end it: [`Self::is_linked`].
    pub fn turn(&mut self, recursion_misses: u64) -> Result<Turn, Ended> {
        self.core.tick(self.clock.now_us(), self.clock.time_ns());
        // A checkpoint that covers a gap must have every older record before its S: a replay would
        // lay one behind S over what the checkpoint has saved.
        // In the same way a call that wants a proof was counted behind all that it confirms.
        let (gaps, proofs) = (self.control.gaps(), self.control.proofs_wanted());
        let producer = self.ring.producer();
        let errors = self.control.writeback_errors();
        let mut worked = self.take_records()?;
        self.look_at_writebacks(errors);
        if self.core.captured_end() >= producer {
            (self.gaps_whole, self.proofs_whole) = (gaps, proofs);
        }
        worked |= self.poll_link()?;
        worked |= self.see_fill()?;
        if let Some(mapper) = self.mapper {
            mapper.check()?;
        }
        worked |= self.act()?;
        worked |= self.see_checkpoint()?;
        let purgeable = self.live.purgeable();
        if purgeable > self.core.purged_seq() {
            self.core.purge_to(purgeable)?;
            worked = true;
        }
        self.begin_checkpoint();
        let lost = events_lost(self.control, recursion_misses);
        if lost != self.lost_at_start {
            let gaps = self.control.gaps();
            let text = format!(
                "{} since the epoch began, {} of them because the ring was full",
                lost - self.lost_at_start,
                gaps[gap::RING_FULL].saturating_sub(self.gaps_proven[gap::RING_FULL])
            );
            return Err(Ended::EventsLost(text));
        }
        self.end_if_unfit()?;
        worked |= self.move_gate();
        self.board.turned();
        if worked {
            self.show_progress();
        }
        if self.refreshed.elapsed() >= REFRESH {
            self.refresh();
        }
        Ok(if worked { Turn::Worked } else { Turn::Idle })
    }

    /// Lets pass what is mirrored; whether there is more to let pass. Only after the counters of what was
    /// lost or not captured were read: such a change was counted before the call that confirms it began.
    /// What this turn has mirrored may rest on a change that was skipped after the counters of skipped
    /// programs were read, so it passes with the next turn.
    fn move_gate(&mut self) -> bool {
        let now = self.core.gate_open_to();
        let before = std::mem::replace(&mut self.gate_next, now);
        let open_to = if self.may_skip_hooks { before } else { now };
        if open_to > self.gate_open_to {
            self.gate_open_to = open_to;
            self.gatekeeper.mirrored(open_to);
        }
        self.is_gate_behind()
    }

    /// Whether more may pass once the counters of skipped programs were read anew.
    pub fn is_gate_behind(&self) -> bool {
        self.gate_next > self.gate_open_to
    }

    /// Ends an epoch whose log must not be replayed any more, or not soon enough.
    fn end_if_unfit(&self) -> Result<(), Ended> {
        let gaps = self.control.gaps();
        let names: Vec<&str> = ENDING_GAPS
            .iter()
            .filter(|reason| gaps[**reason] != self.gaps_at_start[**reason])
            .filter_map(|reason| gap::NAMES.get(*reason).copied())
            .collect();
        if !names.is_empty() {
            return Err(Ended::Gap(names.join(", ")));
        }
        let lag = Duration::from_micros(self.core.lag_us());
        if lag <= self.limits.lag {
            return Ok(());
        }
        let why = if self.core.is_region_full() {
            "the region was full and no checkpoint purged it"
        } else if self.filler.is_busy() {
            "bytes could not be read from the page cache"
        } else if self.link.is_none() {
            "the link to the mirror is gone"
        } else {
            "the link to the mirror is slower than the writers"
        };
        Err(Ended::Lag(format!("{:.1} s: {why}", lag.as_secs_f64())))
    }

    /// Waits until there is something to do.
    ///
    /// # Errors
    /// [`Ended::Capture`].
    pub fn sleep(&mut self, longest: Duration) -> Result<(), Ended> {
        // Arming also takes the event that ended the sleep before, or every sleep would end at once.
        if let Some(link) = &mut self.link
            && (self.core.in_flight() > 0 || self.woken_by_link)
        {
            let woken = std::mem::take(&mut self.woken_by_link);
            if link.arm(woken).is_err() {
                return Ok(());
            }
            // A completion may have come between the last look and the arming.
            if self.poll_link()? {
                return Ok(());
            }
        }
        let longest = if self.filler.is_busy() {
            longest.min(FILL_LOOK)
        } else {
            longest.min(self.until_publishing().unwrap_or(longest))
        };
        self.woken_by_link = self.ring.sleep(longest)? == Woken::Extra;
        self.board.missed_wakeups.set(self.ring.missed_wakeups());
        Ok(())
    }

    /// How long what is mirrored may stay unpublished yet.
    fn until_publishing(&self) -> Option<Duration> {
        let at_us = self.link.as_ref().and(self.core.publish_at_us())?;
        let left = Duration::from_micros(at_us.saturating_sub(self.clock.now_us()));
        // A window that is full keeps it back: its completions wake.
        Some(left.max(FILL_LOOK))
    }

    /// Makes the link's completions wake [`Self::sleep`].
    ///
    /// # Errors
    /// [`Ended::Capture`].
    pub fn watch_link(&mut self) -> Result<(), Ended> {
        let fd = self.link.as_ref().and_then(|link| link.event_fd());
        // `drop_link` stops watching before the link, which owns the descriptor, goes.
        self.ring.watch(fd)?;
        Ok(())
    }

    fn drop_link(&mut self, error: &LinkError) -> Result<(), Ended> {
        tracing::warn!(volume = %self.board.name, %error, "the link to the mirror broke");
        self.ring.watch(None)?;
        self.link = None;
        Ok(())
    }

    fn take_records(&mut self) -> Result<bool, Ended> {
        let mut worked = false;
        while let Some(run) = self.ring.peek(RUN_BYTES)? {
            self.metas.clear();
            let (start, end) = (run.start.0, run.start.0 + run.bytes.len() as u64);
            for item in Records::new(run.bytes) {
                let (at, view) = item?;
                count(&self.board, &view);
                self.metas
                    .push(RecordMeta::of(&view, RingPos(start + at as u64)));
            }
            let mut seq = self.core.captured_seq();
            self.core.captured(&self.metas, self.clock.now_us())?;
            for meta in &self.metas {
                seq = seq.next();
                self.doubt.taken(meta);
                if let Some(mapper) = self.mapper {
                    tell_mapper(mapper, meta, seq);
                }
                if let Some(reason) = self.live.appended(seq, meta)? {
                    tracing::warn!(volume = %self.board.name, %seq, %reason, "a gap");
                    self.planner.want(CheckpointReason::Gap);
                    self.gap_in_log = Some((seq, reason.to_string()));
                }
            }
            self.ring.advance_to(RingPos(end))?;
            worked = true;
        }
        Ok(worked)
    }

    fn poll_link(&mut self) -> Result<bool, Ended> {
        let Some(link) = &mut self.link else {
            return Ok(false);
        };
        self.completed.clear();
        if let Err(error) = link.poll(&mut self.completed) {
            self.drop_link(&error)?;
            return Ok(true);
        }
        let now_us = self.clock.now_us();
        for id in &self.completed {
            if let Some(advance) = self.core.completed(*id, now_us)? {
                self.board
                    .latency(now_us.saturating_sub(advance.captured_us));
            }
        }
        Ok(!self.completed.is_empty())
    }

    fn act(&mut self) -> Result<bool, Ended> {
        let mut worked = false;
        while self.link.is_some() {
            let ring = &*self.ring;
            let crc = |pos, len: u32| ring.bytes(pos, len as usize).map_or(0, crc32c::crc32c);
            let Some(action) = self.core.next_action(crc) else {
                break;
            };
            worked = true;
            self.carry_out(action)?;
        }
        Ok(worked)
    }

    fn carry_out(&mut self, action: Action) -> Result<(), Ended> {
        match action {
            Action::Post {
                id,
                offset,
                head,
                body,
                ..
            } => {
                let body = match &body {
                    PostBody::None => Body::None,
                    PostBody::Ring { pos, len } => Body::Ring {
                        pos: *pos,
                        len: *len,
                    },
                    PostBody::Bytes(bytes) => Body::Bytes(bytes),
                };
                let post = Post {
                    id,
                    offset,
                    head: &head,
                    body,
                };
                if let Some(link) = &mut self.link
                    && let Err(error) = link.post(&post)
                {
                    self.drop_link(&error)?;
                }
            }
            Action::NeedFill {
                seq,
                op,
                identity,
                pos,
                len,
                fill_offset,
            } => {
                let epoch = self.core.epoch();
                self.filler.ask(Wanted {
                    epoch,
                    seq,
                    op,
                    identity,
                    pos,
                    len,
                    fill_offset,
                });
            }
            Action::ReleaseRing(position) => self.ring.release_to(position)?,
            Action::RegionHalf => self.planner.want(CheckpointReason::RegionHalf),
            Action::RegionFull => {
                tracing::warn!(volume = %self.board.name, "the region is full; a checkpoint will purge it");
                self.planner.want(CheckpointReason::RegionFull);
            }
        }
        Ok(())
    }

    /// Hands over bytes that were read, once every change they may show has its record taken: a
    /// change that the read saw had its record reserved before the read ended.
    fn see_fill(&mut self) -> Result<bool, Ended> {
        if self.filled.is_none()
            && let Some((wanted, read)) = self.filler.take()
            && wanted.epoch == self.core.epoch()
        {
            self.filled = Some((wanted, read?, self.ring.producer()));
        }
        let Some((wanted, bytes, end)) = self.filled.take() else {
            return Ok(false);
        };
        if self.core.captured_end() < end {
            self.filled = Some((wanted, bytes, end));
            return Ok(false);
        }
        let gone = bytes.len() < wanted.len as usize;
        let safe_at = self.core.captured_seq();
        if wanted.op == op::WRITE
            && let Some(mapper) = self.mapper
        {
            mapper.logged(wanted.identity, wanted.pos, &bytes, wanted.seq);
        }
        self.core
            .filled(wanted.seq, wanted.fill_offset, bytes, gone, safe_at)?;
        self.board.fills.add(1);
        Ok(true)
    }

    /// Begins a checkpoint if something asks for one.
    fn begin_checkpoint(&mut self) {
        if self.checkpointer.busy() {
            return;
        }
        let gaps = self.control.gaps();
        let rested = self
            .gap_checkpoint_at
            .is_none_or(|at| at.elapsed() >= GAP_CHECKPOINT_EVERY);
        // Also to settle them: see `proven`.
        if !self.is_settled(&gaps) && rested {
            self.planner.want(CheckpointReason::Gap);
        }
        if self.control.proofs_wanted() != self.proofs_at_checkpoint {
            self.planner.want(CheckpointReason::Requested);
        }
        let (now_us, age_us) = (self.clock.now_us(), self.core.oldest_unflushed_age_us());
        let Some(reason) = self.planner.poll(now_us, age_us) else {
            return;
        };
        let checkpoint = Checkpoint {
            epoch: self.core.epoch(),
            seq: self.core.captured_seq(),
            closed: false,
        };
        self.gaps_at_checkpoint = self.gaps_whole;
        self.proofs_at_checkpoint = self.proofs_whole;
        self.ring_at_checkpoint = self.core.captured_end();
        if reason == CheckpointReason::Gap {
            self.gap_checkpoint_at = Some(Instant::now());
        }
        tracing::debug!(volume = %self.board.name, seq = %checkpoint.seq, ?reason, "checkpoint begins");
        if let Some(mapper) = self.mapper {
            mapper.look();
        }
        let mending = self.mending();
        if !self
            .checkpointer
            .begin(checkpoint, self.clock.time_ns(), mending)
        {
            self.not_proven(&CheckpointError::Gone);
        }
    }

    fn see_checkpoint(&mut self) -> Result<bool, Ended> {
        let Some((checkpoint, result)) = self.checkpointer.outcome() else {
            return Ok(false);
        };
        if checkpoint.epoch != self.core.epoch() {
            return Ok(true);
        }
        match result {
            Ok(()) if self.is_believed() => self.proven(checkpoint)?,
            Ok(()) => self.not_proven(&CheckpointError::WriteBack),
            Err(error) => self.not_proven(&error),
        }
        Ok(true)
    }

    fn proven(&mut self, checkpoint: Checkpoint) -> Result<(), Ended> {
        self.board.proved();
        self.checkpoint_failure = None;
        self.planner.succeeded(self.clock.now_us());
        self.gaps_proven = self.gaps_at_checkpoint;
        self.control.acknowledge_gaps(&self.gaps_proven);
        self.gatekeeper.proven_to(self.ring_at_checkpoint);
        // A page of a mapping that was noticed before this checkpoint began could be changed unseen until
        // the checkpoint had written it, also after a newer record of the same page. The next checkpoint
        // covers that record.
        let settled = self.gaps_proven_before.replace(self.gaps_proven);
        if settled.is_some() {
            self.control.settle_gaps(settled.as_ref());
        }
        self.gap_in_log = self
            .gap_in_log
            .take()
            .filter(|(seq, _)| *seq > checkpoint.seq);
        if !self.begun && self.control.gaps_settled().is_some() {
            self.begun = true;
            tracing::info!(
                volume = %self.board.name, epoch = %self.core.epoch(),
                "the first checkpoints are proven: every change is mirrored from here on"
            );
        }
        self.core
            .checkpoint_mark(checkpoint.seq, self.clock.time_ns())?;
        self.live.checkpoint(checkpoint.seq)?;
        if let Some(mapper) = self.mapper {
            mapper.proven(checkpoint.seq);
        }
        Ok(())
    }

    fn not_proven(&mut self, error: &CheckpointError) {
        self.board.checkpoint_failures.add(1);
        let retry = self.planner.failed(self.clock.now_us());
        let (failures, after_ms) = (retry.failures, retry.after_us / 1000);
        tracing::error!(volume = %self.board.name, %error, failures, after_ms, "checkpoint failed");
        self.checkpoint_failure = Some(error.to_string());
    }
}
