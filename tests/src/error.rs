//! What can go wrong in a workload or a check, told once, with the path it is about.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a workload or a check could not be carried out (a difference found is not an error).
#[derive(Debug, Error)]
pub enum Error {
    /// A system call on a path failed.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried, as a verb.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A manifest or stream log is not one.
    #[error("{}: line {line}: {reason}; it must be written again by the workload", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The database said no while the workload ran.
    #[error("database {}", path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The database does not hold what its own commits said.
    #[error("database {}: {reason}", path.display())]
    DatabaseContent {
        /// The database file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The source tree has too little to copy.
    #[error("{} has only {found} regular files that fit, {wanted} are needed: give another --source", path.display())]
    Source {
        /// The tree.
        path: PathBuf,
        /// Regular files found.
        found: usize,
        /// Regular files wanted.
        wanted: usize,
    },
    /// Parts of a tree that is to be described could not be read.
    #[error("{} parts of {} cannot be read, the first: {first}", count, path.display())]
    Unreadable {
        /// The tree.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first of them.
        first: String,
    },
}

/// Gives a system error its verb and path.
pub trait Told<T> {
    /// Says what was tried, and on what.
    ///
    /// # Errors
    /// The same failure, with its context.
    fn told(self, what: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Told<T> for Result<T, E> {
    fn told(self, what: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|error| Error::File {
            what,
            path: path.to_owned(),
            source: error.into(),
        })
    }
}
