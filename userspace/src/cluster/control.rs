//! The control connection between two agents: who is there, and the few questions that begin and end
//! mirroring.
//!
//! ```text
//! frame: length u32 (little-endian, at most 64 KiB) | JSON of one Message
//! client: Hello ->   <- Hello   then Request -> <- Response, one at a time
//! either side may answer Refused, with the reason in words, and close
//! ```
//!
//! Both sides check the other's Hello before anything else. Whatever arrives is limited in size and
//! time and checked before use; a peer that breaks the rules gets an error and a closed
//! connection. Bytes of the volume never travel here, and this module must never act on a
//! request itself.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::claim::{BootId, VolumeClaim};
use crate::ids::{Epoch, NodeId, Seq};
use crate::link::Endpoint;
use crate::region::scan::Tail;

mod client;
mod frame;
mod server;
#[cfg(test)]
mod tests;

pub use client::ControlClient;
pub use server::{ControlHandler, ControlServer};

/// Version of this protocol.
pub const PROTOCOL: u32 = 1;
/// Most bytes of one message.
pub const MESSAGE_BYTES_MAX: u32 = 64 * 1024;

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The cluster.
    pub cluster: String,
    /// The node.
    pub node: NodeId,
    /// Its boot.
    pub boot_id: BootId,
    /// Its configuration's digest; another one is worth a warning.
    pub config_digest: Option<String>,
}

/// What one agent asks the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The owner wants to write into the volume's region.
    OpenRegion {
        /// The volume.
        volume: String,
        /// UUID of its file system, as bytes.
        filesystem_uuid: [u8; 16],
        /// Bytes of the log.
        region_bytes: u64,
        /// The writing side.
        owner_endpoint: Endpoint,
    },
    /// The region is emptied for a new epoch.
    BeginEpoch {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
    },
    /// The region is void from now on.
    CloseEpoch {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
        /// Last record in the region.
        last_mirrored: Seq,
    },
    /// The asking node wants to write its heartbeats.
    OpenNodePage {
        /// The writing side.
        endpoint: Endpoint,
    },
    /// Who owns the volume?
    Ownership {
        /// The volume.
        volume: String,
    },
    /// A change of owner, peer first: take it over into your table and mailbox slot.
    ChangeOwner {
        /// The volume.
        volume: String,
        /// The new word.
        claim: VolumeClaim,
    },
}

/// What the other answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case", deny_unknown_fields)]
pub enum Response {
    /// The region is open to the asking node and no other.
    RegionOpened {
        /// The exposing side.
        endpoint: Endpoint,
        /// Epoch of the region's header.
        epoch: Epoch,
        /// State of the region's header.
        state: RegionState,
        /// Where the log ends, if it holds an open epoch.
        tail: Option<Box<Tail>>,
    },
    /// The region is empty and open for the epoch.
    EpochBegun,
    /// The region is void.
    EpochClosed,
    /// The heartbeat memory is open to the asking node and no other.
    NodePageOpened {
        /// The exposing side.
        endpoint: Endpoint,
    },
    /// What the answering node says of the volume.
    OwnershipIs {
        /// Its word; `None`: it knows nothing.
        claim: Option<VolumeClaim>,
        /// It has the volume mounted.
        serving: bool,
    },
    /// The change is in its table and its mailbox slot.
    OwnerChanged,
    /// It will not, and why.
    Refused {
        /// In words, with the remedy.
        reason: String,
    },
}

/// State of a region's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegionState {
    /// It holds nothing.
    Empty,
    /// Its epoch runs.
    Open,
    /// Its epoch has ended.
    Closed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case", deny_unknown_fields)]
enum Message {
    Hello { hello: Hello },
    Request { id: u64, request: Request },
    Response { id: u64, response: Response },
    Refused { reason: String },
}

/// Why a control connection does not work.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The control port cannot be opened.
    #[error(
        "cannot listen on {address}: {source}; `node.address` must be an address of this machine and its port free"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// The peer is not reached.
    #[error("peer {node} is not reached at {address}: {source}")]
    Unreachable {
        /// The peer.
        node: NodeId,
        /// Its address.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// The other side is not whom this node wants to talk to.
    #[error("wrong peer: {0}")]
    WrongPeer(String),
    /// The other side refuses this node or its request.
    #[error("the peer refuses: {0}")]
    Refused(String),
    /// The connection broke, or the other side closed it.
    #[error("the control connection broke: {0}")]
    Broken(#[from] std::io::Error),
    /// Nothing came in time.
    #[error("the peer did not {0} in time")]
    TimedOut(&'static str),
    /// The other side breaks the rules of this protocol.
    #[error("the peer sent {0}")]
    Protocol(String),
}

/// Who this node is, and with whom it talks.
#[derive(Clone, Debug)]
pub struct Identity {
    /// What it says of itself.
    pub hello: Hello,
    /// Its own control address.
    pub address: SocketAddr,
    /// The configured peers.
    pub peers: Vec<(NodeId, SocketAddr)>,
}

impl Identity {
    /// From the configuration; `None` if `this_node` is none of its nodes.
    #[must_use]
    pub fn new(
        config: &crate::config::Config,
        this_node: &NodeId,
        boot_id: BootId,
    ) -> Option<Self> {
        let own = config.nodes.iter().find(|node| node.name == *this_node)?;
        let peers = config.nodes.iter().filter(|node| node.name != *this_node);
        Some(Self {
            hello: Hello {
                protocol: PROTOCOL,
                cluster: config.cluster.name.clone(),
                node: this_node.clone(),
                boot_id,
                config_digest: Some(config.digest.clone()),
            },
            address: own.address,
            peers: peers
                .map(|node| (node.name.clone(), node.address))
                .collect(),
        })
    }

    /// Whether this node talks to who says `hello`; `wanted`: it must be this peer.
    fn check(&self, hello: &Hello, wanted: Option<&NodeId>) -> Result<(), String> {
        let own = &self.hello;
        if hello.protocol != own.protocol {
            return Err(format!(
                "{} speaks protocol {}, {} speaks {}: run the same version on both nodes",
                hello.node, hello.protocol, own.node, own.protocol
            ));
        }
        if hello.cluster != own.cluster {
            return Err(format!(
                "{} is of the cluster `{}`, {} of `{}`: correct `node.address` or `cluster.name`",
                hello.node, hello.cluster, own.node, own.cluster
            ));
        }
        let known = self.peers.iter().any(|(node, _)| *node == hello.node);
        if !known || wanted.is_some_and(|wanted| *wanted != hello.node) {
            let wanted = wanted.map_or_else(
                || {
                    self.peers
                        .iter()
                        .map(|(node, _)| node.to_string())
                        .collect::<Vec<_>>()
                        .join(", ")
                },
                ToString::to_string,
            );
            return Err(format!(
                "the node `{}` is not the peer that {} is configured for ({wanted}): correct \
                 [[node]] or `--node`",
                hello.node, own.node
            ));
        }
        if hello.config_digest != own.config_digest {
            tracing::warn!(
                "the configuration of node {} differs from this node's: it should be the same file",
                hello.node
            );
        }
        Ok(())
    }
}
