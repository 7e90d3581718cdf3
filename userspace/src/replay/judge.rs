//! The sentinel against the region: may this region be merged into this volume at all?
//!
//! Pure. Whatever is not plainly right is refused with its evidence; it must never guess in favour
//! of a merge.

use thiserror::Error;

use super::sentinel::Sentinel;
use crate::faults::{Fault, injected};
use crate::ids::{Epoch, Seq};

/// What a region says of itself; from its header and a complete scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionClaim {
    /// Cluster name.
    pub cluster: String,
    /// Volume name.
    pub volume: String,
    /// UUID of the file system its records are of (zeros: not known, and not compared).
    pub filesystem_uuid: [u8; 16],
    /// The epoch whose records it holds.
    pub epoch: Epoch,
    /// Its state is "closed".
    pub closed: bool,
    /// The cut: last record in it (0: none).
    pub last: Seq,
    /// The largest checkpoint mark in it (0: none).
    pub marked: Seq,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Merge the records behind `after`.
    Merge {
        /// The sentinel's S: everything up to it is durable already.
        after: Seq,
    },
    /// The volume has all of it; nothing to merge.
    Nothing(NothingToDo),
    /// The region must not be merged into this volume.
    Refuse(Refusal),
}

/// Why there is nothing to merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NothingToDo {
    /// The sentinel's S is at or beyond the region's end.
    Durable {
        /// The sentinel's S.
        sentinel: Seq,
        /// The region's last record.
        last: Seq,
    },
    /// The sentinel already bears the epoch that this takeover writes at its end.
    Finished {
        /// That epoch.
        epoch: Epoch,
    },
}

/// Why the region must not be merged.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// There is no readable sentinel.
    #[error(
        "the volume's sentinel cannot be read, so nothing tells whether the region belongs to it: {0}"
    )]
    Unreadable(String),
    /// Sentinel and region name different clusters or volumes.
    #[error(
        "the region is of volume {region}, the sentinel says {sentinel}: another device is mounted, or another region was given"
    )]
    Foreign {
        /// `cluster/volume` of the region.
        region: String,
        /// `cluster/volume` of the sentinel.
        sentinel: String,
    },
    /// The region is of another file system.
    #[error(
        "the region is of the file system with the UUID {region}, mounted is {mounted}: the volume was made anew or is a copy, and the region's inode numbers mean other files there; mount the right device, or give the region of this one"
    )]
    OtherFilesystem {
        /// The region's.
        region: String,
        /// The mounted one's.
        mounted: String,
    },
    /// The region is of another epoch.
    #[error(
        "the region is of epoch {region}, the volume is in epoch {sentinel}: merging it would bring back a past that has been flushed over; the region is void"
    )]
    OtherEpoch {
        /// The region's.
        region: Epoch,
        /// The sentinel's.
        sentinel: Epoch,
    },
    /// The epoch was closed.
    #[error(
        "epoch {epoch} was closed ({told_by}): since then changes were made that the region does not hold; the region is void"
    )]
    Closed {
        /// The epoch.
        epoch: Epoch,
        /// `the sentinel` or `the region`.
        told_by: &'static str,
    },
    /// A mark in the region proves more than the volume shows.
    #[error(
        "a checkpoint proved everything up to record {marked} durable, but the volume's sentinel says {sentinel}: the volume was set back (a snapshot, another device) or its disk lost what it had confirmed; records are missing in between, so a person must decide"
    )]
    VolumeBehind {
        /// The mark.
        marked: Seq,
        /// The sentinel's S.
        sentinel: Seq,
    },
}

fn uuid_text(uuid: [u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(uuid));
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    parts
        .map(|part| digits.get(part).unwrap_or_default())
        .join("-")
}

/// Judges. `sentinel` is the error's text if it could not be read; `new_epoch` is the epoch that this
/// takeover writes when it has finished; `mounted_uuid` is that of the mounted file system (`None`: not
/// known, and not compared).
#[must_use]
pub fn judge(
    sentinel: Result<&Sentinel, String>,
    region: &RegionClaim,
    new_epoch: Epoch,
    mounted_uuid: Option<[u8; 16]>,
) -> Verdict {
    let sentinel = match sentinel {
        Ok(sentinel) => sentinel,
        Err(text) => return Verdict::Refuse(Refusal::Unreadable(text)),
    };
    if (&sentinel.cluster, &sentinel.volume) != (&region.cluster, &region.volume) {
        return Verdict::Refuse(Refusal::Foreign {
            region: format!("{}/{}", region.cluster, region.volume),
            sentinel: format!("{}/{}", sentinel.cluster, sentinel.volume),
        });
    }
    if let Some(mounted) = mounted_uuid
        && region.filesystem_uuid != [0; 16]
        && region.filesystem_uuid != mounted
    {
        return Verdict::Refuse(Refusal::OtherFilesystem {
            region: uuid_text(region.filesystem_uuid),
            mounted: uuid_text(mounted),
        });
    }
    if sentinel.epoch == new_epoch && new_epoch != region.epoch {
        return Verdict::Nothing(NothingToDo::Finished { epoch: new_epoch });
    }
    if sentinel.epoch != region.epoch && !injected(Fault::StaleEpochAccepted) {
        return Verdict::Refuse(Refusal::OtherEpoch {
            region: region.epoch,
            sentinel: sentinel.epoch,
        });
    }
    if (sentinel.closed || region.closed) && !injected(Fault::ClosedReplayed) {
        let told_by = if sentinel.closed {
            "the sentinel"
        } else {
            "the region"
        };
        return Verdict::Refuse(Refusal::Closed {
            epoch: region.epoch,
            told_by,
        });
    }
    if injected(Fault::SentinelIgnored) {
        return Verdict::Merge { after: Seq(0) };
    }
    if region.marked > sentinel.seq {
        return Verdict::Refuse(Refusal::VolumeBehind {
            marked: region.marked,
            sentinel: sentinel.seq,
        });
    }
    if sentinel.seq >= region.last {
        return Verdict::Nothing(NothingToDo::Durable {
            sentinel: sentinel.seq,
            last: region.last,
        });
    }
    Verdict::Merge {
        after: sentinel.seq,
    }
}
