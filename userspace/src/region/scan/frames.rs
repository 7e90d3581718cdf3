//! The walk from frame to frame.

use serde::Serialize;
use thiserror::Error;
use zerocopy::FromBytes;

use super::{Head, LogEnd, NUMBER_MAX, PendingFill, first_word};
use crate::faults::{Fault, injected};
use crate::ids::{Epoch, Lsn, RingPos, Seq};
use crate::record::{RecordError, Records};
use crate::region::layout::{
    CheckpointMark, FILL_GONE, FILL_LAST, FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, FRAME_MAGIC,
    FrameHeader, REGION_VERSION, Sealed, kind,
};

/// Why the walk ended where it did. After the last frame of a sound log it finds zeros or the
/// remains of an earlier lap; only the published end tells whether that is too early.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum Stop {
    /// The frames fill the whole log.
    #[error("the log is full to its head")]
    Lap,
    /// No frame magic.
    #[error("there is no frame (the bytes begin with {word:#010x})")]
    NoFrame {
        /// The first four bytes.
        word: u32,
    },
    /// The frame header's checksum is wrong.
    #[error("the frame header's checksum is wrong")]
    HeaderCrc,
    /// A field of the header is not what must follow.
    #[error("the frame's {field} is {found}, {expected} must follow")]
    Unexpected {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What was expected.
        expected: u64,
    },
    /// A field of the header has a value that no writer writes.
    #[error("the frame's {field} is {value}, which no frame has")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The body's checksum is wrong.
    #[error("the frame body's checksum is wrong")]
    BodyCrc,
    /// A record of a RUN cannot be read.
    #[error("{what}")]
    Record {
        /// The record format's complaint.
        what: String,
    },
    /// A record without bytes is followed by something other than its FILL.
    #[error("a frame of kind {kind} follows a record that still lacks bytes")]
    FillMissing {
        /// Kind of the frame.
        kind: u8,
    },
    /// A FILL without a record that lacks bytes.
    #[error("a FILL follows a record that lacks none")]
    FillUnasked,
}

/// A frame that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRef {
    /// Its place in the endless log.
    pub lsn: Lsn,
    /// Offset of its body in the log.
    pub body_offset: u64,
    /// Bytes of its body.
    pub body_len: u32,
    /// One of [`kind`].
    pub kind: u8,
    /// [`FILL_LAST`], [`FILL_GONE`].
    pub flags: u16,
    /// RUN: its records.
    pub count: u32,
    /// Its `first_seq`.
    pub first_seq: Seq,
    /// RUN: ring position of its first record. FILL: `safe_at`. Else 0.
    pub ring_pos: u64,
}

/// The bytes of a FILL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillRef {
    /// The record they belong to.
    pub seq: Seq,
    /// Where they lie in the log.
    pub log_offset: u64,
    /// How many.
    pub len: u32,
    /// Where they belong in the record's data.
    pub fill_offset: u32,
    /// Records captured when they were read: they may show any of these.
    pub safe_at: Seq,
}

/// What the walk found.
pub(super) struct Walked {
    pub(super) frames: Vec<FrameRef>,
    pub(super) fills: Vec<FillRef>,
    pub(super) end: LogEnd,
    pub(super) stop: Stop,
    pub(super) checkpoint_seq: Seq,
    pub(super) pending_fill: Option<PendingFill>,
}

/// Walks from `head`; `log` is exactly the log's bytes.
pub(super) fn walk(epoch: Epoch, head: Head, log: &[u8]) -> Walked {
    let mut walk = Walk {
        epoch,
        log,
        first_lsn: head.lsn,
        found: Walked {
            frames: Vec::new(),
            fills: Vec::new(),
            end: LogEnd {
                lsn: head.lsn,
                next_seq: head.seq,
                ring_pos_end: head.ring_pos,
                last_header_crc: head.previous_crc32c,
            },
            stop: Stop::Lap,
            checkpoint_seq: Seq(0),
            pending_fill: None,
        },
    };
    // Each frame takes at least one line, so this bound is never the reason to stop.
    for _ in 0..=log.len() / FRAME_HEADER_BYTES as usize {
        if let Err(stop) = walk.step() {
            walk.found.stop = stop;
            break;
        }
    }
    walk.found
}

struct Walk<'a> {
    epoch: Epoch,
    log: &'a [u8],
    first_lsn: Lsn,
    found: Walked,
}

fn expect(field: &'static str, found: u64, expected: u64) -> Result<(), Stop> {
    if found == expected {
        Ok(())
    } else {
        Err(Stop::Unexpected {
            field,
            found,
            expected,
        })
    }
}

fn limit(field: &'static str, value: u64, valid: bool) -> Result<(), Stop> {
    if valid {
        Ok(())
    } else {
        Err(Stop::Field { field, value })
    }
}

impl<'a> Walk<'a> {
    /// Accepts the frame at the end found so far, or says why not.
    fn step(&mut self) -> Result<(), Stop> {
        let log_bytes = self.log.len() as u64;
        let lsn = self.found.end.lsn;
        let left = log_bytes.saturating_sub(lsn.0 - self.first_lsn.0);
        if left < FRAME_HEADER_BYTES {
            return Err(Stop::Lap);
        }
        let offset = lsn.0 % log_bytes;
        let at = self.log.get(offset as usize..).unwrap_or(&[]);
        if first_word(at) != FRAME_MAGIC {
            return Err(Stop::NoFrame {
                word: first_word(at),
            });
        }
        let header = FrameHeader::open(at).ok_or(Stop::HeaderCrc)?;
        self.check_place(&header, lsn)?;
        // A frame that reached the head again would overwrite what it must not, and none wraps.
        limit(
            "body_len",
            header.body_len.into(),
            header.stride() <= left.min(log_bytes - offset),
        )?;
        let body = self.body(&header, at)?;
        self.check_kind(&header, body, log_bytes - offset)?;
        self.accept(&header, offset + FRAME_HEADER_BYTES, body)
    }

    fn check_place(&self, h: &FrameHeader, lsn: Lsn) -> Result<(), Stop> {
        let end = &self.found.end;
        expect("version", h.version.into(), REGION_VERSION.into())?;
        if !injected(Fault::ChainIgnored) {
            expect("epoch", h.epoch, self.epoch.0)?;
            expect("lsn", h.lsn, lsn.0)?;
            expect(
                "previous_crc32c",
                h.previous_crc32c.into(),
                end.last_header_crc.into(),
            )?;
        }
        match (&self.found.pending_fill, h.kind) {
            (_, kind::PAD) => expect("first_seq", h.first_seq, end.next_seq.0),
            (Some(fill), kind::FILL) => expect("first_seq", h.first_seq, fill.seq.0),
            (Some(_), kind) => Err(Stop::FillMissing { kind }),
            (None, kind::FILL) => Err(Stop::FillUnasked),
            (None, _) => expect("first_seq", h.first_seq, end.next_seq.0),
        }
    }

    fn body(&self, h: &FrameHeader, at: &'a [u8]) -> Result<&'a [u8], Stop> {
        if h.kind == kind::PAD {
            return Ok(&[]);
        }
        limit(
            "body_len",
            h.body_len.into(),
            h.body_len <= FRAME_BODY_BYTES_MAX,
        )?;
        let start = FRAME_HEADER_BYTES as usize;
        let body = at.get(start..start + h.body_len as usize).unwrap_or(&[]);
        if crc32c::crc32c(body) == h.body_crc32c {
            Ok(body)
        } else {
            Err(Stop::BodyCrc)
        }
    }

    fn check_kind(&self, h: &FrameHeader, body: &[u8], to_end: u64) -> Result<(), Stop> {
        let fill_only = if h.kind == kind::FILL {
            FILL_LAST | FILL_GONE
        } else {
            0
        };
        limit("flags", h.flags.into(), h.flags & !fill_only == 0)?;
        limit(
            "count",
            h.count.into(),
            (h.count != 0) == (h.kind == kind::RUN),
        )?;
        limit(
            "fill_offset",
            h.fill_offset.into(),
            h.fill_offset == 0 || h.kind == kind::FILL,
        )?;
        match h.kind {
            kind::RUN => {
                limit("ring_pos", h.ring_pos, h.ring_pos <= NUMBER_MAX)?;
                match self.found.end.ring_pos_end {
                    Some(pos) => expect("ring_pos", h.ring_pos, pos.0),
                    None => Ok(()),
                }
            }
            kind::FILL => self.check_fill(h),
            kind::MARK => {
                expect(
                    "body_len",
                    h.body_len.into(),
                    size_of::<CheckpointMark>() as u64,
                )?;
                limit("ring_pos", h.ring_pos, h.ring_pos == 0)?;
                let seq = mark_seq(body);
                limit("checkpoint seq", seq, seq < h.first_seq)
            }
            kind::PAD => {
                limit("body_crc32c", h.body_crc32c.into(), h.body_crc32c == 0)?;
                limit("ring_pos", h.ring_pos, h.ring_pos == 0)?;
                expect("body_len", h.body_len.into(), to_end - FRAME_HEADER_BYTES)
            }
            other => limit("kind", other.into(), false),
        }
    }

    fn check_fill(&self, h: &FrameHeader) -> Result<(), Stop> {
        let Some(fill) = &self.found.pending_fill else {
            return Err(Stop::FillUnasked);
        };
        let (last, gone) = (h.flags & FILL_LAST != 0, h.flags & FILL_GONE != 0);
        limit("flags", h.flags.into(), last || !gone)?;
        expect("fill_offset", h.fill_offset.into(), fill.filled.into())?;
        let missing = u64::from(fill.len - fill.filled);
        let len = u64::from(h.body_len);
        limit(
            "body_len",
            len,
            len <= missing && (gone || last == (len == missing)),
        )?;
        limit("body_len", len, last || len != 0)?;
        limit(
            "safe_at",
            h.ring_pos,
            (fill.seq.0..=NUMBER_MAX).contains(&h.ring_pos),
        )
    }

    fn accept(&mut self, h: &FrameHeader, body_offset: u64, body: &[u8]) -> Result<(), Stop> {
        match h.kind {
            kind::RUN => self.accept_run(h, body)?,
            kind::FILL => {
                self.found.fills.push(FillRef {
                    seq: Seq(h.first_seq),
                    log_offset: body_offset,
                    len: h.body_len,
                    fill_offset: h.fill_offset,
                    safe_at: Seq(h.ring_pos),
                });
                match &mut self.found.pending_fill {
                    Some(fill) if h.flags & FILL_LAST == 0 => fill.filled += h.body_len,
                    pending => *pending = None,
                }
            }
            kind::MARK => {
                self.found.checkpoint_seq = self.found.checkpoint_seq.max(Seq(mark_seq(body)));
            }
            _ => {}
        }
        self.found.frames.push(FrameRef {
            lsn: Lsn(h.lsn),
            body_offset,
            body_len: h.body_len,
            kind: h.kind,
            flags: h.flags,
            count: h.count,
            first_seq: Seq(h.first_seq),
            ring_pos: h.ring_pos,
        });
        let end = &mut self.found.end;
        end.lsn = Lsn(h.lsn + h.stride());
        end.last_header_crc = h.header_crc32c;
        Ok(())
    }

    /// The records must fill the body exactly, and only the last one may lack its bytes.
    fn accept_run(&mut self, h: &FrameHeader, body: &[u8]) -> Result<(), Stop> {
        let mut count = 0u64;
        let mut lacking = None;
        for item in Records::new(body) {
            let (_, view) = item.map_err(|e: RecordError| Stop::Record {
                what: e.to_string(),
            })?;
            if lacking.is_some() {
                return Err(Stop::FillMissing { kind: kind::RUN });
            }
            if view.needs_fill() {
                lacking = Some(PendingFill {
                    seq: Seq(h.first_seq + count),
                    op: view.header.op,
                    identity: view.identity(),
                    pos: view.header.pos,
                    len: view.header.data_len,
                    filled: 0,
                });
            }
            count += 1;
        }
        expect("count", h.count.into(), count)?;
        self.found.pending_fill = lacking;
        let end = &mut self.found.end;
        end.next_seq = Seq(h.first_seq + count);
        end.ring_pos_end = Some(RingPos(h.ring_pos + u64::from(h.body_len)));
        Ok(())
    }
}

fn mark_seq(body: &[u8]) -> u64 {
    CheckpointMark::read_from_prefix(body).map_or(u64::MAX, |(mark, _)| mark.seq)
}
