//! What a pump does about pages that are changed through mappings.

use twinwrite_abi::{ATTR_SIZE, gap};

use super::Pump;
use crate::agent::mapper::Mapper;
use crate::capture::GapCounts;
use crate::ids::Seq;
use crate::record::{RecordMeta, flag, op};

/// Tells the mapper what a record means for the pages that it knows.
pub(super) fn tell_mapper(mapper: &Mapper, meta: &RecordMeta, seq: Seq) {
    if meta.op == op::SETATTR && meta.arg & ATTR_SIZE != 0 {
        // The page with the end of the file stays mapped, and the log has zeros there now.
        mapper.rewritten(meta.identity, meta.size_after, u64::MAX, seq);
    }
    if meta.op != op::WRITE {
        return;
    }
    let bytes = u64::from(meta.data_len);
    if meta.flags & flag::MAPPED != 0 && bytes == 0 {
        mapper.note(meta.identity, meta.pos, meta.arg, seq);
    } else if bytes != 0 {
        mapper.rewritten(meta.identity, meta.pos, bytes, seq);
    }
}

impl Pump<'_> {
    /// Whether what is not captured of this reason is snapshotted at short intervals.
    pub(super) fn is_snapshotted(&self, reason: usize) -> bool {
        reason == gap::MAPPING
            && self.mapper.is_some()
            && self.gaps_proven[gap::MAPPING] >= self.mapped_before
    }

    /// Whether everything was settled that was noticed and not captured, but for what is snapshotted: that can
    /// wait until a checkpoint is due.
    pub(super) fn is_settled(&self, gaps: &GapCounts) -> bool {
        let Some(mut settled) = self.control.gaps_settled() else {
            return false;
        };
        if self.is_snapshotted(gap::MAPPING) {
            settled[gap::MAPPING] = gaps[gap::MAPPING];
        }
        settled == *gaps
    }

    /// Why what is stored through mappings may be lost for longer than the configured interval.
    pub(super) fn late_look(&self) -> Option<String> {
        let late = self.mapper?.late();
        (late > self.limits.lag).then(|| {
            format!(
                "pages that are changed through mappings should have been looked at {:.1} s ago",
                late.as_secs_f64()
            )
        })
    }

    /// Shows what is known of mapped pages.
    pub(super) fn show_mapped(&self) {
        let Some(mapper) = self.mapper else {
            return;
        };
        self.board.mapped_pages.set(mapper.pages());
        let age_us = u64::try_from(mapper.age().as_micros()).unwrap_or(u64::MAX);
        self.board.mapped_age_us.set(age_us);
    }
}
