//! The driver of `mirror::gate`: writes where the gate stands to where the programs look, and continues
//! what is held before it, as soon as it may pass.
//!
//! The pump does it when it has moved the gate; a thread of its own looks after it, because somebody may
//! be held at any time: just after the pump has looked, or while an epoch is being closed. Nothing here
//! decides: the core says how far the gate is open, the control words who may pass.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use twinwrite_abi::control;

use crate::board::VolumeBoard;
use crate::capture::{Control, Gate};
use crate::durability::closing::Proven;
use crate::ids::RingPos;
use crate::mirror::gate::{Gate as Gates, OpenTo};

/// Somebody who came to the gate after the pump's last look is found after this long.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The same while somebody is held, or was just now.
const LOOK_OFTEN: Duration = Duration::from_millis(5);
/// How long "just now" is: who fsyncs does it again.
const BUSY_FOR: Duration = Duration::from_millis(200);
/// A thread that looked at the gate before it was opened enters the map within this time.
const LAST_LOOKS: Duration = Duration::from_millis(100);

/// The held threads, and what is known of them.
#[derive(Debug)]
struct Watch {
    gate: Gate,
    control: Control,
    board: Arc<VolumeBoard>,
    /// How many holds there were when nobody had been missed; `None`: to be looked at in any case.
    holds_seen: Option<u64>,
    /// Groups that are held, and of these the ones that only other volumes hold.
    remaining: u64,
    for_others: u64,
    held_at: Instant,
}

impl Watch {
    /// Continues whoever may pass.
    fn look(&mut self) {
        let holds = self.control.gate_holds();
        if self.holds_seen == Some(holds) && self.remaining == 0 {
            return;
        }
        // Another volume's agent is at it: again soon.
        let Some(held) = self.gate.release() else {
            self.held_at = Instant::now();
            self.holds_seen = None;
            return;
        };
        self.holds_seen = Some(holds);
        self.held_at = Instant::now();
        (self.remaining, self.for_others) = (held.remaining, held.for_others);
        for waited_ns in held.waited_ns {
            self.board.held(Duration::from_nanos(waited_ns));
        }
        self.board.gate_held_groups.set(held.remaining);
    }

    fn is_busy(&self) -> bool {
        // Who waits for another volume is continued by that one's agent.
        self.remaining > self.for_others || self.held_at.elapsed() < BUSY_FOR
    }
}

/// Who moves the gate and continues what is held; its thread ends with it.
#[derive(Debug)]
pub struct Gatekeeper {
    gates: Mutex<Gates>,
    control: Control,
    watch: Arc<Mutex<Watch>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Gatekeeper {
    /// Takes the gate as it stands, and starts the thread.
    ///
    /// # Errors
    /// The system's.
    pub fn start(gate: Gate, control: Control, board: Arc<VolumeBoard>) -> std::io::Result<Self> {
        let name = format!("gate-{}", board.name);
        let watch = Arc::new(Mutex::new(Watch {
            gate,
            control: control.clone(),
            board,
            // Whom an earlier agent left is not counted among the holds to come.
            holds_seen: None,
            remaining: 0,
            for_others: 0,
            held_at: Instant::now(),
        }));
        let ending = Arc::new(AtomicBool::new(false));
        let (watched, is_ending) = (Arc::clone(&watch), Arc::clone(&ending));
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || look_after(&watched, &is_ending))?;
        let left = OpenTo::of_word(control.get(control::GATE_OPEN_TO));
        Ok(Self {
            gates: Mutex::new(Gates::left(left)),
            control,
            watch,
            ending,
            thread: Some(thread),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Gates)) -> (OpenTo, OpenTo) {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let before = gates.open_to();
        change(&mut gates);
        (before, gates.open_to())
    }

    /// No region can be merged any more: everything passes.
    pub fn open(&self, proven: &Proven) {
        self.change(|gates| gates.open(proven));
        self.control.open_gate();
        self.gate_moved();
    }

    /// An epoch is about to begin: before its first position is chosen.
    pub fn shut(&self, producer: RingPos) {
        if let (OpenTo::All, OpenTo::Position(position)) = self.change(|gates| gates.shut(producer))
        {
            self.control.shut_gate(position);
        }
    }

    /// The epoch's records begin here. What waited before then is nobody's record.
    pub fn begin(&self, start: RingPos) {
        let (_, now) = self.change(|gates| gates.begin(start));
        self.control.next_gate_generation();
        self.follow(now);
    }

    /// An earlier agent's epoch goes on: what it had read is in the ring before `producer`.
    pub fn resume(&self, producer: RingPos) {
        self.change(|gates| gates.resume(producer));
    }

    /// Every replay of the region contains what lies before `end`.
    pub fn mirrored(&self, end: RingPos) {
        let (before, now) = self.change(|gates| gates.mirrored(end, RingPos(0)));
        if before != now {
            self.follow(now);
        }
    }

    /// A checkpoint of what lies before `end` is proven.
    pub fn proven_to(&self, end: RingPos) {
        self.control.open_gate_to_proven(end);
        self.gate_moved();
    }

    /// The epoch is about to be closed: nothing more passes.
    pub fn hold(&self) {
        self.change(Gates::hold);
    }

    /// Runs `attempt` while nothing passes, although no epoch is open; opens the gate again.
    pub fn shut_for<T>(&self, attempt: impl FnOnce() -> T) -> T {
        self.control.shut_gate(RingPos(0));
        let result = attempt();
        self.control.open_gate();
        self.gate_moved();
        result
    }

    fn follow(&self, open_to: OpenTo) {
        if let OpenTo::Position(position) = open_to {
            self.control.open_gate_to(position);
            self.gate_moved();
        }
    }

    /// The gate has moved: continues whoever may pass.
    fn gate_moved(&self) {
        match self.watch.try_lock() {
            Ok(mut watch) => watch.look(),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().look(),
            // The thread is at it, and may have looked at the gate before it moved.
            Err(TryLockError::WouldBlock) => self.wake(),
        }
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Gatekeeper {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn look_after(watch: &Mutex<Watch>, ending: &AtomicBool) {
    let mut ends_at = None;
    loop {
        if ends_at.is_none() && ending.load(Ordering::Acquire) {
            ends_at = Some(Instant::now() + LAST_LOOKS);
        }
        let busy = {
            let mut watch = watch.lock().unwrap_or_else(PoisonError::into_inner);
            watch.look();
            watch.is_busy()
        };
        if ends_at.is_some_and(|end| Instant::now() >= end) {
            return;
        }
        let often = busy || ends_at.is_some();
        std::thread::park_timeout(if often { LOOK_OFTEN } else { LOOK_EVERY });
    }
}
