//! Closing an epoch: the mailbox first, then a checkpoint whose sentinel says so, then the mirror.
//!
//! From the mailbox's word on nobody replays the region; from the sentinel's fsync on the disk has
//! everything. Needs no capture, so that an epoch which an earlier agent left open can be closed
//! even where capture no longer works. It must not call an epoch closed before the sentinel is
//! proven.

use std::sync::Arc;

use super::checkpointer::{Checkpoint, CheckpointError, Checkpointer};
use super::clock::wall_ns;
use super::node::Node;
use crate::board::VolumeBoard;
use crate::cluster::claim::{EpochState, Phase};
use crate::cluster::control::Request;
use crate::config::Volume;
use crate::events::Event;
use crate::ids::{Epoch, Seq};
use crate::status::{Protection, Role};

/// Ends a volume's epochs, and makes its checkpoints.
pub struct Closer<'a> {
    node: &'a Node,
    volume: &'a Volume,
    board: Arc<VolumeBoard>,
    checkpointer: Checkpointer,
}

impl<'a> Closer<'a> {
    /// For a mounted volume.
    ///
    /// # Errors
    /// When the volume or its sentinel cannot be opened.
    pub fn new(
        node: &'a Node,
        volume: &'a Volume,
        board: Arc<VolumeBoard>,
    ) -> Result<Self, CheckpointError> {
        let cluster = &node.config.cluster.name;
        let checkpointer = Checkpointer::start(cluster, &volume.name, &volume.mount_point)?;
        Ok(Self {
            node,
            volume,
            board,
            checkpointer,
        })
    }

    /// For checkpoints within an epoch.
    pub fn checkpointer(&mut self) -> &mut Checkpointer {
        &mut self.checkpointer
    }

    /// The epoch that this node said is open, if there is one.
    pub fn open_epoch(&self) -> Option<Epoch> {
        let claim = self.node.ledger.claim(&self.volume.name)?;
        let own = claim.owner == self.node.id && claim.phase == Phase::Settled;
        (own && claim.epoch_state == EpochState::Open).then_some(claim.epoch)
    }

    /// Closes an epoch; whether it is proven closed.
    pub fn close(&mut self, epoch: Epoch, reason: &str) -> bool {
        let volume = &self.volume.name;
        let last_mirrored = Seq(self.board.mirrored_seq.get());
        self.board.say(
            Role::Owner,
            Protection::Exposed,
            &format!("epoch {epoch} ended: {reason}"),
        );
        let said = self.node.ledger.update(volume, |claim| {
            claim.epoch = claim.epoch.max(epoch);
            claim.epoch_state = EpochState::Closed;
            claim.last_mirrored = last_mirrored;
        });
        if let Err(error) = said {
            tracing::error!(%volume, %error, "the end of the epoch cannot be told in the mailbox");
        }
        let checkpoint = Checkpoint {
            epoch,
            seq: last_mirrored,
            closed: true,
        };
        if let Err(error) = self.checkpointer.run(checkpoint, wall_ns()) {
            self.board.checkpoint_failures.add(1);
            tracing::error!(%volume, %error, "the checkpoint that ends epoch {epoch} failed");
            let text = format!("epoch {epoch} ended ({reason}) and its checkpoint failed: {error}");
            self.board.say(Role::Owner, Protection::Exposed, &text);
            return false;
        }
        self.board.proved();
        self.board.epochs_closed.add(1);
        // Only now: until the disk has everything, the region is what a person might still want.
        let request = Request::CloseEpoch {
            volume: volume.clone(),
            epoch,
            last_mirrored,
        };
        if let Err(error) = self.node.ask(request) {
            tracing::debug!(%volume, %error, "the mirror cannot be told that the epoch ended");
        }
        self.node.events.record(Event::EpochClosed {
            volume: volume.clone(),
            epoch,
            last_mirrored,
            reason: reason.to_owned(),
        });
        true
    }
}
