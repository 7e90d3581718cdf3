//! Replay against its guarantees: random operations, every disk a journal could leave behind or
//! ahead of the cut, interrupted at every step, on a model and on real file systems.
//!
//! `TWINWRITE_CASES` sets how many random cases run on the model (a share of them on real mounts),
//! `TWINWRITE_SEED` runs one of them. Tests on loop devices need root, and fail without it unless
//! `TWINWRITE_NO_LOOP` is set.

mod ahead;
mod cases;
mod choose;
mod crash;
mod guarding;
mod judging;
mod loopfs;
mod model;
mod named;
mod oracle;
mod projects;
mod real;
mod stopping;
mod tainted;
mod world;
