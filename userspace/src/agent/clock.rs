//! The clocks: one that never goes back, for ages and limits; the wall clock, for what people read.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Measures from its start.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts at zero now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Microseconds since the start; never goes back.
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Nanoseconds since 1970 by the wall clock.
    pub fn time_ns(&self) -> i64 {
        wall_ns()
    }
}

/// Nanoseconds since 1970 by the wall clock; 0 if it stands before 1970.
pub fn wall_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// Milliseconds since 1970 by the wall clock.
pub fn wall_ms() -> i64 {
    wall_ns() / 1_000_000
}

/// A time from the configuration, which has been checked to be positive; 0 if it is not.
pub fn duration(signed: jiff::SignedDuration) -> Duration {
    Duration::try_from(signed).unwrap_or_default()
}
