//! What this node is to a volume when its agent starts.
//!
//! The mailbox decides, because both nodes reach it: a takeover writes its claim there **before** it
//! fences. So a node that boots after it was fenced finds the claim, and a node that finds none
//! was not taken over; if a takeover begins later, it fences this node first. Whoever cannot read
//! the peer's word, or is contradicted by it, suspends: a volume that nobody serves is repaired by a
//! person, a volume that two nodes mount is not.
//!
//! An agent must decide from the mailbox before it writes its own slot for the first time; what it
//! then writes is [`first_word`]. This module must never let a node serve a volume that the
//! peer claims with a higher table version, nor one whose last epoch is open and was not merged.

use serde::{Deserialize, Serialize};

use super::claim::{BootId, EpochState, Phase, VolumeClaim};
use crate::faults::{Fault, injected};
use crate::ids::NodeId;

#[cfg(test)]
mod tests;

/// One source's word on a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// There was never one: no table, a blank slot, a volume that is not listed.
    Nothing,
    /// There is one, and it cannot be read.
    Unreadable,
    /// This.
    Says(VolumeClaim),
}

/// This node's own word, with the boot in which it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnWord {
    /// What it says.
    pub word: Word,
    /// The boot in which it was said; `None` if it says nothing.
    pub boot_id: Option<BootId>,
}

impl OwnWord {
    /// The later of the two places in which a node keeps its word: its table and its slot.
    #[must_use]
    pub fn of(table: Self, slot: Self) -> Self {
        match (&table.word, &slot.word) {
            (Word::Says(in_table), Word::Says(in_slot)) => {
                if in_slot.is_later_than(in_table) {
                    slot
                } else {
                    table
                }
            }
            (Word::Says(_), _) | (Word::Unreadable, Word::Nothing | Word::Unreadable) => table,
            (Word::Nothing | Word::Unreadable, _) => slot,
        }
    }
}

/// The peer's answer over the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveAnswer {
    /// What it says; `None`: it knows nothing of the volume.
    pub claim: Option<VolumeClaim>,
    /// It has the volume mounted.
    pub serving: bool,
}

/// All that is known of one volume at start.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// This node.
    pub this_node: &'a NodeId,
    /// This boot.
    pub boot_id: BootId,
    /// The owner while nothing has failed.
    pub configured_owner: &'a NodeId,
    /// This node's own word.
    pub own: &'a OwnWord,
    /// The peer's word in the mailbox.
    pub peer_slot: &'a Word,
    /// The peer's answer; `None`: it could not be reached.
    pub peer_live: Option<&'a LiveAnswer>,
    /// The volume is mounted here, and programs that an earlier agent of this boot attached hold it.
    pub captured: bool,
}

/// Why a node may serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServeAs {
    /// Nobody ever owned it, and it is the configured owner.
    First,
    /// Its agent restarted; the machine did not.
    Resumed,
    /// It owned the volume before, nothing is left to merge, and nobody took it over.
    Returned,
}

/// Why a node cannot tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Doubt {
    /// The peer is not reached and its slot cannot be read, so it may have taken over.
    PeerUnreadable,
    /// This node's own word is lost or damaged, and the peer does not answer.
    OwnWordLost,
    /// Both nodes claim the volume.
    BothClaim,
    /// Both nodes say that the other owns it.
    NeitherClaims,
    /// The peer says that ownership came back to this node, which did not hear of it; and the peer
    /// does not answer.
    InDoubt,
}

impl Doubt {
    /// The reason and the remedy, for people.
    #[must_use]
    pub const fn told(self) -> &'static str {
        match self {
            Self::PeerUnreadable => {
                "the peer does not answer and its mailbox slot cannot be read, so it may have \
                 taken over: start the peer, or say that it is dead with \
                 `twinwrite takeover --confirm-dead NODE`"
            }
            Self::OwnWordLost => {
                "this node no longer knows what it owned (table.json and its mailbox slot are lost \
                 or damaged) and the peer does not answer: start the peer, or say that it is dead \
                 with `twinwrite takeover --confirm-dead NODE`"
            }
            Self::BothClaim => {
                "both nodes claim the volume: stop one of them and look at both tables (table.json)"
            }
            Self::NeitherClaims => {
                "each node says that the other owns the volume: stop one of them and look at both \
                 tables (table.json)"
            }
            Self::InDoubt => {
                "the peer has given the volume back, this node has no record of it, and the peer \
                 does not answer: start the peer, or say that it is dead with \
                 `twinwrite takeover --confirm-dead NODE`"
            }
        }
    }
}

/// What this node is to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// It owns it and may mount it.
    Serve(ServeAs),
    /// It holds its region. An unproven claim of its own is withdrawn.
    Mirror,
    /// The peer took it over: never mount, void what is left of it here, be its mirror. (While the
    /// peer's phase is [`Phase::Claiming`] it may still withdraw: decide again.)
    TakenOver,
    /// It owned it, its epoch is open, and the machine rebooted: the mirror must merge first.
    WaitForMerge,
    /// Its own takeover was interrupted: go on with it, from its first step.
    FinishTakeover,
    /// It cannot tell: mount nothing, and decide again when more is known.
    Suspended(Doubt),
}

/// The peer's word, from its answer or its slot.
struct PeerWord<'a> {
    claim: &'a VolumeClaim,
    live: bool,
    serving: bool,
}

enum Peer<'a> {
    Nothing,
    Unreadable,
    Says(PeerWord<'a>),
}

/// Decides.
#[must_use]
pub fn decide(facts: &Facts<'_>) -> Decision {
    let peer = if injected(Fault::ClaimIgnored) {
        Peer::Nothing
    } else {
        peer_word(facts)
    };
    if contradicts_itself(facts, &peer) {
        return Decision::Suspended(Doubt::BothClaim);
    }
    match &facts.own.word {
        Word::Nothing => without_own_word(facts, &peer, true),
        Word::Unreadable => without_own_word(facts, &peer, false),
        Word::Says(own) if own.owner == *facts.this_node => as_owner(facts, own, &peer),
        Word::Says(own) => as_other(facts, own, &peer),
    }
}

/// The peer has the volume mounted and does not call itself the owner.
fn contradicts_itself(facts: &Facts<'_>, peer: &Peer<'_>) -> bool {
    let owns = |word: &PeerWord<'_>| word.claim.owner != *facts.this_node;
    facts.peer_live.is_some_and(|answer| answer.serving)
        && !matches!(peer, Peer::Says(word) if owns(word))
}

/// An answer is fresher than a slot, unless the slot already holds a later change of owner.
fn peer_word<'a>(facts: &Facts<'a>) -> Peer<'a> {
    let live = facts.peer_live.and_then(|answer| {
        let claim = answer.claim.as_ref()?;
        Some(PeerWord {
            claim,
            live: true,
            serving: answer.serving,
        })
    });
    match (facts.peer_slot, live) {
        (Word::Says(claim), Some(live)) if claim.table_version > live.claim.table_version => {
            Peer::Says(PeerWord { claim, ..live })
        }
        (_, Some(live)) => Peer::Says(live),
        (Word::Says(claim), None) => Peer::Says(PeerWord {
            claim,
            live: facts.peer_live.is_some(),
            serving: false,
        }),
        // It answers that it knows nothing: what its slot would say, it would say too.
        (Word::Unreadable, None) if facts.peer_live.is_none() => Peer::Unreadable,
        (Word::Unreadable | Word::Nothing, None) => Peer::Nothing,
    }
}

/// This node knows nothing; `fresh`: because it never did.
fn without_own_word(facts: &Facts<'_>, peer: &Peer<'_>, fresh: bool) -> Decision {
    let configured = facts.configured_owner == facts.this_node;
    match peer {
        Peer::Says(word) if word.claim.owner != *facts.this_node => {
            if configured {
                Decision::TakenOver
            } else {
                Decision::Mirror
            }
        }
        Peer::Says(word) => match (word.claim.epoch_state, word.live) {
            (EpochState::Open, _) => unmerged(facts),
            (_, true) => Decision::Serve(ServeAs::Returned),
            (_, false) => Decision::Suspended(Doubt::OwnWordLost),
        },
        _ if !fresh => Decision::Suspended(Doubt::OwnWordLost),
        _ if !configured => Decision::Mirror,
        Peer::Unreadable => Decision::Suspended(Doubt::PeerUnreadable),
        Peer::Nothing => Decision::Serve(ServeAs::First),
    }
}

/// This node's word is that it owns the volume.
fn as_owner(facts: &Facts<'_>, own: &VolumeClaim, peer: &Peer<'_>) -> Decision {
    match peer {
        Peer::Unreadable => Decision::Suspended(Doubt::PeerUnreadable),
        Peer::Says(word) if word.claim.owner != *facts.this_node => {
            let (theirs, ours) = (word.claim.table_version, own.table_version);
            match own.phase {
                _ if theirs > ours => Decision::TakenOver,
                _ if theirs == ours => at_a_tie(facts, own, word.claim),
                // The takeover fenced nobody yet, and the peer lives: it was a false alarm.
                Phase::Claiming if word.live => Decision::Mirror,
                Phase::Merging | Phase::Settled | Phase::Unmerged if word.serving => {
                    Decision::Suspended(Doubt::BothClaim)
                }
                _ => as_undisputed_owner(facts, own),
            }
        }
        Peer::Says(_) | Peer::Nothing => as_undisputed_owner(facts, own),
    }
}

/// Both nodes claimed the volume at once, and each may have found the other's word. Who fenced nobody yet
/// mounted nothing and gives way, also to one that has come further once that is settled; of two such nodes
/// the one that is named later does.
fn at_a_tie(facts: &Facts<'_>, own: &VolumeClaim, theirs: &VolumeClaim) -> Decision {
    match (own.phase, theirs.phase) {
        (Phase::Claiming, Phase::Claiming) if *facts.this_node < theirs.owner => {
            Decision::FinishTakeover
        }
        (Phase::Claiming, Phase::Claiming | Phase::Settled | Phase::Unmerged) => Decision::Mirror,
        // One that merges for itself says so before anything of it is proven.
        _ => Decision::Suspended(Doubt::BothClaim),
    }
}

fn as_undisputed_owner(facts: &Facts<'_>, own: &VolumeClaim) -> Decision {
    let same_boot = facts.own.boot_id == Some(facts.boot_id);
    match (own.phase, own.epoch_state) {
        (Phase::Claiming | Phase::Merging, _) => Decision::FinishTakeover,
        (_, _) if !same_boot && injected(Fault::RebootedServes) => {
            Decision::Serve(ServeAs::Returned)
        }
        (Phase::Unmerged, _) => Decision::WaitForMerge,
        (Phase::Settled, _) if same_boot => Decision::Serve(ServeAs::Resumed),
        (Phase::Settled, EpochState::Open) => unmerged(facts),
        (Phase::Settled, EpochState::None | EpochState::Closed) => {
            Decision::Serve(ServeAs::Returned)
        }
    }
}

/// This node's word is that the peer owns the volume.
fn as_other(facts: &Facts<'_>, own: &VolumeClaim, peer: &Peer<'_>) -> Decision {
    let Peer::Says(word) = peer else {
        return Decision::Mirror;
    };
    if word.claim.owner != *facts.this_node || word.claim.table_version < own.table_version {
        return Decision::Mirror;
    }
    // A takeover that was withdrawn gives back what the peer had heard of the epoch.
    let heard = (word.claim.epoch, word.claim.epoch_state);
    let (_, epoch_state) = heard.max((own.epoch, own.epoch_state));
    match (
        word.claim.table_version > own.table_version,
        word.live,
        epoch_state,
    ) {
        (false, ..) => Decision::Suspended(Doubt::NeitherClaims),
        (true, false, _) => Decision::Suspended(Doubt::InDoubt),
        (true, true, EpochState::Open) => unmerged(facts),
        (true, true, _) => Decision::Serve(ServeAs::Returned),
    }
}

/// It owns the volume, and its epoch is open. Where the volume is still mounted and held the machine
/// did not reboot since: to ask for a merge would let the peer mount the volume beside this node.
fn unmerged(facts: &Facts<'_>) -> Decision {
    if facts.captured {
        Decision::Serve(ServeAs::Resumed)
    } else {
        Decision::WaitForMerge
    }
}

/// Whether an owner that serves must stop at once, because the peer's slot claims the volume with a
/// higher table version. To be asked at every look into the mailbox. A claim in the phase
/// [`Phase::Claiming`] may still be withdrawn: as long as it stands nothing may be served, and when
/// it is gone the node decides again.
#[must_use]
pub fn is_claimed_by_peer(own: &VolumeClaim, this_node: &NodeId, peer: &Word) -> bool {
    matches!(peer, Word::Says(claim)
        if claim.owner != *this_node && claim.table_version > own.table_version)
}

/// What this node says of the volume after the decision, in its table and its slot; `None`: nothing.
///
/// Its new boot id goes into the same slot, so an epoch that an earlier boot left open must be
/// marked here, or a restart of the agent would take it for its own.
#[must_use]
pub fn first_word(facts: &Facts<'_>, decision: Decision) -> Option<VolumeClaim> {
    let own = match &facts.own.word {
        Word::Says(own) => Some(own),
        Word::Nothing | Word::Unreadable => None,
    };
    let peer = match peer_word(facts) {
        Peer::Says(word) => Some(word.claim),
        Peer::Nothing | Peer::Unreadable => None,
    };
    let newer = |preferred: Option<&'_ VolumeClaim>, other: Option<&'_ VolumeClaim>| match (
        preferred, other,
    ) {
        (Some(preferred), Some(other)) if other.table_version > preferred.table_version => {
            Some(other.clone())
        }
        (preferred, other) => preferred.or(other).cloned(),
    };
    // Of two words on the same ownership the owner's counts: only the owner knows its epoch.
    let newest_as_owner = newer(own, peer);
    let newest = newer(peer, own);
    let is_this_nodes = |claim: &VolumeClaim| claim.owner == *facts.this_node;
    // A withdrawn takeover gives the ownership back with what the peer had heard of its epoch.
    let with_own_epoch = |claim: VolumeClaim| match own {
        Some(own) if (own.epoch, own.epoch_state) > (claim.epoch, claim.epoch_state) => {
            VolumeClaim {
                epoch: own.epoch,
                epoch_state: own.epoch_state,
                last_mirrored: own.last_mirrored,
                ..claim
            }
        }
        _ => claim,
    };
    match decision {
        Decision::Serve(ServeAs::First) => Some(VolumeClaim::first(facts.this_node.clone())),
        Decision::Serve(_) | Decision::FinishTakeover => newest_as_owner
            .filter(is_this_nodes)
            .or(own.cloned())
            .map(with_own_epoch),
        Decision::WaitForMerge => {
            let mine = newest_as_owner.filter(is_this_nodes).or(own.cloned())?;
            Some(VolumeClaim {
                phase: Phase::Unmerged,
                ..with_own_epoch(mine)
            })
        }
        Decision::Mirror | Decision::TakenOver => match (own, peer) {
            (Some(own), Some(peer))
                if is_this_nodes(own) && peer.table_version < own.table_version =>
            {
                Some(VolumeClaim::change(
                    peer.owner.clone(),
                    Phase::Settled,
                    [own, peer],
                ))
            }
            // It may be withdrawn: what this node knows of its epoch must not be forgotten for it.
            _ => newest.map(with_own_epoch),
        },
        Decision::Suspended(_) => own.map(|own| carried_over(facts, own)),
    }
}

/// This node's word from before, said again in this boot.
fn carried_over(facts: &Facts<'_>, own: &VolumeClaim) -> VolumeClaim {
    let left_open = own.owner == *facts.this_node
        && own.phase == Phase::Settled
        && own.epoch_state == EpochState::Open
        && facts.own.boot_id != Some(facts.boot_id);
    let phase = if left_open {
        Phase::Unmerged
    } else {
        own.phase
    };
    VolumeClaim {
        phase,
        ..own.clone()
    }
}
