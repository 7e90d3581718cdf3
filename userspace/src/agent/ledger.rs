//! What this node says of its volumes, in the two places where it says it: its table on the local
//! disk and its slot in the mailbox.
//!
//! Every change goes to both before it counts. The heartbeat in the mailbox is a write of the same
//! slot, so a node whose word can be read is a node whose disk path works. Before the first write
//! the decision of `cluster::ownership` must have been made from what was read at the start.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::clock::wall_ns;
use crate::cluster::claim::{BootId, EpochState, Phase, VolumeClaim};
use crate::cluster::liveness::{MailboxLook, Told};
use crate::cluster::mailbox::{
    AgentState, Mailbox, MailboxError, NodeReport, SlotError, look_at, word_of,
};
use crate::cluster::ownership::{Decision, Doubt, Facts, OwnWord, Word, first_word};
use crate::cluster::standing::{Fallen, Slot, is_not_outbid};
use crate::cluster::table::{Table, TableError};
use crate::ids::NodeId;

/// Why this node's word could not be given.
#[derive(Debug, Error)]
pub enum LedgerError {
    /// The mailbox.
    #[error(transparent)]
    Mailbox(#[from] MailboxError),
    /// The table.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What is said; its lock is never held over I/O, so that a device that hangs stops nobody who
/// only wants to know.
struct Inner {
    table: Table,
    report: NodeReport,
    /// The slots as they were last read, in the order of the nodes.
    slots: Vec<Result<NodeReport, SlotError>>,
}

/// The table and the mailbox slot of this node.
pub struct Ledger {
    state_dir: PathBuf,
    /// Its lock orders the writes of both places.
    mailbox: Mutex<Mailbox>,
    inner: Mutex<Inner>,
    /// What was found at the start: this node's own words of before.
    table_at_start: Result<Option<Table>, String>,
    slot_at_start: Result<NodeReport, SlotError>,
    peer_index: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn word_in(claim: Option<&VolumeClaim>) -> Word {
    claim.map_or(Word::Nothing, |claim| Word::Says(claim.clone()))
}

impl Ledger {
    /// Reads both places; writes nothing.
    ///
    /// # Errors
    /// When the mailbox cannot be used. A damaged table is not an error here: it makes this node's
    /// word unreadable.
    pub fn open(
        device: &Path,
        state_dir: &Path,
        cluster: &str,
        nodes: &[NodeId],
        own: &NodeId,
        boot_id: BootId,
    ) -> Result<Self, LedgerError> {
        let mailbox = Mailbox::open(device, cluster, nodes, own)?;
        let slots = mailbox.read()?;
        let own_index = nodes.iter().position(|n| n == own).unwrap_or(0);
        let peer_index = nodes.iter().position(|n| n != own).unwrap_or(own_index);
        let slot_at_start = slots
            .get(own_index)
            .cloned()
            .unwrap_or(Err(SlotError::Blank));
        let table_at_start = Table::load(state_dir, cluster).map_err(|error| {
            tracing::error!(%error, "this node's own table cannot be read");
            error.to_string()
        });
        let counter = slot_at_start.as_ref().map_or(0, |report| report.counter);
        let report = NodeReport {
            node: own.clone(),
            boot_id,
            counter,
            time_ns: wall_ns(),
            state: AgentState::Starting,
            volumes: std::collections::BTreeMap::new(),
            exposed: BTreeSet::new(),
            told: Told::default(),
        };
        let table = Table::new(cluster, boot_id);
        Ok(Self {
            state_dir: state_dir.to_owned(),
            mailbox: Mutex::new(mailbox),
            inner: Mutex::new(Inner {
                table,
                report,
                slots,
            }),
            table_at_start,
            slot_at_start,
            peer_index,
        })
    }

    /// Whether an earlier boot of this machine owned the volume and left its epoch open, as read at
    /// the start.
    pub fn left_open_by_earlier_boot(&self, volume: &str) -> bool {
        let own = self.own_word(volume);
        let inner = lock(&self.inner);
        matches!(&own.word, Word::Says(claim)
            if claim.owner == inner.report.node
                && claim.epoch_state == EpochState::Open
                && matches!(claim.phase, Phase::Settled | Phase::Unmerged)
                && own.boot_id != Some(inner.report.boot_id))
    }

    /// Carries this node's words of before over into what it will write, so that its first
    /// heartbeat neither forgets a volume nor takes an epoch that an earlier boot left open for its
    /// own. Writes nothing.
    pub fn carry_over(&self, volume: &str, configured_owner: &NodeId) {
        let own = self.own_word(volume);
        let peer_slot = self.peer_word(volume);
        let mut inner = lock(&self.inner);
        let facts = Facts {
            this_node: &inner.report.node,
            boot_id: inner.report.boot_id,
            configured_owner,
            own: &own,
            peer_slot: &peer_slot,
            peer_live: None,
            captured: false,
        };
        if let Some(claim) = first_word(&facts, Decision::Suspended(Doubt::PeerUnreadable)) {
            inner.table.volumes.insert(volume.to_owned(), claim.clone());
            inner.report.volumes.insert(volume.to_owned(), claim);
        }
    }

    /// This node's word: of this boot, or of before from the later of its two places.
    pub fn own_word(&self, volume: &str) -> OwnWord {
        if let Some(claim) = self.claim(volume) {
            let boot_id = Some(lock(&self.inner).report.boot_id);
            return OwnWord {
                word: Word::Says(claim),
                boot_id,
            };
        }
        let table = match &self.table_at_start {
            Ok(Some(table)) => OwnWord {
                word: word_in(table.volumes.get(volume)),
                boot_id: Some(table.boot_id),
            },
            Ok(None) => OwnWord {
                word: Word::Nothing,
                boot_id: None,
            },
            Err(_) => OwnWord {
                word: Word::Unreadable,
                boot_id: None,
            },
        };
        let slot = OwnWord {
            word: word_of(&self.slot_at_start, volume),
            boot_id: self
                .slot_at_start
                .as_ref()
                .ok()
                .map(|report| report.boot_id),
        };
        OwnWord::of(table, slot)
    }

    /// The peer's word in the mailbox, as last read.
    pub fn peer_word(&self, volume: &str) -> Word {
        lock(&self.inner)
            .slots
            .get(self.peer_index)
            .map_or(Word::Nothing, |slot| word_of(slot, volume))
    }

    /// The peer's whole report, as last read.
    pub fn peer_report(&self) -> Option<NodeReport> {
        lock(&self.inner)
            .slots
            .get(self.peer_index)
            .and_then(|slot| slot.as_ref().ok().cloned())
    }

    /// The peer's slot, as the last heartbeat read it.
    pub fn peer_slot(&self) -> Slot {
        let inner = lock(&self.inner);
        let slot = inner.slots.get(self.peer_index).cloned();
        slot.unwrap_or(Err(SlotError::Blank))
    }

    /// Says this node's words once more and then reads the peer's slot: what is decided from it is decided
    /// after the peer could read them. What the last heartbeat read stays what the peer is judged by.
    ///
    /// # Errors
    /// When the mailbox cannot be written or read.
    pub fn say_and_look(&self) -> Result<Slot, LedgerError> {
        let mailbox = lock(&self.mailbox);
        self.write(&mailbox)?;
        let slot = mailbox.read()?.into_iter().nth(self.peer_index);
        Ok(slot.unwrap_or(Err(SlotError::Blank)))
    }

    /// [`Self::say_and_look`], and whether this node's word on a volume stands beside what it finds.
    ///
    /// # Errors
    /// When the mailbox cannot be written or read.
    pub fn is_not_outbid(&self, volume: &str) -> Result<Result<(), Fallen>, LedgerError> {
        let now = self.say_and_look()?;
        let own = self.claim(volume);
        Ok(own.map_or(Ok(()), |own| is_not_outbid(&own, volume, &now)))
    }

    /// What this node says of a volume now.
    pub fn claim(&self, volume: &str) -> Option<VolumeClaim> {
        lock(&self.inner).report.volumes.get(volume).cloned()
    }

    /// Says this of a volume, in both places; when it returns, both have it.
    ///
    /// # Errors
    /// When either could not be written: the word then does not count as given.
    pub fn publish(&self, volume: &str, claim: &VolumeClaim) -> Result<(), LedgerError> {
        let mailbox = lock(&self.mailbox);
        let table = {
            let mut inner = lock(&self.inner);
            inner.table.volumes.insert(volume.to_owned(), claim.clone());
            inner
                .report
                .volumes
                .insert(volume.to_owned(), claim.clone());
            inner.table.clone()
        };
        // The end of an epoch must be known to the peer first, any other word to this node.
        if claim.epoch_state == EpochState::Closed {
            self.write(&mailbox)?;
            return Ok(table.store(&self.state_dir)?);
        }
        table.store(&self.state_dir)?;
        self.write(&mailbox).map(drop)
    }

    /// Writes this node's slot and returns its counter.
    fn write(&self, mailbox: &Mailbox) -> Result<u64, LedgerError> {
        let report = {
            let mut inner = lock(&self.inner);
            inner.report.counter += 1;
            inner.report.time_ns = wall_ns();
            inner.report.clone()
        };
        mailbox.write(&report)?;
        Ok(report.counter)
    }

    /// Changes this node's claim of a volume and publishes it.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub fn update(
        &self,
        volume: &str,
        change: impl FnOnce(&mut VolumeClaim),
    ) -> Result<(), LedgerError> {
        let Some(mut claim) = self.claim(volume) else {
            return Ok(());
        };
        change(&mut claim);
        self.publish(volume, &claim)
    }

    /// Says what the agent is doing.
    ///
    /// # Errors
    /// When the mailbox cannot be written.
    pub fn set_state(&self, state: AgentState) -> Result<(), LedgerError> {
        let mailbox = lock(&self.mailbox);
        lock(&self.inner).report.state = state;
        self.write(&mailbox).map(drop)
    }

    /// Announces in the slot that this agent restarts.
    ///
    /// # Errors
    /// When the mailbox cannot be written.
    pub fn announce_restart(&self, within: Duration) -> Result<(), LedgerError> {
        let mailbox = lock(&self.mailbox);
        lock(&self.inner).report.told.restart_within = within;
        self.write(&mailbox).map(drop)
    }

    /// What this node tells beside its sign of life.
    pub fn told(&self) -> Told {
        lock(&self.inner).report.told
    }

    /// Notes how long ago the volumes that are served here last answered; it goes out with the next beat.
    pub fn note_volume_io(&self, age: Option<Duration>) {
        lock(&self.inner).report.told.volume_io_age = age;
    }

    /// Notes which volumes this node owns and does not protect; it goes out with the next beat.
    pub fn note_exposed(&self, exposed: BTreeSet<String>) {
        lock(&self.inner).report.exposed = exposed;
    }

    /// One heartbeat: writes this node's slot and looks at the peer's.
    pub fn beat(&self) -> (Result<u64, LedgerError>, MailboxLook) {
        let mailbox = lock(&self.mailbox);
        let written = self.write(&mailbox);
        let look = match mailbox.read() {
            Ok(slots) => {
                let mut inner = lock(&self.inner);
                inner.slots = slots;
                inner
                    .slots
                    .get(self.peer_index)
                    .map_or(MailboxLook::Nothing, |slot| look_at(Some(slot)))
            }
            Err(error) => {
                tracing::warn!(%error, "the mailbox cannot be read");
                MailboxLook::Unreadable
            }
        };
        (written, look)
    }
}
