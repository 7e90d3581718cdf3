//! Going on after a restart or a lost link, from what the region really holds.

use super::fill::OpenFill;
use super::space::HeadPoint;
use super::{CoreError, MirrorCore};
use crate::ids::{RingPos, Seq};
use crate::region::scan::Tail;

fn same(what: &'static str, found: u64, expected: u64) -> Result<(), CoreError> {
    if found == expected {
        Ok(())
    } else {
        Err(CoreError::Tail {
            what,
            found,
            expected,
        })
    }
}

fn within(what: &'static str, found: u64, least: u64, most: u64) -> Result<(), CoreError> {
    if found < least {
        return Err(CoreError::Tail {
            what,
            found,
            expected: least,
        });
    }
    if found > most {
        return Err(CoreError::Tail {
            what,
            found,
            expected: most,
        });
    }
    Ok(())
}

/// Checks what came from the peer against itself; returns the ring position to go on from.
pub(super) fn check_tail(tail: &Tail) -> Result<RingPos, CoreError> {
    let (head, end) = (&tail.head, &tail.end);
    within("head", head.lsn.0, 0, end.lsn.0)?;
    within(
        "length of the log",
        end.lsn.0 - head.lsn.0,
        0,
        tail.log_bytes,
    )?;
    within("first record", head.seq.0, 1, end.next_seq.0)?;
    same("lsn modulo 64", (head.lsn.0 | end.lsn.0) % 64, 0)?;
    if let Some(fill) = &tail.pending_fill {
        same("record to be filled", fill.seq.0, end.next_seq.0 - 1)?;
        within("record to be filled", fill.seq.0, head.seq.0, u64::MAX)?;
        within("bytes filled", fill.filled.into(), 0, fill.len.into())?;
    }
    end.ring_pos_end.ok_or(CoreError::Tail {
        what: "ring position",
        found: 0,
        expected: 1,
    })
}

impl MirrorCore {
    /// Goes on over a new link, after the peer has shut the old one out and scanned the region.
    /// Posts in flight are forgotten: what arrived of them is in the tail.
    ///
    /// # Errors
    /// [`CoreError::Tail`] if the region lacks what was acknowledged, or holds what was not sent: it was
    /// damaged or replaced, and the epoch must be closed.
    pub fn relink(&mut self, tail: &Tail) -> Result<(), CoreError> {
        let ring_pos = check_tail(tail)?;
        same("epoch", tail.epoch.0, self.epoch.0)?;
        same("bytes of the log", tail.log_bytes, self.space.log_bytes)?;
        within(
            "last record",
            tail.last_complete_seq().0,
            self.mirrored.0,
            self.captured.0,
        )?;
        within("end", tail.end.lsn.0, self.mirrored_lsn.0, self.end.lsn.0)?;
        within(
            "head",
            tail.head.lsn.0,
            self.space.safe().0,
            self.space.posted().0,
        )?;
        let sent = self
            .space
            .start_from(tail.end.lsn)
            .unwrap_or(HeadPoint::at(&self.end));
        same("end", tail.end.lsn.0, sent.lsn.0)?;
        same("next record", tail.end.next_seq.0, sent.seq.0)?;
        same(
            "chain of checksums",
            tail.end.last_header_crc.into(),
            sent.previous_crc32c.into(),
        )?;
        same("ring position", ring_pos.0, sent.ring_pos.0)?;

        self.space.relink(tail);
        self.in_flight.clear();
        self.end = tail.end;
        self.next_ring_pos = ring_pos;
        self.mirrored_lsn = tail.end.lsn;
        (self.published, self.publishing) = (None, false);
        (self.half_told, self.full, self.full_told) = (false, false, false);
        self.mark_posted = false;
        self.unsafe_fills.forget_behind(tail.last_complete_seq());
        self.fill = tail.pending_fill.map(OpenFill::new);
        self.abandon_fill();
        let incomplete = u64::from(tail.pending_fill.is_some());
        let release = self
            .records
            .iter()
            .take_while(|r| r.ring_end() <= ring_pos)
            .last()
            .map_or(RingPos(0), |r| {
                if incomplete == 1 {
                    r.ring_pos
                } else {
                    r.ring_end()
                }
            });
        self.advance(Seq(tail.end.next_seq.0 - 1 - incomplete), release);
        self.space
            .purge(self.purged, &self.end, self.fill.is_some());
        Ok(())
    }
}
