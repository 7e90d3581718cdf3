//! The configuration: one TOML file, the same on every node.
//!
//! [`Config::load`] reads it and [`Config::validate`] checks it as a whole; every error names the
//! key and the remedy. Nothing here touches what the file speaks of (devices, mounts, peers), so
//! that a configuration can be checked on any machine.

mod check;
mod load;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;

use bytesize::ByteSize;
use jiff::SignedDuration;
use serde::Deserialize;

pub use self::check::{CLUSTER_NAME_BYTES_MAX, NAME_BYTES_MAX, VOLUMES_MAX};
pub use self::load::ConfigError;
use crate::ids::NodeId;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What the nodes have in common.
    pub cluster: Cluster,
    /// The nodes; their order is their mailbox slot, so never reorder a running cluster's.
    #[serde(rename = "node")]
    pub nodes: Vec<Node>,
    /// The protected volumes.
    #[serde(rename = "volume")]
    pub volumes: Vec<Volume>,
    /// CRC-32C of the file's text, in hex: tells two nodes that they read different files.
    #[serde(skip)]
    pub digest: String,
}

/// Which transport mirrors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransportKind {
    /// One-sided RDMA writes.
    Rdma,
    /// TCP, for hosts without RDMA.
    Tcp,
}

/// `[cluster]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// A peer with another cluster name is refused.
    pub name: String,
    /// How bytes reach the peer.
    #[serde(default = "default_transport")]
    pub transport: TransportKind,
    /// RDMA device; default: the first one.
    pub rdma_device: Option<String>,
    /// A small shared block device for heartbeats and ownership.
    pub mailbox: PathBuf,
    /// Time between heartbeats.
    #[serde(default = "default_heartbeat_interval")]
    pub heartbeat_interval: SignedDuration,
    /// Silence on both paths after which a node is dead.
    #[serde(default = "default_dead_after")]
    pub dead_after: SignedDuration,
    /// A node whose volumes have not answered for so long is taken over although its agent lives, if
    /// the other node reaches them; default: never.
    pub volume_io_limit: Option<SignedDuration>,
    /// Command that powers a node off; `{node}` is replaced by its name. Exit status 0 promises that
    /// the node can no longer reach the volume. Without it takeover waits for a person.
    pub fence_command: Option<Vec<String>>,
    /// Limit of one fence command.
    #[serde(default = "default_fence_timeout")]
    pub fence_timeout: SignedDuration,
    /// Where saved regions and the ownership table live (local disk).
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where the status socket lives.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Address of the metrics endpoint.
    #[serde(default = "default_metrics_listen")]
    pub metrics_listen: SocketAddr,
}

/// `[[node]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: NodeId,
    /// Address of its control port.
    pub address: SocketAddr,
}

/// Who mounts the volume on its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountBy {
    /// The agent, once it knows that this node owns the volume.
    Agent,
    /// Somebody else; the agent refuses to start if it is not mounted.
    External,
}

/// What becomes of shared writable mappings, through which bytes change without a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MappingPolicy {
    /// Their pages are looked at again and again, and what has changed is told.
    Snapshot,
    /// New ones are refused with EOPNOTSUPP.
    Refuse,
}

/// `[[volume]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The shared block device.
    pub device: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Only what is below this directory is protected, a path below the mount point; default: all of it.
    pub directory: Option<PathBuf>,
    /// File system type: `ext4` or `xfs`.
    pub filesystem: String,
    /// Mount options, as for mount(8).
    #[serde(default)]
    pub mount_options: String,
    /// The device keeps what it has confirmed although the file system is mounted without barriers.
    #[serde(default)]
    pub allow_no_barriers: bool,
    /// Who mounts it.
    #[serde(default = "default_mount_by")]
    pub mount_by: MountBy,
    /// The node that owns it while nothing has failed.
    pub owner: NodeId,
    /// The node that holds its region.
    pub mirror: NodeId,
    /// Bytes of the region's log on the mirror.
    #[serde(default = "default_region_bytes")]
    pub region_bytes: ByteSize,
    /// Directory for region files: a tmpfs or hugetlbfs.
    #[serde(default = "default_region_dir")]
    pub region_dir: PathBuf,
    /// Bytes of the capture ring on the owner; a power of two.
    #[serde(default = "default_ring_bytes")]
    pub ring_bytes: ByteSize,
    /// Unflushed records older than this are made durable by a checkpoint.
    #[serde(default = "default_checkpoint_age")]
    pub checkpoint_age: SignedDuration,
    /// Lag beyond this is `exposed`.
    #[serde(default = "default_lag_limit")]
    pub lag_limit: SignedDuration,
    /// What becomes of shared writable mappings of the volume's files.
    #[serde(default = "default_mappings")]
    pub mappings: MappingPolicy,
    /// Pages that are changed through shared mappings are looked at so often: what was stored since is lost with
    /// the node.
    #[serde(default = "default_mapping_snapshot_interval")]
    pub mapping_snapshot_interval: SignedDuration,
    /// Command run when this node begins to serve the volume (`{volume}`, `{mount_point}`).
    pub serve_command: Option<Vec<String>>,
}

fn default_transport() -> TransportKind {
    TransportKind::Rdma
}
fn default_heartbeat_interval() -> SignedDuration {
    SignedDuration::from_millis(500)
}
fn default_dead_after() -> SignedDuration {
    SignedDuration::from_secs(3)
}
fn default_fence_timeout() -> SignedDuration {
    SignedDuration::from_secs(30)
}
fn default_state_dir() -> PathBuf {
    "/var/lib/twinwrite".into()
}
fn default_run_dir() -> PathBuf {
    "/run/twinwrite".into()
}
fn default_metrics_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9477))
}
fn default_mount_by() -> MountBy {
    MountBy::Agent
}
fn default_region_bytes() -> ByteSize {
    ByteSize::mib(256)
}
fn default_region_dir() -> PathBuf {
    "/dev/shm/twinwrite".into()
}
fn default_ring_bytes() -> ByteSize {
    ByteSize::mib(16)
}
fn default_checkpoint_age() -> SignedDuration {
    SignedDuration::from_secs(20)
}
fn default_mappings() -> MappingPolicy {
    MappingPolicy::Snapshot
}
fn default_mapping_snapshot_interval() -> SignedDuration {
    SignedDuration::from_secs(1)
}
fn default_lag_limit() -> SignedDuration {
    SignedDuration::from_secs(2)
}
