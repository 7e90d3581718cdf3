//! Locks between commands that work on the same directory.

use std::fs::{File, OpenOptions};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};

/// Waits for the lock; it is held until the value is dropped.
pub(super) fn exclusive(path: &Path) -> Result<Flock<File>> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open the lock {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| anyhow!("cannot lock {}: {error}", path.display()))
}
