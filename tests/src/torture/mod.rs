//! Torture: random operations of every kind from several threads and processes, and what they left.
//!
//! A *case* is a seed, a length (operations of each thread) and a number of threads; it has a directory
//! of its own, and reproduces a run. Each thread works in a directory of its own, on which a model says
//! what the application was told, and in one that all share.
//!
//! Two regimes. *Settled*: all operations have returned; what the owner shows is what a survivor must
//! show, down to every name, byte and attribute. *Running*: the power is cut in the middle; threads
//! work only in their own directories, and note each operation outside of the volume once it has
//! returned. A survivor must show, thread by thread, what was there after an operation not older than the last
//! one that is known to be mirrored or was confirmed; [`judge`] says what may be seen of later ones.

mod act;
pub mod action;
mod bytes;
pub mod command;
mod generator;
pub mod judge;
mod log;
mod model;
mod thread;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Told as _};
use action::Kind;
use generator::SHARED_DIRECTORIES;
use thread::Worker;

/// The directory of all cases, at the volume's root.
pub const PREFIX: &str = "torture";
/// Its own directory of each case that all its threads share.
const SHARED: &str = "shared";
/// Of a hundred operations in the settled regime.
const SHARED_PERCENT: u64 = 40;

/// What reproduces a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// Decides the operations.
    pub seed: u64,
    /// Operations of each thread.
    pub length: u64,
    /// Threads.
    pub threads: u64,
}

impl Case {
    /// Whether it has operations that flush, where the power is cut once all have returned: every second seed
    /// has none, or the disk itself would keep the most of all.
    #[must_use]
    pub const fn flushes(&self) -> bool {
        !self.seed.is_multiple_of(2)
    }

    /// Its directory below the volume's root.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        Path::new(PREFIX).join(self.to_string())
    }

    fn thread(thread: u64) -> String {
        format!("t{thread}")
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            length,
            threads,
        } = self;
        write!(f, "{seed}-{length}-{threads}")
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Vec<u64> = (text.split('-').map(str::parse).collect::<Result<_, _>>())
            .map_err(|error| format!("{error}: a case is SEED-LENGTH-THREADS"))?;
        match numbers.as_slice() {
            [seed, length, threads] if *threads > 0 => Ok(Self {
                seed: *seed,
                length: *length,
                threads: *threads,
            }),
            _ => Err("a case is SEED-LENGTH-THREADS".to_owned()),
        }
    }
}

/// Which of a case's threads a process runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// All.
    #[default]
    All,
    /// The first, the third and so on.
    Even,
    /// The others.
    Odd,
}

impl Part {
    fn has(self, thread: u64) -> bool {
        match self {
            Self::All => true,
            Self::Even => thread.is_multiple_of(2),
            Self::Odd => !thread.is_multiple_of(2),
        }
    }
}

/// When the power is cut, and so what can be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Regime {
    /// After all operations have returned and were captured.
    Settled,
    /// In the middle; the threads' logs lie in this directory, which is not on the volume.
    Running(PathBuf),
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The volume's mount point.
    pub root: PathBuf,
    /// What reproduces it.
    pub case: Case,
    /// Kinds of operations; none: all.
    pub kinds: Vec<Kind>,
    /// When the power is cut.
    pub regime: Regime,
    /// Threads of this process.
    pub part: Part,
}

/// What became of the operations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Those that succeeded.
    pub succeeded: u64,
    /// Those that the system refused, by its words.
    pub refused: BTreeMap<String, u64>,
}

impl Summary {
    fn add(&mut self, other: Self) {
        self.succeeded += other.succeeded;
        for (words, count) in other.refused {
            *self.refused.entry(words).or_default() += count;
        }
    }
}

/// Makes the directories of a case, which must not be there yet.
///
/// # Errors
/// [`Error::File`].
pub fn prepare(root: &Path, case: &Case) -> Result<(), Error> {
    umask(Mode::empty());
    let top = root.join(case.directory());
    let parent = root.join(PREFIX);
    fs::create_dir_all(&parent).told("make directory", &parent)?;
    let threads = (0..case.threads).map(Case::thread);
    let shared = SHARED_DIRECTORIES.map(|directory| format!("{SHARED}/{directory}"));
    for name in std::iter::once(String::new()).chain(threads).chain(shared) {
        let path = top.join(name);
        fs::create_dir(&path).told("make directory", &path)?;
    }
    Ok(())
}

/// Runs the threads of a prepared case that are this process's.
///
/// # Errors
/// The first operation that fails and must not.
pub fn run(options: &Options) -> Result<Summary, Error> {
    umask(Mode::empty());
    let numbers = (0..options.case.threads).filter(|thread| options.part.has(*thread));
    let workers: Vec<Worker> = numbers
        .map(|thread| Worker::new(options, thread))
        .collect::<Result<_, _>>()?;
    let ended = std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(|| worker.run(options.case.length)))
            .collect();
        let ended = threads.into_iter().map(|thread| {
            let top = options.root.join(options.case.directory());
            let died = |_| Err(std::io::Error::other("a thread died")).told("work in", &top);
            thread.join().unwrap_or_else(died)
        });
        ended.collect::<Vec<Result<Summary, Error>>>()
    });
    let mut summary = Summary::default();
    for each in ended {
        summary.add(each?);
    }
    Ok(summary)
}

#[cfg(test)]
mod tests;
