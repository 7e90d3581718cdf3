//! Replay against its guarantees: random operations, every disk a journal could leave behind or
//! ahead of the cut, interrupted at every step, on a model and on real file systems.
//!
//! `TWINWRITE_CASES` sets how many random cases run on the model, `TWINWRITE_MOUNTED_CASES` how many on each
//! real file system, `TWINWRITE_SEED` runs one of them. `cargo xtask merge` sets all three. Tests on loop devices need root, and fail without it unless
//! `TWINWRITE_NO_LOOP` is set.

mod ahead;
mod attributes;
mod cases;
mod choose;
mod crash;
mod extended;
mod guarding;
mod judging;
mod large;
mod logging;
mod loopfs;
mod model;
mod named;
mod oracle;
mod perform;
mod projects;
mod real;
mod reserved;
mod stopping;
mod tainted;
mod treelog;
mod world;
