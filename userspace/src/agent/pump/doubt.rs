//! What failed write-backs leave in doubt, while an epoch runs: the driver of `durability::taint`.

use twinwrite_abi::{gap, op};

use super::Pump;
use crate::agent::mending::{LeftUnproven, Mending};
use crate::capture::Control;
use crate::durability::checkpoint::CheckpointReason;
use crate::durability::taint::{Rewrite, Taint, Whose};
use crate::ids::{Identity, RingPos};
use crate::record::RecordMeta;

/// The taints of an epoch, and what is done about them.
pub(super) struct Doubt {
    taint: Taint,
    /// Whose write-backs failed, by records that were taken since the last look.
    named: Vec<Identity>,
    /// What the checkpoint under way writes again, and for how many errors it answers.
    asked: Rewrite,
    answers_for: u64,
    left: LeftUnproven,
}

impl Doubt {
    /// For an epoch that goes on at `start`. What an earlier agent of the epoch left in doubt is in
    /// doubt still.
    pub(super) fn new(control: &Control, start: RingPos, left: LeftUnproven) -> Self {
        let (errors, mended) = (control.writeback_errors(), control.writeback_mended());
        let mut taint = Taint::new(errors, start);
        if errors != mended {
            taint.noticed(Whose::Anybody);
        }
        Self {
            taint,
            named: Vec::new(),
            asked: Rewrite::Nothing,
            answers_for: errors,
            left,
        }
    }

    /// A record was taken.
    pub(super) fn taken(&mut self, meta: &RecordMeta) {
        if meta.op == op::GAP && meta.arg == gap::WRITEBACK as u64 {
            self.named.push(meta.identity);
        }
    }

    /// For status and log.
    pub(super) fn told(&self) -> Option<String> {
        self.taint.told()
    }
}

impl Pump<'_> {
    /// Looks at the kernel's count; `errors` is from before the newest records were taken.
    pub(super) fn look_at_writebacks(&mut self, errors: u64) {
        let was_tainted = self.doubt.taint.is_tainted();
        let named = std::mem::take(&mut self.doubt.named);
        self.doubt
            .taint
            .looked(errors, named, self.core.captured_end());
        self.control.writeback_looked(errors);
        self.board.writeback_errors.set(errors);
        if self.doubt.taint.is_tainted() && !was_tainted {
            self.planner.want(CheckpointReason::Gap);
        }
    }

    /// What the checkpoint that begins now must write again.
    pub(super) fn mending(&mut self) -> Mending {
        let errors = self.board.writeback_errors.get();
        let asked = self.doubt.taint.rewrite();
        let mending = Mending::of(errors, &asked, || self.live.unproven_bytes());
        (self.doubt.asked, self.doubt.answers_for) = (asked, errors);
        mending
    }

    /// Whether a checkpoint that has synced and written its sentinel counts.
    pub(super) fn is_believed(&mut self) -> bool {
        let (asked, errors) = (&self.doubt.asked, self.doubt.answers_for);
        self.doubt.taint.rewritten(asked, errors);
        let permit = self.doubt.taint.permit();
        let counts =
            permit.is_some_and(|permit| permit.holds(errors) && self.doubt.taint.proven(permit));
        if counts {
            self.control.mend_writeback(errors);
        }
        counts
    }
}

impl Drop for Pump<'_> {
    fn drop(&mut self) {
        // The closing checkpoint may have to write them again, whatever fails until then.
        self.doubt.left.set(self.live.unproven_bytes());
        // A link that ends keeps its descriptor for a while, and would wake whoever sleeps on the ring.
        if self.link.is_some()
            && let Err(error) = self.ring.watch(None)
        {
            tracing::warn!(volume = %self.board.name, %error, "the link is still watched");
        }
    }
}
