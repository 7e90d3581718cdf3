//! A node's word: its table on the local disk, its slot in the mailbox; as `agent::ledger` does it.

use std::collections::BTreeMap;

use twinwrite::cluster::claim::{BootId, EpochState, VolumeClaim};
use twinwrite::cluster::liveness::{MailboxLook, Told};
use twinwrite::cluster::mailbox::{AgentState, NodeReport, SlotError, look_at, word_of};
use twinwrite::cluster::ownership::{Decision, Doubt, Facts, OwnWord, Word, first_word};
use twinwrite::cluster::standing::Slot;
use twinwrite::ids::NodeId;
use zerocopy::IntoBytes as _;

use crate::random::Random;

/// The cluster's name.
pub const CLUSTER: &str = "sim";
/// The volume's name.
pub const VOLUME: &str = "v";
const SLOT: usize = 1024;
const SECTOR: usize = 512;

/// The nodes.
pub fn node_id(index: usize) -> NodeId {
    NodeId(["a", "b"][index % 2].to_owned())
}

/// The mailbox device: a slot for each node.
#[derive(Clone, Debug)]
pub struct Mailbox {
    slots: [Vec<u8>; 2],
    /// Which nodes reach it.
    pub reached: [bool; 2],
}

impl Default for Mailbox {
    fn default() -> Self {
        Self {
            slots: [vec![0; SLOT], vec![0; SLOT]],
            reached: [true, true],
        }
    }
}

impl Mailbox {
    fn read(&self, index: usize) -> Result<NodeReport, SlotError> {
        NodeReport::open(&self.slots[index], CLUSTER, &node_id(index))
    }

    fn write(&mut self, index: usize, report: &NodeReport, sectors: usize) {
        if let Ok(slot) = report.seal(CLUSTER) {
            let end = (sectors * SECTOR).min(SLOT);
            self.slots[index][..end].copy_from_slice(&slot.as_bytes()[..end]);
        }
    }
}

/// The table as it is on the local disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The boot in which it was written.
    pub boot_id: BootId,
    /// The word on the volume.
    pub claim: Option<VolumeClaim>,
}

/// One agent's ledger.
#[derive(Clone, Debug)]
pub struct Ledger {
    node: usize,
    report: NodeReport,
    table: Option<VolumeClaim>,
    slots: [Result<NodeReport, SlotError>; 2],
    table_at_start: Option<Table>,
    slot_at_start: Result<NodeReport, SlotError>,
}

/// The word could not be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotGiven;

impl Ledger {
    /// Reads both places; `None` when the mailbox cannot be read.
    pub fn open(
        node: usize,
        boot_id: BootId,
        mailbox: &Mailbox,
        table: Option<Table>,
    ) -> Option<Self> {
        if !mailbox.reached[node] {
            return None;
        }
        let slots = [mailbox.read(0), mailbox.read(1)];
        let slot_at_start = slots[node].clone();
        let counter = slot_at_start.as_ref().map_or(0, |report| report.counter);
        Some(Self {
            node,
            report: NodeReport {
                node: node_id(node),
                boot_id,
                counter,
                time_ns: 0,
                state: AgentState::Starting,
                volumes: BTreeMap::new(),
                exposed: std::collections::BTreeSet::new(),
                told: Told::default(),
            },
            table: None,
            slots,
            table_at_start: table,
            slot_at_start,
        })
    }

    /// This node's word: of this boot, or of before.
    pub fn own_word(&self) -> OwnWord {
        if let Some(claim) = self.claim() {
            return OwnWord {
                word: Word::Says(claim),
                boot_id: Some(self.report.boot_id),
            };
        }
        let says =
            |claim: Option<&VolumeClaim>| claim.map_or(Word::Nothing, |c| Word::Says(c.clone()));
        let table = OwnWord {
            word: says(self.table_at_start.as_ref().and_then(|t| t.claim.as_ref())),
            boot_id: self.table_at_start.as_ref().map(|t| t.boot_id),
        };
        let slot = OwnWord {
            word: word_of(&self.slot_at_start, VOLUME),
            boot_id: self.slot_at_start.as_ref().ok().map(|r| r.boot_id),
        };
        OwnWord::of(table, slot)
    }

    /// Carries the word of before over, so that the first heartbeat does not forget it.
    pub fn carry_over(&mut self, configured_owner: &NodeId) {
        let (own, peer_slot) = (self.own_word(), self.peer_word());
        let facts = Facts {
            this_node: &self.report.node,
            boot_id: self.report.boot_id,
            configured_owner,
            own: &own,
            peer_slot: &peer_slot,
            peer_live: None,
            captured: false,
        };
        if let Some(claim) = first_word(&facts, Decision::Suspended(Doubt::PeerUnreadable)) {
            self.table = Some(claim.clone());
            self.report.volumes.insert(VOLUME.to_owned(), claim);
        }
    }

    /// What this node says now.
    pub fn claim(&self) -> Option<VolumeClaim> {
        self.report.volumes.get(VOLUME).cloned()
    }

    /// The peer's word, as last read.
    pub fn peer_word(&self) -> Word {
        word_of(&self.slots[1 - self.node], VOLUME)
    }

    /// The peer's whole report, as last read.
    pub fn peer_report(&self) -> Option<&NodeReport> {
        self.slots[1 - self.node].as_ref().ok()
    }

    /// The peer's slot, as the last heartbeat read it.
    pub fn peer_slot(&self) -> &Slot {
        &self.slots[1 - self.node]
    }

    /// Says this node's words once more, then reads the peer's slot.
    pub fn say_and_look(&mut self, mailbox: &mut Mailbox) -> Result<Slot, NotGiven> {
        self.write(mailbox)?;
        Ok(mailbox.read(1 - self.node))
    }

    /// This node's boot.
    pub fn boot_id(&self) -> BootId {
        self.report.boot_id
    }

    /// What the agent is doing.
    pub fn set_state(&mut self, state: AgentState) {
        self.report.state = state;
    }

    fn store(&self, table: &mut Option<Table>) {
        *table = Some(Table {
            boot_id: self.report.boot_id,
            claim: self.table.clone(),
        });
    }

    fn write(&mut self, mailbox: &mut Mailbox) -> Result<(), NotGiven> {
        self.report.counter += 1;
        if !mailbox.reached[self.node] {
            return Err(NotGiven);
        }
        mailbox.write(self.node, &self.report, 2);
        Ok(())
    }

    /// Says this, in both places. The end of an epoch must be known to the peer first, any other
    /// word to this node.
    pub fn publish(
        &mut self,
        claim: &VolumeClaim,
        mailbox: &mut Mailbox,
        table: &mut Option<Table>,
    ) -> Result<(), NotGiven> {
        self.table = Some(claim.clone());
        self.report.volumes.insert(VOLUME.to_owned(), claim.clone());
        if claim.epoch_state == EpochState::Closed {
            self.write(mailbox)?;
            self.store(table);
            return Ok(());
        }
        self.store(table);
        self.write(mailbox)
    }

    /// One heartbeat.
    pub fn beat(&mut self, mailbox: &mut Mailbox) -> MailboxLook {
        let _ = self.write(mailbox);
        if !mailbox.reached[self.node] {
            return MailboxLook::Unreadable;
        }
        self.slots = [mailbox.read(0), mailbox.read(1)];
        look_at(Some(&self.slots[1 - self.node]))
    }

    /// The machine dies while it writes its slot.
    pub fn tear(&self, mailbox: &mut Mailbox, random: &mut Random) {
        let mut report = self.report.clone();
        report.counter += 1;
        if mailbox.reached[self.node] && random.chance(15) {
            mailbox.write(self.node, &report, 1);
        }
    }
}
