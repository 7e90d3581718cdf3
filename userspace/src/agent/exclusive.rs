//! One agent for a volume: two would take each other's records out of the ring.
//!
//! A lock on a file, because the kernel gives it back when its holder dies, however it dies. It must
//! never be released while this process still reads a ring.

use std::fs::{File, Permissions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

use crate::capture::escaped;

/// Where all agents of a host look, whatever their configuration. Only root may write in `/run`; in
/// `/run/lock` anybody could have put a link there that leads elsewhere.
const LOCK_DIRECTORY: &str = "/run/twinwrite-locks";
const OWNER_ONLY: u32 = 0o600;

/// Why a volume cannot be had.
#[derive(Debug, Error)]
pub enum ExclusiveError {
    /// Another process has it.
    #[error(
        "volume {volume} is in the hands of another twinwrite process (pid {holder}): stop that one first, \
         for example with `kill {holder}`"
    )]
    Held {
        /// The volume.
        volume: String,
        /// What the lock file says of its holder.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("{}: {source}; it keeps two agents from one volume", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// The sole right to one volume's capture, until it is dropped or the process ends.
#[derive(Debug)]
pub struct VolumeLock {
    _file: Flock<File>,
}

impl VolumeLock {
    /// Takes it, or says who has it.
    ///
    /// # Errors
    /// [`ExclusiveError`].
    pub fn take(volume: &str) -> Result<Self, ExclusiveError> {
        Self::take_in(Path::new(LOCK_DIRECTORY), volume)
    }

    fn take_in(directory: &Path, volume: &str) -> Result<Self, ExclusiveError> {
        let path = directory.join(format!("{}.lock", escaped(volume)));
        let failed = |source| ExclusiveError::File {
            path: path.clone(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW)
            .mode(OWNER_ONLY)
            .open(&path)
            .map_err(failed)?;
        // Whoever may open it may lock it.
        file.set_permissions(Permissions::from_mode(OWNER_ONLY))
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                file.set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| write!(file, "{}", std::process::id()))
                    .map_err(failed)?;
                Ok(Self { _file: file })
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                // A holder that has not written yet is a holder all the same.
                file.read_to_string(&mut holder).ok();
                Err(ExclusiveError::Held {
                    volume: volume.to_owned(),
                    holder,
                })
            }
            Err((_, error)) => Err(failed(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_told_who_has_the_volume() {
        let directory = tempfile::tempdir().expect("a directory");
        let first = VolumeLock::take_in(directory.path(), "vol0").expect("free");
        let error = VolumeLock::take_in(directory.path(), "vol0").expect_err("held");
        let own = std::process::id().to_string();
        assert!(
            matches!(&error, ExclusiveError::Held { volume, holder } if volume == "vol0" && *holder == own),
            "{error}"
        );
        VolumeLock::take_in(directory.path(), "vol1").expect("another volume");
        drop(first);
        VolumeLock::take_in(directory.path(), "vol0").expect("given back");
    }
}
