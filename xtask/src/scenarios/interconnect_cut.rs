//! The link is cut while both nodes live: the mailbox says so, and nobody takes over.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::bench::{
    LIMIT, Stream, all_mirrored, is_mounted, losses, number, peer_state, throughout, until, volume,
};
use crate::lab::{AwaitedState, Lab, NodeName};

use NodeName::{A, B};

/// Far beyond the three seconds after which a silent node is dead.
const CUT_FOR: Duration = Duration::from_secs(15);
const OPERATIONS: u64 = 300;

pub(super) fn run(lab: &Lab) -> Result<()> {
    let before = volume(lab, A)?;
    let losses_before = losses(lab, A)?;
    lab.cut_link()?;
    let watched = while_cut(lab);
    lab.heal_link()?;
    watched?;
    lab.wait(A, AwaitedState::Protected, LIMIT)?;
    until(lab, "both nodes hear each other again", LIMIT, || {
        Ok(peer_state(lab, A)? == "alive" && peer_state(lab, B)? == "alive")
    })?;
    all_mirrored(lab, A)?;
    let after = volume(lab, A)?;
    ensure!(
        number(&after, "epoch")? > number(&before, "epoch")?,
        "the lag limit passed without a link and the epoch went on: {after}"
    );
    ensure!(
        losses(lab, A)? == losses_before,
        "events were lost while the link was cut"
    );
    Ok(())
}

fn while_cut(lab: &Lab) -> Result<()> {
    // Also a record that cannot be mirrored is needed: an idle link may be cut unnoticed by the owner.
    lab.run(A, "rm -rf /srv/vol0/stream")?;
    let stream = Stream::start(lab, A, OPERATIONS, 100)?;
    lab.wait(A, AwaitedState::Exposed, LIMIT)?;
    until(
        lab,
        "B sees a silent link and a live mailbox",
        LIMIT,
        || Ok(peer_state(lab, B)? == "link_silent"),
    )?;
    throughout(
        lab,
        "B is the mirror and A serves, exposed for want of the link",
        CUT_FOR,
        || {
            let (owner, mirror) = (volume(lab, A)?, volume(lab, B)?);
            let reason = owner["reason"].as_str().unwrap_or_default();
            let names_link = reason.contains("link") || reason.contains("reach");
            Ok(mirror["role"] == "mirror"
                && mirror["takeover"].is_null()
                && owner["role"] == "owner"
                && owner["protection"] == "exposed"
                && names_link
                && is_mounted(lab, A)?
                && !is_mounted(lab, B)?)
        },
    )?;
    // A went on serving.
    stream.finish()?;
    stream.require_all(A)?;
    let events = lab.run(B, "cat /var/lib/twinwrite/events.jsonl")?;
    ensure!(
        !events.contains("takeover_began"),
        "B began to take over while A lived:\n{events}"
    );
    let fenced = lab
        .events()?
        .into_iter()
        .any(|event| event["event"] == "fenced");
    ensure!(!fenced, "somebody was fenced while both nodes lived");
    Ok(())
}
