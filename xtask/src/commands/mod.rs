//! The subcommands, one file each: arguments in, library calls, words out.

pub mod build;
pub mod coverage;
pub mod demo;
pub mod disk_ahead;
pub mod faults;
pub mod merge;
pub mod run;
pub mod setup;
pub mod sim;
pub mod test;
pub mod torture;
pub mod vm;
