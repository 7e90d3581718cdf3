//! The sender: takes records in ring order and puts them into the peer's region as frames.
//!
//! `core` decides what is written where and what has arrived; a driver moves the bytes. Nothing here
//! judges whether a record is durable: `durability` does, and says how far to purge. `gate` says which
//! calls that asked for durability may be answered.

pub mod core;
pub mod gate;
