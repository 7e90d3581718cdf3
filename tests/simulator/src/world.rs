//! Two machines, a disk, a mailbox, a link, and the steps by which they change.

mod link;
mod machines;

use std::collections::VecDeque;

use twinwrite::cluster::claim::BootId;
use twinwrite::cluster::liveness::{Beat, Liveness};
use twinwrite::status::PeerState;

use crate::applications::Taste;
use crate::disk::Disk;
use crate::fault::{DriverFault, Fault};
use crate::history::History;
use crate::image::{Image, Version};
use crate::keeper::Keeping;
use crate::kernel::{Call, Kernel, Rule, THREADS, Under, Waits};
use crate::ledger::{Ledger, Mailbox, Table};
use crate::random::Random;
use crate::region::Region;
use crate::step::{Kind, Step};
use crate::wire::Wire;

/// Events kept for the trace.
const TRACE_LINES: usize = 400;
/// Time between heartbeats.
pub const HEARTBEAT_US: u64 = 200_000;

/// What a run is made of, chosen by its seed.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Bytes of the region's log.
    pub log_bytes: u64,
    /// Bytes of the ring.
    pub ring_bytes: u64,
    /// Lag beyond this ends the epoch.
    pub lag_limit_us: u64,
    /// Age at which records ask for a checkpoint.
    pub checkpoint_age_us: u64,
    /// A syncfs writes back and does not flush, as XFS may.
    pub lazy_syncfs: bool,
    /// The file system tells when an inode was made.
    pub births: bool,
    /// A fence command is configured.
    pub has_fence: bool,
    /// What applications like to do.
    pub taste: Taste,
}

/// Something that must never be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which guarantee.
    pub guarantee: &'static str,
    /// What.
    pub what: String,
}

/// One agent process.
#[derive(Debug)]
pub struct Agent {
    /// Its word.
    pub ledger: Ledger,
    /// How it judges the peer.
    pub liveness: Liveness,
    /// How the peer looks.
    pub peer_state: PeerState,
    /// What it is doing with the volume.
    pub keeping: Keeping,
    /// The registration that the owner may write to.
    pub exposed: Option<u64>,
    /// Nobody may write to the region any more.
    pub sealed: bool,
    /// It has the volume mounted and serves it.
    pub serving: bool,
    /// A person's word that the peer is dead.
    pub confirmed_dead: bool,
    /// Heartbeats sent.
    pub beats: u64,
    /// What both paths showed at the last look.
    pub heard: (Option<Beat>, Option<u64>),
    /// Looks since then that showed the same.
    pub looks: u32,
}

impl Agent {
    /// Whether a person's word that the peer is dead can be true as far as this node sees.
    pub fn may_peer_be_dead(&self) -> bool {
        match self.peer_state {
            PeerState::Dead => true,
            PeerState::Unknown => self.liveness.is_silent(),
            PeerState::Alive | PeerState::LinkSilent | PeerState::MailboxSilent => false,
        }
    }
}

/// One machine.
#[derive(Debug)]
pub struct Machine {
    /// It has power.
    pub up: bool,
    /// It is stopped, and knows nothing of it.
    pub paused: bool,
    /// Counts its boots.
    pub boot: u8,
    /// The volume, while it is mounted here.
    pub kernel: Option<Kernel>,
    /// The agent, while it runs.
    pub agent: Option<Agent>,
    /// Memory that holds the peer's records; outlives the agent.
    pub region: Option<Region>,
    /// The peer's heartbeat in this machine's memory: boot and counter.
    pub page: Option<(u8, u64)>,
    /// The copy on the local disk.
    pub saved: Option<Region>,
    /// The table on the local disk.
    pub table: Option<Table>,
    /// Its link to the peer's region.
    pub wire: Option<Wire>,
}

impl Machine {
    fn new() -> Self {
        Self {
            up: true,
            paused: false,
            boot: 1,
            kernel: None,
            agent: None,
            region: None,
            page: None,
            saved: None,
            table: None,
            wire: None,
        }
    }
}

/// What the owner last showed while it called the volume protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The owner.
    pub node: usize,
    /// Ring position up to which it called the records mirrored.
    pub mirrored: u64,
    /// Epoch.
    pub epoch: u64,
    /// The mirror's boot, whose memory holds the records.
    pub mirror_boot: u8,
}

/// Everything.
#[derive(Debug)]
pub struct World {
    /// How this run is.
    pub setting: Setting,
    /// The fault that is injected.
    pub fault: Option<Fault>,
    /// Both machines.
    pub machines: [Machine; 2],
    /// The shared disk.
    pub disk: Disk,
    /// The volume as the disk shows it while nobody has it mounted.
    pub at_rest: Image,
    /// The mailbox.
    pub mailbox: Mailbox,
    /// The interconnect works.
    pub linked: bool,
    /// The oracle.
    pub history: History,
    /// The last mutation.
    pub version: Version,
    /// The last generation.
    pub generation: u32,
    /// The last registration.
    pub registration: u64,
    /// Microseconds since the beginning.
    pub now_us: u64,
    /// A merge was interrupted by its machine's death and not finished since.
    pub half_merged: bool,
    /// What was promised last, until it is not shown any more.
    pub promised: Option<Shown>,
    /// The first thing that must never be.
    pub violation: Option<Violation>,
    /// Dice of the running step.
    pub dice: Random,
    /// One line an event, if anybody listens.
    pub trace: Option<VecDeque<String>>,
    /// What runs have come to.
    pub counts: Counts,
    /// Step under way.
    pub step: usize,
}

/// What happened, to see that runs are not idle.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Operations of applications.
    pub operations: u64,
    /// Fsync-class calls that were answered.
    pub confirmed: u64,
    /// Epochs begun.
    pub epochs: u64,
    /// Epochs closed.
    pub closed: u64,
    /// Checkpoints proven.
    pub checkpoints: u64,
    /// Takeovers that came to their end.
    pub takeovers: u64,
    /// Of these, with records merged.
    pub merges: u64,
    /// Records merged.
    pub records: u64,
    /// Machines that died.
    pub crashes: u64,
    /// Half-merged volumes that were served with their merge given up: what a person decided, or
    /// what a torn slot hid. Nobody can say any more what they should show.
    pub given_up: u64,
    /// Agents that went on with a running epoch.
    pub resumed: u64,
    /// What fsync-class calls waited for.
    pub waits: Waits,
}

impl Counts {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.confirmed += other.confirmed;
        self.epochs += other.epochs;
        self.closed += other.closed;
        self.checkpoints += other.checkpoints;
        self.takeovers += other.takeovers;
        self.merges += other.merges;
        self.records += other.records;
        self.crashes += other.crashes;
        self.given_up += other.given_up;
        self.resumed += other.resumed;
        self.waits.add(&other.waits);
    }
}

/// Tells an event, at the price of a branch when nobody listens.
#[macro_export]
macro_rules! say {
    ($world:expr, $($words:tt)*) => {
        if $world.trace.is_some() {
            let text = format!($($words)*);
            $world.tell(text);
        }
    };
}

impl World {
    /// Both machines have just been started, and the volume was never protected.
    pub fn new(setting: Setting, fault: Option<Fault>, listen: bool) -> Self {
        let disk = Disk::new();
        let at_rest = Image::fresh();
        Self {
            setting,
            fault,
            machines: [Machine::new(), Machine::new()],
            disk,
            history: History::new(at_rest.clone()),
            at_rest,
            mailbox: Mailbox::default(),
            linked: true,
            version: 0,
            generation: 100,
            registration: 0,
            now_us: 1,
            half_merged: false,
            promised: None,
            violation: None,
            dice: Random(0),
            trace: listen.then(VecDeque::new),
            counts: Counts::default(),
            step: 0,
        }
    }

    /// Notes a line of the trace.
    pub fn tell(&mut self, text: String) {
        let (step, now) = (self.step, self.now_us);
        if let Some(trace) = &mut self.trace {
            if trace.len() >= TRACE_LINES {
                trace.pop_front();
            }
            if trace.back().is_some_and(|last| last.ends_with(&text)) {
                return;
            }
            trace.push_back(format!("{step:>5} {:>9.3} ms  {text}", now as f64 / 1000.0));
        }
    }

    /// Whether a fault of a driver is injected.
    pub fn has(&self, fault: DriverFault) -> bool {
        self.fault == Some(Fault::Driver(fault))
    }

    /// Something that must never be.
    pub fn violate(&mut self, guarantee: &'static str, what: String) {
        say!(self, "VIOLATION of {guarantee}: {what}");
        if self.violation.is_none() {
            self.violation = Some(Violation { guarantee, what });
        }
    }

    /// Whether this machine's processor runs.
    pub fn runs(&self, node: usize) -> bool {
        self.machines[node].up && !self.machines[node].paused
    }

    /// Whether the two agents can talk now.
    pub fn can_talk(&self) -> bool {
        self.linked
            && self.runs(0)
            && self.runs(1)
            && self.machines.iter().all(|m| m.agent.is_some())
    }

    /// This boot.
    pub fn boot_id(&self, node: usize) -> BootId {
        BootId([self.machines[node].boot * 2 + node as u8; 16])
    }

    /// What a kernel needs of the world.
    pub fn kernel_and_under(
        &mut self,
        node: usize,
    ) -> Option<(&mut Kernel, Under<'_>, &mut Random)> {
        let kernel = self.machines[node].kernel.as_mut()?;
        let under = Under {
            disk: &mut self.disk,
            history: &mut self.history,
            version: &mut self.version,
        };
        Some((kernel, under, &mut self.dice))
    }

    /// Does one step; what is impossible now is nothing.
    pub fn run_step(&mut self, step: &Step) {
        self.dice = Random(step.dice);
        self.step += 1;
        self.now_us += self.dice.next() % 60;
        let node = self.place(step);
        match step.kind {
            Kind::Application => self.application(node),
            Kind::WriteBack => {
                if self.runs(node)
                    && let Some((kernel, under, dice)) = self.kernel_and_under(node)
                {
                    kernel.write_back_some(dice, under.disk);
                }
            }
            Kind::Commit => self.commit(node),
            Kind::FailDisk => self.disk.failing = 1 + self.dice.below(2) as u32,
            Kind::Pump => self.owner_steps(node),
            Kind::Turn => self.owner_turn(node),
            Kind::Fill => self.fill_step(node),
            Kind::Checkpoint => self.checkpoint_step(node),
            Kind::Land => self.land(node),
            Kind::Complete => self.complete(node),
            Kind::Keep => self.keep(node),
            Kind::Tick => self.tick(),
            Kind::CutLink => self.cut_link(),
            Kind::MendLink => self.mend_link(),
            Kind::Mailbox => {
                let reached = &mut self.mailbox.reached[node];
                *reached = !*reached;
                let now = *reached;
                say!(
                    self,
                    "{}: the mailbox is {}",
                    name(node),
                    if now { "reached again" } else { "not reached" }
                );
            }
            Kind::KillAgent => self.kill_agent(node),
            Kind::StartAgent => self.start_agent(node),
            Kind::Crash => self.crash(node, "the power fails"),
            Kind::Boot => self.boot(node),
            Kind::Pause => self.pause(node),
            Kind::Settle => self.settle(),
        }
        self.look_for_two_writers();
    }

    /// Steps are meant for the node that has the volume, or for the other one.
    fn place(&self, step: &Step) -> usize {
        let has = |node: usize| self.machines[node].kernel.is_some();
        let owner = match (has(0), has(1)) {
            (true, _) => 0,
            (_, true) => 1,
            _ => usize::from(self.machines[1].wire.is_some()),
        };
        owner ^ step.node()
    }

    /// All that landed completes.
    pub fn complete_all(&mut self, node: usize) {
        for _ in 0..8 {
            self.complete(node);
        }
    }

    /// Boots a machine.
    pub fn run_boot(&mut self, node: usize) {
        self.boot(node);
    }

    fn gate_rule(&self) -> Rule {
        match self.fault {
            Some(Fault::Driver(DriverFault::GateRemoved)) => Rule::NoGate,
            Some(Fault::Driver(DriverFault::WritersIgnored)) => Rule::WritersIgnored,
            Some(Fault::Driver(DriverFault::SyncTrustsLog)) => Rule::MirroredWillDo,
            Some(Fault::Driver(DriverFault::SyncTrustsWholeLog)) => Rule::SyncTrustsWholeLog,
            Some(Fault::Driver(DriverFault::MarkForNames)) => Rule::MarkForNames,
            Some(Fault::Driver(DriverFault::FsyncTrustsLog)) => Rule::GapsIgnored,
            _ => Rule::Whole,
        }
    }

    fn application(&mut self, node: usize) {
        let serving = self.machines[node]
            .kernel
            .as_ref()
            .is_some_and(|kernel| kernel.served);
        if !self.runs(node) {
            return;
        }
        let taste = self.setting.taste;
        let rule = self.gate_rule();
        let listens = self.trace.is_some();
        let before = self.history.operations.len();
        let thread = self.dice.below(THREADS);
        let Some((kernel, mut under, dice)) = self.kernel_and_under(node) else {
            return;
        };
        kernel.rule = rule;
        kernel.told = listens.then(String::new);
        let gated = matches!(kernel.calls[thread], Call::Gated(..));
        if matches!(kernel.calls[thread], Call::Idle) {
            if serving {
                crate::applications::begin(kernel, thread, &taste, dice, &mut under);
            }
        } else {
            kernel.step(thread, dice, &mut under);
        }
        let answered = gated && matches!(kernel.calls[thread], Call::Idle);
        let waits = std::mem::take(&mut kernel.waits);
        let told = kernel.told.take().filter(|told| !told.is_empty());
        self.counts.confirmed += u64::from(answered);
        self.counts.waits.add(&waits);
        self.counts.operations += (self.history.operations.len() - before) as u64;
        if let Some(told) = told {
            say!(self, "{}: {told}", name(node));
        }
    }

    fn commit(&mut self, node: usize) {
        if self.runs(node) && self.machines[node].kernel.is_some() {
            let version = self.version;
            self.disk.commit(version);
            if self.dice.chance(60) {
                self.disk.flush();
            }
            say!(
                self,
                "{}: the journal commits in the background",
                name(node)
            );
        }
    }
}

/// A machine's name.
pub fn name(node: usize) -> &'static str {
    ["a", "b"][node % 2]
}
