//! One probe for each operation that a volume can go through.
//!
//! A probe has a directory of its own. [`Stage::Prepare`] makes what the operation needs, and the caller has
//! it flushed; [`Stage::Act`] does the operation alone, and asks for no durability unless that is the operation.
//! What the directory shows then is what a survivor must show; what it showed before is what it shows if
//! the operation was lost. A probe that changes nothing in between could not fail, and is refused.

mod attributes;
mod data;
mod kinds;
mod mappings;
mod names;
mod space;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::error::{Error, Told as _};

/// What every probe finds: a file of this many bytes.
const BASE_BYTES: usize = 256 * 1024;
/// Its name.
const BASE: &str = "base";

/// Probes whose operation makes itself durable, or reaches a disk without a cache by itself.
const DURABLE: &[&str] = &[
    "pwritev2-dsync",
    "pwritev2-sync",
    "open-dsync",
    "open-sync",
    "direct",
    "direct-beyond-the-end",
    "uring-direct",
    "direct-in-place",
    "store-and-msync",
];

/// A kind of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Bytes written, by every way in.
    Data,
    /// Bytes stored through a shared mapping.
    Mappings,
    /// Size and space.
    Space,
    /// Names.
    Names,
    /// Attributes.
    Attributes,
}

type Work = fn(&Path) -> io::Result<()>;

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Its name on the command line and in the table.
    pub name: &'static str,
    /// Its kind.
    pub group: Group,
    prepare: Work,
    act: Work,
}

/// A step of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// Makes what the operation needs.
    Prepare,
    /// Does it.
    Act,
}

/// What became of an operation on the machine that did it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It succeeded.
    Done,
    /// It was refused: `EPERM`.
    Refused,
    /// This file system or kernel does not have it.
    NotOffered {
        /// The system's words.
        reason: String,
    },
}

/// All probes, in the order of the table.
pub fn all() -> impl Iterator<Item = &'static Probe> {
    [
        data::PROBES,
        kinds::PROBES,
        mappings::PROBES,
        space::PROBES,
        names::PROBES,
        attributes::PROBES,
    ]
    .into_iter()
    .flatten()
}

/// The probe of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Probe> {
    all().find(|probe| probe.name == name)
}

impl Probe {
    /// Whether the operation makes itself durable, so that a crash can take nothing of it.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        DURABLE.contains(&self.name)
    }

    /// Carries out one stage in the probe's directory, which [`Stage::Prepare`] makes.
    ///
    /// # Errors
    /// [`Error::File`]: the stage failed otherwise than an [`Outcome`] tells.
    pub fn run(&self, stage: Stage, directory: &Path) -> Result<Outcome, Error> {
        let result = match stage {
            Stage::Prepare => fs::create_dir_all(directory)
                .and_then(|()| fs::write(directory.join(BASE), pattern(1, BASE_BYTES)))
                .and_then(|()| (self.prepare)(directory)),
            Stage::Act => (self.act)(directory),
        };
        match result {
            Ok(()) => Ok(Outcome::Done),
            Err(error) if stage == Stage::Act => match error.raw_os_error() {
                Some(libc::EPERM) => Ok(Outcome::Refused),
                Some(
                    libc::EOPNOTSUPP
                    | libc::ENOTTY
                    | libc::ENOSYS
                    | libc::EINVAL
                    | libc::ENAMETOOLONG,
                ) => {
                    let reason = error.to_string();
                    Ok(Outcome::NotOffered { reason })
                }
                _ => Err(error).told("carry out the probe in", directory),
            },
            Err(error) => Err(error).told("prepare the probe in", directory),
        }
    }
}

/// Bytes that a seed decides, none of them zero.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = crate::random::Random::new(seed);
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        content.extend(random.number().to_le_bytes().map(|byte| byte | 1));
    }
    content.truncate(bytes);
    content
}

/// The base file, to write to.
fn base(directory: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(directory.join(BASE))
}

/// Overwrites a part of the base file.
fn overwrite(file: &File, seed: u64, bytes: usize, at: u64) -> io::Result<()> {
    file.write_all_at(&pattern(seed, bytes), at)
}

fn nothing(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests;
