//! Who owns which volume, who is alive, and what happens when a node dies.
//!
//! Cores, which know no clock, socket or system call: `claim` (what a node says of a volume),
//! `liveness` (is the peer dead), `ownership` (what this node is to a volume at start), `takeover`
//! (the steps in their order), `standing` (whether a claim still holds), `words` (what mailbox, sentinel and region say together), `questions`
//! (what waits for a person). Drivers beside them: `mailbox` (the shared device), `table` (the
//! local disk), `control` (the connection between the agents), `command` and `fence`
//! (administrator's commands), `mounts`. Nothing here may mount, replay or serve a volume whose
//! other node may still write to it.

pub mod claim;
pub mod command;
pub mod control;
pub mod fence;
pub mod liveness;
pub mod mailbox;
pub mod mounts;
pub mod ownership;
pub mod questions;
pub mod standing;
pub mod table;
pub mod takeover;
pub mod words;
