//! Answering the peer's agent.

use std::sync::Arc;

use super::node::{Node, lock};
use crate::cluster::control::{ControlHandler, Hello, RegionState, Request, Response};
use crate::ids::{Epoch, NodeId};
use crate::link::Endpoint;
use crate::region::layout::region_state;

/// Answers from what the node holds.
pub struct Handler(pub Arc<Node>);

fn refused(reason: impl ToString) -> Response {
    Response::Refused {
        reason: reason.to_string(),
    }
}

impl ControlHandler for Handler {
    async fn handle(&self, peer: &Hello, request: Request) -> Response {
        let node = Arc::clone(&self.0);
        let from = peer.node.clone();
        // Regions are scanned and memory registered: not on a thread that others wait for.
        let answered = tokio::task::spawn_blocking(move || answer(&node, &from, request)).await;
        answered.unwrap_or_else(|_| refused("the request could not be answered"))
    }
}

fn answer(node: &Node, from: &NodeId, request: Request) -> Response {
    match request {
        Request::OpenRegion {
            volume,
            filesystem_uuid,
            region_bytes,
            owner_endpoint,
        } => open_region(
            node,
            from,
            &volume,
            (filesystem_uuid, region_bytes),
            &owner_endpoint,
        ),
        Request::BeginEpoch { volume, epoch } => begin_epoch(node, from, &volume, epoch),
        Request::CloseEpoch { volume, epoch, .. } => match node.regions.get(&volume) {
            Some(host) => match lock(host).close_epoch(epoch) {
                Ok(()) => Response::EpochClosed,
                Err(error) => refused(error),
            },
            None => unknown(&volume),
        },
        Request::OpenNodePage { endpoint } => open_page(node, &endpoint),
        Request::Ownership { volume } => Response::OwnershipIs {
            claim: node.ledger.claim(&volume),
            serving: node.is_serving(&volume),
        },
        Request::ChangeOwner { .. } => {
            refused("giving a volume back is not built yet: stop the agent on one node instead")
        }
    }
}

fn unknown(volume: &str) -> Response {
    refused(format!(
        "volume {volume} is not configured here: use one configuration on both nodes"
    ))
}

/// Why `from` may not write into this node's region, if it may not.
fn objection(node: &Node, from: &NodeId, volume: &str) -> Option<String> {
    if node.is_serving(volume) {
        return Some(format!(
            "{} owns volume {volume} and serves it: {from} was taken over",
            node.id
        ));
    }
    let claim = node.ledger.claim(volume)?;
    (claim.owner == node.id).then(|| {
        format!(
            "{} claims volume {volume} since table version {}",
            node.id, claim.table_version
        )
    })
}

fn open_region(
    node: &Node,
    from: &NodeId,
    volume: &str,
    (filesystem_uuid, region_bytes): ([u8; 16], u64),
    writer: &Endpoint,
) -> Response {
    let Some(host) = node.regions.get(volume) else {
        return unknown(volume);
    };
    if let Some(reason) = objection(node, from, volume) {
        return refused(reason);
    }
    let configured = node.volume(volume).map_or(0, |v| v.region_bytes.as_u64());
    if configured != region_bytes {
        return refused(format!(
            "region_bytes of {volume} is {configured} here and {region_bytes} at {from}: use one configuration"
        ));
    }
    match lock(host).open(writer, filesystem_uuid) {
        Ok(opened) => Response::RegionOpened {
            endpoint: opened.endpoint,
            epoch: opened.epoch,
            state: match opened.state {
                region_state::OPEN => RegionState::Open,
                region_state::CLOSED => RegionState::Closed,
                _ => RegionState::Empty,
            },
            tail: opened.tail.map(Box::new),
        },
        Err(error) => refused(error),
    }
}

fn begin_epoch(node: &Node, from: &NodeId, volume: &str, epoch: Epoch) -> Response {
    let Some(host) = node.regions.get(volume) else {
        return unknown(volume);
    };
    if let Some(reason) = objection(node, from, volume) {
        return refused(reason);
    }
    match lock(host).begin_epoch(from, epoch) {
        Ok(()) => Response::EpochBegun,
        Err(error) => refused(error),
    }
}

fn open_page(node: &Node, writer: &Endpoint) -> Response {
    let mut page = lock(&node.page);
    if let Some(old) = page.exposed.take()
        && let Err(error) = old.revoke()
    {
        tracing::warn!(%error, "the peer's former heartbeat link could not be shut");
    }
    let opened = node
        .transport
        .expose(Arc::clone(&page.memory))
        .and_then(|mut exposed| {
            exposed.accept(writer)?;
            Ok(exposed)
        });
    match opened {
        Ok(exposed) => {
            let endpoint = exposed.endpoint();
            page.exposed = Some(exposed);
            Response::NodePageOpened { endpoint }
        }
        Err(error) => refused(error),
    }
}
