//! What an agent tells of itself: the answer of the status socket, of `twinwrite status`, and the
//! source of the metrics. Field names are part of the interface.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, NodeId, Seq};

/// A volume's protection, on its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// Every change is captured and the lag is within its limit.
    Protected,
    /// A gap, or lag beyond the limit: a crash now may lose unflushed writes.
    Exposed,
    /// There is no mirror; the volume is served without a twin.
    Alone,
    /// The volume is not served until the cluster's question is answered.
    Suspended,
}

/// What this node is to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It has the volume mounted and serves it.
    Owner,
    /// It holds the volume's region.
    Mirror,
    /// Neither.
    None,
}

/// How a peer looks from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// Not heard of since this agent started.
    Unknown,
    /// Heard on the link and in the mailbox.
    Alive,
    /// The link is silent, the mailbox is not: the interconnect is broken, nobody takes over.
    LinkSilent,
    /// The mailbox is silent, the link is not.
    MailboxSilent,
    /// Silent on both paths for longer than the limit.
    Dead,
}

/// One step of a takeover and how long it took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeoverStep {
    /// `detect`, `claim`, `fence`, `revoke`, `save`, `mount`, `judge`, `replay`, `epoch`, `serve`.
    pub name: String,
    /// Milliseconds it took.
    pub took_ms: u64,
    /// Wall clock at its end, milliseconds since 1970.
    pub ended_at_ms: i64,
}

/// A takeover this agent carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeoverStatus {
    /// The steps so far, in order.
    pub steps: Vec<TakeoverStep>,
    /// Done, and the volume is served.
    pub serving: bool,
    /// Records of the region that were merged.
    pub records_replayed: u64,
    /// The cut: the last record of the region.
    pub cut_seq: Seq,
    /// What was merged is not whole, in words.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What stopped it, if anything did.
    pub error: Option<String>,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Name from the configuration.
    pub name: String,
    /// Only what is below this directory is protected; all of it if there is none.
    #[serde(default)]
    pub directory: Option<String>,
    /// What this node is to it.
    pub role: Role,
    /// Its protection (as far as this node knows it).
    pub protection: Protection,
    /// Why it is not `protected`, in words with the remedy; empty if it is.
    pub reason: String,
    /// The running or last epoch.
    pub epoch: Epoch,
    /// Last record in the ring.
    pub captured_seq: Seq,
    /// Last record in the peer's region.
    pub mirrored_seq: Seq,
    /// Last record dropped from the region because it is durable.
    pub purged_seq: Seq,
    /// Records captured and not yet mirrored.
    pub lag_records: u64,
    /// Their bytes.
    pub lag_bytes: u64,
    /// Age of the oldest of them, microseconds.
    pub lag_us: u64,
    /// Bytes in the region that are not purged.
    pub unpurged_bytes: u64,
    /// Bytes of the region's log.
    pub region_bytes: u64,
    /// Bytes of the volume that are set aside for a merge.
    #[serde(default)]
    pub reserve_bytes: u64,
    /// Why there are none, in words; a merge into a full volume may then have to wait for room.
    #[serde(default)]
    pub reserve_missing: Option<String>,
    /// Age of the oldest unflushed record, microseconds.
    pub oldest_unflushed_age_us: u64,
    /// Age of the last proof of durability (checkpoint), milliseconds.
    pub checkpoint_age_ms: u64,
    /// Whether ring bytes go to the wire without a copy.
    pub zero_copy: bool,
    /// `rdma` or `tcp`.
    pub link: String,
    /// The takeover this node carried out, if any.
    pub takeover: Option<TakeoverStatus>,
}

/// One peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub node: NodeId,
    /// How it looks from here.
    pub state: PeerState,
    /// Age of its last heartbeat over the link, milliseconds.
    pub heartbeat_age_ms: u64,
    /// Age of its last heartbeat in the mailbox, milliseconds.
    pub mailbox_age_ms: u64,
    /// How long ago the volumes it serves last answered, by its own word, milliseconds.
    #[serde(default)]
    pub volume_io_age_ms: u64,
    /// Its agent said that it restarts: its silence means nothing for a while.
    #[serde(default)]
    pub restarting: bool,
}

/// Everything `twinwrite status --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// This node.
    pub node: NodeId,
    /// Version of the agent.
    pub version: String,
    /// Seconds since the agent started.
    pub uptime_s: u64,
    /// Its peers.
    pub peers: Vec<PeerStatus>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
}
