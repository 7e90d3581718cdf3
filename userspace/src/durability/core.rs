//! The purge rule: how far the region's head may move.
//!
//! Records leave in order, so what counts is the longest prefix in which every record's effect is
//! proven durable. What proves which effect of a record:
//!
//! | effect | proof, besides a checkpoint's S |
//! |---|---|
//! | bytes of a WRITE | fsync marks of that inode over that range |
//! | size | a mark of that inode over the full range |
//! | times, mode, owner | a mark over the full range without the datasync flag |
//! | a name | none |
//! | an inode without a name (`O_TMPFILE`) | none |
//!
//! A mark counts for records before the ring position at its call's entry, and not at all for an inode
//! without links or one whose write-back failed before. Every WRITE also sets the mtime, so none is covered before a full mark without the
//! datasync flag, and such a mark proves its bytes and size too: one position for each inode says it
//! all. Marks over a part, and fdatasync, matter to the replay, which clips by them, and purge nothing.
//!
//! An `O_TMPFILE` inode that was linked later has a trap: a checkpoint between the two proves the
//! inode, but as an orphan, which the next mount removes. So its TMPFILE record stays until its LINK is
//! proven, and a LINK whose TMPFILE has left already is a gap. So is one behind a checkpoint that was to
//! cover an uncaptured change: that may have been one of the orphan's.
//!
//! It must never take a record as covered because a later one is.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use thiserror::Error;

use crate::faults::{Fault, injected};
use crate::ids::{Identity, RingPos, Seq};
use crate::record::{RecordMeta, flag, op};

/// Where the range of a whole-file fsync ends (`LLONG_MAX`); marks may also say -1.
const FULL_RANGE_END: u64 = i64::MAX as u64;

/// A breach of the protocol between the log and its driver.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LiveError {
    /// Records that do not follow each other.
    #[error("record {found} follows record {last}: records must be appended in order")]
    Order {
        /// What was appended.
        found: Seq,
        /// The last one before it.
        last: Seq,
    },
    /// A checkpoint of what was never captured.
    #[error("a checkpoint up to record {seq}, but {last} is the last captured")]
    Checkpoint {
        /// Its S.
        seq: Seq,
        /// Last record appended.
        last: Seq,
    },
}

/// Why the region cannot bring back a change although all its records were captured.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum GapReason {
    /// An `O_TMPFILE` inode got its first name after its creation had been purged.
    #[error("inode {identity} got its first name after its creation had left the region")]
    LinkOfPurgedTmpfile {
        /// The inode.
        identity: Identity,
    },
    /// An `O_TMPFILE` inode got its first name after a checkpoint that was to cover an uncaptured change,
    /// which may have been its own: no checkpoint makes durable what has no name.
    #[error(
        "inode {identity} got its first name after a checkpoint that had to cover uncaptured changes"
    )]
    LinkBehindGap {
        /// The inode.
        identity: Identity,
    },
}

/// What covers a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nothing: it has no effect of its own.
    Nothing,
    /// A full mark of its inode, or a checkpoint.
    FullMark,
    /// A checkpoint.
    Checkpoint,
    /// A checkpoint of it, and of the LINK that named it if there is one.
    Tmpfile,
}

#[derive(Clone, Copy, Debug)]
struct Live {
    ring_pos: RingPos,
    identity: Identity,
    need: Need,
    /// WRITE: where its bytes lie in the file.
    pos: u64,
    data_len: u32,
}

/// What is known of an inode that has live records.
#[derive(Clone, Copy, Debug, Default)]
struct Inode {
    /// Live records that need it here.
    records: u64,
    /// Its TMPFILE record, if that is live.
    tmpfile: Option<Seq>,
    /// The LINK that gave it its first name.
    named_at: Option<Seq>,
    /// All its records before this position are proven by a full mark.
    proven: RingPos,
}

/// The records that are not known to be durable.
#[derive(Clone, Debug)]
pub struct LiveLog {
    live: VecDeque<Live>,
    inodes: HashMap<Identity, Inode>,
    /// First record that is not purgeable.
    first: Seq,
    /// Number of `live`'s first record; the records between `first` and it are of an earlier agent, which
    /// alone knew what they are: only a checkpoint covers them.
    known_from: Seq,
    /// Largest S.
    checkpoint: Seq,
    /// A change was noticed and not captured, as far as the log of this agent or an earlier one knows.
    gapped: bool,
}

/// How many bytes of the inode's content a record tells of: also those that are stored only later, through a
/// mapping.
fn changed_bytes(meta: &RecordMeta) -> u32 {
    match (meta.op, meta.data_len) {
        (op::WRITE, 0) if meta.flags & flag::MAPPED != 0 => {
            u32::try_from(meta.arg).unwrap_or(u32::MAX)
        }
        (op::WRITE, bytes) => bytes,
        _ => 0,
    }
}

impl LiveLog {
    /// A log whose records from `first` on are not purged and which goes on with `next`; the two are
    /// equal for a new epoch, and come from the region's head and end after a restart.
    #[must_use]
    pub fn new(first: Seq, next: Seq) -> Self {
        Self {
            live: VecDeque::new(),
            inodes: HashMap::new(),
            first: first.min(next),
            known_from: next,
            checkpoint: Seq(0),
            gapped: next > Seq(1),
        }
    }

    /// Last record appended.
    #[must_use]
    pub fn last(&self) -> Seq {
        Seq(self.known_from.0 + self.live.len() as u64 - 1)
    }

    /// Takes the next record. An FSYNC is also a mark: see [`LiveLog::fsync_mark`].
    ///
    /// # Errors
    /// [`LiveError::Order`].
    pub fn appended(
        &mut self,
        seq: Seq,
        meta: &RecordMeta,
    ) -> Result<Option<GapReason>, LiveError> {
        let last = self.last();
        if seq != last.next() {
            return Err(LiveError::Order { found: seq, last });
        }
        let identity = meta.identity;
        let need = match meta.op {
            op::FSYNC | op::GAP => Need::Nothing,
            op::WRITE | op::SETATTR | op::EXTENDED => Need::FullMark,
            op::TMPFILE => Need::Tmpfile,
            _ => Need::Checkpoint,
        };
        let mut gap = None;
        self.gapped |= meta.op == op::GAP;
        match need {
            Need::FullMark => self.inodes.entry(identity).or_default().records += 1,
            Need::Tmpfile => {
                let inode = self.inodes.entry(identity).or_default();
                inode.records += 1;
                (inode.tmpfile, inode.named_at) = (Some(seq), None);
            }
            Need::Checkpoint if meta.op == op::LINK && meta.flags & flag::FROM_TMPFILE != 0 => {
                let inode = self.inodes.get_mut(&identity);
                match inode.and_then(|inode| Some((inode.tmpfile?, inode))) {
                    Some((made_at, inode)) => {
                        inode.named_at = Some(seq);
                        if self.gapped && made_at <= self.checkpoint {
                            gap = Some(GapReason::LinkBehindGap { identity });
                        }
                    }
                    None => gap = Some(GapReason::LinkOfPurgedTmpfile { identity }),
                }
            }
            Need::Checkpoint | Need::Nothing => {}
        }
        self.live.push_back(Live {
            ring_pos: meta.ring_pos,
            identity,
            need,
            pos: meta.pos,
            data_len: changed_bytes(meta),
        });
        if meta.op == op::FSYNC {
            self.fsync_mark(
                identity,
                meta.pos,
                meta.size_after,
                meta.flags,
                if injected(Fault::EntryPositionIgnored) {
                    meta.ring_pos
                } else {
                    RingPos(meta.arg)
                },
            );
        }
        Ok(gap)
    }

    /// An fsync-class call succeeded on `first_byte..=last_byte` of an inode; it counts for records
    /// before `before`, the ring position at its entry.
    pub fn fsync_mark(
        &mut self,
        identity: Identity,
        first_byte: u64,
        last_byte: u64,
        flags: u8,
        before: RingPos,
    ) {
        let full = first_byte == 0 && last_byte >= FULL_RANGE_END;
        let mut without = flag::DATASYNC | flag::UNLINKED | flag::TAINTED;
        if injected(Fault::DatasyncPurgesAttributes) {
            without &= !flag::DATASYNC;
        }
        if injected(Fault::UnlinkedPurged) {
            without &= !flag::UNLINKED;
        }
        if injected(Fault::TaintIgnored) {
            without &= !flag::TAINTED;
        }
        if !full && !injected(Fault::RangePurgesInode) || flags & without != 0 {
            return;
        }
        // An inode without live records has nothing to prove; later records are behind `before`.
        if let Some(inode) = self.inodes.get_mut(&identity) {
            inode.proven = inode.proven.max(before);
        }
    }

    /// A checkpoint has proven everything up to `seq`.
    ///
    /// # Errors
    /// [`LiveError::Checkpoint`] for what was never appended.
    pub fn checkpoint(&mut self, seq: Seq) -> Result<(), LiveError> {
        let last = self.last();
        if seq > last {
            return Err(LiveError::Checkpoint { seq, last });
        }
        self.checkpoint = self.checkpoint.max(seq);
        if injected(Fault::CheckpointPurgesOneMore) {
            self.checkpoint = self.checkpoint.next().min(last);
        }
        Ok(())
    }

    /// The last record that may leave the region: it and all before it are covered.
    pub fn purgeable(&mut self) -> Seq {
        if self.first < self.known_from {
            self.first = self.first.max(self.checkpoint.next()).min(self.known_from);
        }
        while self.first == self.known_from
            && self
                .live
                .front()
                .is_some_and(|record| self.is_covered(self.first, record))
        {
            if let Some(record) = self.live.pop_front() {
                self.forget(&record);
            }
            self.first = self.first.next();
            self.known_from = self.first;
        }
        Seq(self.first.0 - 1)
    }

    /// Where unproven bytes lie, by inode; `None` if there may be others: records of an earlier agent,
    /// of which this one knows nothing.
    #[must_use]
    pub fn unproven_bytes(&self) -> Option<BTreeMap<Identity, Vec<Range<u64>>>> {
        if self.first < self.known_from {
            return None;
        }
        let mut bytes: BTreeMap<Identity, Vec<Range<u64>>> = BTreeMap::new();
        for live in self.live.iter().filter(|live| live.data_len > 0) {
            let range = live.pos..live.pos.saturating_add(live.data_len.into());
            bytes.entry(live.identity).or_default().push(range);
        }
        for ranges in bytes.values_mut() {
            *ranges = merged(std::mem::take(ranges));
        }
        Some(bytes)
    }

    /// Records that are held.
    #[must_use]
    pub fn live_records(&self) -> usize {
        self.live.len()
    }

    /// Inodes that are held.
    #[must_use]
    pub fn live_inodes(&self) -> usize {
        self.inodes.len()
    }

    fn is_covered(&self, seq: Seq, record: &Live) -> bool {
        let by_checkpoint = seq <= self.checkpoint;
        let inode = self.inodes.get(&record.identity);
        match record.need {
            Need::Nothing => true,
            Need::FullMark => {
                by_checkpoint || inode.is_some_and(|inode| record.ring_pos < inode.proven)
            }
            Need::Checkpoint => by_checkpoint,
            Need::Tmpfile => {
                let named_at = inode.and_then(|inode| inode.named_at);
                by_checkpoint && named_at.is_none_or(|seq| seq <= self.checkpoint)
            }
        }
    }

    fn forget(&mut self, record: &Live) {
        if !matches!(record.need, Need::FullMark | Need::Tmpfile) {
            return;
        }
        if let Some(inode) = self.inodes.get_mut(&record.identity) {
            if record.need == Need::Tmpfile {
                inode.tmpfile = None;
            }
            inode.records -= 1;
            if inode.records == 0 {
                self.inodes.remove(&record.identity);
            }
        }
    }
}

/// Ranges in order, those that touch made into one.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}
