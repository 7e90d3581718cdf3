//! What is durable: which records marks cover, and when a checkpoint is due.
//!
//! `core` holds the purge rule, `checkpoint` the plan of checkpoints, `closing` the end of an epoch,
//! `taint` what a failed write-back leaves in doubt; drivers do the syncing. Nothing here believes that a write is durable because it was written
//! back: only marks prove it.

pub mod checkpoint;
pub mod closing;
pub mod core;
pub mod mapped;
pub mod taint;
