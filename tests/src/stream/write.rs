//! Carrying the operations out and logging each after its system call returned.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use super::PREFIX;
use super::block::Block;
use super::confirmed::Confirmer;
use super::log::{Header, LOG_VERSION, Line};
use super::operation::{Action, CREATE_MODE, CURRENT, Generator, Operation};
use crate::error::{Error, Told};

/// Operations that may wait for their log line at most: a larger buffer would hide lost ones.
pub const BUFFERED_MAX: u64 = 16;
/// A line does not wait longer than this for the buffer to fill.
const BUFFERED_FOR_MAX: Duration = Duration::from_millis(20);

/// How the stream runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Decides the sequence.
    pub seed: u64,
    /// Ends the stream; without it, it goes on until it is killed.
    pub time_limit: Option<Duration>,
    /// Ends the stream after so many operations.
    pub operations_max: Option<u64>,
    /// Pace; 0 for as fast as it goes.
    pub operations_per_second: u64,
    /// Log lines written at once, at most [`BUFFERED_MAX`].
    pub buffered_max: u64,
    /// Asks for durability after so many operations, and notes what was confirmed; without it, never.
    pub confirm_every: Option<u64>,
}

/// Runs the stream below `root`, which must not have a `stream` directory yet, and returns how many
/// operations returned.
///
/// # Errors
/// [`Error::File`] for the first operation that fails; all before it are in the log.
pub fn run(root: &Path, log: &Path, options: &Options) -> Result<u64, Error> {
    let top = root.join(PREFIX);
    let buffered_max = options.buffered_max.clamp(1, BUFFERED_MAX);
    let header = Header {
        stream: LOG_VERSION,
        seed: options.seed,
        buffered_max,
    };
    let mut confirmer = (options.confirm_every)
        .map(|every| Confirmer::new(root, log, every))
        .transpose()?;
    let mut log = LogWriter::create(log, &header)?;
    let mut generator = Generator::new(options.seed);
    let started = Instant::now();
    let mut done = 0;
    let limit = options.operations_max.unwrap_or(u64::MAX);
    while done < limit
        && options
            .time_limit
            .is_none_or(|limit| started.elapsed() < limit)
    {
        let operation = generator.next();
        if let Err(error) = carry_out(&top, options.seed, &operation) {
            log.flush()?;
            return Err(error);
        }
        done = operation.number;
        if let Some(confirmer) = &mut confirmer
            && let Err(error) = confirmer.after(&top, &operation)
        {
            log.push(operation)?;
            log.flush()?;
            return Err(error);
        }
        log.push(operation)?;
        if let Some(due) = due(options.operations_per_second, done) {
            let wait = due.saturating_sub(started.elapsed());
            if wait > BUFFERED_FOR_MAX {
                log.flush()?;
            }
            sleep(wait);
        }
    }
    log.flush()?;
    Ok(done)
}

/// When the operation after `done` is due, counted from the start.
fn due(operations_per_second: u64, done: u64) -> Option<Duration> {
    let nanos = done
        .checked_mul(1_000_000_000)?
        .checked_div(operations_per_second)?;
    Some(Duration::from_nanos(nanos))
}

/// Exactly one system call that changes the volume.
fn carry_out(top: &Path, seed: u64, operation: &Operation) -> Result<(), Error> {
    let at = |path: &str| {
        if path.is_empty() {
            top.to_owned()
        } else {
            top.join(path)
        }
    };
    let block = |file: u64, index: u32| {
        Block {
            seed,
            number: operation.number,
            file,
            index,
        }
        .bytes()
    };
    match &operation.action {
        Action::MakeDirectory { path } => {
            let path = at(path);
            DirBuilder::new()
                .mode(0o755)
                .create(&path)
                .told("make directory", &path)
        }
        Action::Create { path } => {
            let path = at(path);
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(CREATE_MODE);
            options.open(&path).map(drop).told("create", &path)
        }
        Action::Append { file, path, index } => append(&at(path), &block(*file, *index)),
        Action::Overwrite { file, path, index } => {
            overwrite(&at(path), &block(*file, *index), *index)
        }
        Action::Rename { from, to, .. } => fs::rename(at(from), at(to)).told("rename", &at(from)),
        Action::Replace { from, .. } => fs::rename(at(from), at(CURRENT)).told("rename", &at(from)),
        Action::Link { from, to, .. } => fs::hard_link(at(from), at(to)).told("link", &at(to)),
        Action::Unlink { path, .. } => fs::remove_file(at(path)).told("remove", &at(path)),
        Action::ChangeMode { path, mode, .. } => {
            fs::set_permissions(at(path), Permissions::from_mode(*mode))
                .told("change the mode of", &at(path))
        }
    }
}

fn append(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = OpenOptions::new()
        .append(true)
        .open(path)
        .told("open", path)?;
    let written = file.write(bytes).told("append to", path)?;
    whole(written, bytes, path)
}

fn overwrite(path: &Path, bytes: &[u8], index: u32) -> Result<(), Error> {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .told("open", path)?;
    let offset = u64::from(index) * bytes.len() as u64;
    let written = file.write_at(bytes, offset).told("overwrite", path)?;
    whole(written, bytes, path)
}

/// A short write would need a second system call: it ends the stream instead.
fn whole(written: usize, bytes: &[u8], path: &Path) -> Result<(), Error> {
    if written == bytes.len() {
        return Ok(());
    }
    Err(std::io::Error::from(std::io::ErrorKind::WriteZero)).told("write a whole block to", path)
}

/// Appends whole lines to the log, each batch with one `write`.
struct LogWriter {
    file: File,
    path: PathBuf,
    waiting: Vec<u8>,
    lines: u64,
    since: Instant,
    buffered_max: u64,
}

impl LogWriter {
    fn create(path: &Path, header: &Header) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(path)
            .told("create the log (an older one is not overwritten)", path)?;
        let mut writer = Self {
            file,
            path: path.to_owned(),
            waiting: Vec::new(),
            lines: 0,
            since: Instant::now(),
            buffered_max: header.buffered_max,
        };
        writer.line(header)?;
        writer.flush()?;
        Ok(writer)
    }

    fn line(&mut self, line: &impl serde::Serialize) -> Result<(), Error> {
        serde_json::to_writer(&mut self.waiting, line).told("write a line of", &self.path)?;
        self.waiting.push(b'\n');
        Ok(())
    }

    /// Takes an operation that returned.
    fn push(&mut self, operation: Operation) -> Result<(), Error> {
        if self.lines == 0 {
            self.since = Instant::now();
        }
        self.line(&Line {
            returned_at_ns: now_ns(),
            operation,
        })?;
        self.lines += 1;
        if self.lines >= self.buffered_max || self.since.elapsed() >= BUFFERED_FOR_MAX {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.file
            .write_all(&self.waiting)
            .told("write the log", &self.path)?;
        self.waiting.clear();
        self.lines = 0;
        Ok(())
    }
}

fn now_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
