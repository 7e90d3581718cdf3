//! The bytes of a mailbox slot, and which of its copies counts.
//!
//! ```text
//! 0 magic [8] | 8 version u32 | 12 state u32 | 16 cluster [64] | 80 node [64]
//! 144 boot_id [16] | 160 counter u64 | 168 time_ns i64 | 176 volume_count u32 | 180 restart_ms u32
//! 184 volume [8] of 96 bytes: name [32] | table_version u64 | owner [32] | epoch u64
//!                             | last_mirrored u64 | epoch_state u32 | flags u32
//! 952 volume_io_ms u32 | 956 exposed u32 | 960 zero [60] | 1020 crc32c u32    the rest of the 4096 bytes is zero
//! ```
//!
//! Zero in `restart_ms` or `volume_io_ms` means "nothing told". Version 1 had one copy of each slot.
//!
//! All integers are little-endian. The checksum is over everything before it, so that a write torn
//! between two sectors of the device is told from a slot. Nothing here may trust a byte before it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::cluster::claim::{BootId, EpochState, Phase, VolumeClaim};
use crate::cluster::liveness::Told;
use crate::config::{CLUSTER_NAME_BYTES_MAX, NAME_BYTES_MAX, VOLUMES_MAX};
use crate::ids::{Epoch, NodeId, Seq};
use crate::region::layout::Sealed;

const MAGIC: [u8; 8] = *b"TWMAILBX";
const VERSION: u32 = 2;
const FLAG_CLAIMING: u32 = 1;
const FLAG_MERGING: u32 = 2;
const FLAG_UNMERGED: u32 = 4;

/// The fixed bytes of a slot; see the module's drawing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct MailboxSlot {
    /// `TWMAILBX`.
    pub magic: [u8; 8],
    /// Version of this layout.
    pub version: u32,
    /// An [`AgentState`].
    pub state: u32,
    /// Cluster name, zero-padded.
    pub cluster: [u8; 64],
    /// Node name, zero-padded.
    pub node: [u8; 64],
    /// The writer's boot.
    pub boot_id: [u8; 16],
    /// Grows with every write.
    pub counter: u64,
    /// The writer's clock, nanoseconds since 1970: for people only.
    pub time_ns: i64,
    /// How many of `volumes` count.
    pub volume_count: u32,
    /// Not 0: the writer's agent restarts, and will be silent for no longer than this.
    pub restart_ms: u32,
    /// What the writer says of each volume.
    pub volumes: [VolumeEntry; VOLUMES_MAX],
    /// 1 + how long ago the volumes that the writer serves last answered; 0: it does not tell.
    pub volume_io_ms: u32,
    /// Bit by bit, in the order of `volumes`: its writer owns that volume and does not protect it now. An older
    /// agent neither says nor reads it.
    pub exposed: u32,
    /// Zero.
    pub reserved2: [u32; 15],
    /// CRC-32C of everything before this field.
    pub crc32c: u32,
}

/// One volume in a slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct VolumeEntry {
    /// Its name, zero-padded.
    pub name: [u8; 32],
    /// See [`VolumeClaim::table_version`].
    pub table_version: u64,
    /// The owner's name, zero-padded.
    pub owner: [u8; 32],
    /// See [`VolumeClaim::epoch`].
    pub epoch: u64,
    /// See [`VolumeClaim::last_mirrored`].
    pub last_mirrored: u64,
    /// 0 none, 1 open, 2 closed.
    pub epoch_state: u32,
    /// 1 claiming, 2 merging, 4 unmerged.
    pub flags: u32,
}

const _: () = assert!(size_of::<VolumeEntry>() == 96);
const _: () = assert!(size_of::<MailboxSlot>() == 1024);
const _: () = assert!(NAME_BYTES_MAX == 32 && CLUSTER_NAME_BYTES_MAX == 64);

impl Sealed for MailboxSlot {
    const MAGIC: &'static [u8] = &MAGIC;
}

/// Why a slot says nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SlotError {
    /// Nobody has written it yet.
    #[error("it is blank")]
    Blank,
    /// The checksum is wrong: torn by a power cut, or damaged.
    #[error("it is torn or damaged (its checksum is wrong)")]
    Torn,
    /// Something else lives on the device.
    #[error("it holds something that is no mailbox")]
    NoMailbox,
    /// Another cluster's.
    #[error("it belongs to the cluster `{found}`, and this one is `{wanted}`")]
    OtherCluster {
        /// The cluster in the slot.
        found: String,
        /// This one.
        wanted: String,
    },
    /// Another node's: the nodes of the configuration were reordered or renamed.
    #[error(
        "it belongs to the node `{found}`, and here it is `{wanted}`'s: keep the order of [[node]]"
    )]
    OtherNode {
        /// The node in the slot.
        found: String,
        /// The node of the configuration.
        wanted: String,
    },
    /// Another version of this layout.
    #[error(
        "it has version {0}, and this agent knows {VERSION}: run the same version on both nodes"
    )]
    Version(u32),
    /// The checksum is right and the contents are not.
    #[error("it is not well-formed: {0}")]
    Malformed(String),
}

impl SlotError {
    /// Whether writing over it loses nothing of anybody else's.
    #[must_use]
    pub fn may_be_overwritten(&self) -> bool {
        matches!(self, Self::Blank | Self::Torn | Self::Malformed(_))
    }
}

/// The copies of a slot, as they were read.
pub type SlotCopies = [Result<NodeReport, SlotError>; super::COPIES];

/// Which copy holds the last word that was written whole.
pub(super) fn newest_of(copies: &SlotCopies) -> Option<usize> {
    let whole = copies.iter().enumerate();
    whole
        .filter_map(|(index, copy)| Some((index, copy.as_ref().ok()?.counter)))
        .max_by_key(|(_, counter)| *counter)
        .map(|(index, _)| index)
}

/// What a slot says: its last whole word, since nobody acted upon one whose write had not ended.
///
/// # Errors
/// If there is none: blank only if nothing was ever written, else the damage.
pub fn newest(copies: SlotCopies) -> Result<NodeReport, SlotError> {
    let newest = newest_of(&copies);
    let damaged = |copy: &Result<_, _>| !matches!(copy, Err(SlotError::Blank));
    let index = newest.or_else(|| copies.iter().position(damaged));
    let mut copies = copies.into_iter();
    let copy = copies.nth(index.unwrap_or(0));
    copy.unwrap_or(Err(SlotError::Blank))
}

/// What an agent is doing, for its peer and for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum AgentState {
    /// It finds out what it is to each volume, and has mounted nothing on its own.
    #[default]
    Starting = 1,
    /// It runs.
    Running = 2,
    /// It ended on purpose and has nothing mounted: its silence is no death. An agent that stops while
    /// a volume stays mounted (an upgrade) does not write this.
    Stopped = 3,
}

/// What a node says in its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeReport {
    /// The writer.
    pub node: NodeId,
    /// Its boot.
    pub boot_id: BootId,
    /// Grows with every write.
    pub counter: u64,
    /// Its clock, nanoseconds since 1970: for people only.
    pub time_ns: i64,
    /// What it is doing.
    pub state: AgentState,
    /// What it says of each volume, by name.
    pub volumes: BTreeMap<String, VolumeClaim>,
    /// Which of them it owns and shows as not protected, although their epochs may be open.
    pub exposed: BTreeSet<String>,
    /// What it tells beside its sign of life.
    pub told: Told,
}

impl NodeReport {
    /// Reads a slot that should be `node`'s, of `cluster`.
    ///
    /// # Errors
    /// [`SlotError`], for any bytes whatever.
    pub fn open(bytes: &[u8], cluster: &str, node: &NodeId) -> Result<Self, SlotError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(SlotError::Blank);
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(SlotError::NoMailbox);
        }
        let slot = MailboxSlot::open(bytes).ok_or(SlotError::Torn)?;
        if slot.version != VERSION {
            return Err(SlotError::Version(slot.version));
        }
        let found = text(&slot.cluster)?;
        if found != cluster {
            return Err(SlotError::OtherCluster {
                found,
                wanted: cluster.to_owned(),
            });
        }
        let found = text(&slot.node)?;
        if found != node.0 {
            return Err(SlotError::OtherNode {
                found,
                wanted: node.0.clone(),
            });
        }
        Self::from_slot(&slot)
    }

    fn from_slot(slot: &MailboxSlot) -> Result<Self, SlotError> {
        let entries = usize::try_from(slot.volume_count)
            .ok()
            .and_then(|count| slot.volumes.get(..count))
            .ok_or_else(|| SlotError::Malformed(format!("{} volumes", slot.volume_count)))?;
        let state = match slot.state {
            1 => AgentState::Starting,
            2 => AgentState::Running,
            3 => AgentState::Stopped,
            other => return Err(SlotError::Malformed(format!("agent state {other}"))),
        };
        let volumes: Vec<(String, VolumeClaim)> = entries
            .iter()
            .map(VolumeEntry::open)
            .collect::<Result<_, _>>()?;
        let is_exposed = |index: usize| slot.exposed >> index & 1 != 0;
        let exposed = volumes.iter().enumerate();
        let exposed = exposed.filter(|(index, _)| is_exposed(*index));
        Ok(Self {
            node: NodeId(text(&slot.node)?),
            boot_id: BootId(slot.boot_id),
            counter: slot.counter,
            time_ns: slot.time_ns,
            state,
            exposed: exposed.map(|(_, (name, _))| name.clone()).collect(),
            volumes: volumes.into_iter().collect(),
            told: told_of(slot.restart_ms, slot.volume_io_ms),
        })
    }

    /// The bytes of the slot.
    ///
    /// # Errors
    /// In words, if a name or the number of volumes does not fit.
    pub fn seal(&self, cluster: &str) -> Result<MailboxSlot, String> {
        let mut slot = MailboxSlot::new_zeroed();
        slot.magic = MAGIC;
        slot.version = VERSION;
        slot.state = self.state as u32;
        slot.cluster = padded(cluster)?;
        slot.node = padded(&self.node.0)?;
        slot.boot_id = self.boot_id.0;
        slot.counter = self.counter;
        slot.time_ns = self.time_ns;
        (slot.restart_ms, slot.volume_io_ms) = words_of(&self.told);
        if self.volumes.len() > VOLUMES_MAX {
            return Err(format!(
                "{} volumes, at most {VOLUMES_MAX}",
                self.volumes.len()
            ));
        }
        for (entry, (name, claim)) in slot.volumes.iter_mut().zip(&self.volumes) {
            *entry = VolumeEntry::of(name, claim)?;
            slot.exposed |= u32::from(self.exposed.contains(name)) << slot.volume_count;
            slot.volume_count += 1;
        }
        Ok(Sealed::seal(slot))
    }
}

/// Longest absence that a node can announce: for so long its death goes unnoticed.
pub const RESTART_LIMIT: Duration = Duration::from_secs(300);

/// What the two words of a slot, or of a heartbeat, tell.
#[must_use]
pub fn told_of(restart_ms: u32, volume_io_ms: u32) -> Told {
    let age = volume_io_ms.checked_sub(1);
    Told {
        // Whoever says more is damaged or hostile, and is not waited for until then.
        restart_within: Duration::from_millis(restart_ms.into()).min(RESTART_LIMIT),
        volume_io_age: age.map(|ms| Duration::from_millis(ms.into())),
    }
}

/// The two words that tell it.
#[must_use]
pub fn words_of(told: &Told) -> (u32, u32) {
    let ms = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX - 1);
    let age = told
        .volume_io_age
        .map_or(0, |age| ms(age).saturating_add(1));
    (ms(told.restart_within), age)
}

impl VolumeEntry {
    fn of(name: &str, claim: &VolumeClaim) -> Result<Self, String> {
        Ok(Self {
            name: padded(name)?,
            table_version: claim.table_version,
            owner: padded(&claim.owner.0)?,
            epoch: claim.epoch.0,
            last_mirrored: claim.last_mirrored.0,
            epoch_state: match claim.epoch_state {
                EpochState::None => 0,
                EpochState::Open => 1,
                EpochState::Closed => 2,
            },
            flags: match claim.phase {
                Phase::Settled => 0,
                Phase::Claiming => FLAG_CLAIMING,
                Phase::Merging => FLAG_MERGING,
                Phase::Unmerged => FLAG_UNMERGED,
            },
        })
    }

    fn open(&self) -> Result<(String, VolumeClaim), SlotError> {
        let malformed = |what: &str, value: u32| SlotError::Malformed(format!("{what} {value}"));
        let claim = VolumeClaim {
            table_version: self.table_version,
            owner: NodeId(text(&self.owner)?),
            phase: match self.flags {
                0 => Phase::Settled,
                FLAG_CLAIMING => Phase::Claiming,
                FLAG_MERGING => Phase::Merging,
                FLAG_UNMERGED => Phase::Unmerged,
                other => return Err(malformed("flags", other)),
            },
            epoch: Epoch(self.epoch),
            epoch_state: match self.epoch_state {
                0 => EpochState::None,
                1 => EpochState::Open,
                2 => EpochState::Closed,
                other => return Err(malformed("epoch state", other)),
            },
            last_mirrored: Seq(self.last_mirrored),
        };
        Ok((text(&self.name)?, claim))
    }
}

fn padded<const N: usize>(name: &str) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    match bytes.get_mut(..name.len()) {
        Some(place) if !name.is_empty() => place.copy_from_slice(name.as_bytes()),
        _ => return Err(format!("the name `{name}` must have 1 to {N} bytes")),
    }
    Ok(bytes)
}

fn text(bytes: &[u8]) -> Result<String, SlotError> {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    let name = bytes
        .get(..end)
        .and_then(|name| std::str::from_utf8(name).ok());
    match name {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(SlotError::Malformed("a name".to_owned())),
    }
}
