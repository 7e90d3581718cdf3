//! What a node says of a volume: in its mailbox slot, in its table, in answer to its peer.
//!
//! A claim is knowledge, not permission: only `ownership` and `takeover` decide what follows from
//! it. Nothing here may read or write anything.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, NodeId, Seq};

/// One boot of one machine (`/proc/sys/kernel/random/boot_id`); another one after a reboot, the
/// same one after a restart of the agent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// The running kernel's.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn of_this_machine() -> std::io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        text.trim().parse().map_err(|error| {
            std::io::Error::new(std::io::ErrorKind::InvalidData, format!("boot_id: {error}"))
        })
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootId({self})")
    }
}

impl FromStr for BootId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits: Vec<u8> = text
            .chars()
            .filter(|c| *c != '-')
            .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| "a boot id is 32 hexadecimal digits".to_owned())?;
        let bytes: Vec<u8> = digits
            .chunks_exact(2)
            .filter_map(|pair| <[u8; 2]>::try_from(pair).ok())
            .map(|[high, low]| high << 4 | low)
            .collect();
        let odd = digits.len() % 2 == 1;
        match <[u8; 16]>::try_from(bytes) {
            Ok(bytes) if !odd => Ok(Self(bytes)),
            _ => Err("a boot id is 32 hexadecimal digits".to_owned()),
        }
    }
}

impl Serialize for BootId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BootId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Whether the records of an epoch are to be replayed if its owner dies.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum EpochState {
    /// There was no epoch under this ownership yet.
    #[default]
    None,
    /// It runs: the region is to be replayed.
    Open,
    /// It ended: the region is void.
    Closed,
}

/// How far a claim of ownership has come, in this order.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A takeover began; the node before may not be fenced yet, so nothing was mounted.
    Claiming,
    /// The node before is fenced; mount and replay may have begun and are not finished.
    Merging,
    /// The owner serves, or may.
    #[default]
    Settled,
    /// The owner's machine rebooted while the epoch was open: it has mounted nothing and will not;
    /// the mirror must merge first. Only a change of owner leads out of it.
    Unmerged,
}

/// What a node says of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeClaim {
    /// Grows by one with each change of owner.
    pub table_version: u64,
    /// The owner.
    pub owner: NodeId,
    /// How far its claim has come.
    pub phase: Phase,
    /// The running or last epoch.
    pub epoch: Epoch,
    /// Whether it runs.
    pub epoch_state: EpochState,
    /// Last record known in the mirror's region when this was said.
    pub last_mirrored: Seq,
}

impl VolumeClaim {
    /// The first owner's first word.
    #[must_use]
    pub const fn first(owner: NodeId) -> Self {
        Self {
            table_version: 1,
            owner,
            phase: Phase::Settled,
            epoch: Epoch(0),
            epoch_state: EpochState::None,
            last_mirrored: Seq(0),
        }
    }

    /// A change of owner above everything that is `known` (both tables, both slots): with
    /// [`Phase::Claiming`] a takeover's first word, with [`Phase::Settled`] and the node before as
    /// `owner` its withdrawal. Epoch numbers go on.
    #[must_use]
    pub fn change<'a>(
        owner: NodeId,
        phase: Phase,
        known: impl IntoIterator<Item = &'a Self>,
    ) -> Self {
        let mut changed = Self {
            table_version: 0,
            phase,
            ..Self::first(owner)
        };
        for claim in known {
            changed.table_version = changed.table_version.max(claim.table_version);
            let of = |claim: &Self| (claim.epoch, claim.epoch_state, claim.last_mirrored);
            if of(claim) > of(&changed) {
                (changed.epoch, changed.epoch_state, changed.last_mirrored) = of(claim);
            }
        }
        changed.table_version = changed.table_version.saturating_add(1);
        changed
    }

    /// Whether the same node said this after `other`.
    #[must_use]
    pub fn is_later_than(&self, other: &Self) -> bool {
        let key = |claim: &Self| {
            (
                claim.table_version,
                claim.phase,
                claim.epoch,
                claim.epoch_state,
                claim.last_mirrored,
            )
        };
        key(self) > key(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_read_in_both_ways_of_writing_it() {
        let id: BootId = "01020304-0506-0708-090a-0b0c0d0e0f10".parse().unwrap();
        assert_eq!(id.to_string(), "0102030405060708090a0b0c0d0e0f10");
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in [
            "",
            "1",
            "g1020304-0506-0708-090a-0b0c0d0e0f10",
            &"0".repeat(33),
        ] {
            assert!(wrong.parse::<BootId>().is_err(), "{wrong}");
        }
        assert_ne!(BootId::of_this_machine().unwrap(), BootId::default());
    }

    #[test]
    fn a_change_of_owner_is_above_all_that_is_known_and_keeps_the_epoch() {
        let node = |name: &str| NodeId(name.into());
        let open = VolumeClaim {
            epoch: Epoch(8),
            epoch_state: EpochState::Open,
            last_mirrored: Seq(5),
            ..VolumeClaim::first(node("a"))
        };
        let closed = VolumeClaim {
            epoch_state: EpochState::Closed,
            ..open.clone()
        };
        let older = VolumeClaim {
            table_version: 7,
            epoch: Epoch(3),
            epoch_state: EpochState::Closed,
            last_mirrored: Seq(900),
            ..open.clone()
        };
        let claim = VolumeClaim::change(node("b"), Phase::Claiming, [&open, &older, &closed]);
        assert_eq!((claim.table_version, claim.phase), (8, Phase::Claiming));
        assert_eq!(
            (claim.epoch, claim.epoch_state),
            (Epoch(8), EpochState::Closed)
        );
        assert_eq!(
            (claim.owner.clone(), claim.last_mirrored),
            (node("b"), Seq(5))
        );
        assert!(claim.is_later_than(&open) && claim.is_later_than(&older));
        let fresh = VolumeClaim::change(node("b"), Phase::Settled, []);
        assert_eq!(fresh, VolumeClaim::first(node("b")));
    }
}
