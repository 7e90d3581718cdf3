//! Builds, tests, demonstrates and runs twinwrite.
//!
//! It needs no system library itself, so that it can run on a fresh machine and install what the
//! rest needs.

pub mod ahead;
pub mod build;
pub mod commands;
pub mod coverage;
pub mod demo;
pub mod faults;
mod json_file;
pub mod lab;
pub mod paths;
pub mod progress;
pub mod random;
pub mod scenarios;
pub mod setup;
pub mod torture;
