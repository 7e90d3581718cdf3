//! When a checkpoint is due. One runs at a time; a failed one is tried again, later each time.
//!
//! The driver asks [`CheckpointPlanner::poll`], runs what it is told, and says how it ended. This core
//! must never read a clock and never decide what a checkpoint proves.

#[cfg(test)]
mod tests;

use serde::Serialize;

use crate::record::gap;

/// Gaps after which older records of the log could be laid over newer bytes or names: they end the
/// epoch. The others (stores through mappings, attributes) are covered by a checkpoint within it,
/// because what confirms them is captured as a mark and clips the older records.
pub const ENDING_GAPS: [usize; 9] = [
    gap::FALLOCATE,
    gap::REMAP,
    gap::DIRECT_IO,
    gap::IOCTL,
    gap::RING_FULL,
    gap::WHITEOUT,
    gap::UNREADABLE,
    gap::UNGATED,
    gap::BORDER,
];

/// Wait before the first retry.
const RETRY_MIN_US: u64 = 100_000;
/// Longest wait before a retry.
const RETRY_MAX_US: u64 = 10_000_000;

/// Why a checkpoint is made; the more urgent is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointReason {
    /// The oldest unflushed record has reached its age limit.
    Age,
    /// Somebody asked for one.
    Requested,
    /// The region is half full.
    RegionHalf,
    /// The region is full.
    RegionFull,
    /// A change was not captured: until it is on the disk the volume is exposed.
    Gap,
}

/// What a failure leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Failures in a row, this one included.
    pub failures: u32,
    /// Time until the next try.
    pub after_us: u64,
}

/// The plan of one volume's checkpoints.
#[derive(Clone, Debug)]
pub struct CheckpointPlanner {
    age_limit_us: u64,
    wanted: Option<CheckpointReason>,
    running: Option<CheckpointReason>,
    failures: u32,
    not_before_us: u64,
    proven_us: Option<u64>,
}

impl CheckpointPlanner {
    /// A plan that lets no unflushed record grow older than this.
    #[must_use]
    pub fn new(age_limit_us: u64) -> Self {
        Self {
            age_limit_us,
            wanted: None,
            running: None,
            failures: 0,
            not_before_us: 0,
            proven_us: None,
        }
    }

    /// Asks for a checkpoint that begins after this call. One that runs already does not count: it
    /// may have taken its S before.
    pub fn want(&mut self, reason: CheckpointReason) {
        self.wanted = self.wanted.max(Some(reason));
    }

    /// Whether to begin one now, and why. The caller must then begin it and report its end.
    pub fn poll(&mut self, now_us: u64, oldest_unflushed_age_us: u64) -> Option<CheckpointReason> {
        if self.running.is_some() || now_us < self.not_before_us {
            return None;
        }
        let aged = (oldest_unflushed_age_us >= self.age_limit_us).then_some(CheckpointReason::Age);
        self.running = self.wanted.take().max(aged);
        self.running
    }

    /// The one that runs, if any.
    #[must_use]
    pub fn running(&self) -> Option<CheckpointReason> {
        self.running
    }

    /// It has proven everything up to its S.
    pub fn succeeded(&mut self, now_us: u64) {
        self.running = None;
        self.failures = 0;
        self.not_before_us = 0;
        self.proven_us = Some(now_us);
    }

    /// It has proven nothing. What it was for is wanted still.
    pub fn failed(&mut self, now_us: u64) -> Retry {
        if let Some(reason) = self.running.take() {
            self.want(reason);
        }
        let after_us = RETRY_MIN_US
            .saturating_mul(1 << self.failures.min(30))
            .min(RETRY_MAX_US);
        self.failures = self.failures.saturating_add(1);
        self.not_before_us = now_us.saturating_add(after_us);
        Retry {
            failures: self.failures,
            after_us,
        }
    }

    /// Age of the last proof, `None` if there was none.
    #[must_use]
    pub fn proof_age_us(&self, now_us: u64) -> Option<u64> {
        self.proven_us.map(|proven| now_us.saturating_sub(proven))
    }
}
