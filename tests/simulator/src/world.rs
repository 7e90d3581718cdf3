//! Two machines, a disk, a mailbox, a link, and the steps by which they change.

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
use crate::wire::{Payload, Wire};

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

    /// A post lands in the peer's memory.
    fn land(&mut self, node: usize) {
        if self.linked && self.machines[1 - node].up {
            let count = 1 + self.dice.below(4);
            for _ in 0..count {
                self.land_one(node, None);
            }
        }
    }

    /// Lands the first post that has not; only its first lines if it is torn.
    pub fn land_one(&mut self, node: usize, torn: Option<usize>) -> bool {
        let [a, b] = &mut self.machines;
        let (owner, mirror) = if node == 0 { (a, b) } else { (b, a) };
        let Some(wire) = owner.wire.as_mut().filter(|wire| !wire.broken) else {
            return false;
        };
        let Some(post) = wire.flying.iter_mut().find(|post| !post.landed) else {
            return false;
        };
        let exposed = mirror.agent.as_ref().and_then(|agent| agent.exposed);
        if exposed != Some(wire.registration) {
            wire.broken = true;
            return false;
        }
        let sealed = mirror.agent.as_ref().is_some_and(|agent| agent.sealed);
        let mut bytes = post.head.to_vec();
        match &post.body {
            Payload::Bytes(own) => bytes.extend_from_slice(own),
            Payload::Ring { at, len } => {
                if let Some(kernel) = &owner.kernel {
                    bytes.extend_from_slice(kernel.ring.bytes(twinwrite::ids::RingPos(*at), *len));
                }
            }
        }
        let end = torn.map_or(bytes.len(), |lines| (lines * 64).min(bytes.len()));
        if torn.is_none() {
            post.landed = true;
        }
        let (id, offset) = (post.id, post.offset);
        if let Some(region) = &mut mirror.region {
            region.store(offset, &bytes[..end]);
        }
        say!(
            self,
            "post {} of {} lands at {offset} ({end} bytes)",
            id.0,
            name(node)
        );
        if sealed {
            self.violate(
                "5, one writer",
                format!("post {} landed in a revoked region", id.0),
            );
        }
        true
    }

    /// Completions come back.
    fn complete(&mut self, node: usize) {
        if !self.linked {
            return;
        }
        let count = 1 + self.dice.below(4);
        if let Some(wire) = &mut self.machines[node].wire {
            for _ in 0..count {
                if wire.flying.front().is_some_and(|post| post.landed)
                    && let Some(post) = wire.flying.pop_front()
                {
                    wire.completions.push_back(post.id);
                }
            }
        }
    }

    fn cut_link(&mut self) {
        if !std::mem::replace(&mut self.linked, false) {
            return;
        }
        say!(self, "the interconnect is cut");
    }

    fn mend_link(&mut self) {
        if self.linked {
            return;
        }
        // What was not repeated for so long is given up.
        for node in 0..2 {
            if self.dice.chance(60) {
                self.break_wire(node);
            }
        }
        self.linked = true;
        say!(self, "the interconnect works again");
    }

    /// A link ends: some posts arrive still, one in part, completions are lost.
    pub fn break_wire(&mut self, node: usize) {
        if self.machines[node]
            .wire
            .as_ref()
            .is_none_or(|wire| wire.broken)
        {
            return;
        }
        let arrive = self.dice.below(3);
        if self.linked && self.machines[1 - node].up {
            for _ in 0..arrive {
                self.land_one(node, None);
            }
            let lines = self.dice.below(5);
            self.land_one(node, Some(lines));
        }
        if let Some(wire) = &mut self.machines[node].wire {
            wire.broken = true;
            wire.flying.clear();
        }
        say!(self, "the link of {} to the region breaks", name(node));
    }

    /// An agent dies, and with it its links and registrations.
    pub fn kill_agent(&mut self, node: usize) {
        if self.machines[node].agent.is_none() {
            return;
        }
        self.break_wire(node);
        self.machines[node].wire = None;
        self.machines[node].agent = None;
        say!(self, "{}: the agent dies", name(node));
    }

    /// A machine loses its power.
    pub fn crash(&mut self, node: usize, why: &str) {
        if !self.machines[node].up {
            return;
        }
        self.counts.crashes += 1;
        self.check_mirrored(node);
        if let Some(agent) = &self.machines[node].agent {
            agent.ledger.tear(&mut self.mailbox, &mut self.dice);
        }
        // What is in the network may still arrive, much later.
        let ghost = self.dice.chance(40);
        let machine = &mut self.machines[node];
        if let (Some(wire), Some(kernel)) = (&mut machine.wire, &machine.kernel) {
            for post in &mut wire.flying {
                if let Payload::Ring { at, len } = post.body {
                    let bytes = kernel.ring.bytes(twinwrite::ids::RingPos(at), len);
                    post.body = Payload::Bytes(bytes.to_vec());
                }
            }
        }
        if !ghost {
            self.break_wire(node);
            self.machines[node].wire = None;
        }
        let takes_over =
            |agent: &Agent| matches!(agent.keeping, Keeping::TakingOver(_) | Keeping::Deciding);
        let machine = &self.machines[node];
        let unserved = machine.kernel.as_ref().is_some_and(|kernel| !kernel.served);
        if unserved && machine.saved.is_some() && machine.agent.as_ref().is_none_or(takes_over) {
            self.half_merged = true;
        }
        let machine = &mut self.machines[node];
        machine.agent = None;
        machine.up = false;
        machine.paused = false;
        machine.region = None;
        machine.page = None;
        if let Some(kernel) = machine.kernel.take() {
            self.generation = self.generation.max(kernel.last_generation());
            self.at_rest = self.disk.power_cut(&mut self.dice);
        }
        say!(self, "{}: {why}", name(node));
    }

    fn boot(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        if machine.up {
            return;
        }
        machine.up = true;
        machine.boot += 1;
        machine.wire = None;
        say!(self, "{}: boots", name(node));
        self.start_agent(node);
    }

    fn pause(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        if machine.up {
            machine.paused = !machine.paused;
            let paused = machine.paused;
            say!(
                self,
                "{}: {}",
                name(node),
                if paused { "stops, whole" } else { "goes on" }
            );
        }
    }

    /// The owner's device is used by one kernel at a time.
    fn look_for_two_writers(&mut self) {
        if self.machines.iter().all(|machine| machine.kernel.is_some()) {
            self.violate(
                "5, one writer",
                "both machines have the volume mounted".to_owned(),
            );
        }
    }

    /// The peer's memory must hold at least what its owner calls mirrored.
    pub fn check_mirrored(&mut self, node: usize) {
        let Some(owner) = self.machines[node]
            .agent
            .as_ref()
            .and_then(|a| a.keeping.owner())
        else {
            return;
        };
        let Some((epoch, mirrored)) = owner.mirrored() else {
            return;
        };
        let Some(region) = &self.machines[1 - node].region else {
            return;
        };
        if region.header().is_none_or(|h| h.epoch != epoch.0) {
            return;
        }
        match region.scan() {
            Ok(scan) if scan.tail().last_complete_seq() >= mirrored => {}
            Ok(scan) => {
                let found = scan.tail().last_complete_seq();
                self.violate(
                    "2, whole up to the cut",
                    format!(
                        "{} calls record {mirrored} mirrored, the region ends with {found}",
                        name(node)
                    ),
                );
            }
            Err(error) => {
                self.violate(
                    "2, whole up to the cut",
                    format!("the region cannot be read: {error}"),
                );
            }
        }
    }

    /// Mounts the volume on a node.
    pub fn mount(&mut self, node: usize) {
        let image = self.at_rest.clone();
        self.disk.mounted(image.clone());
        self.machines[node].kernel = Some(Kernel::mount(
            image,
            self.setting.ring_bytes,
            self.generation,
        ));
        say!(self, "{}: mounts the volume", name(node));
        self.look_for_two_writers();
    }

    /// Unmounts it in order: everything reaches the disk.
    pub fn unmount(&mut self, node: usize) {
        if let Some(mut kernel) = self.machines[node].kernel.take() {
            kernel.sync_all(&mut self.disk);
            self.generation = self.generation.max(kernel.last_generation());
            let mut image = kernel.live;
            image.inodes.retain(|_, inode| inode.links > 0);
            self.disk.mounted(image.clone());
            self.at_rest = image;
            // Whoever mounts it next shows all of it; nobody was told that it is durable, though.
            self.promised = None;
            say!(self, "{}: unmounts the volume", name(node));
        }
    }

    /// The volume goes on as it is shown on this node: its oracle begins anew.
    pub fn adopt(&mut self, node: usize) {
        if let Some(kernel) = &self.machines[node].kernel {
            self.history = History::new(kernel.live.clone());
        }
        self.promised = None;
        self.half_merged = false;
    }
}

/// A machine's name.
pub fn name(node: usize) -> &'static str {
    ["a", "b"][node % 2]
}
