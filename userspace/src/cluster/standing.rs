//! Whether a claim still stands: what keeps two nodes from mounting one volume.
//!
//! Both nodes keep to one order: *say, then look, then act*. A node writes its word into its slot,
//! then reads the peer's slot from the device, and only then fences without a command, or mounts. Of
//! two nodes that come together at least one finds the other's word, whatever else is late. Therefore:
//!
//! - A takeover begins with a claim above everything that anybody has said, also where this
//!   node says already that the volume is its own: it gives up the promise to mount nothing.
//! - Behind a fence that is only somebody's word, a person's or the peer's own, the slot must still show
//!   what that word was about: no later sign of life; the promise of `Phase::Unmerged`, or this node's claim.
//! - Nothing is mounted, by a takeover or without one, where the peer has claimed it meanwhile.
//!
//! A fence stays valid over this node's reboots: what the peer's machine reads when it comes back is this
//! node's claim, and to mount it must claim above that, which is found here.
//!
//! Pure: whoever calls must have written first and read then. Nothing here may be decided from a slot
//! that was read before this node's word was written.

use thiserror::Error;

use super::claim::{Phase, VolumeClaim};
use super::mailbox::{NodeReport, SlotError, word_of};
use super::ownership::Word;
use super::takeover::FencedBy;
use crate::ids::NodeId;

/// A slot as it was read.
pub type Slot = Result<NodeReport, SlotError>;

/// Why a claim does not stand: nothing is mounted, and ownership is decided again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fallen {
    /// The peer's claim is not below this node's.
    #[error("the peer claims the volume, too (its table version {theirs}, this node's {ours})")]
    Outbid {
        /// The peer's table version.
        theirs: u64,
        /// This node's.
        ours: u64,
    },
    /// A person called it dead.
    #[error("the peer was called dead, and has shown a sign of life since")]
    Lives,
    /// It rebooted and had promised to mount nothing.
    #[error("the peer, which had rebooted and waited for a merge, does not wait any more")]
    WaitsNoMore,
}

/// The word with which a takeover begins or goes on; `None`: the one that this node gave stands.
///
/// A node that owns the volume and takes it over for itself (a person called the mirror dead that
/// should have merged) withdraws nothing for anybody: its claim is [`Phase::Merging`] from the beginning.
///
/// # Errors
/// If this node owns the volume and the peer has claimed it above that.
pub fn claim_of(
    this_node: &NodeId,
    own: Option<&VolumeClaim>,
    known: &[VolumeClaim],
) -> Result<Option<VolumeClaim>, Fallen> {
    let theirs = known.iter().filter(|claim| claim.owner != *this_node);
    let theirs = theirs.map(|claim| claim.table_version).max().unwrap_or(0);
    let Some(own) = own.filter(|own| own.owner == *this_node) else {
        let claim = VolumeClaim::change(this_node.clone(), Phase::Claiming, known);
        return Ok(Some(claim));
    };
    let ours = own.table_version;
    match own.phase {
        Phase::Claiming | Phase::Merging if theirs < ours => Ok(None),
        Phase::Settled | Phase::Unmerged if theirs > ours => Err(Fallen::Outbid { theirs, ours }),
        Phase::Claiming => Ok(Some(change(own, Phase::Claiming, known))),
        Phase::Settled | Phase::Unmerged | Phase::Merging => {
            Ok(Some(change(own, Phase::Merging, known)))
        }
    }
}

fn change(own: &VolumeClaim, phase: Phase, known: &[VolumeClaim]) -> VolumeClaim {
    VolumeClaim::change(own.owner.clone(), phase, known.iter().chain([own]))
}

/// The peer has not claimed the volume at or above this node's word.
///
/// # Errors
/// If it has.
pub fn is_not_outbid(own: &VolumeClaim, volume: &str, now: &Slot) -> Result<(), Fallen> {
    match word_of(now, volume) {
        Word::Says(claim)
            if claim.owner != own.owner && claim.table_version >= own.table_version =>
        {
            Err(Fallen::Outbid {
                theirs: claim.table_version,
                ours: own.table_version,
            })
        }
        _ => Ok(()),
    }
}

/// The fence still holds: `judged` is the peer's slot from which it was called dead, `now` as it was
/// read since this node's claim was written.
///
/// # Errors
/// If it does not.
pub fn is_fenced(
    by: FencedBy,
    own: &VolumeClaim,
    volume: &str,
    judged: &Slot,
    now: &Slot,
) -> Result<(), Fallen> {
    is_not_outbid(own, volume, now)?;
    let holds = match by {
        FencedBy::Command => true,
        FencedBy::Person => sign_of_life(judged) == sign_of_life(now),
        // It may have found this node's claim already, and follows it.
        FencedBy::Reboot => matches!(word_of(now, volume), Word::Says(claim)
            if claim.phase == Phase::Unmerged || claim.owner == own.owner),
    };
    match by {
        _ if holds => Ok(()),
        FencedBy::Reboot => Err(Fallen::WaitsNoMore),
        FencedBy::Command | FencedBy::Person => Err(Fallen::Lives),
    }
}

/// What changes with every write of a slot.
fn sign_of_life(slot: &Slot) -> Option<(super::claim::BootId, u64)> {
    let report = slot.as_ref().ok()?;
    Some((report.boot_id, report.counter))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::claim::{BootId, EpochState};
    use crate::cluster::liveness::Told;
    use crate::cluster::mailbox::AgentState;
    use crate::ids::Epoch;

    fn node(name: &str) -> NodeId {
        NodeId(name.into())
    }

    fn claim(owner: &str, table_version: u64, phase: Phase) -> VolumeClaim {
        VolumeClaim {
            table_version,
            phase,
            epoch: Epoch(4),
            epoch_state: EpochState::Open,
            ..VolumeClaim::first(node(owner))
        }
    }

    /// The peer `b`'s slot.
    fn slot(counter: u64, word: Option<VolumeClaim>) -> Slot {
        Ok(NodeReport {
            node: node("b"),
            boot_id: BootId([7; 16]),
            counter,
            time_ns: 0,
            state: AgentState::Running,
            volumes: word
                .map(|claim| ("v".to_owned(), claim))
                .into_iter()
                .collect(),
            exposed: std::collections::BTreeSet::new(),
            told: Told::default(),
        })
    }

    fn made(own: Option<&VolumeClaim>, known: &[VolumeClaim]) -> Option<(u64, Phase)> {
        let made = claim_of(&node("a"), own, known).unwrap();
        made.map(|claim| {
            assert_eq!((claim.owner, claim.epoch), (node("a"), Epoch(4)));
            (claim.table_version, claim.phase)
        })
    }

    #[test]
    fn a_takeover_claims_above_everything_and_only_once() {
        let theirs = claim("b", 5, Phase::Settled);
        assert_eq!(
            made(Some(&theirs), std::slice::from_ref(&theirs)),
            Some((6, Phase::Claiming))
        );
        assert_eq!(
            made(None, std::slice::from_ref(&theirs)),
            Some((6, Phase::Claiming))
        );
        for phase in [Phase::Claiming, Phase::Merging] {
            assert_eq!(
                made(Some(&claim("a", 6, phase)), std::slice::from_ref(&theirs)),
                None
            );
            // The peer came between: above it, or nothing is claimed.
            let above = claim("b", 6, Phase::Claiming);
            assert_eq!(
                made(Some(&claim("a", 6, phase)), &[above]),
                Some((7, phase))
            );
        }
    }

    #[test]
    fn an_owner_that_merges_for_itself_raises_the_version_too() {
        for phase in [Phase::Unmerged, Phase::Settled] {
            let own = claim("a", 5, phase);
            assert_eq!(made(Some(&own), &[]), Some((6, Phase::Merging)));
            let theirs = claim("b", 6, Phase::Claiming);
            let outbid = Fallen::Outbid { theirs: 6, ours: 5 };
            assert_eq!(claim_of(&node("a"), Some(&own), &[theirs]), Err(outbid));
        }
    }

    #[test]
    fn whoever_looks_second_finds_the_others_claim() {
        let own = claim("a", 6, Phase::Claiming);
        for by in [FencedBy::Command, FencedBy::Person, FencedBy::Reboot] {
            for version in [6, 7] {
                let now = slot(1, Some(claim("b", version, Phase::Claiming)));
                let fallen = is_fenced(by, &own, "v", &now, &now);
                assert_eq!(
                    fallen,
                    Err(Fallen::Outbid {
                        theirs: version,
                        ours: 6
                    })
                );
                assert!(is_not_outbid(&own, "v", &now).is_err());
            }
        }
        for now in [
            slot(1, None),
            slot(1, Some(claim("b", 5, Phase::Settled))),
            slot(1, Some(claim("a", 6, Phase::Claiming))),
            Err(SlotError::Torn),
        ] {
            assert_eq!(is_not_outbid(&own, "v", &now), Ok(()));
            assert_eq!(is_fenced(FencedBy::Command, &own, "v", &now, &now), Ok(()));
        }
    }

    #[test]
    fn a_persons_word_falls_with_the_next_sign_of_life() {
        let own = claim("a", 6, Phase::Claiming);
        let judged = slot(9, Some(claim("b", 5, Phase::Settled)));
        let check = |now: &Slot| is_fenced(FencedBy::Person, &own, "v", &judged, now);
        assert_eq!(check(&judged), Ok(()));
        assert_eq!(
            check(&slot(10, Some(claim("b", 5, Phase::Settled)))),
            Err(Fallen::Lives)
        );
        assert_eq!(check(&Err(SlotError::Torn)), Err(Fallen::Lives));
    }

    #[test]
    fn a_reboot_fences_only_as_long_as_the_owner_waits() {
        let own = claim("a", 6, Phase::Claiming);
        let check = |now: &Slot| is_fenced(FencedBy::Reboot, &own, "v", now, now);
        for waits in [
            claim("b", 5, Phase::Unmerged),
            claim("a", 6, Phase::Claiming),
        ] {
            assert_eq!(check(&slot(1, Some(waits))), Ok(()));
        }
        // It lives and writes, as it must.
        for now in [
            slot(2, Some(claim("b", 5, Phase::Settled))),
            slot(2, Some(claim("b", 5, Phase::Merging))),
            slot(2, None),
            Err(SlotError::Torn),
        ] {
            assert_eq!(check(&now), Err(Fallen::WaitsNoMore));
        }
    }
}
