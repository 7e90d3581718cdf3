//! The way from an owner to its mirror's region, and to everybody who must know of an epoch.

use std::sync::Arc;

use super::node::Node;
use super::pump::{Ended, Standing};
use crate::board::VolumeBoard;
use crate::cluster::claim::EpochState;
use crate::cluster::control::{RegionState, Request, Response};
use crate::cluster::ownership::is_claimed_by_peer;
use crate::config::Volume;
use crate::events::Event;
use crate::ids::Epoch;
use crate::link::{Link, RingSource};
use crate::region::scan::Tail;
use crate::status::{PeerState, Protection, Role};

/// A link to the region, and what the region holds.
pub(super) struct Opened {
    pub(super) link: Box<dyn Link>,
    pub(super) epoch: Epoch,
    pub(super) open: bool,
    pub(super) tail: Option<Box<Tail>>,
}

/// The way to the mirror's region, and to everybody who must know of the epoch, while the pump
/// borrows the rest of the owner, and on the thread that makes a broken link anew.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) node: Arc<Node>,
    pub(super) volume: Volume,
    pub(super) filesystem_uuid: [u8; 16],
    pub(super) source: RingSource,
}

impl Door {
    /// A link without traffic does not notice that the other end is gone; heartbeats do.
    pub(super) fn mirror_is_silent(&self) -> Option<String> {
        let peer = &self.node.peer;
        match self.node.peer_state() {
            PeerState::Dead => Some(format!("{peer} is silent on both paths")),
            PeerState::LinkSilent => Some(format!("{peer} is silent on the link")),
            PeerState::Alive | PeerState::MailboxSilent | PeerState::Unknown => None,
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        if self.node.stopping() {
            return true;
        }
        let Some(own) = self.node.ledger.claim(&self.volume.name) else {
            return false;
        };
        let peer = self.node.ledger.peer_word(&self.volume.name);
        is_claimed_by_peer(&own, &self.node.id, &peer)
    }

    /// A fresh link to the region; the one before is shut out by it.
    pub(super) fn open(&self) -> anyhow::Result<Opened> {
        let outgoing = self.node.transport.outgoing(Some(self.source.clone()))?;
        let request = Request::OpenRegion {
            volume: self.volume.name.clone(),
            filesystem_uuid: self.filesystem_uuid,
            region_bytes: self.volume.region_bytes.as_u64(),
            owner_endpoint: outgoing.endpoint(),
        };
        match self.node.ask(request)? {
            Response::RegionOpened {
                endpoint,
                epoch,
                state,
                tail,
            } => Ok(Opened {
                link: outgoing.connect(&endpoint)?,
                epoch,
                open: state == RegionState::Open,
                tail,
            }),
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        }
    }

    /// Tells both places that the epoch is open: from here on a takeover merges the region.
    pub(super) fn publish_open(&self, epoch: Epoch) -> Result<(), Ended> {
        let volume = &self.volume.name;
        self.node
            .ledger
            .update(volume, |claim| {
                claim.epoch = epoch;
                claim.epoch_state = EpochState::Open;
            })
            .map_err(|error| Ended::Ledger(error.to_string()))?;
        self.node.events.record(Event::EpochOpened {
            volume: volume.clone(),
            epoch,
        });
        Ok(())
    }

    pub(super) fn show(&self, board: &VolumeBoard, blind_spots: &[String], standing: &Standing) {
        match standing {
            Standing::Beginning => {}
            Standing::Exposed(reason) => board.say(Role::Owner, Protection::Exposed, reason),
            Standing::Protected if blind_spots.is_empty() => {
                board.say(Role::Owner, Protection::Protected, "");
            }
            Standing::Protected => {
                let text = format!(
                    "this kernel does not show changes that pass {}: see `twinwrite doctor`",
                    blind_spots.join(", ")
                );
                board.say(Role::Owner, Protection::Exposed, &text);
            }
        }
    }
}
