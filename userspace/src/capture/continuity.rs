//! What the next agent must know of the running epoch, kept beside the pinned programs.
//!
//! It lives in the control map, so it ends with the programs: a set of words without its stamp is
//! never believed.

use twinwrite_abi::{control, gap};

use super::control::{Control, GapCounts};
use crate::ids::{Epoch, RingPos, Seq};

const STAMP: u64 = u64::from_le_bytes(*b"TWEPOCH1");
const STAMP_AT: usize = control::CONTINUITY;
const EPOCH_AT: usize = control::CONTINUITY + 1;
const RING_START_AT: usize = control::CONTINUITY + 2;
const SEQ_BASE_AT: usize = control::CONTINUITY + 3;
const DROPS_AT: usize = control::CONTINUITY + 4;
const MISSES_AT: usize = control::CONTINUITY + 5;
const GAPS_AT: usize = control::CONTINUITY + 8;

/// The running epoch, as its agent left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continuity {
    /// The epoch.
    pub epoch: Epoch,
    /// Where the ring stood when it began.
    pub ring_start: RingPos,
    /// The seq before the record at `ring_start`.
    pub seq_base: Seq,
    /// Drops when it began.
    pub drops: u64,
    /// Recursion misses when it began.
    pub recursion_misses: u64,
    /// Gap counts when it began.
    pub gaps: GapCounts,
}

impl Continuity {
    /// What the agent before left; `None` if no epoch runs.
    #[must_use]
    pub fn load(control: &Control) -> Option<Self> {
        (control.get(STAMP_AT) == STAMP).then(|| Self {
            epoch: Epoch(control.get(EPOCH_AT)),
            ring_start: RingPos(control.get(RING_START_AT)),
            seq_base: Seq(control.get(SEQ_BASE_AT)),
            drops: control.get(DROPS_AT),
            recursion_misses: control.get(MISSES_AT),
            gaps: std::array::from_fn(|reason| control.get(GAPS_AT + reason)),
        })
    }

    /// Leaves this for the next agent.
    pub fn store(&self, control: &Control) {
        Self::clear(control);
        control.set(EPOCH_AT, self.epoch.0);
        control.set(RING_START_AT, self.ring_start.0);
        control.set(SEQ_BASE_AT, self.seq_base.0);
        control.set(DROPS_AT, self.drops);
        control.set(MISSES_AT, self.recursion_misses);
        for (reason, count) in self.gaps.iter().enumerate() {
            control.set(GAPS_AT + reason, *count);
        }
        control.set(STAMP_AT, STAMP);
    }

    /// No epoch runs.
    pub fn clear(control: &Control) {
        control.set(STAMP_AT, 0);
    }
}

const _: () = assert!(GAPS_AT + gap::COUNT <= twinwrite_abi::CONTROL_SLOTS);
