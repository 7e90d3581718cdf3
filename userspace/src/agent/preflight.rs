//! What must be so before the agent starts: where the volumes are mounted, what the kernel can do.
//!
//! An administrator who starts an agent that cannot work must see it at once, by its exit status.
//! This room changes nothing and must never refuse an agent that another node's word may still make
//! an owner: what only an owner needs is asked of the configured owner alone.

use anyhow::bail;

use super::fitness;
use super::node::Node;
use crate::capture;
use crate::cluster::claim::{EpochState, Phase};
use crate::cluster::mounts::{self, MountState};
use crate::cluster::ownership::Word;
use crate::config::{MountBy, Volume};

/// Refuses to start on a host where nothing can be protected.
///
/// # Errors
/// The first thing that is not as it must be, with the remedy.
pub fn check(node: &Node) -> anyhow::Result<()> {
    for volume in &node.config.volumes {
        match mounts::find(volume)? {
            MountState::Mounted(_) => {}
            MountState::NotMounted if !must_be_mounted(node, volume) => {}
            _ => drop(mounts::require_mounted(volume)?),
        }
        check_fitness(node, volume)?;
    }
    check_kernel(node)
}

/// Somebody else mounts it, and this node may serve it without asking anyone.
fn must_be_mounted(node: &Node, volume: &Volume) -> bool {
    if volume.mount_by != MountBy::External || volume.owner != node.id {
        return false;
    }
    let own = node.ledger.own_word(&volume.name);
    match own.word {
        Word::Nothing => true,
        Word::Unreadable => false,
        Word::Says(claim) => {
            claim.owner == node.id
                && claim.phase == Phase::Settled
                && own.boot_id == Some(node.boot_id)
        }
    }
}

/// What a volume is cannot be mended by the other node. Where an epoch runs the agent is needed all the
/// same, to close it: the owner refuses then.
fn check_fitness(node: &Node, volume: &Volume) -> anyhow::Result<()> {
    let own = node.ledger.own_word(&volume.name);
    let runs = matches!(&own.word, Word::Says(claim) if claim.epoch_state == EpochState::Open);
    let result = fitness::check(volume);
    if runs || volume.owner != node.id {
        if let Err(error) = result {
            tracing::error!("{error:#}");
        }
        return Ok(());
    }
    result
}

fn check_kernel(node: &Node) -> anyhow::Result<()> {
    let owns = node
        .config
        .volumes
        .iter()
        .any(|volume| volume.owner == node.id);
    for feature in capture::features() {
        if feature.ok || !feature.required {
            continue;
        }
        if owns {
            bail!(
                "this host cannot protect a volume: {}: {}; see `twinwrite doctor`",
                feature.name,
                feature.remedy
            );
        }
        tracing::warn!(
            "this host can mirror, and after a takeover it could not protect: {}: {}",
            feature.name,
            feature.remedy
        );
    }
    Ok(())
}
