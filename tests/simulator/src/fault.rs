//! Deliberate faults: those of the cores, and those of the drivers around them.

use twinwrite::faults::Fault as CoreFault;

/// Faults of cores that no run can show: memory is never damaged here, after a boot the ledger
/// carries a node's word over before the fault's place asks whose boot it is of, and no write-back loses
/// pages silently.
const UNSEEN: &[CoreFault] = &[
    CoreFault::PublishedIgnored,
    CoreFault::RebootedServes,
    CoreFault::TaintIgnored,
];

/// A fault of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverFault {
    /// Fsync-class calls answer without waiting for their marks.
    GateRemoved,
    /// An fsync waits for what was captured when it began, also while somebody is changing the file.
    WritersIgnored,
    /// A sync of names or of the volume answers once everything captured is mirrored.
    SyncTrustsLog,
    /// A sync of the volume answers once everything captured is mirrored, unless the log lacks something.
    SyncTrustsWholeLog,
    /// A sync of names that somebody is changing answers once its mark is mirrored.
    MarkForNames,
    /// An fsync waits for what was captured when it began, also while the log lacks something.
    FsyncTrustsLog,
    /// A checkpoint is called proven without a sync.
    PurgeBeforeSync,
    /// The sentinel is written before the device has flushed what it says.
    SentinelBeforeFlush,
    /// A failed sync is called a checkpoint.
    WriteErrorIgnored,
    /// The volume is mounted and merged before the owner is fenced.
    ReplayBeforeFence,
    /// The region is read while its owner may still write.
    RevokeOmitted,
    /// An epoch is closed without a closed sentinel, the mailbox or the region saying so.
    ClosedSentinelOmitted,
    /// The gates open before the epoch is closed.
    GatesBeforeSentinel,
    /// The gates follow what is mirrored, whether or not a replay would contain it.
    GateIgnoresFills,
    /// A node that rebooted with its epoch open serves at once.
    UnmergedServes,
    /// A node that mounts the volume serves before a closed sentinel is proven.
    ServedUnproven,
    /// A checkpoint covers gaps that are newer than records behind its S.
    GapsReadLate,
    /// Changes that are not captured do not weaken what is shown.
    GapsIgnored,
    /// Changes that make the log unfit do not end the epoch.
    GapsDoNotClose,
    /// Lost events do not end the epoch.
    LossIgnored,
    /// Bytes read late are said to be of the record's own time.
    SafeAtTooEarly,
    /// The volume is called protected before the first checkpoint.
    ProtectedTooEarly,
    /// After a takeover the sentinel keeps the old epoch.
    SentinelNotWritten,
}

impl DriverFault {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::GateRemoved,
        Self::WritersIgnored,
        Self::SyncTrustsLog,
        Self::SyncTrustsWholeLog,
        Self::MarkForNames,
        Self::FsyncTrustsLog,
        Self::PurgeBeforeSync,
        Self::SentinelBeforeFlush,
        Self::WriteErrorIgnored,
        Self::ReplayBeforeFence,
        Self::RevokeOmitted,
        Self::ClosedSentinelOmitted,
        Self::GatesBeforeSentinel,
        Self::GateIgnoresFills,
        Self::UnmergedServes,
        Self::ServedUnproven,
        Self::GapsReadLate,
        Self::GapsIgnored,
        Self::GapsDoNotClose,
        Self::LossIgnored,
        Self::SafeAtTooEarly,
        Self::ProtectedTooEarly,
        Self::SentinelNotWritten,
    ];
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Of a core.
    Core(CoreFault),
    /// Of a driver.
    Driver(DriverFault),
}

impl Fault {
    /// All of them.
    pub fn all() -> Vec<Self> {
        let cores = CoreFault::ALL
            .iter()
            .filter(|fault| !UNSEEN.contains(fault));
        let cores = cores.map(|fault| Self::Core(*fault));
        cores
            .chain(DriverFault::ALL.iter().map(|fault| Self::Driver(*fault)))
            .collect()
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        let camel = match self {
            Self::Core(fault) => format!("{fault:?}"),
            Self::Driver(fault) => format!("{fault:?}"),
        };
        let mut name = String::new();
        for letter in camel.chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }

    /// The fault of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|fault| fault.name() == name)
    }

    /// Switches it on for this thread, as far as it is one of a core.
    pub fn inject(fault: Option<Self>) {
        twinwrite::faults::inject(match fault {
            Some(Self::Core(fault)) => Some(fault),
            _ => None,
        });
    }
}
