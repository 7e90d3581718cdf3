//! What a takeover is told, and what it tells.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ids::{NodeId, Seq};
use crate::status::PeerState;

/// Why a step failed, with its context.
pub type StepError = Box<dyn std::error::Error + Send + Sync>;

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The monotonic clock, since any fixed point.
    pub monotonic: Duration,
    /// The wall clock, milliseconds since 1970.
    pub wall_ms: i64,
}

/// Why a node takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The owner is silent on both paths.
    OwnerDead,
    /// The owner is heard, and says that its volumes have not answered it for longer than
    /// `volume_io_limit`, while they answer this node.
    OwnerLostVolumes,
    /// The owner's machine rebooted with its epoch open; its new agent says so itself
    /// (`Phase::Unmerged`), has mounted nothing and will not: there is nothing to fence.
    OwnerRebooted,
}

impl Cause {
    /// In words.
    pub(super) const fn told(self) -> &'static str {
        match self {
            Self::OwnerDead => "it is silent on both paths",
            Self::OwnerLostVolumes => {
                "its volumes' disks have not answered it for longer than volume_io_limit, and they answer here"
            }
            Self::OwnerRebooted => "it rebooted with its epoch open",
        }
    }
}

/// By what the owner is known to be unable to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FencedBy {
    /// The fence command's exit status 0.
    Command,
    /// A person's word.
    Person,
    /// Its own: it rebooted and has mounted nothing.
    Reboot,
}

/// What the volume's sentinel and the saved region say together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// There are records to merge.
    Merge,
    /// The disk has everything.
    Nothing {
        /// Why.
        why: String,
    },
    /// There is no region that could be merged: what was unflushed is lost, nobody knows how much.
    LossUnknown {
        /// Why.
        why: String,
    },
    /// Mailbox, sentinel and region contradict each other: only a person can tell what is true.
    Ask {
        /// How they do.
        why: String,
        /// What each of them says.
        evidence: String,
    },
}

/// What a replay did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Records of the region that were merged.
    pub records_replayed: u64,
    /// The last record of the region.
    pub cut_seq: Seq,
    /// What was merged is not whole, in words: changes that were noticed and not captured, inodes that
    /// could not be made.
    pub warnings: Vec<String>,
}

/// What a call of [`super::Takeover::advance`] came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A step is done, another follows.
    Stepped,
    /// Nothing happens until a person confirms that the owner is dead, or decides what the judge
    /// cannot.
    WaitsForPerson,
    /// A step failed; the next call tries it again.
    Stopped,
    /// This node's claim does not stand: this takeover is over, and ownership is decided again.
    Fallen,
    /// This node serves the volume.
    Serving,
}

/// Why a person's word was not taken.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfirmError {
    /// Another node is meant.
    #[error("the takeover of volume {volume} is from node {from}, not from {named}")]
    OtherNode {
        /// The volume.
        volume: String,
        /// The owner.
        from: NodeId,
        /// The node that was named.
        named: NodeId,
    },
    /// The node is heard.
    #[error("node {named} is not dead: it looks {state:?}; power it off first")]
    NotDead {
        /// The node.
        named: NodeId,
        /// How it looks.
        state: PeerState,
    },
}

/// Why a takeover is not withdrawn.
#[derive(Debug, Error)]
pub enum WithdrawError {
    /// The owner is fenced already.
    #[error("the takeover of volume {0} is not withdrawn: its owner is fenced already")]
    TooLate(String),
    /// The claim could not be taken back.
    #[error("the takeover of volume {0} is not withdrawn: {1}")]
    Failed(String, StepError),
}
