//! Reading a region that may be damaged, truncated, foreign, stale or hostile, and finding the cut.
//!
//! [`scan`] walks the frames from the head and accepts only what the writer can have written next:
//! the expected lsn, epoch, seq, ring position and chain of header checksums. It stops at the first
//! frame that does not fit; that is the log's end, unless the owner published that the log goes
//! further, and then it is damage. Payloads stay where they are: records carry offsets into the log.
//!
//! It must never trust a length before its checksum and its limit, never panic, never take more
//! steps than the log has 64-byte lines, and never call a damaged log whole.

mod frames;
mod records;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::FromBytes;

use super::layout::{
    HEAD_OFFSETS, HeadSlot, LOG_BYTES_MAX, LOG_BYTES_MIN, LOG_OFFSET, MIRRORED_OFFSET, Mirrored,
    REGION_VERSION, RegionHeader, STATUS_OFFSET, Sealed, chain_start,
};
use crate::faults::{Fault, injected};
use crate::ids::{Epoch, Identity, Lsn, RingPos, Seq};
pub use frames::{FillRef, FrameRef, Stop};
pub use records::{Payload, ScannedRecord, ScannedRecords};

/// No lsn, seq or ring position of a real log comes near this; sums below it cannot overflow.
const NUMBER_MAX: u64 = 1 << 62;
/// Bytes of a status line.
const LINE_BYTES: usize = 64;

/// Why a region cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ScanError {
    /// The first page holds no region header.
    #[error("this is not a region: its first page has no valid header (wrong file, or damaged)")]
    NotARegion,
    /// A format this program does not know.
    #[error(
        "the region has format version {found}, this program reads version {REGION_VERSION}: use the twinwrite that wrote it"
    )]
    Version {
        /// The header's version.
        found: u32,
    },
    /// A log size that no writer uses.
    #[error(
        "the region header says its log has {found} bytes; it must be a multiple of 4096 between {LOG_BYTES_MIN} and {LOG_BYTES_MAX}: the header is damaged"
    )]
    LogBytes {
        /// The header's `log_bytes`.
        found: u64,
    },
    /// Fewer bytes than the header says.
    #[error(
        "the region is cut short: {what} needs {need} bytes and {have} are there: get a complete copy"
    )]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Bytes it needs.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The status page holds something the owner cannot have written.
    #[error(
        "the region's status page is damaged: {what}; nothing tells how far the log went, so it must not be replayed without a person's decision"
    )]
    Status {
        /// What is wrong.
        what: &'static str,
    },
    /// The log ends before what the owner published as mirrored.
    #[error("the region's log is damaged at lsn {} (record {} is the last one readable): {stop}; the owner had published lsn {} and record {}: it must not be replayed without a person's decision", end.lsn, last_seq, mirrored_lsn, mirrored_seq)]
    Damaged {
        /// Where the walk ended.
        end: LogEnd,
        /// Last complete record before that.
        last_seq: Seq,
        /// Why it ended.
        stop: Stop,
        /// The published end.
        mirrored_lsn: Lsn,
        /// The published last record.
        mirrored_seq: Seq,
    },
}

/// Where the log begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The status page's slot that says so; `None`: no slot was written, the epoch's start counts.
    pub slot: Option<u8>,
    /// Start of the first frame.
    pub lsn: Lsn,
    /// Number of the next record there.
    pub seq: Seq,
    /// What that frame carries as `previous_crc32c`.
    pub previous_crc32c: u32,
    /// Ring position of the next record there; unknown at the epoch's start.
    pub ring_pos: Option<RingPos>,
}

impl Head {
    /// The head of an epoch that has not purged anything.
    #[must_use]
    pub fn of_epoch(epoch: Epoch) -> Self {
        Self {
            slot: None,
            lsn: Lsn(0),
            seq: Seq(1),
            previous_crc32c: chain_start(epoch.0),
            ring_pos: None,
        }
    }
}

/// Where the log ends: what the next frame must continue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEnd {
    /// Where the next frame goes.
    pub lsn: Lsn,
    /// Number of the next record.
    pub next_seq: Seq,
    /// Ring position of the next record; `None` if this epoch has no record yet.
    pub ring_pos_end: Option<RingPos>,
    /// `header_crc32c` of the last frame, or what stands for it.
    pub last_header_crc: u32,
}

/// A last record whose bytes are not all in the log yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingFill {
    /// The record.
    pub seq: Seq,
    /// WRITE: bytes of the file are missing. EXTENDED: its extended state.
    pub op: u8,
    /// Its inode.
    pub identity: Identity,
    /// Offset of its data in the file.
    pub pos: u64,
    /// Bytes of its data.
    pub len: u32,
    /// Bytes of it that are in the log already.
    pub filled: u32,
}

/// What a sender needs to go on where the region ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// Epoch of the region.
    pub epoch: Epoch,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Where the log begins.
    pub head: Head,
    /// Where it ends.
    pub end: LogEnd,
    /// The last record, if its bytes are not complete.
    pub pending_fill: Option<PendingFill>,
    /// The cut, see [`Scan::cut`].
    pub cut: Seq,
    /// The last record that bytes of the log may show: the cut is at the log's end once it is there.
    pub safe_at: Seq,
}

impl Tail {
    /// The tail of an epoch that has no frame yet and whose first record will be at `ring_pos`.
    #[must_use]
    pub fn of_epoch(epoch: Epoch, log_bytes: u64, ring_pos: RingPos) -> Self {
        let head = Head {
            ring_pos: Some(ring_pos),
            ..Head::of_epoch(epoch)
        };
        let end = LogEnd {
            lsn: head.lsn,
            next_seq: head.seq,
            ring_pos_end: Some(ring_pos),
            last_header_crc: head.previous_crc32c,
        };
        Self {
            epoch,
            log_bytes,
            head,
            end,
            pending_fill: None,
            cut: Seq(head.seq.0 - 1),
            safe_at: Seq(0),
        }
    }

    /// The last record that is complete in the region.
    #[must_use]
    pub fn last_complete_seq(&self) -> Seq {
        last_complete(self.end.next_seq, self.pending_fill.as_ref())
    }
}

/// A region as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Epoch of every frame.
    pub epoch: Epoch,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Where the log begins.
    pub head: Head,
    /// The frames, in order.
    pub frames: Vec<FrameRef>,
    /// The FILL bodies, in order.
    pub fills: Vec<FillRef>,
    /// Where the log ends.
    pub end: LogEnd,
    /// Why the walk ended there.
    pub stop: Stop,
    /// Last record in the log, complete or not.
    pub last_seq: Seq,
    /// The cut: the last N such that all bytes of all records up to N are there and none of them was
    /// read after a record beyond N.
    pub cut: Seq,
    /// Largest S of a checkpoint mark in the log; 0 if there is none.
    pub checkpoint_seq: Seq,
    /// The last record, if its bytes are not complete.
    pub pending_fill: Option<PendingFill>,
    /// What the owner published last, if anything.
    pub mirrored: Option<Mirrored>,
}

impl Scan {
    /// What a sender needs to go on from here.
    #[must_use]
    pub fn tail(&self) -> Tail {
        Tail {
            epoch: self.epoch,
            log_bytes: self.log_bytes,
            head: self.head,
            end: self.end,
            pending_fill: self.pending_fill,
            cut: self.cut,
            safe_at: self
                .fills
                .iter()
                .map(|fill| fill.safe_at)
                .max()
                .unwrap_or_default(),
        }
    }

    /// The records, in order, each with the places of its bytes; `log` is what was scanned.
    #[must_use]
    pub fn records<'a>(&'a self, log: &'a [u8]) -> ScannedRecords<'a> {
        ScannedRecords::new(self, log)
    }
}

/// Takes a region apart: header, status page, log.
///
/// # Errors
/// [`ScanError::NotARegion`], [`ScanError::Version`], [`ScanError::LogBytes`], [`ScanError::Truncated`].
pub fn split(region: &[u8]) -> Result<(RegionHeader, &[u8], &[u8]), ScanError> {
    let header = RegionHeader::open(region).ok_or(ScanError::NotARegion)?;
    check_header(&header)?;
    let part = |what, from: u64, len: u64| {
        let have = (region.len() as u64).saturating_sub(from).min(len);
        region
            .get(from as usize..(from + len) as usize)
            .ok_or(ScanError::Truncated {
                what,
                need: len,
                have,
            })
    };
    let status = part("the status page", STATUS_OFFSET, LOG_OFFSET - STATUS_OFFSET)?;
    let log = part("the log", LOG_OFFSET, header.log_bytes)?;
    Ok((header, status, log))
}

fn check_header(header: &RegionHeader) -> Result<(), ScanError> {
    if header.version != REGION_VERSION {
        return Err(ScanError::Version {
            found: header.version,
        });
    }
    let bytes = header.log_bytes;
    if !(LOG_BYTES_MIN..=LOG_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(4096) {
        return Err(ScanError::LogBytes { found: bytes });
    }
    Ok(())
}

/// Reads the frames of a region from its head to its end.
///
/// `status_page` and `log` must be a copy that nobody writes to any more. Whose region it is, and
/// whether its state and epoch allow a replay, is not judged here.
///
/// # Errors
/// [`ScanError::Damaged`] when the log ends before what the owner published, [`ScanError::Status`]
/// when the status page cannot be believed, or what is wrong with the header.
pub fn scan(header: &RegionHeader, status_page: &[u8], log: &[u8]) -> Result<Scan, ScanError> {
    check_header(header)?;
    read(header, status_page, log)
}

/// [`scan`] without the limits on the log's size, for the simulator.
///
/// # Errors
/// As [`scan`].
#[cfg(feature = "faults")]
pub fn scan_small_log(
    header: &RegionHeader,
    status_page: &[u8],
    log: &[u8],
) -> Result<Scan, ScanError> {
    read(header, status_page, log)
}

/// [`scan`] without the limits on the log's size, so that tests can use small logs.
pub(crate) fn read(
    header: &RegionHeader,
    status_page: &[u8],
    log: &[u8],
) -> Result<Scan, ScanError> {
    let log = usize::try_from(header.log_bytes)
        .ok()
        .and_then(|len| log.get(..len))
        .ok_or(ScanError::Truncated {
            what: "the log",
            need: header.log_bytes,
            have: log.len() as u64,
        })?;
    let epoch = Epoch(header.epoch);
    let mirrored = read_mirrored(status_page, epoch)?;
    let head = read_head(status_page, epoch)?;
    if head.slot.is_some() && mirrored.is_none_or(|m| m.lsn < head.lsn.0) {
        return Err(ScanError::Status {
            what: "the log's head is beyond what was published as mirrored",
        });
    }
    let walked = frames::walk(epoch, head, log);
    let last_seq = last_complete(walked.end.next_seq, walked.pending_fill.as_ref());
    if let Some(m) = mirrored
        && !injected(Fault::PublishedIgnored)
        && (m.lsn > walked.end.lsn.0 || m.seq > last_seq.0)
    {
        return Err(ScanError::Damaged {
            end: walked.end,
            last_seq,
            stop: walked.stop,
            mirrored_lsn: Lsn(m.lsn),
            mirrored_seq: Seq(m.seq),
        });
    }
    Ok(Scan {
        epoch,
        log_bytes: header.log_bytes,
        head,
        cut: find_cut(head.seq, last_seq, &walked.fills),
        last_seq: Seq(walked.end.next_seq.0 - 1),
        frames: walked.frames,
        fills: walked.fills,
        end: walked.end,
        stop: walked.stop,
        checkpoint_seq: walked.checkpoint_seq,
        pending_fill: walked.pending_fill,
        mirrored,
    })
}

/// The part of the log that its owner has published: from the head to the end known complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Where the log begins.
    pub head: Lsn,
    /// End of the last frame known complete; the log may go further.
    pub end: Lsn,
}

/// What the status page says of the log, without looking at the log.
///
/// # Errors
/// As [`scan`], for header and status page.
pub fn published(header: &RegionHeader, status_page: &[u8]) -> Result<Published, ScanError> {
    check_header(header)?;
    let epoch = Epoch(header.epoch);
    let mirrored = read_mirrored(status_page, epoch)?;
    let head = read_head(status_page, epoch)?.lsn;
    let end = mirrored.map_or(head, |m| Lsn(m.lsn.clamp(head.0, NUMBER_MAX)));
    Ok(Published { head, end })
}

fn last_complete(next_seq: Seq, pending: Option<&PendingFill>) -> Seq {
    Seq(next_seq
        .0
        .saturating_sub(if pending.is_some() { 2 } else { 1 }))
}

/// A status line, `None` if it was never written. An epoch begins with a zeroed status page, so
/// anything else must be valid: a 64-byte line is written whole or not at all.
fn read_line<T: Sealed>(
    page: &[u8],
    offset: u64,
    what: &'static str,
) -> Result<Option<T>, ScanError> {
    let at = (offset - STATUS_OFFSET) as usize;
    let line = page.get(at..at + LINE_BYTES).ok_or(ScanError::Truncated {
        what: "the status page",
        need: LOG_OFFSET - STATUS_OFFSET,
        have: page.len() as u64,
    })?;
    if line.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    T::open(line).map(Some).ok_or(ScanError::Status { what })
}

fn read_mirrored(page: &[u8], epoch: Epoch) -> Result<Option<Mirrored>, ScanError> {
    let Some(m) = read_line::<Mirrored>(
        page,
        MIRRORED_OFFSET,
        "its `mirrored` line has a wrong checksum",
    )?
    else {
        return Ok(None);
    };
    if m.epoch != epoch.0 {
        return Err(ScanError::Status {
            what: "its `mirrored` line is of another epoch",
        });
    }
    Ok(Some(m))
}

fn read_head(page: &[u8], epoch: Epoch) -> Result<Head, ScanError> {
    let mut head = Head::of_epoch(epoch);
    for (slot, offset) in (0u8..).zip(HEAD_OFFSETS) {
        let line = read_line::<HeadSlot>(page, offset, "a head slot has a wrong checksum")?;
        let Some(h) = line.filter(|h| h.epoch == epoch.0) else {
            continue;
        };
        if !h.lsn.is_multiple_of(64) || h.seq == 0 || h.lsn.max(h.seq).max(h.ring_pos) > NUMBER_MAX
        {
            return Err(ScanError::Status {
                what: "a head slot holds numbers that no log has",
            });
        }
        if head.slot.is_none() || h.lsn > head.lsn.0 {
            head = Head {
                slot: Some(slot),
                lsn: Lsn(h.lsn),
                seq: Seq(h.seq),
                previous_crc32c: h.previous_crc32c,
                ring_pos: Some(RingPos(h.ring_pos)),
            };
        }
    }
    Ok(head)
}

/// Finds the last N in `head_seq - 1 ..= last` such that no record up to N was filled with bytes
/// read after a record beyond N.
fn find_cut(head_seq: Seq, last: Seq, fills: &[FillRef]) -> Seq {
    if injected(Fault::SafeAtIgnored) {
        return last;
    }
    let mut latest = 0;
    let reach: Vec<u64> = fills
        .iter()
        .map(|fill| {
            latest = latest.max(fill.safe_at.0);
            latest
        })
        .collect();
    // Between two filled records the reach is constant, so only the largest N of each stretch counts.
    let mut candidate = last.0;
    for (fill, reach) in fills.iter().zip(reach).rev() {
        if fill.seq.0 > candidate {
            continue;
        }
        if reach <= candidate {
            return Seq(candidate);
        }
        candidate = fill.seq.0 - 1;
    }
    Seq(candidate.max(head_seq.0 - 1))
}

/// The first bytes of a log line as an integer, for messages.
fn first_word(bytes: &[u8]) -> u32 {
    u32::read_from_prefix(bytes).map_or(0, |(word, _)| word)
}
