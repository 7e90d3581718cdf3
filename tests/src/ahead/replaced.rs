//! Small files, each replaced as a whole: a new file is written and fsynced, renamed over the old
//! one, and the directory is fsynced. Now and then one is replaced by a file that was not fsynced: the name
//! may become durable before the bytes, so that after a crash a part of them is there, or nothing.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::Run;
use super::history::Reach;
use super::sector::block;
use crate::error::{Error, Told as _};
use crate::random::Random;

/// Files: each is a cell.
pub(super) const FILES: u32 = 12;
/// Blocks of a file.
pub(super) const BLOCKS_EACH: u32 = 2;

/// A cell's file below a run's directory.
pub(super) fn path(directory: &Path, cell: u32) -> PathBuf {
    directory.join(format!("file{cell}"))
}

pub(super) fn run(mut run: Run<'_>, random: &mut Random) -> Result<(), Error> {
    run.make_directory()?;
    for cell in 0..FILES {
        let version = run.log.try_cells(&[cell])?;
        if random.below(2) == 0 {
            drop(write(&run, &path(run.directory(), cell), cell, version)?);
        } else {
            replace(&run, cell, version, false)?;
        }
    }
    run.wait()?;
    loop {
        let cell = random.below(FILES.into()) as u32;
        if random.below(4) == 0 {
            let version = run.log.try_loosely(&[cell])?;
            replace(&run, cell, version, false)?;
        }
        replace_durably(&mut run, cell)?;
        run.pause(random);
    }
}

pub(super) fn follow(mut run: Run<'_>) -> Result<(), Error> {
    run.make_directory()?;
    (0..FILES).try_for_each(|cell| replace_durably(&mut run, cell))
}

fn replace_durably(run: &mut Run<'_>, cell: u32) -> Result<(), Error> {
    let version = run.log.try_cells(&[cell])?;
    replace(run, cell, version, true)?;
    let directory = File::open(run.directory()).told("open", run.directory())?;
    directory.sync_all().told("fsync", run.directory())?;
    run.log.confirmed(version, Reach::Own)
}

fn write(run: &Run<'_>, path: &Path, cell: u32, version: u64) -> Result<File, Error> {
    let mut file = File::create(path).told("make", path)?;
    for place in 0..BLOCKS_EACH {
        let bytes = block(run.options.seed, cell, place, version);
        file.write_all(&bytes).told("write", path)?;
    }
    Ok(file)
}

fn replace(run: &Run<'_>, cell: u32, version: u64, sync: bool) -> Result<(), Error> {
    let new = run.directory().join("new");
    let file = write(run, &new, cell, version)?;
    if sync {
        file.sync_all().told("fsync", &new)?;
    }
    fs::rename(&new, path(run.directory(), cell)).told("rename", &new)
}
