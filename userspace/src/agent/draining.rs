//! Emptying the ring while no epoch needs its records, so that what comes next finds room.
//!
//! It must never touch a ring whose records may still reach a region.

use std::time::{Duration, Instant};

use super::closer::Meanwhile;
use super::gatekeeper::Gatekeeper;
use crate::capture::{Capture, RingConsumer};
use crate::durability::closing::Proven;
use crate::ids::RingPos;

/// A record that stays half written for longer has lost its writer.
const HALF_WRITTEN_LIMIT: Duration = Duration::from_secs(2);

/// Reads everything and throws it away.
pub fn drain(ring: &mut RingConsumer) -> anyhow::Result<()> {
    while let Some(run) = ring.peek(usize::MAX)? {
        let end = RingPos(run.start.0 + run.bytes.len() as u64);
        ring.advance_to(end)?;
        ring.release_to(end)?;
    }
    Ok(())
}

/// While an epoch is closed nobody needs the records, and what waits must not find the ring full.
pub struct Draining<'a> {
    pub volume: &'a str,
    pub gatekeeper: &'a Gatekeeper,
    pub ring: &'a mut RingConsumer,
}

impl Meanwhile for Draining<'_> {
    fn open_gates(&mut self, proven: &Proven) {
        self.gatekeeper.open(proven);
    }

    fn turn(&mut self) {
        if let Err(error) = drain(self.ring) {
            tracing::error!(volume = self.volume, %error, "the ring cannot be read");
        }
    }
}

/// The gate of programs that an earlier agent left attached; nobody reads their ring.
pub struct PinnedGates<'a>(pub &'a str);

impl Meanwhile for PinnedGates<'_> {
    fn open_gates(&mut self, _: &Proven) {
        if let Err(error) = Capture::open_pinned_gate(self.0) {
            tracing::error!(volume = self.0, "{error}");
        }
    }

    fn turn(&mut self) {}
}

/// Drains until nothing is half written: where an epoch may begin.
///
/// # Errors
/// When the ring cannot be read, or a record stays half written.
pub fn drain_to_the_end(ring: &mut RingConsumer) -> anyhow::Result<RingPos> {
    let deadline = Instant::now() + HALF_WRITTEN_LIMIT;
    loop {
        drain(ring)?;
        if ring.cursor() == ring.producer() {
            return Ok(ring.cursor());
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "a record stays half written in the ring"
        );
        std::thread::yield_now();
    }
}
