//! Deliberate faults in the cores: the negative control of the simulator.
//!
//! With the feature `faults` one fault can be switched on for the running thread; without it
//! [`injected`] is `false` at compile time and nothing of this is in a program. It must never be
//! built into a product.

/// A fault of a core, at the one place that its name tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The mirror's core counts a record as mirrored when it is posted.
    AckBeforeCompletion,
    /// The mirror's core releases ring space when it is posted.
    RingReleasedBeforeCompletion,
    /// The mirror's core reuses log space before the head's write has completed.
    SpaceReusedBeforeHead,
    /// The mirror's core publishes what was posted, not what has completed.
    PublishedAheadOfMemory,
    /// A range fsync purges all records of its inode.
    RangePurgesInode,
    /// An fdatasync purges attribute changes.
    DatasyncPurgesAttributes,
    /// A mark counts for records made while its call ran.
    EntryPositionIgnored,
    /// An inode without a name is purged by its own fsync, and clipped.
    UnlinkedPurged,
    /// A mark behind a failed write-back purges and clips.
    TaintIgnored,
    /// A checkpoint purges one record more than it proved.
    CheckpointPurgesOneMore,
    /// The scan takes filled bytes whenever they were read.
    SafeAtIgnored,
    /// The scan does not compare its end with what was published.
    PublishedIgnored,
    /// The scan does not look at the epoch nor at the chain of frames.
    ChainIgnored,
    /// Replay does not clip by marks.
    ClipOmitted,
    /// Replay takes what bears the name for the inode that it does not find.
    PathFallback,
    /// Replay removes what is in the way without asking whether it is proven dead.
    VictimUnchecked,
    /// Replay makes anew what was deleted after the cut.
    DeletedAheadRemade,
    /// Replay re-executes names in order of the log: what a later record unbinds stays.
    UnbindOmitted,
    /// The judge merges a region of another epoch.
    StaleEpochAccepted,
    /// The judge does not skip what the sentinel proves durable.
    SentinelIgnored,
    /// The judge merges a closed epoch.
    ClosedReplayed,
    /// A peer that is silent on the link alone is called dead.
    LinkSilentMeansDead,
    /// Time in which a node did not look counts as the peer's silence.
    OwnStallCounts,
    /// A node that rebooted with its epoch open serves at once.
    RebootedServes,
    /// A returning node does not look at the peer's claim.
    ClaimIgnored,
}

impl Fault {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::AckBeforeCompletion,
        Self::RingReleasedBeforeCompletion,
        Self::SpaceReusedBeforeHead,
        Self::PublishedAheadOfMemory,
        Self::RangePurgesInode,
        Self::DatasyncPurgesAttributes,
        Self::EntryPositionIgnored,
        Self::UnlinkedPurged,
        Self::TaintIgnored,
        Self::CheckpointPurgesOneMore,
        Self::SafeAtIgnored,
        Self::PublishedIgnored,
        Self::ChainIgnored,
        Self::ClipOmitted,
        Self::PathFallback,
        Self::VictimUnchecked,
        Self::DeletedAheadRemade,
        Self::UnbindOmitted,
        Self::StaleEpochAccepted,
        Self::SentinelIgnored,
        Self::ClosedReplayed,
        Self::LinkSilentMeansDead,
        Self::OwnStallCounts,
        Self::RebootedServes,
        Self::ClaimIgnored,
    ];
}

#[cfg(feature = "faults")]
thread_local! {
    static INJECTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Switches a fault on, or all off, for this thread.
#[cfg(feature = "faults")]
pub fn inject(fault: Option<Fault>) {
    INJECTED.set(fault);
}

/// Whether this fault is switched on.
#[cfg(feature = "faults")]
#[must_use]
pub fn injected(fault: Fault) -> bool {
    INJECTED.get() == Some(fault)
}

/// Never, in a product.
#[cfg(not(feature = "faults"))]
#[must_use]
pub const fn injected(_: Fault) -> bool {
    false
}
