//! What the three words that survive an owner say together: the owner's in the mailbox, the
//! sentinel's on its volume, the header's of its region.
//!
//! They are written in a fixed order, so most pairs that differ are the trace of a crash between
//! two writes, and have one right answer:
//!
//! ```text
//! an epoch begins    region open -> sentinel open -> mailbox open
//! it is closed       mailbox closed -> sentinel closed -> region closed
//! a takeover ends    sentinel closed, of a later epoch -> mailbox
//! ```
//!
//! What no crash explains means that the volume was set back (a snapshot, another device, a disk
//! that lost what it had confirmed), or that the mailbox is another one: then nobody but a person
//! knows which word is true. Pure; it must never merge on words that contradict each other.

use std::fmt;

use crate::faults::{Fault, injected};
use crate::ids::{Epoch, NodeId, Seq};
use crate::replay::{NothingToDo, Refusal, RegionClaim, Sentinel, Verdict, judge};

use super::claim::{EpochState, Phase};

#[cfg(test)]
mod tests;

/// What is known of the owner's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerWord {
    /// The owner.
    pub node: NodeId,
    /// Its running or last epoch.
    pub epoch: Epoch,
    /// Whether that ran.
    pub state: EpochState,
    /// How far its own claim of the volume had come.
    pub phase: Phase,
    /// The last record that it knew in the region.
    pub last_mirrored: Seq,
    /// When it was written, by the writer's clock; `None`: not known.
    pub time_ns: Option<i64>,
    /// It was read from the owner's own slot; otherwise this node remembers it, and the owner may have
    /// said more since.
    pub exact: bool,
}

/// What the mounted volume's sentinel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SentinelWord {
    /// There is none.
    Missing,
    /// There is one, and it cannot be read or trusted.
    Unreadable(String),
    /// This.
    Says(Sentinel),
}

/// What the saved region says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegionWord {
    /// There is none, or it was never used.
    Missing,
    /// It cannot be read to its published end.
    Damaged(String),
    /// This.
    Says {
        /// Its header and what its scan found.
        claim: RegionClaim,
        /// When its owner last published how far it is mirrored; `None`: never.
        time_ns: Option<i64>,
    },
}

/// The three words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// The owner's; `None`: there is none that can be read.
    pub owner: Option<OwnerWord>,
    /// The volume's.
    pub sentinel: SentinelWord,
    /// The region's.
    pub region: RegionWord,
    /// The epoch whose merge into the volume was begun last, by the volume's own note.
    pub merging: Option<Epoch>,
    /// UUID of the mounted file system; `None`: not known, and not compared.
    pub mounted_uuid: Option<[u8; 16]>,
    /// The file system had been unmounted in an orderly way when this node came to mount it.
    pub unmounted: bool,
}

/// What follows from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// The records behind `after` are merged.
    Merge {
        /// The sentinel's S.
        after: Seq,
    },
    /// The disk has everything.
    Nothing(String),
    /// The region must not be merged; what was not flushed is lost.
    Void(String),
    /// No crash explains them: a person decides.
    Ask(String),
    /// The wrong volume or the wrong region was given.
    Refuse(Refusal),
}

impl Words {
    /// The largest epoch that any of them bears.
    #[must_use]
    pub fn latest_epoch(&self) -> Epoch {
        let owner = self.owner.as_ref().map_or(Epoch(0), |word| word.epoch);
        let sentinel = match &self.sentinel {
            SentinelWord::Says(sentinel) => sentinel.epoch,
            SentinelWord::Missing | SentinelWord::Unreadable(_) => Epoch(0),
        };
        owner.max(sentinel).max(self.region_epoch())
    }

    /// The region's epoch; 0 if there is none.
    #[must_use]
    pub fn region_epoch(&self) -> Epoch {
        match &self.region {
            RegionWord::Says { claim, .. } => claim.epoch,
            RegionWord::Missing | RegionWord::Damaged(_) => Epoch(0),
        }
    }

    /// What follows.
    #[must_use]
    pub fn ruling(&self) -> Ruling {
        match &self.sentinel {
            SentinelWord::Unreadable(error) => Ruling::Ask(format!(
                "the volume's sentinel cannot be read, so nothing tells whether the region belongs \
                 to it: {error}"
            )),
            SentinelWord::Missing => self.without_sentinel(),
            SentinelWord::Says(sentinel) if sentinel.closed && !injected(Fault::ClosedReplayed) => {
                self.with_closed(sentinel)
            }
            SentinelWord::Says(sentinel) => self.with_open(sentinel),
        }
    }

    /// The owner's word that an epoch runs, which it gives only after a proven sentinel of that epoch.
    fn open_at_owner(&self) -> Option<(&NodeId, Epoch)> {
        let word = self.owner.as_ref()?;
        (word.state == EpochState::Open).then_some((&word.node, word.epoch))
    }

    fn set_back(node: &NodeId, said: Epoch, volume: &str) -> Ruling {
        Ruling::Ask(format!(
            "{node} said that epoch {said} runs, after its first checkpoint was proven, and {volume}: \
             the volume was set back (a snapshot, another device) or its disk lost what it had \
             confirmed"
        ))
    }

    fn without_sentinel(&self) -> Ruling {
        if let Some((node, said)) = self.open_at_owner() {
            return Self::set_back(node, said, "the volume has no sentinel");
        }
        Ruling::Void("the volume has no sentinel: it was not protected yet".to_owned())
    }

    fn with_closed(&self, sentinel: &Sentinel) -> Ruling {
        let of_volume = sentinel.epoch;
        if let Some((node, said)) = self.open_at_owner()
            && said > of_volume
        {
            let volume = format!("the volume is in epoch {of_volume}, which is closed");
            return Self::set_back(node, said, &volume);
        }
        let told = self.owner.as_ref().map_or(Epoch(0), |word| word.epoch);
        // The sentinel of a finished takeover bears no record; a closing owner's word comes with it.
        if of_volume > told.max(self.region_epoch()) && sentinel.seq == Seq(0) {
            return Ruling::Nothing(format!(
                "the volume is in epoch {of_volume} already: it was merged before"
            ));
        }
        Ruling::Void(format!("epoch {of_volume} of the volume was closed"))
    }

    fn with_open(&self, sentinel: &Sentinel) -> Ruling {
        let of_volume = sentinel.epoch;
        if self.merging == Some(of_volume) && self.region_epoch() != of_volume {
            return Ruling::Ask(half_merged(of_volume));
        }
        if let Some(word) = &self.owner {
            let (node, said) = (&word.node, word.epoch);
            match word.state {
                EpochState::Open if said > of_volume => {
                    let volume = format!("the volume is in epoch {of_volume}");
                    return Self::set_back(node, said, &volume);
                }
                EpochState::Closed | EpochState::None if said > of_volume => {
                    return Ruling::Ask(format!(
                        "{node} said that epoch {said} had ended, and the volume is in epoch {of_volume}, \
                         which was never closed on it: the volume was set back (a snapshot, another \
                         device) or its disk lost what it had confirmed"
                    ));
                }
                // In a takeover's claim stands what its node had heard of the owner before.
                EpochState::Open
                    if said < of_volume
                        && word.exact
                        && matches!(word.phase, Phase::Settled | Phase::Unmerged) =>
                {
                    return Ruling::Ask(format!(
                        "{node} said that epoch {said} runs, and the volume is in epoch {of_volume} \
                         already, which does not begin before {said} was called closed: the mailbox \
                         was set back or is another one"
                    ));
                }
                EpochState::Closed if said == of_volume && !injected(Fault::ClosedReplayed) => {
                    return Ruling::Void(format!("{node} said that epoch {said} had ended"));
                }
                EpochState::Open | EpochState::Closed | EpochState::None => {}
            }
        }
        match &self.region {
            RegionWord::Missing => self.region_elsewhere(of_volume).unwrap_or_else(|| {
                Ruling::Void("this node holds no region of the volume".to_owned())
            }),
            RegionWord::Damaged(error) => Ruling::Ask(format!(
                "epoch {of_volume} of the volume runs, and its region is damaged: {error}"
            )),
            RegionWord::Says { claim, .. } => self.with_region(sentinel, claim),
        }
    }

    /// The owner had itself begun to merge a region, which it keeps in its state directory.
    fn region_elsewhere(&self, of_volume: Epoch) -> Option<Ruling> {
        let word = self.owner.as_ref()?;
        (word.phase == Phase::Merging).then(|| {
            Ruling::Ask(format!(
                "{} was taking the volume over when it died; {}",
                word.node,
                half_merged(of_volume)
            ))
        })
    }

    fn with_region(&self, sentinel: &Sentinel, region: &RegionClaim) -> Ruling {
        let of_volume = sentinel.epoch;
        if region.epoch > of_volume {
            return Ruling::Ask(format!(
                "the region is of epoch {}, which does not begin before the one before is proven \
                 closed, and the volume is in epoch {of_volume}, which is open: the volume was set \
                 back (a snapshot, another device) or its disk lost what it had confirmed",
                region.epoch
            ));
        }
        if region.epoch < of_volume && !injected(Fault::StaleEpochAccepted) {
            return self.region_elsewhere(of_volume).unwrap_or_else(|| {
                Ruling::Void(format!(
                    "the region here is of epoch {}, the volume is in epoch {of_volume}",
                    region.epoch
                ))
            });
        }
        match judge(
            Ok(sentinel),
            region,
            self.latest_epoch().next(),
            self.mounted_uuid,
        ) {
            // A merge that was begun before is this node's own trace.
            Verdict::Merge { .. } if self.unmounted && self.merging != Some(of_volume) => {
                Ruling::Ask(format!(
                    "epoch {of_volume} of the volume runs, and its file system was unmounted since: \
                     somebody has had it mounted, and the region may hold older content than the disk"
                ))
            }
            Verdict::Merge { after } => Ruling::Merge { after },
            Verdict::Nothing(NothingToDo::Durable { sentinel, last }) => Ruling::Nothing(format!(
                "everything up to record {sentinel} is durable, the region ends with {last}"
            )),
            Verdict::Nothing(NothingToDo::Finished { epoch }) => Ruling::Nothing(format!(
                "the volume is in epoch {epoch} already: it was merged before"
            )),
            Verdict::Refuse(Refusal::Closed { epoch, .. }) => Ruling::Ask(format!(
                "the region of epoch {epoch} is closed, which its owner says only once a closed \
                 sentinel is proven, and the volume's is open: the volume was set back (a snapshot, \
                 another device) or its disk lost what it had confirmed"
            )),
            Verdict::Refuse(refusal @ Refusal::VolumeBehind { .. }) => {
                Ruling::Ask(refusal.to_string())
            }
            Verdict::Refuse(refusal) => Ruling::Refuse(refusal),
        }
    }
}

fn half_merged(epoch: Epoch) -> String {
    format!(
        "the region of epoch {epoch} is not here, and may be half merged into the volume already: bring \
         the copy from the node that had begun (saved/ in its state_dir) into saved/ of this node's"
    )
}

fn time(time_ns: Option<i64>) -> String {
    time_ns
        .and_then(|at| jiff::Timestamp::from_nanosecond(at.into()).ok())
        .map_or_else(
            || "at an unknown time".to_owned(),
            |at| format!("at {at:.3}"),
        )
}

fn state(closed: bool) -> &'static str {
    if closed { "closed" } else { "open" }
}

/// The evidence, for a person.
impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.owner {
            None => write!(f, "mailbox: no word of the owner can be read")?,
            Some(word) => write!(
                f,
                "mailbox: {} said epoch {}, {:?}, record {} mirrored, {}{}",
                word.node,
                word.epoch,
                word.state,
                word.last_mirrored,
                time(word.time_ns),
                if word.exact { "" } else { " (remembered here)" }
            )?,
        }
        match &self.sentinel {
            SentinelWord::Missing => write!(f, "; sentinel: none")?,
            SentinelWord::Unreadable(error) => write!(f, "; sentinel: {error}")?,
            SentinelWord::Says(sentinel) => write!(
                f,
                "; sentinel: epoch {}, {}, record {} durable, {}",
                sentinel.epoch,
                state(sentinel.closed),
                sentinel.seq,
                time(Some(sentinel.time_ns))
            )?,
        }
        match &self.region {
            RegionWord::Missing => write!(f, "; region: none")?,
            RegionWord::Damaged(error) => write!(f, "; region: {error}")?,
            RegionWord::Says { claim, time_ns } => write!(
                f,
                "; region: epoch {}, {}, ends with record {}, {}",
                claim.epoch,
                state(claim.closed),
                claim.last,
                time(*time_ns)
            )?,
        }
        if let Some(epoch) = self.merging {
            write!(f, "; a merge of epoch {epoch} was begun")?;
        }
        if self.unmounted {
            write!(f, "; file system: unmounted")?;
        }
        Ok(())
    }
}
