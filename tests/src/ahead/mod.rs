//! Applications that ask for durability, and the oracle that knows what they were told: the one
//! place here where a workload calls fsync.
//!
//! Each case first writes content that it does not flush, and waits. Then it overwrites the same
//! content by confirmed operations, one after the other, until the power goes. Before and after each
//! it says so in a log outside of the volume, so that the log never claims what was not confirmed
//! and never misses what was. The oracle: each cell (a block, a file, a row) shows the version that
//! was last confirmed, or one that was tried after it.

mod blocks;
mod database;
mod history;
mod judge;
mod postgres;
mod replaced;
mod sector;
mod sqlite;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;

pub use judge::{Report, judge};

use crate::error::{Error, Told as _};
use crate::random::Random;
use history::Log;

/// What an application does, and how it asks for durability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// Overwrites, then fsync, fdatasync, syncfs or sync.
    Fsync,
    /// Overwrites that return when they are durable: `O_DSYNC`, `O_SYNC`, `RWF_DSYNC`.
    SyncWrite,
    /// Direct overwrites of what was written through the page cache.
    Direct,
    /// Stores through a shared mapping, then `msync(MS_SYNC)`.
    Msync,
    /// A new file, fsynced, renamed over the old one, and the directory fsynced.
    Rename,
    /// SQLite, `synchronous=FULL`, with a rollback journal.
    SqliteDelete,
    /// SQLite, `synchronous=FULL`, with a write-ahead log.
    SqliteWal,
    /// PostgreSQL as it is installed, but for a few sizes.
    Postgres,
}

/// What a run of a case is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to do.
    pub case: Case,
    /// A directory on the volume, made by the run.
    pub directory: PathBuf,
    /// Where to write the log (not on the volume).
    pub log: PathBuf,
    /// The file whose appearance ends the wait.
    pub go: PathBuf,
    /// Decides the sequence of operations.
    pub seed: u64,
    /// Pause between two operations, at most.
    pub pause: Duration,
}

const GO_INTERVAL: Duration = Duration::from_millis(15);

/// Runs a case until it is killed.
///
/// # Errors
/// [`Error`] for the first call that fails.
pub fn run(options: &Options) -> Result<(), Error> {
    let log = Log::create(&options.log)?;
    let mut random = Random::new(options.seed);
    let run = Run { options, log };
    match options.case {
        Case::Fsync | Case::SyncWrite | Case::Direct | Case::Msync => blocks::run(run, &mut random),
        Case::Rename => replaced::run(run, &mut random),
        Case::SqliteDelete | Case::SqliteWal => {
            database::run(run, &mut random, sqlite::Sqlite::create)
        }
        Case::Postgres => database::run(run, &mut random, postgres::Postgres::create),
    }
}

/// Overwrites everything that an interrupted run left, as somebody else who mounts the volume, and
/// goes on in its log; all of it is confirmed when this returns.
///
/// # Errors
/// [`Error`] for the first call that fails.
pub fn follow(options: &Options) -> Result<(), Error> {
    let log = Log::resume(&options.log)?;
    let run = Run { options, log };
    match options.case {
        Case::Fsync | Case::SyncWrite | Case::Direct | Case::Msync => blocks::follow(run),
        Case::Rename => replaced::follow(run),
        Case::SqliteDelete | Case::SqliteWal => {
            database::follow(run, sqlite::Sqlite::open(options)?)
        }
        // A server that cannot be told to end before the unmount.
        Case::Postgres => Ok(()),
    }
}

/// What the cases have in common.
struct Run<'a> {
    options: &'a Options,
    log: Log,
}

impl Run<'_> {
    fn directory(&self) -> &Path {
        &self.options.directory
    }

    fn make_directory(&self) -> Result<(), Error> {
        let directory = self.directory();
        std::fs::create_dir_all(directory).told("make directory", directory)
    }

    /// Says that the older content is written, and waits for the word to go on.
    fn wait(&mut self) -> Result<(), Error> {
        self.log.ready()?;
        while !self.options.go.exists() {
            std::thread::sleep(GO_INTERVAL);
        }
        Ok(())
    }

    fn pause(&self, random: &mut Random) {
        let most = self.options.pause.as_micros() as u64;
        std::thread::sleep(Duration::from_micros(random.below(most + 1)));
    }
}
