//! twinwrite: every write a file server accepted but has not flushed gets a twin in a second
//! machine's memory.
//!
//! Data goes one way: `capture` (ring) -> `mirror` -> `link` -> the peer's `region`; `durability`
//! decides what may be purged; on a failure `cluster` fences and takes over, and `replay` merges
//! the region into the volume. Cores (`mirror::core`, `durability::core`, `region::scan`,
//! `replay::{judge,plan}`, `cluster::core`) know no clock, socket or system call.

pub mod admin;
pub mod agent;
pub mod board;
pub mod capture;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod durability;
pub mod events;
pub mod faults;
pub mod ids;
pub mod link;
pub mod metrics;
pub mod mirror;
pub mod record;
pub mod region;
pub mod replay;
pub mod status;
