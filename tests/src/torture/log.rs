//! What a thread notes outside of the volume: a line for each operation that returned, `ok` or the
//! error's number, written at once. The operations themselves follow from the seed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::Case;
use crate::error::{Error, Told as _};

/// Where the log of a thread lies.
#[must_use]
pub(super) fn path(directory: &Path, case: &Case, thread: u64) -> PathBuf {
    directory.join(format!("{case}.t{thread}"))
}

/// Whether each operation that returned succeeded, in their order; a last line without its end is
/// not there.
pub(super) fn load(path: &Path) -> Result<Vec<bool>, Error> {
    let text = fs::read_to_string(path).told("read", path)?;
    let lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    Ok(lines.map(|line| line.trim_end() == "ok").collect())
}

/// The writing end.
pub(super) struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    pub(super) fn create(path: PathBuf) -> Result<Self, Error> {
        let file = OpenOptions::new().append(true).create_new(true).open(&path);
        let file = file.told("create the log (an older one is not overwritten)", &path)?;
        Ok(Self { file, path })
    }

    pub(super) fn note(&mut self, result: &io::Result<()>) -> Result<(), Error> {
        let line = match result {
            Ok(()) => "ok\n".to_owned(),
            Err(error) => format!("{}\n", error.raw_os_error().unwrap_or_default()),
        };
        let written = self.file.write_all(line.as_bytes());
        written.told("write the log", &self.path)
    }
}
