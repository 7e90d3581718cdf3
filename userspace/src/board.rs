//! The board: what the agent's threads know, where status, metrics and log lines read it.
//!
//! One writer per field (the thread that owns the fact), any number of readers. The board never
//! decides anything: it is looked at, not acted upon.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::events::{Event, EventLog};
use crate::ids::{Epoch, NodeId, Seq};
use crate::status::{
    AgentStatus, PeerState, PeerStatus, Protection, Role, TakeoverStatus, VolumeStatus,
};

/// How many operation kinds there are room for; indexed by `twinwrite_abi::op`.
pub const OPERATIONS: usize = 16;
/// Upper bounds of the capture-to-mirrored latency histogram, seconds.
pub const LATENCY_BOUNDS_SECONDS: [f64; 14] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05,
    0.25, 1.0, 5.0,
];

/// Counts per bucket of a histogram of times (not cumulative); the last is beyond all bounds.
pub type Buckets = [Gauge; LATENCY_BOUNDS_SECONDS.len() + 1];

/// A mirroring thread that has not turned for this long is not believed, microseconds.
const STALE_US: i64 = 5_000_000;

/// A number one thread writes and others read.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
    /// Adds to the value.
    pub fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }
    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The words of a volume that change together.
#[derive(Clone, Debug)]
pub struct VolumeWords {
    /// What this node is to the volume.
    pub role: Role,
    /// Its protection.
    pub protection: Protection,
    /// Why it is not protected, with the remedy.
    pub reason: String,
    /// The takeover this agent carried out or carries out.
    pub takeover: Option<TakeoverStatus>,
}

/// One volume's numbers.
#[derive(Debug)]
pub struct VolumeBoard {
    /// Its name.
    pub name: String,
    /// `rdma` or `tcp`.
    pub link: &'static str,
    words: Mutex<VolumeWords>,
    /// Why the volume has no reserve; `None`: it has one, or nobody has looked.
    missing_reserve: Mutex<Option<String>>,
    events: OnceLock<Arc<EventLog>>,
    /// Running or last epoch.
    pub epoch: Gauge,
    /// Last record in the ring.
    pub captured_seq: Gauge,
    /// Last record in the region.
    pub mirrored_seq: Gauge,
    /// Last record purged.
    pub purged_seq: Gauge,
    /// Records captured and not mirrored.
    pub lag_records: Gauge,
    /// Their bytes.
    pub lag_bytes: Gauge,
    /// Age of the oldest of them, microseconds, at the last look.
    pub lag_us: Gauge,
    /// The largest `lag_records` of the last 10 to 20 seconds.
    pub lag_records_peak: Gauge,
    /// The largest `lag_us` of the last 10 to 20 seconds.
    pub lag_us_peak: Gauge,
    /// Bytes in the region not purged.
    pub unpurged_bytes: Gauge,
    /// Bytes of the region's log.
    pub region_bytes: Gauge,
    /// Bytes of the volume that are set aside for a merge.
    pub reserve_bytes: Gauge,
    /// Errors that the file system has counted.
    pub filesystem_errors: Gauge,
    /// Age of the oldest unflushed record, microseconds.
    pub oldest_unflushed_age_us: Gauge,
    /// The directory below which only it is protected.
    pub directory: OnceLock<String>,
    /// Whether the ring's own memory is the source of the RDMA writes.
    pub zero_copy: AtomicBool,
    /// Records by operation.
    pub records: [Gauge; OPERATIONS],
    /// Bytes written by operation (payload of WRITE, spans of the others).
    pub bytes: [Gauge; OPERATIONS],
    /// Events lost because the ring was full.
    pub drops: Gauge,
    /// Writes whose bytes the agent had to fill from the page cache.
    pub fills: Gauge,
    /// Write-backs of the volume that failed.
    pub writeback_errors: Gauge,
    /// Hook runs the kernel skipped.
    pub recursion_misses: Gauge,
    /// Noticed and uncaptured changes, by `twinwrite_abi::gap`.
    pub gaps: [Gauge; twinwrite_abi::gap::COUNT],
    /// Pages that may be changed through shared mappings, without a record.
    pub mapped_pages: Gauge,
    /// How long ago these were looked at, microseconds.
    pub mapped_age_us: Gauge,
    /// Checkpoints that proved durability.
    pub checkpoints: Gauge,
    /// Checkpoints that failed.
    pub checkpoint_failures: Gauge,
    /// Epochs closed.
    pub epochs_closed: Gauge,
    /// Calls of the fsync class that found the gate open.
    pub gate_passed: Gauge,
    /// Those that saw it open while they looked at it, without being stopped.
    pub gate_polled: Gauge,
    /// Those that were stopped before it.
    pub gate_holds: Gauge,
    /// Replies of the kernel's NFS server that were refused.
    pub gate_replies_refused: Gauge,
    /// Thread groups that are stopped before it now.
    pub gate_held_groups: Gauge,
    /// Threads continued per bucket of the time they were stopped (not cumulative).
    pub held_counts: Buckets,
    /// Sum of these times, microseconds.
    pub held_sum_us: Gauge,
    /// Sleeps that only the safety timeout ended although records were there: must stay 0.
    pub missed_wakeups: Gauge,
    /// Monotonic time at which the mirroring thread last turned, microseconds; -1: it need not.
    turned_us: AtomicI64,
    /// Monotonic time of the last proof, microseconds since the board began; -1 is never.
    last_proof_us: AtomicI64,
    /// Frames completed per latency bucket (not cumulative); the last is beyond all bounds.
    pub latency_counts: Buckets,
    /// Sum of latencies, microseconds.
    pub latency_sum_us: Gauge,
    started: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded data are plain values that are never left half-written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VolumeBoard {
    fn new(name: &str, link: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            link,
            words: Mutex::new(VolumeWords {
                role: Role::None,
                protection: Protection::Suspended,
                reason: "starting".to_owned(),
                takeover: None,
            }),
            missing_reserve: Mutex::new(None),
            events: OnceLock::new(),
            epoch: Gauge::default(),
            captured_seq: Gauge::default(),
            mirrored_seq: Gauge::default(),
            purged_seq: Gauge::default(),
            lag_records: Gauge::default(),
            lag_bytes: Gauge::default(),
            lag_us: Gauge::default(),
            lag_records_peak: Gauge::default(),
            lag_us_peak: Gauge::default(),
            unpurged_bytes: Gauge::default(),
            region_bytes: Gauge::default(),
            reserve_bytes: Gauge::default(),
            filesystem_errors: Gauge::default(),
            oldest_unflushed_age_us: Gauge::default(),
            directory: OnceLock::new(),
            zero_copy: AtomicBool::new(false),
            records: Default::default(),
            bytes: Default::default(),
            drops: Gauge::default(),
            fills: Gauge::default(),
            writeback_errors: Gauge::default(),
            recursion_misses: Gauge::default(),
            gaps: Default::default(),
            mapped_pages: Gauge::default(),
            mapped_age_us: Gauge::default(),
            checkpoints: Gauge::default(),
            checkpoint_failures: Gauge::default(),
            epochs_closed: Gauge::default(),
            gate_passed: Gauge::default(),
            gate_polled: Gauge::default(),
            gate_holds: Gauge::default(),
            gate_replies_refused: Gauge::default(),
            gate_held_groups: Gauge::default(),
            held_counts: Default::default(),
            held_sum_us: Gauge::default(),
            missed_wakeups: Gauge::default(),
            turned_us: AtomicI64::new(-1),
            last_proof_us: AtomicI64::new(-1),
            latency_counts: Default::default(),
            latency_sum_us: Gauge::default(),
            started: Instant::now(),
        }
    }

    /// A copy of the words. `protected` is not believed of a mirroring thread that does not run.
    pub fn words(&self) -> VolumeWords {
        let mut words = lock(&self.words).clone();
        let turned_us = self.turned_us.load(Ordering::Relaxed);
        let silent_us = self.now_us().saturating_sub(turned_us);
        if words.protection == Protection::Protected && turned_us >= 0 && silent_us > STALE_US {
            words.protection = Protection::Exposed;
            words.reason = format!(
                "the mirroring thread has not run for {} s: the disk, the mailbox or this machine \
                 hangs",
                silent_us / 1_000_000
            );
        }
        words
    }

    fn now_us(&self) -> i64 {
        i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    /// The mirroring thread runs.
    pub fn turned(&self) {
        self.turned_us.store(self.now_us(), Ordering::Relaxed);
    }

    /// There is no mirroring thread that must run.
    pub fn rests(&self) {
        self.turned_us.store(-1, Ordering::Relaxed);
    }

    /// Changes role, protection and reason; a change of protection or reason is logged once.
    pub fn say(&self, role: Role, protection: Protection, reason: &str) {
        let mut words = lock(&self.words);
        if (words.role, words.protection, words.reason.as_str()) == (role, protection, reason) {
            return;
        }
        let (old_role, old_protection) = (words.role, words.protection);
        words.role = role;
        words.protection = protection;
        reason.clone_into(&mut words.reason);
        drop(words);
        let volume = &self.name;
        let weak = matches!(protection, Protection::Exposed | Protection::Alone);
        if role == Role::Owner && weak {
            tracing::warn!(%volume, ?role, ?protection, reason, "protection changed");
        } else if (old_role, old_protection) != (role, protection) {
            tracing::info!(%volume, ?role, ?protection, reason, "protection changed");
        } else {
            tracing::info!(%volume, reason, "still {protection:?}");
        }
        // A mirror tells of the owner's volume only what it has heard.
        if (role == Role::Owner || old_role == Role::Owner)
            && (weak || (old_role, old_protection) != (role, protection))
            && let Some(events) = self.events.get()
        {
            events.note(Event::ProtectionChanged {
                volume: volume.clone(),
                to: protection,
                reason: reason.to_owned(),
            });
        }
    }

    /// Shows what is set aside on the volume, or why nothing is; each change is told once.
    pub fn keep_reserve(&self, made: Result<u64, String>) {
        let bytes = made.as_ref().copied().unwrap_or(0);
        self.reserve_bytes.set(bytes);
        let error = made.err();
        let before = std::mem::replace(&mut *lock(&self.missing_reserve), error.clone());
        if before.is_some() != error.is_some()
            && let Some(events) = self.events.get()
        {
            let volume = self.name.clone();
            events.record(Event::Reserve {
                volume,
                bytes,
                error,
            });
        }
    }

    /// Why nothing is set aside on the volume.
    pub fn missing_reserve(&self) -> Option<String> {
        lock(&self.missing_reserve).clone()
    }

    /// Publishes the progress of a takeover.
    pub fn tell_takeover(&self, takeover: TakeoverStatus) {
        lock(&self.words).takeover = Some(takeover);
    }

    /// Notes that a checkpoint has just proved durability.
    pub fn proved(&self) {
        self.checkpoints.add(1);
        self.last_proof_us.store(self.now_us(), Ordering::Relaxed);
    }

    /// Age of the last proof, milliseconds; `u64::MAX` if there was none.
    pub fn proof_age_ms(&self) -> u64 {
        let at = self.last_proof_us.load(Ordering::Relaxed);
        let now = self.now_us();
        if at < 0 {
            u64::MAX
        } else {
            u64::try_from((now - at) / 1000).unwrap_or(0)
        }
    }

    /// Counts one frame that took this long from capture to the mirror's memory.
    pub fn latency(&self, us: u64) {
        let seconds = us as f64 / 1e6;
        let bucket = LATENCY_BOUNDS_SECONDS.partition_point(|bound| *bound < seconds);
        self.latency_counts[bucket].add(1);
        self.latency_sum_us.add(us);
    }

    /// Counts one thread that was stopped before the gate for this long.
    pub fn held(&self, time: Duration) {
        let bucket = LATENCY_BOUNDS_SECONDS.partition_point(|bound| *bound < time.as_secs_f64());
        self.held_counts[bucket].add(1);
        self.held_sum_us
            .add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    fn status(&self) -> VolumeStatus {
        let words = self.words();
        VolumeStatus {
            name: self.name.clone(),
            directory: self.directory.get().cloned(),
            role: words.role,
            protection: words.protection,
            reason: words.reason,
            epoch: Epoch(self.epoch.get()),
            captured_seq: Seq(self.captured_seq.get()),
            mirrored_seq: Seq(self.mirrored_seq.get()),
            purged_seq: Seq(self.purged_seq.get()),
            lag_records: self.lag_records.get(),
            lag_bytes: self.lag_bytes.get(),
            lag_us: self.lag_us.get(),
            unpurged_bytes: self.unpurged_bytes.get(),
            region_bytes: self.region_bytes.get(),
            reserve_bytes: self.reserve_bytes.get(),
            reserve_missing: self.missing_reserve(),
            oldest_unflushed_age_us: self.oldest_unflushed_age_us.get(),
            checkpoint_age_ms: self.proof_age_ms(),
            zero_copy: self.zero_copy.load(Ordering::Relaxed),
            link: self.link.to_owned(),
            takeover: words.takeover,
        }
    }
}

/// One peer's signs of life.
#[derive(Debug)]
pub struct PeerBoard {
    /// Its name.
    pub node: NodeId,
    state: Mutex<PeerState>,
    /// Age of its last heartbeat over the link, milliseconds.
    pub heartbeat_age_ms: Gauge,
    /// Age of its last heartbeat in the mailbox, milliseconds.
    pub mailbox_age_ms: Gauge,
    /// How long ago the volumes it serves last answered, by its own word, milliseconds.
    pub volume_io_age_ms: Gauge,
    /// Its agent said that it restarts.
    pub restarting: AtomicBool,
}

impl PeerBoard {
    /// How the peer looks.
    pub fn state(&self) -> PeerState {
        *lock(&self.state)
    }
    /// Replaces it.
    pub fn set_state(&self, state: PeerState) {
        *lock(&self.state) = state;
    }
}

/// Everything one agent knows of itself.
#[derive(Debug)]
pub struct Board {
    /// This node.
    pub node: NodeId,
    started: Instant,
    peers: Vec<Arc<PeerBoard>>,
    volumes: BTreeMap<String, Arc<VolumeBoard>>,
}

impl Board {
    /// A board for these peers and volumes (name, link).
    pub fn new(node: NodeId, peers: &[NodeId], volumes: &[(String, &'static str)]) -> Self {
        let peers = peers
            .iter()
            .map(|node| {
                Arc::new(PeerBoard {
                    node: node.clone(),
                    state: Mutex::new(PeerState::Unknown),
                    heartbeat_age_ms: Gauge::default(),
                    mailbox_age_ms: Gauge::default(),
                    volume_io_age_ms: Gauge::default(),
                    restarting: AtomicBool::new(false),
                })
            })
            .collect();
        let volumes = volumes
            .iter()
            .map(|(name, link)| (name.clone(), Arc::new(VolumeBoard::new(name, link))))
            .collect();
        Self {
            node,
            started: Instant::now(),
            peers,
            volumes,
        }
    }

    /// Where changes of protection are told, beside the log.
    pub fn tell(&self, events: &Arc<EventLog>) {
        for volume in self.volumes.values() {
            // Told twice, the first one stays.
            volume.events.set(Arc::clone(events)).ok();
        }
    }

    /// The board of one volume.
    pub fn volume(&self, name: &str) -> Option<Arc<VolumeBoard>> {
        self.volumes.get(name).cloned()
    }

    /// All volumes.
    pub fn volumes(&self) -> impl Iterator<Item = &Arc<VolumeBoard>> {
        self.volumes.values()
    }

    /// All peers.
    pub fn peers(&self) -> &[Arc<PeerBoard>] {
        &self.peers
    }

    /// What `twinwrite status` tells.
    pub fn status(&self) -> AgentStatus {
        AgentStatus {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            peers: self
                .peers
                .iter()
                .map(|peer| PeerStatus {
                    node: peer.node.clone(),
                    state: peer.state(),
                    heartbeat_age_ms: peer.heartbeat_age_ms.get(),
                    mailbox_age_ms: peer.mailbox_age_ms.get(),
                    volume_io_age_ms: peer.volume_io_age_ms.get(),
                    restarting: peer.restarting.load(Ordering::Relaxed),
                })
                .collect(),
            volumes: self.volumes.values().map(|v| v.status()).collect(),
        }
    }
}
