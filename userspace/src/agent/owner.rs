//! Owning a volume: capture it, mirror it, and say truly how protected it is.
//!
//! Protection begins in this order: attach, calibrate, reserve, region emptied for a new epoch, first
//! checkpoint with a sentinel of that epoch, `protected`. It ends by closing the epoch: mailbox,
//! checkpoint, sentinel. While there is no epoch the ring is emptied and the state is `exposed` or
//! `alone`. It must never call a volume protected before a checkpoint of the epoch was proven.

mod mirroring;

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use twinwrite_abi::control;

use super::clock::duration;
use super::closer::{Closer, Meanwhile as _, Unclosed};
use super::door::{Door, Opened};
use super::draining::{Draining, PinnedGates, drain, drain_to_the_end};
use super::filesystem_uuid::filesystem_uuid;
use super::filler::Filler;
use super::fitness;
use super::gate_probe;
use super::gatekeeper::Gatekeeper;
use super::mapper::Mapper;
use super::node::Node;
use super::pump::{Ended, events_lost};
use super::relink;
use super::reserve::Reserve;
use super::watch;
use crate::board::VolumeBoard;
use crate::capture::{
    Capture, CaptureOptions, Continuity, DisabledHook, Filesystem, GapCounts, Looked, Need,
    RingConsumer, Subtree, bpf_lsm_active, calibrate, kernel_device, may_skip_hooks,
};
use crate::cluster::control::{Request, Response};
use crate::cluster::ownership::is_claimed_by_peer;
use crate::config::{MappingPolicy, Volume};
use crate::durability::closing::Proven;
use crate::ids::{Epoch, RingPos, Seq};
use crate::link::Link;
use crate::region::scan::Tail;
use crate::replay::sentinel;
use crate::status::{PeerState, Protection, Role};

/// How often a search for hard links tells how far it is.
const SEARCH_TOLD_EVERY: Duration = Duration::from_secs(5);
/// A mirror that is not reached is tried again after this long.
const RETRY: Duration = Duration::from_secs(1);
/// A gap that ended an epoch is often followed by more of its kind.
const GAP_REST: Duration = Duration::from_millis(500);
/// Longest look of a waiting thread at the gate before it is stopped. Stopping and continuing it
/// costs about as much.
const GATE_POLL_NS: u64 = 200_000;
/// Environment variable that switches the gate off; for tests that show what happens without it.
const GATE_OFF_VARIABLE: &str = "TWINWRITE_TEST_GATE_OFF";
/// What is shown then.
const GATE_IS_OFF: &str = "the gate is switched off by TWINWRITE_TEST_GATE_OFF: what an fsync confirms can be \
    reverted";
/// Longest rest before a gate that did not hold is tried again.
const PROBE_REST_MAX: Duration = Duration::from_secs(300);
/// Why a node no longer owns a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The agent ends.
    Stopping,
    /// The peer claims the volume with a higher table version.
    ClaimedByPeer,
    /// The capture programs must be attached anew; no epoch is open.
    CaptureLost,
}

/// A volume that this node has mounted.
pub struct Owner<'a> {
    node: &'a Arc<Node>,
    volume: &'a Volume,
    board: Arc<VolumeBoard>,
    capture: Capture,
    ring: RingConsumer,
    filler: Filler,
    /// `None` where the programs cannot be asked for snapshots.
    mapper: Option<Mapper>,
    gatekeeper: Gatekeeper,
    /// The gate was seen to hold, by this agent or the one before.
    gate_proven: bool,
    closer: Closer<'a>,
    reserve: Reserve,
    filesystem_uuid: [u8; 16],
    last_epoch: Epoch,
    /// An epoch that is not proven closed.
    unclosed: Option<Unclosed>,
    /// Until then the epoch of an earlier agent may be gone on with.
    resume_until: Instant,
    /// Changes that this kernel does not even let be noticed.
    blind_spots: Vec<String>,
    /// A test has switched the gate off.
    gate_off: bool,
    /// When a gate that did not hold is tried again, and how long the rest before was.
    probe_at: Instant,
    probe_rest: Duration,
    /// A gap ended the epoch that is to be closed.
    gap_rest: bool,
    /// Pinned programs were removed.
    capture_lost: bool,
}

/// An epoch about to run.
struct Session {
    link: Box<dyn Link>,
    tail: Tail,
    lost_at_start: u64,
    gaps_proven: GapCounts,
}

impl<'a> Owner<'a> {
    /// Captures the mounted volume. `is_proven_closed`: the caller has closed what was open, and
    /// proven it, since the last epoch.
    ///
    /// # Errors
    /// What failed, with the remedy.
    pub fn new(
        node: &'a Arc<Node>,
        volume: &'a Volume,
        board: Arc<VolumeBoard>,
        is_proven_closed: bool,
    ) -> anyhow::Result<Self> {
        let mount = &volume.mount_point;
        fitness::check(volume)?;
        // The agent's own directory and sentinel are made now, before anything is captured for good.
        let mut closer = Closer::new(node, volume, Arc::clone(&board))?;
        let subtree = (volume.directory.as_deref())
            .map(|directory| subtree_of(mount, directory))
            .transpose()?;
        let options = CaptureOptions {
            volume_name: volume.name.clone(),
            device: kernel_device(mount)?,
            ring_bytes: u32::try_from(volume.ring_bytes.as_u64()).context("ring_bytes")?,
            filesystem: Filesystem::from_name(&volume.filesystem)?,
            subtree,
        };
        if !is_proven_closed && !Capture::can_be_resumed(&options) {
            close_before_attaching(&mut closer, &volume.name)?;
        }
        let mut capture = Capture::attach(&options).context("attaching the capture programs")?;
        let reserve = Reserve::of(mount, Arc::clone(&board));
        if !capture.resumed() {
            // New programs come only while no epoch is open.
            let calibrated = reserve.lent_to(|| calibrate(&capture, mount));
            calibrated.context("calibrating the hooks on this kernel")?;
        }
        let last_epoch = sentinel::read(mount).map_or(Epoch(0), |s| s.epoch);
        let control = capture.control();
        control.set(control::GATE_POLL_NS, GATE_POLL_NS);
        closer.checkpointer().errors().watch(capture.control());
        let gate_off = std::env::var_os(GATE_OFF_VARIABLE).is_some();
        if gate_off {
            tracing::error!(volume = %volume.name, "{GATE_IS_OFF}");
        }
        control.set(control::GATE_OFF, u64::from(gate_off));
        control.set(control::MAY_SKIP, u64::from(may_skip_hooks()));
        let refuses_mappings = volume.mappings == MappingPolicy::Refuse;
        anyhow::ensure!(
            !refuses_mappings || can_refuse_mappings(&capture),
            "volume {}: `mappings = \"refuse\"` needs the security hooks mmap_file and file_mprotect: boot \
             with `bpf` in the lsm= list, or choose \"snapshot\"",
            volume.name
        );
        control.set(control::MAPPINGS_REFUSED, u64::from(refuses_mappings));
        capture.watch_server();
        let gate = capture.take_gate().context("the maps of the gate")?;
        let gatekeeper = Gatekeeper::start(gate, capture.control().clone(), Arc::clone(&board))?;
        // New programs come only where everything is closed and proven.
        let goes_on = capture.resumed() && Continuity::load(capture.control()).is_some();
        if !goes_on {
            capture.withdraw_border();
        }
        let unclosed = if capture.resumed() {
            closer.left("another agent ended, and this one cannot go on with it")
        } else {
            None
        };
        if unclosed.is_none() {
            // Without an epoch there never was one, or its end has just been proven.
            gatekeeper.open(&Proven::without_sentinel());
        }
        // What ended before is not waited for.
        let resume_for = match &unclosed {
            Some(Unclosed { reason: None, .. }) | None => Duration::ZERO,
            Some(_) => duration(volume.lag_limit),
        };
        Ok(Self {
            node,
            volume,
            board,
            ring: capture.consumer()?,
            filler: Filler::start(mount)?,
            mapper: if bpf_lsm_active() {
                let interval = duration(volume.mapping_snapshot_interval);
                Some(Mapper::start(mount, interval)?)
            } else {
                None
            },
            gatekeeper,
            gate_off,
            gate_proven: gate_off,
            probe_at: Instant::now(),
            probe_rest: RETRY,
            gap_rest: false,
            closer,
            reserve,
            filesystem_uuid: filesystem_uuid(&volume.device, &volume.filesystem)?,
            last_epoch,
            unclosed,
            resume_until: Instant::now() + resume_for,
            blind_spots: blind_spots(&capture),
            capture_lost: false,
            capture,
        })
    }

    fn say(&self, protection: Protection, reason: &str) {
        self.board.say(Role::Owner, protection, reason);
    }

    /// Mirrors epoch after epoch until the agent stops or the volume is claimed away.
    pub fn run(&mut self) -> Left {
        loop {
            self.board.rests();
            match self.leaving() {
                // The next agent goes on with what runs, or closes it.
                Some(Left::Stopping) if self.node.restarting() => return Left::Stopping,
                Some(Left::Stopping) => {
                    self.close();
                    return Left::Stopping;
                }
                Some(left) => return left,
                None => {}
            }
            // While they are held open they go on, also to hold the gate, until the epoch is closed.
            if self.capture_lost && self.close() {
                return Left::CaptureLost;
            }
            match self.begin() {
                Ok(Some(session)) => {
                    let epoch = session.tail.epoch;
                    let ended = self.mirror(session);
                    self.gatekeeper.hold();
                    self.capture_lost |= matches!(ended, Ended::CaptureLost(_));
                    if self.node.restarting() {
                        // It goes on, and the next agent mirrors what the programs capture meanwhile;
                        // unless it had to end just now, which that agent then does.
                        if !matches!(ended, Ended::Stop) {
                            Continuity::clear(self.capture.control());
                        }
                        continue;
                    }
                    let reason = Some(ended.to_string());
                    self.unclosed = Some(Unclosed { epoch, reason });
                    // From here on nothing can be gone on with.
                    self.resume_until = Instant::now();
                    self.say(
                        Protection::Exposed,
                        &format!("epoch {epoch} ended: {ended}"),
                    );
                    self.gap_rest = matches!(ended, Ended::Gap(_));
                }
                Ok(None) => {}
                Err(error) => {
                    let dead = self.node.peer_state() == PeerState::Dead;
                    let protection = if dead {
                        Protection::Alone
                    } else {
                        Protection::Exposed
                    };
                    self.say(protection, &format!("not mirrored: {error:#}"));
                    self.idle(RETRY);
                }
            }
        }
    }

    fn leaving(&self) -> Option<Left> {
        if self.node.stopping() {
            return Some(Left::Stopping);
        }
        let own = self.node.ledger.claim(&self.volume.name)?;
        let peer = self.node.ledger.peer_word(&self.volume.name);
        is_claimed_by_peer(&own, &self.node.id, &peer).then_some(Left::ClaimedByPeer)
    }

    /// The next session: of the epoch that an earlier agent left running, or of a new one once that
    /// is closed. `None`: try again.
    fn begin(&mut self) -> anyhow::Result<Option<Session>> {
        if self.unclosed.is_none() {
            let (mount, device) = (&self.volume.mount_point, self.capture.options().device);
            watch::look_at_mount(mount, device)?;
            if let Some(reason) = watch::lost_subtree(self.volume, &self.capture) {
                self.capture_lost = true;
                anyhow::bail!(reason);
            }
            self.prove_border()?;
            let opened = self.door().open()?;
            return self.begin_new(opened).map(Some);
        }
        // The ring is left alone as long as its records may still reach the epoch's region.
        if Instant::now() < self.resume_until {
            match self.door().open() {
                Ok(opened) => {
                    if let Some(session) = self.resume(opened)? {
                        return Ok(Some(session));
                    }
                }
                Err(error) => {
                    let reason = format!("the running epoch waits for its mirror: {error:#}");
                    self.say(Protection::Exposed, &reason);
                    self.node.pause(relink::EVERY);
                    return Ok(None);
                }
            }
        }
        if !self.close() {
            self.node.pause(RETRY);
        } else if std::mem::take(&mut self.gap_rest) {
            // Only now: until the epoch was closed everybody had to wait.
            self.idle(GAP_REST);
        }
        Ok(None)
    }

    /// No file may have names on both sides of the protected directory's border.
    fn prove_border(&self) -> anyhow::Result<()> {
        let said_at = Cell::new(Instant::now());
        let is_left = |looked: Looked| {
            if said_at.get().elapsed() >= SEARCH_TOLD_EVERY {
                said_at.set(Instant::now());
                let reason = format!(
                    "looking for hard links that lead out of the protected directory: {} names in {} directories \
                     so far",
                    looked.names, looked.directories
                );
                self.say(Protection::Exposed, &reason);
            }
            self.leaving().is_some()
        };
        Ok(self
            .capture
            .prove_border(&self.volume.mount_point, &is_left)?)
    }

    /// Closes what is not closed; whether nothing is left open.
    fn close(&mut self) -> bool {
        let Some(unclosed) = &self.unclosed else {
            return true;
        };
        // First of all, so that no later agent goes on with what was half closed.
        Continuity::clear(self.capture.control());
        let mut draining = Draining {
            volume: &self.volume.name,
            gatekeeper: &self.gatekeeper,
            ring: &mut self.ring,
        };
        let closed = self.closer.close(unclosed, &mut draining);
        if closed {
            self.unclosed = None;
        }
        closed
    }

    /// Without an epoch nobody needs the records; an unread ring would only fill.
    fn idle(&mut self, longest: Duration) {
        let deadline = Instant::now() + longest;
        while Instant::now() < deadline && !self.node.stopping() {
            if let Err(error) = drain(&mut self.ring) {
                tracing::error!(volume = %self.volume.name, %error, "the ring cannot be read");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn door(&self) -> Door {
        Door {
            node: Arc::clone(self.node),
            volume: self.volume.clone(),
            filesystem_uuid: self.filesystem_uuid,
            source: self.ring.source(),
        }
    }

    fn lost(&self) -> anyhow::Result<u64> {
        Ok(events_lost(
            self.capture.control(),
            self.capture.recursion_misses()?,
        ))
    }

    /// Goes on with the running epoch of an earlier agent, if nothing was lost since.
    fn resume(&mut self, opened: Opened) -> anyhow::Result<Option<Session>> {
        let lost = self.lost()?;
        let Some(left) = Continuity::load(self.capture.control()) else {
            return Ok(None);
        };
        let (Some(tail), Some(unclosed)) = (&opened.tail, &self.unclosed) else {
            return Ok(None);
        };
        let Some(position) = tail.end.ring_pos_end else {
            return Ok(None);
        };
        let same = opened.open && opened.epoch == left.epoch && unclosed.epoch == left.epoch;
        let whole = lost == left.drops.saturating_add(left.recursion_misses);
        let there = (self.ring.consumer()..=self.ring.producer()).contains(&position);
        if !(same && whole && there) {
            return Ok(None);
        }
        self.ring.rewind();
        self.ring.advance_to(position)?;
        tracing::info!(
            volume = %self.volume.name, epoch = %left.epoch, next = %tail.end.next_seq,
            "going on with the running epoch"
        );
        self.last_epoch = left.epoch;
        self.gate_proven = true;
        self.gatekeeper.resume(self.ring.producer());
        let (tail, gaps_proven) = (**tail, left.gaps);
        Ok(Some(Session {
            link: opened.link,
            tail,
            lost_at_start: lost,
            gaps_proven,
        }))
    }

    fn begin_new(&mut self, opened: Opened) -> anyhow::Result<Session> {
        self.prove_gate()?;
        self.reserve.keep();
        let claim = self.node.ledger.claim(&self.volume.name);
        let claimed = claim.map_or(Epoch(0), |claim| claim.epoch);
        Continuity::clear(self.capture.control());
        let epoch = self.last_epoch.max(opened.epoch).max(claimed).next();
        self.say(
            Protection::Exposed,
            &format!("epoch {epoch} begins: the first checkpoint runs"),
        );
        match self.node.ask(Request::BeginEpoch {
            volume: self.volume.name.clone(),
            epoch,
        })? {
            Response::EpochBegun => {}
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        }
        let begun = self.shut_and_begin();
        let (ring_start, recursion_misses, drops, gaps) = begun.inspect_err(|_| {
            // Nothing was written into its region; the proof that none can be merged opens the gate.
            self.unclosed = Some(Unclosed {
                epoch,
                reason: None,
            });
        })?;
        let control = self.capture.control();
        // Bytes whose write-back failed before have no record in this epoch.
        control.mend_writeback(control.writeback_errors());
        let seq_base = Seq(0);
        Continuity {
            epoch,
            ring_start,
            seq_base,
            drops,
            recursion_misses,
            gaps,
        }
        .store(control);
        self.last_epoch = epoch;
        let tail = Tail::of_epoch(epoch, self.volume.region_bytes.as_u64(), ring_start);
        let lost_at_start = events_lost(control, recursion_misses);
        Ok(Session {
            link: opened.link,
            tail,
            lost_at_start,
            gaps_proven: gaps,
        })
    }

    /// Shuts the gate for an epoch; where its records begin, and what was lost before.
    fn shut_and_begin(&mut self) -> anyhow::Result<(RingPos, u64, u64, GapCounts)> {
        let control = self.capture.control();
        // A page that was dirtied through a mapping before can be changed unseen.
        control.settle_gaps(None);
        // Whoever passed before this has its mark in what is drained now, and not in the epoch.
        self.gatekeeper.shut(self.ring.producer());
        let ring_start = drain_to_the_end(&mut self.ring)?;
        // Read after the ring's place is fixed: what is lost later is lost in this epoch.
        let recursion_misses = self.capture.recursion_misses()?;
        let (drops, gaps) = (control.drops(), control.gaps());
        control.acknowledge_gaps(&gaps);
        // What was lost before the counters were read is nobody's loss in this epoch.
        self.gatekeeper.begin(ring_start);
        Ok((ring_start, recursion_misses, drops, gaps))
    }

    /// Proves once that the gate holds. One that fails is tried again later and later: everybody waits
    /// meanwhile.
    fn prove_gate(&mut self) -> anyhow::Result<()> {
        if self.gate_proven {
            return Ok(());
        }
        anyhow::ensure!(
            Instant::now() >= self.probe_at,
            "the gate did not hold when it was tried; it will be tried again"
        );
        let (mount, keeper) = (&self.volume.mount_point, &self.gatekeeper);
        let proof = self.reserve.lent_to(|| gate_probe::prove(mount, keeper));
        if proof.is_err() {
            self.probe_rest = (self.probe_rest * 2).min(PROBE_REST_MAX);
            self.probe_at = Instant::now() + self.probe_rest;
        }
        proof.context("the gate does not hold on this kernel")?;
        self.gate_proven = true;
        Ok(())
    }
}

/// Between programs that are taken away and new ones nothing is captured and no gate holds: an epoch
/// that an earlier agent left open must be closed before, and who waits at the old programs' gate go on.
/// One that is closed is proven again.
fn close_before_attaching(closer: &mut Closer<'_>, volume: &str) -> anyhow::Result<()> {
    let mut gates = PinnedGates(volume);
    match closer.left("this agent brings other programs than the one before") {
        Some(unclosed) => anyhow::ensure!(
            closer.close(&unclosed, &mut gates),
            "epoch {} could not be closed before the programs are attached anew",
            unclosed.epoch
        ),
        None => gates.open_gates(&Proven::without_sentinel()),
    }
    Ok(())
}

/// The directory below which the volume is protected.
fn subtree_of(mount: &Path, directory: &Path) -> anyhow::Result<Subtree> {
    anyhow::ensure!(
        bpf_lsm_active(),
        "`directory` needs the security hooks inode_link and inode_rename: boot with `bpf` in the lsm= list, or \
         protect the volume as a whole"
    );
    Ok(Subtree::find(mount, directory)?)
}

fn can_refuse_mappings(capture: &Capture) -> bool {
    let is_missing = |disabled: &DisabledHook| disabled.hook.need == Need::RefusesMappings;
    bpf_lsm_active() && !capture.disabled().iter().any(is_missing)
}

/// What this kernel does not even let be noticed.
fn blind_spots(capture: &Capture) -> Vec<String> {
    let disabled = capture
        .disabled()
        .iter()
        .filter(|disabled| matches!(disabled.hook.need, Need::Notices(_)))
        .map(|disabled| disabled.hook.function.to_owned());
    // Without it in the list of security modules its hooks can be attached and never run.
    let ioctls =
        (!bpf_lsm_active()).then(|| "file_ioctl (add bpf to the boot parameter lsm=)".to_owned());
    disabled.chain(ioctls).collect()
}
