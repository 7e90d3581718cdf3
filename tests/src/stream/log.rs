//! The log of operations that returned, one JSON line each, behind a header line.
//!
//! It is read after its writer died at any point: a last line without its end is not there.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::operation::{Generator, Operation};
use crate::error::{Error, Told};

/// Version of the log's lines.
pub const LOG_VERSION: u32 = 1;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`LOG_VERSION`].
    pub stream: u32,
    /// Decides the sequence.
    pub seed: u64,
    /// Operations that may have returned without being in the log yet.
    pub buffered_max: u64,
}

/// An operation that returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Wall clock after it returned, nanoseconds since 1970.
    pub returned_at_ns: i64,
    /// The operation; its action is its expected effect.
    #[serde(flatten)]
    pub operation: Operation,
}

/// A log that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The first line.
    pub header: Header,
    /// The operations it claims to have returned, without holes.
    pub acknowledged: Vec<Line>,
}

impl Log {
    /// Reads a log and holds it against the sequence its seed decides.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Format`] if a line is not the one that must be there.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).told("read", path)?;
        let bad = |line: usize, reason: String| Error::Format {
            path: path.into(),
            line,
            reason,
        };
        let mut lines = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .enumerate();
        let (_, first) = lines
            .next()
            .ok_or_else(|| bad(1, "the log has no header".into()))?;
        let header: Header =
            serde_json::from_str(first).map_err(|error| bad(1, error.to_string()))?;
        if header.stream != LOG_VERSION {
            return Err(bad(1, format!("a log of version {}", header.stream)));
        }
        let mut generator = Generator::new(header.seed);
        let mut acknowledged = Vec::new();
        for (index, text) in lines {
            let line: Line =
                serde_json::from_str(text).map_err(|error| bad(index + 1, error.to_string()))?;
            let expected = generator.next();
            if line.operation != expected {
                let reason = format!("{:?} where the seed says {expected:?}", line.operation);
                return Err(bad(index + 1, reason));
            }
            acknowledged.push(line);
        }
        Ok(Self {
            header,
            acknowledged,
        })
    }

    /// Number of the last operation that may have been carried out: those not yet logged, and one
    /// that was cut off inside its system call.
    #[must_use]
    pub fn last_possible(&self) -> u64 {
        self.acknowledged.len() as u64 + self.header.buffered_max + 1
    }
}
