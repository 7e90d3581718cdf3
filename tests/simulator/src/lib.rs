//! A seeded simulator: twinwrite's real cores in one process against models of kernel, disk, link,
//! mailbox and clock, with anything crashing at any step.
//!
//! A run is a pure function of the sources, a seed and a number of steps. The cores are the product's:
//! `mirror::core`, `durability`, `region::{layout, scan}`, `replay`, `cluster::{liveness, ownership,
//! takeover, claim, mailbox::slot}`; the drivers around them do what `twinwrite::agent`'s do. It must
//! never look at a clock, and never do better by the cores than the agent does.

pub mod applications;
pub mod disk;
pub mod endurance;
pub mod fault;
pub mod gating;
pub mod history;
pub mod image;
pub mod keeper;
pub mod kernel;
pub mod ledger;
pub mod owner;
pub mod random;
pub mod region;
pub mod ring;
pub mod run;
pub mod step;
pub mod takeover;
pub mod volume;
pub mod wire;
pub mod world;
