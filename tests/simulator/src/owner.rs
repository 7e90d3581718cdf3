//! Owning a volume, as `agent::owner`, `agent::pump`, `agent::checkpointer` and `agent::closer` do it:
//! the same cores, the same order, split where something else may come between.

mod beginning;
mod closing;
mod pump;

use std::collections::VecDeque;

use twinwrite::cluster::claim::{EpochState, Phase};
use twinwrite::cluster::ownership::is_claimed_by_peer;
use twinwrite::durability::checkpoint::CheckpointPlanner;
use twinwrite::durability::closing::{Closing, Proven};
use twinwrite::durability::core::LiveLog;
use twinwrite::ids::{Epoch, Identity, Seq};
use twinwrite::mirror::core::MirrorCore;
use twinwrite::mirror::gate::{Gate, OpenTo};
use twinwrite::record::gap;
use twinwrite::replay::Sentinel;

use crate::image::Version;
use crate::ledger::{CLUSTER, VOLUME, node_id};
use crate::say;
use crate::world::{World, name};

/// A volume with gaps is covered by a checkpoint no more often than this.
const GAP_CHECKPOINT_EVERY_US: u64 = 2_000;

/// What is to be proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    epoch: Epoch,
    seq: Seq,
    closed: bool,
}

/// A checkpoint under way.
#[derive(Clone, Copy, Debug)]
struct Running {
    proof: Proof,
    /// Ring position behind what it is to prove, and what it covers beside.
    behind: u64,
    /// What was changed before it wrote back.
    written_at: Version,
    stage: u8,
    /// What was changed before it began.
    began_at: Version,
}

/// Bytes being read.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    seq: Seq,
    inode: Identity,
    pos: u64,
    len: u32,
    fill_offset: u32,
}

#[derive(Clone, Debug)]
enum Fill {
    None,
    Asked(Wanted),
    Read(Wanted, Vec<u8>),
    Ready(Wanted, Vec<u8>),
    /// Taken by the pump, with the ring position behind every change it may show.
    Taken(Wanted, Vec<u8>, u64),
}

/// The machinery of one epoch.
#[derive(Debug)]
struct Pump {
    core: MirrorCore,
    live: LiveLog,
    planner: CheckpointPlanner,
    fill: Fill,
    lost_at_start: u64,
    gaps_at_start: [u64; gap::COUNT],
    gaps_at_checkpoint: [u64; gap::COUNT],
    gaps_proven: [u64; gap::COUNT],
    /// Those of the checkpoint proven before.
    gaps_proven_before: Option<[u64; gap::COUNT]>,
    /// Calls that asked for a proof when the last checkpoint began.
    proofs_at_checkpoint: u64,
    /// The same, read before the last records were taken that are older than they.
    proofs_whole: u64,
    /// Gaps, read before the last records were taken that are older than they.
    gaps_whole: [u64; gap::COUNT],
    /// The operations that these are about.
    noticed: Vec<usize>,
    /// Those that the checkpoint under way covers.
    covering: Vec<usize>,
    begun: bool,
    checkpoint_failed: bool,
    gap_in_log: Option<Seq>,
    gap_checkpoint_us: Option<u64>,
    unlinked_us: Option<u64>,
    opened: bool,
    phase: u8,
    /// Record and ring position behind it, of what is not mirrored.
    ends: VecDeque<(Seq, u64)>,
    /// Everything before this ring position is mirrored.
    mirrored_to: u64,
    /// Last mutation before the present turn.
    turned_at: Version,
    /// All uncaptured changes up to here are covered by the checkpoint under way, or by a proven one.
    covers: Version,
    covered: Version,
    /// The mirror's boot when the link was first made.
    mirror_boot: u8,
    /// The last mutation when `gaps_whole` was read.
    whole_at: Version,
}

#[derive(Debug)]
enum State {
    Between,
    /// Mounted, and nobody may use it before the closed sentinel is proven.
    Proving(Box<Ending>),
    Mirroring(Box<Pump>),
    Closing(Box<Ending>),
}

/// An epoch that is being closed.
#[derive(Debug)]
struct Ending {
    closing: Closing,
    /// The checkpoint is to begin once an earlier one has ended.
    wanted: bool,
    /// It is under way.
    proof: Proof,
}

impl Ending {
    fn of(epoch: Epoch, last_mirrored: Seq, closed: bool) -> Self {
        Self {
            closing: Closing::new(epoch, last_mirrored, ""),
            wanted: false,
            proof: Proof {
                epoch,
                seq: last_mirrored,
                closed,
            },
        }
    }
}

/// The owner of a mounted volume.
#[derive(Debug)]
pub struct Owner {
    state: State,
    gate: Gate,
    last_epoch: Epoch,
    /// An epoch that is not proven closed.
    unclosed: Option<Epoch>,
    resume_until_us: u64,
    retry_us: u64,
    running: Option<Running>,
    /// What was to be proven, the ring position behind it, and whether it was.
    outcome: Option<(Proof, u64, bool)>,
    last_mirrored: Seq,
}

/// Why an epoch ends.
type Ended = String;

impl Owner {
    /// The running epoch and how far it is said to be mirrored.
    pub fn mirrored(&self) -> Option<(Epoch, Seq)> {
        match &self.state {
            State::Mirroring(pump) => Some((pump.core.epoch(), pump.core.mirrored_seq())),
            _ => None,
        }
    }

    /// Whether it has a running epoch that is proven.
    pub fn is_protected(&self) -> bool {
        matches!(&self.state, State::Mirroring(pump) if pump.opened)
    }
}

fn sentinel_of(proof: &Proof) -> Sentinel {
    Sentinel {
        cluster: CLUSTER.to_owned(),
        volume: VOLUME.to_owned(),
        epoch: proof.epoch,
        seq: proof.seq,
        closed: proof.closed,
        time_ns: 0,
    }
}

impl World {
    /// What is not proven closed, and whether somebody says that it is open.
    fn left_unclosed(&self, node: usize) -> (Option<Epoch>, bool) {
        let on_volume = self.disk.sentinel();
        let agent = self.machines[node].agent.as_ref();
        let claim = agent.and_then(|agent| agent.ledger.claim());
        let told_open = claim.filter(|claim| {
            let settled = claim.owner == node_id(node) && claim.phase == Phase::Settled;
            settled && claim.epoch_state == EpochState::Open
        });
        let open_on_volume = on_volume.filter(|s| !s.closed).map(|s| s.epoch);
        let open = told_open.map(|claim| claim.epoch).max(open_on_volume);
        // One that is closed may stand so in the page cache only, and is proven again.
        let unclosed = open.or(on_volume.map(|s| s.epoch));
        (unclosed.filter(|epoch| *epoch > Epoch(0)), open.is_some())
    }

    fn fresh_owner(&self, gate: Gate, unclosed: Option<Epoch>) -> Owner {
        Owner {
            state: State::Between,
            gate,
            last_epoch: self.disk.sentinel().map_or(Epoch(0), |s| s.epoch),
            unclosed,
            resume_until_us: self.now_us,
            retry_us: 0,
            running: None,
            outcome: None,
            last_mirrored: Seq(0),
        }
    }

    /// An owner that only proves that no region can be merged any more, if that is to be proven.
    pub fn unproven_owner(&mut self, node: usize) -> Option<Owner> {
        let epoch = self.left_unclosed(node).0?;
        let mut owner = self.fresh_owner(Gate::left(OpenTo::of_word(0)), Some(epoch));
        owner.state = State::Proving(Box::new(Ending::of(epoch, Seq(0), true)));
        say!(
            self,
            "{}: proves first that epoch {epoch} is closed",
            name(node)
        );
        Some(owner)
    }

    /// Captures the mounted volume.
    pub fn new_owner(&mut self, node: usize) -> Owner {
        let (unclosed, is_open) = self.left_unclosed(node);
        let mut left = OpenTo::of_word(0);
        if let Some(kernel) = &mut self.machines[node].kernel {
            if !std::mem::replace(&mut kernel.attached, true) {
                kernel.gate = left;
            }
            left = kernel.gate;
        }
        let mut gate = Gate::left(left);
        if unclosed.is_none() {
            gate.open(&Proven::without_sentinel());
        }
        let mut owner = self.fresh_owner(gate, unclosed);
        if is_open {
            owner.resume_until_us += self.setting.lag_limit_us;
        }
        self.tell_gate(node, &owner.gate);
        owner
    }

    /// Writes the control word that the programs look at.
    fn tell_gate(&mut self, node: usize, gate: &Gate) {
        if let Some(kernel) = &mut self.machines[node].kernel
            && kernel.gate != gate.open_to()
        {
            kernel.gate = gate.open_to();
            say!(
                self,
                "{}: the gates are open to {:?}",
                name(node),
                gate.open_to()
            );
        }
    }

    /// Takes the owner out of its agent to work with it.
    fn with_owner<T>(
        &mut self,
        node: usize,
        work: impl FnOnce(&mut Self, &mut Owner) -> T,
    ) -> Option<T> {
        if !self.runs(node) || self.machines[node].kernel.is_none() {
            return None;
        }
        let mut owner = self.machines[node].agent.as_mut()?.keeping.take_owner()?;
        let result = work(self, &mut owner);
        if let Some(agent) = &mut self.machines[node].agent {
            agent.keeping.put_owner(owner);
        }
        Some(result)
    }

    /// A few parts of the owner's loop.
    pub fn owner_steps(&mut self, node: usize) {
        let count = 1 + self.dice.below(3);
        for _ in 0..count {
            self.with_owner(node, |world, owner| world.owner_step(node, owner));
        }
    }

    /// A whole turn.
    pub fn owner_turn(&mut self, node: usize) {
        self.with_owner(node, |world, owner| {
            for _ in 0..8 {
                world.owner_step(node, owner);
                if matches!(&owner.state, State::Mirroring(pump) if pump.phase == 0) {
                    break;
                }
            }
        });
    }

    fn owner_step(&mut self, node: usize, owner: &mut Owner) {
        match std::mem::replace(&mut owner.state, State::Between) {
            State::Between => {
                if let Some(left) = self.leaving(node) {
                    say!(self, "{}: leaves the volume: {left}", name(node));
                    return;
                }
                self.begin(node, owner);
            }
            State::Mirroring(mut pump) => match self.pump_part(node, owner, &mut pump) {
                Ok(()) => owner.state = State::Mirroring(pump),
                Err(ended) => {
                    let epoch = pump.core.epoch();
                    owner.last_mirrored = pump.core.mirrored_seq();
                    owner.unclosed = Some(epoch);
                    owner.resume_until_us = self.now_us;
                    owner.gate.hold();
                    self.machines[node].wire = None;
                    self.promised = None;
                    say!(self, "{}: epoch {epoch} ended: {ended}", name(node));
                }
            },
            State::Proving(mut ending) => {
                if self.leaving(node).is_some() {
                    return;
                }
                if self.close_part(node, owner, &mut ending) {
                    *owner = self.serving_owner(node);
                } else {
                    owner.state = State::Proving(ending);
                }
            }
            State::Closing(mut ending) => {
                if self.leaving(node).is_none() && !self.close_part(node, owner, &mut ending) {
                    owner.state = State::Closing(ending);
                }
            }
        }
    }

    /// The peer claims the volume.
    pub fn leaving(&self, node: usize) -> Option<&'static str> {
        let agent = self.machines[node].agent.as_ref()?;
        let own = agent.ledger.claim()?;
        is_claimed_by_peer(&own, &node_id(node), &agent.ledger.peer_word())
            .then_some("the peer claims it")
    }

    /// Changes this node's claim and publishes it.
    pub fn update_claim(
        &mut self,
        node: usize,
        change: impl FnOnce(&mut twinwrite::cluster::claim::VolumeClaim),
    ) -> bool {
        let machine = &mut self.machines[node];
        let Some(agent) = &mut machine.agent else {
            return false;
        };
        let Some(mut claim) = agent.ledger.claim() else {
            return true;
        };
        change(&mut claim);
        let given = agent
            .ledger
            .publish(&claim, &mut self.mailbox, &mut machine.table)
            .is_ok();
        say!(
            self,
            "{}: says {:?} {:?} epoch {} {:?}, version {}{}",
            name(node),
            claim.owner.0,
            claim.phase,
            claim.epoch,
            claim.epoch_state,
            claim.table_version,
            if given { "" } else { " (not given)" }
        );
        given
    }
}
