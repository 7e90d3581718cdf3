//! The log's space: which frames are there, and where the head may go.

use std::collections::VecDeque;

use crate::faults::{Fault, injected};
use crate::ids::{Lsn, RingPos, Seq};
use crate::region::layout::FRAME_HEADER_BYTES;
use crate::region::scan::{LogEnd, Tail};

/// Kept free by all but the frame that ends an abandoned fill, so that a full log cannot lock itself.
const RESERVE_BYTES: u64 = 4096;
/// The same for logs smaller than any that a product has.
const RESERVE_BYTES_MIN: u64 = 128;

/// A place where the log may begin: what a head slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeadPoint {
    pub(super) lsn: Lsn,
    pub(super) seq: Seq,
    pub(super) previous_crc32c: u32,
    pub(super) ring_pos: RingPos,
}

impl HeadPoint {
    pub(super) fn at(end: &LogEnd) -> Self {
        Self {
            lsn: end.lsn,
            seq: end.next_seq,
            previous_crc32c: end.last_header_crc,
            ring_pos: end.ring_pos_end.unwrap_or_default(),
        }
    }
}

/// A posted frame (after a restart: all frames before it as one).
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: HeadPoint,
    /// A fill is open where it starts, so the log cannot begin here.
    fill_open: bool,
    /// Purged when this record is.
    last_seq: Seq,
    completed: bool,
}

/// Where a frame can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Here, with a body of at most this many bytes.
    Here(u64),
    /// At the log's start, after a PAD that takes this many bytes.
    AfterPad(u64),
    /// Nowhere until something is purged.
    Full,
}

/// The frames from the head on.
#[derive(Clone, Debug)]
pub(super) struct Space {
    pub(super) log_bytes: u64,
    frames: VecDeque<Entry>,
    /// Index of the first entry without a completion, counted from the first entry ever.
    popped: u64,
    completed: u64,
    target: HeadPoint,
    /// What the last posted head slot says.
    posted: Lsn,
    /// What the last completed head slot says: space before it may be overwritten.
    safe: Lsn,
    /// Slot for the next head.
    pub(super) slot: u8,
    /// A head slot is in flight.
    pub(super) writing: bool,
}

impl Space {
    pub(super) fn new(tail: &Tail) -> Self {
        let head = &tail.head;
        let start = HeadPoint {
            lsn: head.lsn,
            seq: head.seq,
            previous_crc32c: head.previous_crc32c,
            ring_pos: head.ring_pos.unwrap_or_default(),
        };
        let mut frames = VecDeque::new();
        if tail.end.lsn > head.lsn {
            let last_seq = Seq(tail.end.next_seq.0 - 1);
            frames.push_back(Entry {
                start,
                fill_open: false,
                last_seq,
                completed: true,
            });
        }
        Self {
            log_bytes: tail.log_bytes,
            completed: frames.len() as u64,
            frames,
            popped: 0,
            target: start,
            posted: head.lsn,
            safe: head.lsn,
            slot: head.slot.map_or(0, |slot| 1 - slot.min(1)),
            writing: false,
        }
    }

    /// Where a frame with this body can go when the log ends at `end`.
    pub(super) fn place(&self, end: Lsn, body_len: u64, use_reserve: bool) -> Place {
        let reserve = if use_reserve {
            0
        } else {
            (self.log_bytes / 8).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES)
        };
        let taken = if injected(Fault::SpaceReusedBeforeHead) {
            end.0 - self.target.lsn.0
        } else {
            end.0 - self.safe.0
        };
        let free = self.log_bytes.saturating_sub(taken + reserve);
        let to_end = self.log_bytes - end.0 % self.log_bytes;
        let need = FRAME_HEADER_BYTES + body_len.next_multiple_of(64);
        if need > to_end {
            if to_end + need > free {
                Place::Full
            } else {
                Place::AfterPad(to_end)
            }
        } else if need > free {
            Place::Full
        } else {
            Place::Here(to_end.min(free) - FRAME_HEADER_BYTES)
        }
    }

    /// Notes a frame that was posted where the log ended.
    pub(super) fn push(&mut self, start: HeadPoint, fill_open: bool, last_seq: Seq) {
        self.frames.push_back(Entry {
            start,
            fill_open,
            last_seq,
            completed: false,
        });
    }

    /// Notes that the oldest frame in flight has completed.
    pub(super) fn complete_next(&mut self) {
        let index = (self.completed - self.popped) as usize;
        if let Some(entry) = self.frames.get_mut(index) {
            entry.completed = true;
            self.completed += 1;
        }
    }

    /// Moves the wanted head over completed frames whose records are purged, to a frame's start.
    pub(super) fn purge(&mut self, purged: Seq, end: &LogEnd, fill_open: bool) {
        let mut drop = 0;
        for (index, entry) in self.frames.iter().enumerate() {
            if !entry.completed || entry.last_seq > purged {
                break;
            }
            let (next, open) = self
                .frames
                .get(index + 1)
                .map_or((HeadPoint::at(end), fill_open), |next| {
                    (next.start, next.fill_open)
                });
            if !open {
                self.target = next;
                drop = index + 1;
            }
        }
        self.frames.drain(..drop);
        self.popped += drop as u64;
    }

    /// The head as it should be.
    pub(super) fn target(&self) -> HeadPoint {
        self.target
    }

    /// The head to be written now, if it should move and no slot is in flight.
    pub(super) fn head_due(&self) -> Option<HeadPoint> {
        (!self.writing && self.target.lsn > self.posted).then_some(self.target)
    }

    /// Notes that a head slot was posted.
    pub(super) fn head_posted(&mut self, lsn: Lsn) {
        self.posted = lsn;
        self.writing = true;
        self.slot = 1 - self.slot;
    }

    /// Notes that it completed.
    pub(super) fn head_completed(&mut self, lsn: Lsn) {
        self.safe = lsn;
        self.writing = false;
    }

    /// Bytes that may not be overwritten when the log ends at `end`.
    pub(super) fn taken(&self, end: Lsn) -> u64 {
        end.0 - self.safe.0
    }

    /// First byte that may not be overwritten.
    pub(super) fn safe(&self) -> Lsn {
        self.safe
    }

    /// Last head posted.
    pub(super) fn posted(&self) -> Lsn {
        self.posted
    }

    /// Where the first frame at or after `lsn` starts.
    pub(super) fn start_from(&self, lsn: Lsn) -> Option<HeadPoint> {
        let index = self.frames.partition_point(|entry| entry.start.lsn < lsn);
        self.frames.get(index).map(|entry| entry.start)
    }

    /// Goes on after a lost link: the frames before the tail arrived, the others are forgotten.
    pub(super) fn relink(&mut self, tail: &Tail) {
        let keep = self
            .frames
            .partition_point(|entry| entry.start.lsn < tail.end.lsn);
        self.frames.truncate(keep);
        for entry in &mut self.frames {
            entry.completed = true;
        }
        self.completed = self.popped + self.frames.len() as u64;
        self.posted = tail.head.lsn;
        self.safe = tail.head.lsn;
        self.slot = tail.head.slot.map_or(0, |slot| 1 - slot.min(1));
        self.writing = false;
    }
}
