//! Workloads and the oracle for tests on machines that lose power.
//!
//! A workload changes a volume on its owner and writes down, outside the volume, what it was told:
//! [`settled`] a manifest of a tree, [`sqlite`] the rows of a database, [`stream`] every single
//! operation. [`check`] compares the survivor's volume with those. Producing and checking use the
//! same walker ([`walk`]) and the same manifest ([`manifest`]).
//!
//! Nothing here but [`ahead`], [`overwrite`], [`uring`], [`torture`] and some of [`probe`] may ask the volume for durability (no
//! fsync, no `O_SYNC`): what survives must have survived because of twinwrite. Nothing here may use twinwrite's own code: an oracle that shares
//! the code under test shares its mistakes.

pub mod ahead;
pub mod check;
pub mod compare;
pub mod error;
pub mod escape;
pub mod manifest;
mod mapping;
pub mod overwrite;
pub mod probe;
pub mod random;
pub mod settled;
pub mod sqlite;
pub mod stream;
pub mod torture;
pub mod uring;
pub mod walk;

/// The directory at the volume's root that belongs to twinwrite itself; never compared.
pub const AGENT_DIRECTORY: &str = ".twinwrite";
/// The directory that mkfs.ext4 makes; it must be empty.
pub const LOST_AND_FOUND: &str = "lost+found";
