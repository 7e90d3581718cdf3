//! Does one known operation after the other and compares what the ring shows of it.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::known::{Item, Known};
use crate::capture::probe::is_state_of_new_told;
use crate::capture::{Capture, CaptureError, RingConsumer};
use crate::ids::RingPos;
use crate::record::{Records, op};

/// Of the blocks that the known operations work on.
pub(super) const BLOCK_BYTES: usize = 4096;
const RUN_BYTES_MAX: usize = 1 << 20;
/// How long a record of somebody else may stay half written.
const BUSY_LIMIT: Duration = Duration::from_secs(5);

/// The place where the known operations are done.
pub(super) struct Bench<'a> {
    pub(super) capture: &'a Capture,
    consumer: RingConsumer,
    pub(super) root: Item,
    directory: PathBuf,
    /// The extended state of all that is made is told: it may have something that nobody gave it.
    pub(super) is_new_told: bool,
    /// Inode numbers that are ours: records of others are not looked at.
    ours: HashSet<u64>,
    began_at: RingPos,
    pub(super) operations: u32,
    pub(super) skipped: Vec<String>,
}

impl<'a> Bench<'a> {
    pub(super) fn new(capture: &'a Capture, directory: &Path) -> Result<Self, CaptureError> {
        let consumer = capture.consumer()?;
        let root = Item::hold(directory)?;
        let mut bench = Self {
            capture,
            consumer,
            is_new_told: is_state_of_new_told(capture.options().filesystem),
            ours: HashSet::from([root.identity.ino]),
            root,
            directory: directory.to_owned(),
            began_at: RingPos(0),
            operations: 0,
            skipped: Vec::new(),
        };
        bench.begin()?;
        Ok(bench)
    }

    /// A path in the directory of the known operations.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Creates a file some blocks long.
    pub(super) fn file_of_blocks(&self, name: &str) -> Result<File, CaptureError> {
        let file = done(
            "create",
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(self.path(name)),
        )?;
        write_blocks(&file)?;
        Ok(file)
    }

    /// Takes hold of a name in the directory; its records are looked at from now on.
    pub(super) fn hold(&mut self, name: &str) -> Result<Item, CaptureError> {
        let item = Item::hold(&self.path(name))?;
        self.own(&item);
        Ok(item)
    }

    /// Looks at the records of `item` from now on.
    pub(super) fn own(&mut self, item: &Item) {
        self.ours.insert(item.identity.ino);
    }

    /// Forgets everything that was captured up to now.
    pub(super) fn begin(&mut self) -> Result<(), CaptureError> {
        self.discard()?;
        self.began_at = self.consumer.cursor();
        Ok(())
    }

    /// Releases everything that was captured up to now.
    pub(super) fn discard(&mut self) -> Result<(), CaptureError> {
        self.collect().map(drop)
    }

    /// What was captured of ours since [`Self::begin`], with each record's position.
    pub(super) fn collect(&mut self) -> Result<Vec<(RingPos, Known)>, CaptureError> {
        let until = self.consumer.producer();
        let limit = Instant::now() + BUSY_LIMIT;
        let mut seen = Vec::new();
        while self.consumer.cursor() < until {
            let Some(run) = self.consumer.peek(RUN_BYTES_MAX)? else {
                if Instant::now() > limit {
                    let source = io::Error::from(io::ErrorKind::TimedOut);
                    return Err(CaptureError::system(
                        "waiting for a half-written record",
                        source,
                    ));
                }
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            for record in Records::new(run.bytes) {
                let position = run.start.0;
                let (at, view) = record.map_err(|error| CaptureError::Ring {
                    position,
                    reason: error.to_string(),
                })?;
                let parents = [view.header.pos, view.names().new_parent_ino];
                if self.ours.contains(&view.header.ino)
                    || view.has_names() && parents.iter().any(|parent| self.ours.contains(parent))
                {
                    seen.push((RingPos(position + at as u64), Known::seen(&view)));
                }
            }
            let end = RingPos(run.start.0 + run.bytes.len() as u64);
            self.consumer.advance_to(end)?;
            self.consumer.release_to(end)?;
        }
        if self.is_new_told {
            forget_state_of_new(&mut seen);
        }
        Ok(seen)
    }

    /// Compares what was captured since [`Self::begin`] with what must have been.
    pub(super) fn expect(
        &mut self,
        hook: &'static str,
        operation: &str,
        mut expected: Vec<Known>,
    ) -> Result<(), CaptureError> {
        let began_at = self.began_at;
        let seen = self.collect()?;
        for (known, (position, seen)) in expected.iter_mut().zip(&seen) {
            // Where exactly an fsync began depends on what others do; the bounds do not.
            if known.header.op == op::FSYNC && (began_at.0..=position.0).contains(&seen.header.arg)
            {
                known.header.arg = seen.header.arg;
            }
        }
        self.compare(hook, operation, &expected, &seen)
    }

    /// As [`Self::expect`], for records that were collected already.
    pub(super) fn compare(
        &mut self,
        hook: &'static str,
        operation: &str,
        expected: &[Known],
        seen: &[(RingPos, Known)],
    ) -> Result<(), CaptureError> {
        if !seen.iter().map(|(_, known)| known).eq(expected) {
            return Err(CaptureError::Calibration {
                hook,
                operation: operation.to_owned(),
                expected: list(expected.iter()),
                seen: list(seen.iter().map(|(_, known)| known)),
            });
        }
        self.operations += 1;
        self.begin()
    }

    /// Notes that something could not be tried here.
    pub(super) fn skip(&mut self, what: &str, why: impl std::fmt::Display) {
        self.skipped.push(format!("{what}: {why}"));
    }
}

/// Drops what is told behind each inode that is made.
fn forget_state_of_new(seen: &mut Vec<(RingPos, Known)>) {
    let mut made = None;
    seen.retain(|(_, known)| {
        let header = &known.header;
        let is_of_new = header.op == op::EXTENDED && made == Some(header.ino);
        let is_made = matches!(header.op, op::CREATE | op::SYMLINK | op::TMPFILE);
        made = is_made.then_some(header.ino);
        !is_of_new
    });
}

fn list<'k>(records: impl Iterator<Item = &'k Known>) -> String {
    let texts: Vec<String> = records.map(|record| format!("[{record}]")).collect();
    if texts.is_empty() {
        "no record".to_owned()
    } else {
        texts.join(" then ")
    }
}

/// Names an operation that failed.
pub(super) fn done<T, E: Into<io::Error>>(
    operation: &str,
    result: Result<T, E>,
) -> Result<T, CaptureError> {
    result
        .map_err(|source| CaptureError::system(format!("calibrating: {operation}"), source.into()))
}

/// Makes a file some blocks long.
pub(super) fn write_blocks(file: &File) -> Result<(), CaptureError> {
    done("write", file.write_all_at(&[7; 4 * BLOCK_BYTES], 0))
}
