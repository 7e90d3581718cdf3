//! What comes of a pump's turns, for its owner: what is to be shown, and why an epoch ends.

use twinwrite_abi::gap;

use super::Pump;
use crate::capture::CaptureError;
use crate::durability::core::LiveError;
use crate::mirror::core::CoreError;

/// Why an epoch cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// Events were lost, so that later records cannot be trusted to be all.
    #[error("events were lost ({0}): the ring was full or the kernel skipped a hook")]
    EventsLost(String),
    /// The core met something that breaks the protocol.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// The record of what is durable was fed out of order.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// The ring is not what the programs write.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A record that cannot be read.
    #[error("the ring holds a damaged record: {0}")]
    Record(#[from] crate::record::RecordError),
    /// The link has been gone for longer than the lag limit.
    #[error("the link to the mirror is gone: {0}")]
    LinkGone(String),
    /// The start of the epoch could not be told in table and mailbox.
    #[error("the epoch could not be told: {0}")]
    Ledger(String),
    /// A change was noticed that is not captured, and that makes the log unfit to be replayed.
    #[error("a change that is not captured ({0}); a checkpoint covers it, then a new epoch begins")]
    Gap(String),
    /// Too much has not reached the mirror for too long.
    #[error("the lag was over its limit: {0}")]
    Lag(String),
    /// The volume is not where or what it was.
    #[error("{0}")]
    Volume(String),
    /// Somebody removed pinned programs or maps: this agent's go on, and would end with it.
    #[error("{0}: the capture programs are attached anew")]
    CaptureLost(String),
    /// The agent stops.
    #[error("the agent stops")]
    Stop,
}

/// What one turn found to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Something moved.
    Worked,
    /// Nothing to do until something happens.
    Idle,
}

/// What the volume's protection is to be, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The epoch's first checkpoint is not proven yet.
    Beginning,
    /// Everything captured is, or soon will be, in the region.
    Protected,
    /// Something weakens protection.
    Exposed(String),
}

impl Pump<'_> {
    /// What the volume's protection is now.
    pub fn standing(&self) -> Standing {
        if !self.begun {
            return match &self.checkpoint_failure {
                Some(error) => Standing::Exposed(format!("the first checkpoint failed: {error}")),
                None => Standing::Beginning,
            };
        }
        if let Some(reason) = self.doubt.told() {
            let failure = self.checkpoint_failure.iter();
            let failure: String = failure.map(|error| format!("; {error}")).collect();
            return Standing::Exposed(reason + &failure);
        }
        let gaps = self.control.gaps();
        let new: Vec<&str> = gap::NAMES
            .iter()
            .enumerate()
            .zip(gaps.iter().zip(&self.gaps_proven))
            .filter(|((reason, _), (now, proven))| now > proven && !self.is_snapshotted(*reason))
            .map(|((_, name), _)| *name)
            .collect();
        if !new.is_empty() {
            let names = new.join(", ");
            return Standing::Exposed(format!(
                "changes that are not captured yet ({names}); a checkpoint will cover them"
            ));
        }
        if let Some(reason) = self.late_look() {
            return Standing::Exposed(reason);
        }
        if let Some((_, reason)) = &self.gap_in_log {
            return Standing::Exposed(format!("{reason}; a checkpoint will cover it"));
        }
        match &self.checkpoint_failure {
            Some(error) => Standing::Exposed(format!("the last checkpoint failed: {error}")),
            None => Standing::Protected,
        }
    }
}
