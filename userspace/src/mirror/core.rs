//! The sender's brain: which bytes go where in the region, what has arrived, what may be reused.
//!
//! Inputs are methods (records, fills, completions, purges, time); outputs are [`Action`]s pulled by
//! [`MirrorCore::next_action`] until it returns `None`. Everything that goes to the peer is a
//! [`Action::Post`] on one ordered link, so a later post never overtakes an earlier one.
//!
//! What holds at every moment, and what the model test checks:
//! - a scan of the peer's memory finds at least what was told as mirrored, at most what was captured;
//! - ring space is released only after the frames that carry it (and its fill) have completed;
//! - log space is reused only after the write of a head beyond it has completed;
//! - the published `mirrored` line is never ahead of the memory, and never behind a published head;
//!   it is behind what is mirrored by no more than [`PUBLISH_EVERY_US`] and [`PUBLISH_BYTES`].
//!
//! It must never read a clock, a ring or a socket, and never wait.

mod fill;
mod link;
mod post;
mod space;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use thiserror::Error;

use crate::ids::{Epoch, Identity, Lsn, RingPos, Seq};
use crate::link::PostId;
use crate::record::{RecordMeta, op};
use crate::region::layout::{CheckpointMark, FRAME_BODY_BYTES_MAX, LOG_BYTES_MIN};
use crate::region::scan::{LogEnd, Tail};
use fill::{OpenFill, UnsafeFills};
use post::InFlight;
pub use post::{PUBLISH_BYTES, PUBLISH_EVERY_US, PostBody, PostKind};
use space::Space;

/// Unflushed batches captured within this time of each other are told as one, the older.
const UNFLUSHED_MERGE_US: u64 = 10_000;

/// What the driver is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write `head` and `body` side by side at `offset` of the region, in this order of actions.
    Post {
        /// To be handed back by [`MirrorCore::completed`].
        id: PostId,
        /// Offset in the region.
        offset: u64,
        /// The sealed header, or the whole line.
        head: [u8; 64],
        /// What follows it.
        body: PostBody,
        /// What it is, for logs and metrics.
        kind: PostKind,
    },
    /// Read these bytes of the file from the page cache, or of its extended state, then take all committed records from the
    /// ring, then call [`MirrorCore::filled`].
    NeedFill {
        /// The record that lacks bytes.
        seq: Seq,
        /// WRITE or EXTENDED: what is to be read.
        op: u8,
        /// Its inode.
        identity: Identity,
        /// Offset in the file.
        pos: u64,
        /// Bytes, at most [`FRAME_BODY_BYTES_MAX`].
        len: u32,
        /// Where they belong in the record's data.
        fill_offset: u32,
    },
    /// Ring space before this position is no longer needed.
    ReleaseRing(RingPos),
    /// Half of the log is taken: a checkpoint would free it. Told once for each position of the head.
    RegionHalf,
    /// A frame does not fit until something is purged: hold the writers or close the epoch. Told once
    /// for each position of the head.
    RegionFull,
}

/// A breach of the protocol between the core and its driver or its peer. The epoch cannot go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CoreError {
    /// A log size that the format does not have.
    #[error(
        "a log of {log_bytes} bytes: it must be a multiple of 4096 and at least {LOG_BYTES_MIN}"
    )]
    LogBytes {
        /// The size.
        log_bytes: u64,
    },
    /// A window without room for a frame beside the two status lines.
    #[error("a window of {window} posts: it must be at least 3")]
    Window {
        /// The window.
        window: usize,
    },
    /// Records that do not follow each other in the ring.
    #[error(
        "record {seq} begins at ring position {found}, {expected} must follow: the ring was read with a hole"
    )]
    Hole {
        /// The number it would have had.
        seq: Seq,
        /// Where the record before it ended.
        expected: RingPos,
        /// Where it begins.
        found: RingPos,
    },
    /// A record that no frame can carry.
    #[error(
        "record {seq} spans {span} bytes; a record spans a multiple of 64 up to {FRAME_BODY_BYTES_MAX}"
    )]
    Span {
        /// Its number.
        seq: Seq,
        /// Its span.
        span: u32,
    },
    /// A fill of another length than was asked for.
    #[error("fill of record {seq}: {found} bytes were read where {expected} were asked for")]
    FillLength {
        /// The record.
        seq: Seq,
        /// Bytes asked for.
        expected: u32,
        /// Bytes given.
        found: usize,
    },
    /// A fill whose `safe_at` is impossible.
    #[error(
        "fill of record {seq}: safe_at {safe_at} is before the record or beyond the last captured {captured}"
    )]
    SafeAt {
        /// The record.
        seq: Seq,
        /// What was given.
        safe_at: Seq,
        /// Last record captured.
        captured: Seq,
    },
    /// A completion that is not the next one due.
    #[error("post {found} completed, {expected:?} was due: the link lost or reordered completions")]
    Completion {
        /// The post that completed.
        found: u64,
        /// The oldest post in flight.
        expected: Option<u64>,
    },
    /// A purge of what was never captured.
    #[error("purge to record {seq}, but {captured} is the last captured")]
    Purge {
        /// How far.
        seq: Seq,
        /// Last record captured.
        captured: Seq,
    },
    /// A tail that does not continue what this core sent.
    #[error(
        "the peer's region does not continue this log: {what} is {found}, {expected} was sent or acknowledged"
    )]
    Tail {
        /// What differs.
        what: &'static str,
        /// In the region.
        found: u64,
        /// Here.
        expected: u64,
    },
}

/// What a completion moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Last record now mirrored.
    pub mirrored: Seq,
    /// Records that became mirrored by it.
    pub records: u64,
    /// When the oldest of them was captured, on the clock of [`MirrorCore::tick`].
    pub captured_us: u64,
}

/// Records captured together.
#[derive(Clone, Copy, Debug)]
struct Batch {
    last_seq: Seq,
    captured_us: u64,
}

/// The sender of one epoch of one volume.
#[derive(Clone, Debug)]
pub struct MirrorCore {
    epoch: Epoch,
    window: usize,
    now_us: u64,
    time_ns: i64,
    /// Records whose ring space is not released; the last one is `captured`.
    records: VecDeque<RecordMeta>,
    records_bytes: u64,
    captured: Seq,
    captured_end: RingPos,
    /// Where the next frame goes; `ring_pos_end` is always known here.
    end: LogEnd,
    next_ring_pos: RingPos,
    fill: Option<OpenFill>,
    mark: Option<CheckpointMark>,
    mark_posted: bool,
    in_flight: VecDeque<InFlight>,
    next_id: u64,
    mirrored: Seq,
    mirrored_lsn: Lsn,
    /// What the `mirrored` line last posted says, and whether that post is in flight.
    published: Option<(Lsn, Seq)>,
    published_us: u64,
    publishing: bool,
    purged: Seq,
    space: Space,
    /// When the last head was posted.
    head_us: u64,
    release: RingPos,
    released: RingPos,
    unsafe_fills: UnsafeFills,
    half_told: bool,
    full: bool,
    full_told: bool,
    unmirrored: VecDeque<Batch>,
    unflushed: VecDeque<Batch>,
}

impl MirrorCore {
    /// A sender that goes on at `tail`: [`Tail::of_epoch`] for a new epoch, or the mirror's scan after a
    /// restart of this agent. The next record it takes is the one at the tail's ring position.
    ///
    /// # Errors
    /// [`CoreError::LogBytes`], [`CoreError::Window`], or [`CoreError::Tail`] when the tail's numbers contradict each other.
    pub fn new(tail: &Tail, window: usize, now_us: u64) -> Result<Self, CoreError> {
        if tail.log_bytes < LOG_BYTES_MIN || !tail.log_bytes.is_multiple_of(4096) {
            return Err(CoreError::LogBytes {
                log_bytes: tail.log_bytes,
            });
        }
        Self::build(tail, window, now_us)
    }

    /// [`MirrorCore::new`] without the limit on the log's size, for the simulator.
    ///
    /// # Errors
    /// As [`MirrorCore::new`].
    #[cfg(feature = "faults")]
    pub fn with_small_log(tail: &Tail, window: usize, now_us: u64) -> Result<Self, CoreError> {
        Self::build(tail, window, now_us)
    }

    /// [`MirrorCore::new`] without the limit on the log's size, so that tests can use small logs.
    fn build(tail: &Tail, window: usize, now_us: u64) -> Result<Self, CoreError> {
        if window < 3 {
            return Err(CoreError::Window { window });
        }
        let ring_pos = link::check_tail(tail)?;
        let captured = Seq(tail.end.next_seq.0 - 1);
        let mirrored = tail.last_complete_seq();
        let purged = Seq(tail.head.seq.0 - 1);
        // When these records were captured is not known any more; their age counts from now.
        let restarted = Batch {
            last_seq: captured,
            captured_us: now_us,
        };
        let unflushed = (captured > purged)
            .then_some(restarted)
            .into_iter()
            .collect();
        let mut unsafe_fills = UnsafeFills::default();
        // Where that record began is not known any more.
        unsafe_fills.note(tail.cut.next(), RingPos(0), tail.safe_at);
        let unmirrored = (captured > mirrored)
            .then_some(restarted)
            .into_iter()
            .collect();
        Ok(Self {
            epoch: tail.epoch,
            window,
            now_us,
            time_ns: 0,
            records: VecDeque::new(),
            records_bytes: 0,
            captured,
            captured_end: ring_pos,
            end: tail.end,
            next_ring_pos: ring_pos,
            fill: tail.pending_fill.map(OpenFill::new),
            mark: None,
            mark_posted: false,
            in_flight: VecDeque::new(),
            next_id: 1,
            mirrored,
            mirrored_lsn: tail.end.lsn,
            published: None,
            published_us: 0,
            publishing: false,
            head_us: 0,
            purged,
            space: Space::new(tail),
            release: if tail.pending_fill.is_some() {
                RingPos(0)
            } else {
                ring_pos
            },
            released: RingPos(0),
            unsafe_fills,
            half_told: false,
            full: false,
            full_told: false,
            unmirrored,
            unflushed,
        })
    }

    /// Tells the time: `now_us` of a clock that never goes back, `time_ns` since 1970.
    pub fn tick(&mut self, now_us: u64, time_ns: i64) {
        self.now_us = self.now_us.max(now_us);
        self.time_ns = time_ns;
    }

    /// Takes committed records, in ring order, each where the one before it ended.
    ///
    /// # Errors
    /// [`CoreError::Hole`], [`CoreError::Span`]: the epoch must be closed.
    pub fn captured(&mut self, records: &[RecordMeta], now_us: u64) -> Result<(), CoreError> {
        self.now_us = self.now_us.max(now_us);
        for record in records {
            let seq = self.captured.next();
            if record.ring_pos != self.captured_end {
                let (expected, found) = (self.captured_end, record.ring_pos);
                return Err(CoreError::Hole {
                    seq,
                    expected,
                    found,
                });
            }
            let span = record.span;
            if span < 64 || !span.is_multiple_of(64) || span > FRAME_BODY_BYTES_MAX {
                return Err(CoreError::Span { seq, span });
            }
            self.captured = seq;
            self.captured_end = record.ring_end();
            self.records_bytes += weight(record);
            self.records.push_back(*record);
        }
        if !records.is_empty() {
            let batch = Batch {
                last_seq: self.captured,
                captured_us: self.now_us,
            };
            self.unmirrored.push_back(batch);
            match self.unflushed.back_mut() {
                Some(last) if self.now_us - last.captured_us < UNFLUSHED_MERGE_US => {
                    last.last_seq = self.captured;
                }
                _ => self.unflushed.push_back(batch),
            }
        }
        Ok(())
    }

    /// A checkpoint has proven everything up to `seq` durable: the log is to say so, once it has
    /// come that far. Purging is separate: [`MirrorCore::purge_to`].
    ///
    /// # Errors
    /// [`CoreError::Purge`] for what was never captured.
    pub fn checkpoint_mark(&mut self, seq: Seq, time_ns: i64) -> Result<(), CoreError> {
        self.check_captured(seq)?;
        self.mark = Some(CheckpointMark {
            seq: seq.0,
            time_ns,
        });
        self.mark_posted = false;
        Ok(())
    }

    /// Everything up to `seq` is durable and may leave the region.
    ///
    /// # Errors
    /// [`CoreError::Purge`] for what was never captured.
    pub fn purge_to(&mut self, seq: Seq) -> Result<(), CoreError> {
        self.check_captured(seq)?;
        self.purged = self.purged.max(seq);
        while self
            .unflushed
            .front()
            .is_some_and(|b| b.last_seq <= self.purged)
        {
            self.unflushed.pop_front();
        }
        self.abandon_fill();
        self.space
            .purge(self.purged, &self.end, self.fill.is_some());
        Ok(())
    }

    fn check_captured(&self, seq: Seq) -> Result<(), CoreError> {
        if seq > self.captured {
            return Err(CoreError::Purge {
                seq,
                captured: self.captured,
            });
        }
        Ok(())
    }

    /// Notes that the log is complete up to `seq` and the ring needed only from `release` on.
    fn advance(&mut self, seq: Seq, release: RingPos) -> Option<Advance> {
        self.release = self.release.max(release);
        while self
            .records
            .front()
            .is_some_and(|r| r.ring_end() <= self.release)
        {
            if let Some(record) = self.records.pop_front() {
                self.records_bytes -= weight(&record);
            }
        }
        if seq <= self.mirrored {
            return None;
        }
        let records = seq.0 - self.mirrored.0;
        self.mirrored = seq;
        self.unsafe_fills.complete(seq);
        let captured_us = self
            .unmirrored
            .front()
            .map_or(self.now_us, |batch| batch.captured_us);
        while self.unmirrored.front().is_some_and(|b| b.last_seq <= seq) {
            self.unmirrored.pop_front();
        }
        Some(Advance {
            mirrored: seq,
            records,
            captured_us,
        })
    }

    /// Last record in the ring.
    #[must_use]
    pub fn captured_seq(&self) -> Seq {
        self.captured
    }

    /// Where the next record of the ring begins.
    #[must_use]
    pub fn captured_end(&self) -> RingPos {
        self.captured_end
    }

    /// Last record in the peer's region, with all its bytes.
    #[must_use]
    pub fn mirrored_seq(&self) -> Seq {
        self.mirrored
    }

    /// The ring position up to which every record is in the peer's region, with all its bytes and
    /// inside the cut: a replay would show all of it. What the marks before it confirm cannot be
    /// undone. It never goes back.
    #[must_use]
    pub fn gate_open_to(&self) -> RingPos {
        self.unsafe_fills
            .before(self.mirrored)
            .unwrap_or(self.release)
    }

    /// Last record that may have left the region because it is durable.
    #[must_use]
    pub fn purged_seq(&self) -> Seq {
        self.purged
    }

    /// Records captured and not yet mirrored.
    #[must_use]
    pub fn lag_records(&self) -> u64 {
        self.captured.0 - self.mirrored.0
    }

    /// Bytes of these records, with those that are still to be filled.
    #[must_use]
    pub fn lag_bytes(&self) -> u64 {
        self.records_bytes
    }

    /// Age of the oldest of them, 0 if there is none.
    #[must_use]
    pub fn lag_us(&self) -> u64 {
        self.unmirrored
            .front()
            .map_or(0, |batch| self.now_us - batch.captured_us)
    }

    /// Bytes of the log that are not purged.
    #[must_use]
    pub fn unpurged_bytes(&self) -> u64 {
        self.end.lsn.0 - self.space.target().lsn.0
    }

    /// Age of the oldest record that is not known durable, 0 if there is none.
    #[must_use]
    pub fn oldest_unflushed_age_us(&self) -> u64 {
        self.unflushed
            .front()
            .map_or(0, |batch| self.now_us - batch.captured_us)
    }

    /// Posts without a completion.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a frame waits for space in the region.
    #[must_use]
    pub fn is_region_full(&self) -> bool {
        self.full
    }

    /// The epoch it sends.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

/// What a record costs on the wire: its span, and its bytes if they come later.
fn weight(record: &RecordMeta) -> u64 {
    // How much an extended state takes is known when it is read; it is little.
    let later = if record.needs_fill() && record.op == op::WRITE {
        record.data_len
    } else {
        0
    };
    u64::from(record.span) + u64::from(later)
}
