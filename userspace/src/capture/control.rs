//! The control words shared with the eBPF programs.
//!
//! One writer each (see `twinwrite_abi::control`): this side never writes a slot of the programs.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use twinwrite_abi::{CONTROL_SLOTS, control, gap};

use super::CaptureError;
use super::sys::{Mapping, page_bytes};
use crate::ids::RingPos;

/// How often each gap reason occurred, by index of [`twinwrite_abi::gap`].
pub type GapCounts = [u64; gap::COUNT];

/// The control words of one volume; clones share them.
#[derive(Clone, Debug)]
pub struct Control {
    map: Arc<Mapping>,
}

impl Control {
    /// Maps the control map.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, CaptureError> {
        let bytes = (CONTROL_SLOTS * 8).next_multiple_of(page_bytes());
        let map = Mapping::new(fd, 0, bytes, true, "the control map")?;
        Ok(Self { map: Arc::new(map) })
    }

    fn word(&self, slot: usize) -> &AtomicU64 {
        assert!(slot < CONTROL_SLOTS, "control slot {slot} does not exist");
        // SAFETY: the mapping holds CONTROL_SLOTS words, is page-aligned, lives as long as `self`,
        // and other parties touch the words with single loads, stores and atomics only.
        unsafe { self.map.start().cast::<AtomicU64>().add(slot).as_ref() }
    }

    /// Reads a word.
    #[must_use]
    pub fn get(&self, slot: usize) -> u64 {
        self.word(slot).load(Ordering::Acquire)
    }

    /// Writes a word of the agent.
    pub fn set(&self, slot: usize, value: u64) {
        self.word(slot).store(value, Ordering::Release);
    }

    /// Makes this process the one whose own work is not captured.
    ///
    /// # Errors
    /// [`CaptureError::System`] when `/proc` cannot be read.
    pub(super) fn name_agent(&self) -> Result<(), CaptureError> {
        let stat = procfs::process::Process::myself().and_then(|process| process.stat());
        let stat = stat.map_err(|error| {
            CaptureError::system(
                "reading /proc/self/stat".to_owned(),
                std::io::Error::other(error),
            )
        })?;
        self.set(control::AGENT_START_TICKS, stat.starttime);
        self.set(control::AGENT_TGID, u64::from(std::process::id()));
        Ok(())
    }

    /// Lets pass who waits for a ring position up to this one. A thread that is held later has seen
    /// it.
    pub fn open_gate_to(&self, position: RingPos) {
        self.set(control::GATE_OPEN_TO, position.0);
        // A program counts its hold (a full barrier) and looks at the gate again.
        fence(Ordering::SeqCst);
    }

    /// A checkpoint of what was captured up to a ring position is proven.
    pub fn open_gate_to_proven(&self, position: RingPos) {
        self.set(control::GATE_PROVEN_TO, position.0);
        fence(Ordering::SeqCst);
    }

    /// Nothing passes the gate from now on but what waits for a position up to this one.
    pub fn shut_gate(&self, position: RingPos) {
        // In this order: who finds the second word as it was, need not look at the first.
        self.set(control::GATE_PROVEN_TO, 0);
        self.set(control::GATE_OPEN_TO, position.0);
        fence(Ordering::SeqCst);
    }

    /// Everything that was noticed before needs to wait no longer.
    pub fn next_gate_generation(&self) {
        let generation = self.get(control::GATE_GENERATION);
        self.set(control::GATE_GENERATION, generation.wrapping_add(1));
    }

    /// No epoch is open: nothing waits.
    pub fn open_gate(&self) {
        self.set(control::GATE_PROVEN_TO, control::GATE_OPEN);
        self.set(control::GATE_OPEN_TO, control::GATE_OPEN);
        self.next_gate_generation();
        fence(Ordering::SeqCst);
    }

    /// Calls that asked for a checkpoint of what was captured before them.
    #[must_use]
    pub fn proofs_wanted(&self) -> u64 {
        self.get(control::PROOFS_WANTED)
    }

    /// The gaps that nobody has to wait for any more; `None`: no gap of the epoch is settled yet.
    #[must_use]
    pub fn gaps_settled(&self) -> Option<GapCounts> {
        let settled: GapCounts =
            std::array::from_fn(|reason| self.get(control::GAPS_SETTLED + reason));
        settled
            .iter()
            .all(|count| *count != control::UNSETTLED)
            .then_some(settled)
    }

    /// Says which gaps nobody has to wait for any more.
    pub fn settle_gaps(&self, settled: Option<&GapCounts>) {
        for reason in 0..gap::COUNT {
            let count = settled
                .and_then(|settled| settled.get(reason))
                .copied()
                .unwrap_or(control::UNSETTLED);
            self.set(control::GAPS_SETTLED + reason, count);
        }
    }

    /// Calls that found the gate open, that saw it open while they looked, that were stopped.
    #[must_use]
    pub fn gate_counts(&self) -> [u64; 3] {
        [
            self.get(control::GATE_PASSED),
            self.get(control::GATE_POLLED),
            self.gate_holds(),
        ]
    }

    /// Threads stopped before the gate since the programs were loaded.
    #[must_use]
    pub fn gate_holds(&self) -> u64 {
        self.get(control::GATE_HOLDS)
    }

    /// Replies of the kernel's NFS server that were refused since the programs were loaded.
    #[must_use]
    pub fn replies_refused(&self) -> u64 {
        self.get(control::SERVER_REFUSED)
    }

    /// Whether the NFS server was told to wait for what has not passed the gate yet.
    pub(super) fn holds_replies(&self) -> bool {
        let generation = self.get(control::GATE_GENERATION);
        let behind = |open_to, position, since| {
            self.get(open_to) < self.get(position) && self.get(since) == generation
        };
        let closing = self.get(control::SERVER_CLOSED) == generation.wrapping_add(1);
        self.get(control::GATE_OPEN_TO) != control::GATE_OPEN
            && (closing
                || behind(
                    control::GATE_OPEN_TO,
                    control::SERVER_MIRRORED,
                    control::SERVER_MIRRORED_GENERATION,
                )
                || behind(
                    control::GATE_PROVEN_TO,
                    control::SERVER_PROVEN,
                    control::SERVER_PROVEN_GENERATION,
                ))
    }

    /// Records submitted since the programs were loaded.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.get(control::RECORDS)
    }

    /// Events lost because the ring was full.
    #[must_use]
    pub fn drops(&self) -> u64 {
        self.get(control::DROPS)
    }

    /// Writes whose bytes could not be copied at exit.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.get(control::FAULTS)
    }

    /// How many write-backs of the volume have failed.
    #[must_use]
    pub fn writeback_errors(&self) -> u64 {
        self.get(control::WRITEBACK_ERRORS)
    }

    /// So many of them were seen.
    pub fn writeback_looked(&self, errors: u64) {
        self.set(control::WRITEBACK_LOOKED, errors);
    }

    /// How many of them are mended.
    #[must_use]
    pub fn writeback_mended(&self) -> u64 {
        self.get(control::WRITEBACK_MENDED)
    }

    /// What the first so many left in doubt was written again and is proven: marks prove something
    /// again.
    pub fn mend_writeback(&self, errors: u64) {
        self.set(control::WRITEBACK_MENDED, errors);
    }

    /// How often each gap reason occurred.
    #[must_use]
    pub fn gaps(&self) -> GapCounts {
        std::array::from_fn(|reason| self.get(control::GAPS + reason))
    }

    /// How many of each reason were acknowledged.
    #[must_use]
    pub fn gaps_acknowledged(&self) -> GapCounts {
        std::array::from_fn(|reason| self.get(control::GAPS_SEEN + reason))
    }

    /// Acknowledges what `gaps` told: the next one of each reason writes a GAP record again. One that
    /// occurred after `gaps` was read wrote none: ask [`Self::has_new_gap`] afterwards.
    pub fn acknowledge_gaps(&self, seen: &GapCounts) {
        for (reason, count) in seen.iter().enumerate() {
            self.set(control::GAPS_SEEN + reason, *count);
        }
    }

    /// Whether a gap has occurred that is not acknowledged.
    #[must_use]
    pub fn has_new_gap(&self) -> bool {
        self.gaps() != self.gaps_acknowledged()
    }
}
