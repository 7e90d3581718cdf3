//! The log: what a case tried and what was confirmed, in its order. Each line is one write to a file
//! outside of the volume, and the next step begins after it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Told as _};

/// Writes a log.
pub(super) struct Log {
    file: File,
    path: PathBuf,
    last: u64,
}

/// How far a confirmation reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// To the cells of this version.
    Own,
    /// To everything tried before it.
    All,
}

impl Log {
    pub(super) fn create(path: &Path) -> Result<Self, Error> {
        let file = File::create(path).told("make the log", path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            last: 0,
        })
    }

    /// Goes on behind the last version of a log.
    pub(super) fn resume(path: &Path) -> Result<Self, Error> {
        let history = History::load(path)?;
        let whole = std::fs::read(path).told("read", path)?;
        let end = whole.iter().rposition(|byte| *byte == b'\n');
        let file = File::options().append(true).open(path);
        let file = file.told("open the log", path)?;
        // A line that was cut off would swallow the next one.
        file.set_len(end.map_or(0, |end| end as u64 + 1))
            .told("shorten the log", path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            last: history.versions.keys().last().copied().unwrap_or_default(),
        })
    }

    fn line(&mut self, line: &str) -> Result<(), Error> {
        let bytes = format!("{line}\n");
        self.file
            .write_all(bytes.as_bytes())
            .told("write the log", &self.path)
    }

    /// Gives the version that these cells are about to get.
    pub(super) fn try_cells(&mut self, cells: &[u32]) -> Result<u64, Error> {
        self.give("try", cells)
    }

    /// As [`Log::try_cells`], of a version that takes the old one's place before it is durable itself.
    pub(super) fn try_loosely(&mut self, cells: &[u32]) -> Result<u64, Error> {
        self.give("loose", cells)
    }

    fn give(&mut self, word: &str, cells: &[u32]) -> Result<u64, Error> {
        self.last += 1;
        let cells: Vec<String> = cells.iter().map(u32::to_string).collect();
        self.line(&format!("{word} {} {}", self.last, cells.join(",")))?;
        Ok(self.last)
    }

    /// The version was confirmed as durable.
    pub(super) fn confirmed(&mut self, version: u64, reach: Reach) -> Result<(), Error> {
        let word = match reach {
            Reach::Own => "own",
            Reach::All => "all",
        };
        self.line(&format!("{word} {version}"))
    }

    /// The older content is written.
    pub(super) fn ready(&mut self) -> Result<(), Error> {
        self.line("ready")
    }
}

/// What a cell was given, oldest first, and which of that it must at least show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) tried: Vec<u64>,
    /// Those of them that took the old one's place before they were durable themselves.
    pub(super) loose: Vec<u64>,
    /// Last confirmed version.
    pub(super) confirmed: Option<u64>,
    /// Last version before the wait.
    pub(super) older: Option<u64>,
}

/// A log that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct History {
    pub(super) cells: BTreeMap<u32, Cell>,
    /// The cells of each version.
    pub(super) versions: BTreeMap<u64, Vec<u32>>,
    /// Confirmations after the wait.
    pub(super) confirmations: u64,
    /// The wait was reached.
    pub(super) ready: bool,
}

impl History {
    pub(super) fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).told("read", path)?;
        let mut history = Self::default();
        // A line without its end was cut off.
        let lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        for (index, line) in lines.enumerate() {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            history.take(&words).ok_or_else(|| Error::Format {
                path: path.to_owned(),
                line: index + 1,
                reason: format!("`{}` is no line of such a log", line.trim_end()),
            })?;
        }
        Ok(history)
    }

    fn take(&mut self, words: &[&str]) -> Option<()> {
        match words {
            [word @ ("try" | "loose"), version, cells] => {
                let version = version.parse().ok()?;
                let cells: Option<Vec<u32>> = cells.split(',').map(|c| c.parse().ok()).collect();
                let cells = cells?;
                for cell in &cells {
                    let cell = self.cells.entry(*cell).or_default();
                    cell.tried.push(version);
                    if *word == "loose" {
                        cell.loose.push(version);
                    }
                }
                self.versions.insert(version, cells);
            }
            ["own", version] => {
                let version = version.parse().ok()?;
                for cell in self.versions.get(&version)? {
                    self.cells.get_mut(cell)?.confirmed = Some(version);
                }
                self.confirmations += u64::from(self.ready);
            }
            ["all", version] => {
                let version: u64 = version.parse().ok()?;
                self.versions.get(&version)?;
                for cell in self.cells.values_mut() {
                    let last = cell.tried.iter().rfind(|tried| **tried <= version);
                    cell.confirmed = cell.confirmed.max(last.copied());
                }
                self.confirmations += u64::from(self.ready);
            }
            ["ready"] => {
                self.ready = true;
                for cell in self.cells.values_mut() {
                    cell.older = cell.tried.last().copied();
                }
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_says_of_each_cell_what_it_must_show() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log");
        let mut log = Log::create(&path).expect("a log");
        assert_eq!(log.try_cells(&[0]).expect("a line"), 1);
        assert_eq!(log.try_cells(&[1, 2]).expect("a line"), 2);
        log.ready().expect("a line");
        assert_eq!(log.try_cells(&[1]).expect("a line"), 3);
        log.confirmed(3, Reach::Own).expect("a line");
        assert_eq!(log.try_cells(&[2]).expect("a line"), 4);
        assert_eq!(log.try_loosely(&[0]).expect("a line"), 5);
        log.confirmed(5, Reach::All).expect("a line");
        assert_eq!(log.try_cells(&[1]).expect("a line"), 6);
        log.file.write_all(b"own").expect("half a line");
        let history = History::load(&path).expect("a history");
        let must: Vec<_> = history.cells.values().map(|cell| cell.confirmed).collect();
        assert_eq!(must, [Some(5), Some(3), Some(4)]);
        let older: Vec<_> = history.cells.values().map(|cell| cell.older).collect();
        assert_eq!(older, [Some(1), Some(2), Some(2)]);
        let loose: Vec<_> = history.cells.values().map(|c| c.loose.as_slice()).collect();
        assert_eq!(loose, [&[5][..], &[], &[]]);
        assert_eq!((history.confirmations, history.ready), (2, true));
        let mut log = Log::resume(&path).expect("the log");
        assert_eq!(log.try_cells(&[0]).expect("a line"), 7);
        log.confirmed(7, Reach::Own).expect("a line");
        let history = History::load(&path).expect("a history");
        assert_eq!(history.cells.get(&0).and_then(|c| c.confirmed), Some(7));
        std::fs::write(&path, "own 9\n").expect("a damaged log");
        assert!(History::load(&path).is_err());
    }
}
