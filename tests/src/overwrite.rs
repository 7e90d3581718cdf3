//! A workload that asks for durability and nothing else: it overwrites one block with the next number,
//! fsyncs it, and notes each number once the fsync has answered.
//!
//! A survivor must show the last number noted, or a later one. The whole block holds the number, so
//! that a torn one is seen.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::Error;

/// Bytes of the block.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The first number.
    pub from: u64,
    /// How many.
    pub count: u64,
    /// Ask for durability after each.
    pub sync: bool,
}

/// How long the answers took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many there were.
    pub answers: u64,
    /// The median of write and fsync together.
    pub median_us: u64,
    /// The longest.
    pub longest_us: u64,
}

pub(crate) fn file_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}

pub(crate) fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK_BYTES / 8)
}

/// Overwrites, and notes each number on a line of its own.
///
/// # Errors
/// The first write or fsync that fails.
pub fn run(path: &Path, log: &Path, options: &Options) -> Result<Summary, Error> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(file_error("open", path))?;
    let mut log_file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(log)
        .map_err(file_error("open", log))?;
    let mut times = Vec::new();
    for number in (options.from..).take(usize::try_from(options.count).unwrap_or(usize::MAX)) {
        let bytes = block(number);
        let began = Instant::now();
        file.write_all_at(&bytes, 0)
            .map_err(file_error("write", path))?;
        if options.sync {
            file.sync_all().map_err(file_error("fsync", path))?;
        }
        times.push(began.elapsed());
        // One write, so that a line is there or not.
        log_file
            .write_all(format!("{number}\n").as_bytes())
            .map_err(file_error("write", log))?;
    }
    Ok(summary(&mut times))
}

fn summary(times: &mut [Duration]) -> Summary {
    times.sort_unstable();
    let us = |time: Option<&Duration>| {
        time.map_or(0, |time| {
            u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
        })
    };
    Summary {
        answers: times.len() as u64,
        median_us: us(times.get(times.len() / 2)),
        longest_us: us(times.last()),
    }
}

/// The number that the block holds.
///
/// # Errors
/// If it cannot be read, or holds more than one number.
pub fn found(path: &Path) -> Result<u64, Error> {
    let file = File::open(path).map_err(file_error("open", path))?;
    let mut bytes = [0; BLOCK_BYTES];
    file.read_exact_at(&mut bytes, 0)
        .map_err(file_error("read", path))?;
    let (numbers, _) = bytes.as_chunks::<8>();
    let first = numbers.first().copied().unwrap_or_default();
    if numbers.iter().any(|number| *number != first) {
        return Err(Error::Format {
            path: path.to_owned(),
            line: 1,
            reason: "the block is torn: it holds more than one number".to_owned(),
        });
    }
    Ok(u64::from_le_bytes(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_holds_the_last_number_noted() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, log) = (directory.path().join("block"), directory.path().join("log"));
        let options = Options {
            from: 7,
            count: 3,
            sync: true,
        };
        let summary = run(&path, &log, &options).expect("all writes succeed");
        assert_eq!(summary.answers, 3);
        assert!(summary.median_us <= summary.longest_us);
        assert_eq!(found(&path).expect("whole"), 9);
        let noted = std::fs::read_to_string(&log).expect("a log");
        assert_eq!(noted, "7\n8\n9\n");
    }

    #[test]
    fn a_torn_block_is_seen() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("block");
        let mut bytes = block(1);
        bytes[4000] = 2;
        std::fs::write(&path, bytes).expect("written");
        assert!(found(&path).is_err());
    }
}
