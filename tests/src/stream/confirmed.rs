//! What the system confirmed to be durable: noted right after the call that said so returned, and held
//! against what a crash left.
//!
//! The notes lie beside the stream's log, one line each, written at once: a confirmation that is noted
//! was given.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::block::BLOCK_BYTES;
use super::observe::{Observed, Seen};
use super::operation::{Action, Cell, Operation};
use crate::error::{Error, Told};

/// Something that was confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmed {
    /// `syncfs`: every operation up to this one.
    All(u64),
    /// `fsync` of the file that this operation overwrote: the block it wrote.
    One(u64),
}

/// Where the notes of a stream's log lie.
#[must_use]
pub fn path_of(log: &Path) -> PathBuf {
    log.with_extension("confirmed")
}

/// Asks for durability now and then, and notes what was confirmed.
pub struct Confirmer {
    every: u64,
    root: File,
    root_path: PathBuf,
    notes: File,
    notes_path: PathBuf,
}

impl Confirmer {
    /// One that asks after every so many operations: in turn for one file and for the whole volume.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn new(root: &Path, log: &Path, every: u64) -> Result<Self, Error> {
        let notes_path = path_of(log);
        let notes = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&notes_path)
            .told(
                "create the notes (older ones are not overwritten)",
                &notes_path,
            )?;
        Ok(Self {
            every: every.max(1),
            root: File::open(root).told("open", root)?,
            root_path: root.to_owned(),
            notes,
            notes_path,
        })
    }

    /// Looks whether it is time, after this operation has returned.
    ///
    /// # Errors
    /// [`Error::File`] of the call that asked, or of the note.
    pub fn after(&mut self, top: &Path, operation: &Operation) -> Result<(), Error> {
        let number = operation.number;
        if number.is_multiple_of(self.every) {
            nix::unistd::syncfs(self.root.as_fd())
                .map_err(std::io::Error::from)
                .told("sync the volume of", &self.root_path)?;
            return self.note(&format!("all {number}\n"));
        }
        if let Action::Overwrite { path, .. } = &operation.action
            && number % self.every >= self.every / 2
        {
            let path = top.join(path);
            let file = OpenOptions::new().write(true).open(&path);
            let file = file.told("open", &path)?;
            file.sync_all().told("fsync", &path)?;
            return self.note(&format!("one {number}\n"));
        }
        Ok(())
    }

    fn note(&mut self, line: &str) -> Result<(), Error> {
        let written = self.notes.write_all(line.as_bytes());
        written.told("write the notes", &self.notes_path)
    }
}

/// Reads the notes beside `log`; none if nothing was ever asked for.
///
/// # Errors
/// [`Error::File`]; [`Error::Format`] for a line that is no note.
pub fn load(log: &Path) -> Result<Vec<Confirmed>, Error> {
    let path = path_of(log);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).told("read", &path)?;
    let lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    lines
        .enumerate()
        .map(|(index, line)| {
            let number = |word: &str| line.trim().strip_prefix(word)?.parse().ok();
            let all = number("all ").map(Confirmed::All);
            all.or_else(|| number("one ").map(Confirmed::One))
                .ok_or_else(|| Error::Format {
                    path: path.clone(),
                    line: index + 1,
                    reason: "neither `all N` nor `one N`".into(),
                })
        })
        .collect()
}

/// How many confirmed operations are not there, given up to which one all is there.
#[must_use]
pub fn lost(
    confirmed: &[Confirmed],
    operations: &[Operation],
    observed: &Observed,
    prefix: u64,
) -> u64 {
    let all = confirmed.iter().filter_map(|confirmed| match confirmed {
        Confirmed::All(number) => Some(*number),
        Confirmed::One(_) => None,
    });
    let whole = all.max().unwrap_or(0).saturating_sub(prefix);
    let single = confirmed.iter().filter(|confirmed| match confirmed {
        Confirmed::One(number) => *number > prefix && is_block_lost(*number, operations, observed),
        Confirmed::All(_) => false,
    });
    whole.max(single.count() as u64)
}

/// Bytes of so many operations: each writes one block at the most.
#[must_use]
pub fn bytes(operations: u64) -> u64 {
    operations.saturating_mul(BLOCK_BYTES as u64)
}

/// Whether a block shows something older than what this operation wrote there.
fn is_block_lost(number: u64, operations: &[Operation], observed: &Observed) -> bool {
    let written = operations
        .iter()
        .find(|operation| operation.number == number);
    let Some(Action::Overwrite { file, index, .. }) = written.map(|operation| &operation.action)
    else {
        return true;
    };
    match observed.cells.get(&Cell::Block(*file, *index)) {
        Some(Seen::Value(seen)) => *seen < number,
        // A later overwrite that was cut in the middle has taken it.
        Some(Seen::Torn(_)) => !operations.iter().any(|later| {
            later.number > number
                && matches!(&later.action, Action::Overwrite { file: f, index: i, .. } if (f, i) == (file, index))
        }),
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::operation::Generator;

    #[test]
    fn an_older_block_is_a_confirmed_loss_and_a_newer_one_is_none() {
        let mut generator = Generator::new(7);
        let operations: Vec<Operation> = (0..4000).map(|_| generator.next()).collect();
        let overwrite = operations.iter().rev().find_map(|operation| {
            let Action::Overwrite { file, index, .. } = &operation.action else {
                return None;
            };
            Some((operation.number, Cell::Block(*file, *index)))
        });
        let (number, cell) = overwrite.unwrap();
        let with = |seen: Seen| Observed {
            cells: [(cell.clone(), seen)].into(),
            ..Observed::default()
        };
        let confirmed = [Confirmed::All(3), Confirmed::One(number)];
        let judge = |observed: &Observed, prefix| lost(&confirmed, &operations, observed, prefix);
        assert_eq!(judge(&with(Seen::Value(number)), 10), 0);
        assert_eq!(judge(&with(Seen::Value(number + 5)), 10), 0);
        assert_eq!(judge(&with(Seen::Value(number - 1)), 10), 1);
        assert_eq!(judge(&with(Seen::Torn("torn".into())), 10), 1);
        assert_eq!(judge(&Observed::default(), number), 0, "within the prefix");
        assert_eq!(judge(&with(Seen::Value(number)), 1), 2, "3 were confirmed");
    }

    #[test]
    fn notes_are_read_back_and_a_torn_last_line_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("stream.log");
        assert_eq!(load(&log).unwrap(), []);
        fs::write(path_of(&log), "one 4\nall 9\nall 1").unwrap();
        let read = load(&log).unwrap();
        assert_eq!(read, [Confirmed::One(4), Confirmed::All(9)]);
        fs::write(path_of(&log), "some 4\n").unwrap();
        assert!(load(&log).is_err());
    }

    #[test]
    fn a_stream_notes_what_it_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("stream.log");
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let options = crate::stream::write::Options {
            seed: 3,
            time_limit: None,
            operations_max: Some(100),
            operations_per_second: 0,
            buffered_max: 4,
            confirm_every: Some(20),
        };
        crate::stream::write::run(&root, &log, &options).unwrap();
        let read = load(&log).unwrap();
        let all: Vec<_> = read
            .iter()
            .filter(|c| matches!(c, Confirmed::All(_)))
            .collect();
        assert_eq!(all.len(), 5);
        assert!(
            read.iter().any(|c| matches!(c, Confirmed::One(_))),
            "{read:?}"
        );
    }
}
