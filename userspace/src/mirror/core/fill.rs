//! The bytes of a record that the programs could not copy.

use std::collections::VecDeque;

use super::{Action, CoreError, MirrorCore};
use crate::ids::{RingPos, Seq};
use crate::region::layout::FRAME_BODY_BYTES_MAX;
use crate::region::scan::PendingFill;

/// The record whose bytes are missing; nothing but its FILLs may follow it in the log.
#[derive(Clone, Debug)]
pub(super) struct OpenFill {
    /// The record; `filled` counts what is posted.
    pub(super) pending: PendingFill,
    /// The driver was asked for the next part.
    asked: bool,
    /// The next part, read and not yet posted.
    pub(super) part: Option<Part>,
    /// The record was purged before it was filled: it ends without its bytes.
    pub(super) abandoned: bool,
}

/// Bytes read from the page cache.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) bytes: Vec<u8>,
    pub(super) gone: bool,
    pub(super) safe_at: Seq,
}

/// Records whose bytes may show changes that come later in the log: the cut is not between such a
/// record and the last of these changes.
#[derive(Clone, Debug, Default)]
pub(super) struct UnsafeFills(VecDeque<UnsafeFill>);

#[derive(Clone, Copy, Debug)]
struct UnsafeFill {
    seq: Seq,
    ring_pos: RingPos,
    safe_at: Seq,
}

impl UnsafeFills {
    /// Notes a fill of the record that begins at `ring_pos`. Fills come in the order of their records.
    pub(super) fn note(&mut self, seq: Seq, ring_pos: RingPos, safe_at: Seq) {
        match self.0.back_mut() {
            // They overlap, touch, or belong to one record: no cut is between them.
            Some(last) if last.safe_at >= seq => {
                last.safe_at = last.safe_at.max(safe_at);
            }
            _ if safe_at > seq => self.0.push_back(UnsafeFill {
                seq,
                ring_pos,
                safe_at,
            }),
            _ => {}
        }
    }

    /// Forgets what is safe when the log is complete up to `mirrored`.
    pub(super) fn complete(&mut self, mirrored: Seq) {
        while self.0.front().is_some_and(|fill| fill.safe_at <= mirrored) {
            self.0.pop_front();
        }
    }

    /// Forgets the fills of records behind `complete`, which did not arrive: they are read anew, and
    /// an earlier record's fill may be noted before them.
    pub(super) fn forget_behind(&mut self, complete: Seq) {
        while self.0.back().is_some_and(|fill| fill.seq > complete) {
            self.0.pop_back();
        }
    }

    /// Where the cut is if it is not at `mirrored`.
    pub(super) fn before(&self, mirrored: Seq) -> Option<RingPos> {
        let fill = self.0.front().filter(|fill| fill.seq <= mirrored)?;
        Some(fill.ring_pos)
    }
}

impl OpenFill {
    pub(super) fn new(pending: PendingFill) -> Self {
        Self {
            pending,
            asked: false,
            part: None,
            abandoned: false,
        }
    }

    fn wanted(&self) -> u32 {
        (self.pending.len - self.pending.filled).min(FRAME_BODY_BYTES_MAX)
    }

    /// Counts a part as posted; the next one is asked for then.
    pub(super) fn posted(&mut self, len: u32) {
        self.pending.filled += len;
        self.asked = false;
        self.part = None;
    }
}

impl MirrorCore {
    /// Takes the bytes that a [`Action::NeedFill`] asked for. `gone`: the file no longer has the rest
    /// (removed or truncated meanwhile); `bytes` is then what was left. `safe_at`: the last record
    /// captured after the read. Returns false if they are no longer wanted.
    ///
    /// # Errors
    /// [`CoreError::FillLength`], [`CoreError::SafeAt`].
    pub fn filled(
        &mut self,
        seq: Seq,
        fill_offset: u32,
        bytes: Vec<u8>,
        gone: bool,
        safe_at: Seq,
    ) -> Result<bool, CoreError> {
        let captured = self.captured;
        let Some(fill) = &mut self.fill else {
            return Ok(false);
        };
        let pending = &fill.pending;
        if pending.seq != seq || pending.filled != fill_offset || !fill.asked || fill.part.is_some()
        {
            return Ok(false);
        }
        let expected = fill.wanted();
        if bytes.len() > expected as usize || (!gone && bytes.len() < expected as usize) {
            return Err(CoreError::FillLength {
                seq,
                expected,
                found: bytes.len(),
            });
        }
        if safe_at < seq || safe_at > captured {
            return Err(CoreError::SafeAt {
                seq,
                safe_at,
                captured,
            });
        }
        fill.part = Some(Part {
            bytes,
            gone,
            safe_at,
        });
        Ok(true)
    }

    /// Asks for the next part of the open fill, once.
    pub(super) fn ask_for_fill(&mut self) -> Option<Action> {
        let fill = self
            .fill
            .as_mut()
            .filter(|fill| !fill.asked && !fill.abandoned)?;
        fill.asked = true;
        let pending = &fill.pending;
        Some(Action::NeedFill {
            seq: pending.seq,
            op: pending.op,
            identity: pending.identity,
            pos: pending.pos + u64::from(pending.filled),
            len: fill.wanted(),
            fill_offset: pending.filled,
        })
    }

    /// A purged record needs no bytes, and a fill larger than the region could never end otherwise.
    pub(super) fn abandon_fill(&mut self) {
        if let Some(fill) = &mut self.fill
            && fill.pending.seq <= self.purged
        {
            fill.abandoned = true;
            fill.part = None;
        }
    }
}
