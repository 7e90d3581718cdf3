//! One file of blocks, overwritten in place, each time by another way to ask for durability.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::io::ReadWriteFlags;

use super::history::Reach;
use super::sector::{BLOCK_BYTES, block};
use super::{Case, Run};
use crate::error::{Error, Told as _};
use crate::mapping::Mapping;
use crate::random::Random;

/// Blocks of the file: each is a cell.
pub(super) const BLOCKS: u32 = 48;
const FILE: &str = "blocks";

/// The file below a run's directory.
pub(super) fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

/// The file, opened in all ways that are needed.
struct Blocks<'a> {
    run: Run<'a>,
    path: PathBuf,
    plain: File,
    data_sync: File,
    sync: File,
    direct: File,
    direct_sync: File,
    mapping: Option<Mapping>,
    aligned: Vec<u8>,
}

pub(super) fn follow(run: Run<'_>) -> Result<(), Error> {
    let mut blocks = Blocks::open(run)?;
    blocks.write_all_durably()
}

pub(super) fn run(run: Run<'_>, random: &mut Random) -> Result<(), Error> {
    let case = run.options.case;
    let mut blocks = Blocks::open(run)?;
    blocks.older_content(random)?;
    blocks.run.wait()?;
    if case == Case::Msync {
        let bytes = NonZeroUsize::new(BLOCKS as usize * BLOCK_BYTES).unwrap_or(NonZeroUsize::MIN);
        let mapping = Mapping::new(&blocks.plain, bytes);
        blocks.mapping = Some(mapping.told("map", &blocks.path)?);
    }
    loop {
        match case {
            Case::SyncWrite => blocks.sync_write(random)?,
            Case::Direct => blocks.direct_write(random)?,
            Case::Msync => blocks.store(random)?,
            _ => blocks.write_and_sync(random)?,
        }
        blocks.run.pause(random);
    }
}

impl<'a> Blocks<'a> {
    fn open(run: Run<'a>) -> Result<Self, Error> {
        run.make_directory()?;
        let path = path(run.directory());
        let open = |flags: i32| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.custom_flags(flags).open(&path).told("open", &path)
        };
        Ok(Self {
            plain: open(0)?,
            data_sync: open(libc::O_DSYNC)?,
            sync: open(libc::O_SYNC)?,
            direct: open(libc::O_DIRECT)?,
            direct_sync: open(libc::O_DIRECT | libc::O_DSYNC)?,
            run,
            path,
            mapping: None,
            aligned: vec![0; 2 * BLOCK_BYTES],
        })
    }

    fn write_all_durably(&mut self) -> Result<(), Error> {
        let mut last = 0;
        for cell in 0..BLOCKS {
            last = self.write(cell)?;
        }
        self.plain.sync_all().told("fsync", &self.path)?;
        self.run.log.confirmed(last, Reach::All)
    }

    fn block(&self, cell: u32, version: u64) -> Vec<u8> {
        block(self.run.options.seed, cell, 0, version)
    }

    /// Every block at least once, not flushed; sometimes over a durable file.
    fn older_content(&mut self, random: &mut Random) -> Result<(), Error> {
        if random.below(2) == 0 {
            self.write_all_durably()?;
        }
        for cell in 0..BLOCKS {
            self.write(cell)?;
        }
        for _ in 0..BLOCKS / 4 {
            self.write(random.below(BLOCKS.into()) as u32)?;
        }
        Ok(())
    }

    /// A plain write: confirms nothing.
    fn write(&mut self, cell: u32) -> Result<u64, Error> {
        let version = self.run.log.try_cells(&[cell])?;
        let bytes = self.block(cell, version);
        self.plain
            .write_all_at(&bytes, offset(cell))
            .told("write", &self.path)?;
        Ok(version)
    }

    fn any_cell(random: &mut Random) -> u32 {
        random.below(BLOCKS.into()) as u32
    }

    fn write_and_sync(&mut self, random: &mut Random) -> Result<(), Error> {
        let cell = Self::any_cell(random);
        for _ in 0..random.below(3) {
            self.write(cell)?;
        }
        let mut last = self.write(cell)?;
        if random.below(3) == 0 {
            last = self.write(Self::any_cell(random))?;
        }
        match random.below(20) {
            0 => rustix::fs::sync(),
            1..=3 => nix::unistd::syncfs(&self.plain).told("syncfs", &self.path)?,
            4..=10 => self.plain.sync_data().told("fdatasync", &self.path)?,
            _ => self.plain.sync_all().told("fsync", &self.path)?,
        }
        self.run.log.confirmed(last, Reach::All)
    }

    fn sync_write(&mut self, random: &mut Random) -> Result<(), Error> {
        let cell = Self::any_cell(random);
        if random.below(2) == 0 {
            self.write(cell)?;
        }
        let version = self.run.log.try_cells(&[cell])?;
        let (bytes, at) = (self.block(cell, version), offset(cell));
        match random.below(3) {
            0 => self.data_sync.write_all_at(&bytes, at),
            1 => self.sync.write_all_at(&bytes, at),
            _ => {
                let parts = [IoSlice::new(&bytes)];
                match rustix::io::pwritev2(&self.plain, &parts, at, ReadWriteFlags::DSYNC) {
                    Ok(BLOCK_BYTES) => Ok(()),
                    Ok(_) => Err(std::io::ErrorKind::WriteZero.into()),
                    Err(error) => Err(error.into()),
                }
            }
        }
        .told("write durably", &self.path)?;
        self.run.log.confirmed(version, Reach::Own)
    }

    fn direct_write(&mut self, random: &mut Random) -> Result<(), Error> {
        let cell = Self::any_cell(random);
        if random.below(3) > 0 {
            self.write(cell)?;
        }
        let version = self.run.log.try_cells(&[cell])?;
        let bytes = self.block(cell, version);
        // Direct writes must come from a page's border.
        let begin = self.aligned.as_ptr().align_offset(BLOCK_BYTES);
        let aligned = self.aligned.get_mut(begin..begin + BLOCK_BYTES);
        let aligned = aligned.unwrap_or_default();
        aligned.copy_from_slice(&bytes);
        if random.below(2) == 0 {
            let written = self.direct_sync.write_all_at(aligned, offset(cell));
            written.told("write directly and durably", &self.path)?;
            return self.run.log.confirmed(version, Reach::Own);
        }
        let written = self.direct.write_all_at(aligned, offset(cell));
        written.told("write directly", &self.path)?;
        self.plain.sync_data().told("fdatasync", &self.path)?;
        self.run.log.confirmed(version, Reach::All)
    }

    fn store(&mut self, random: &mut Random) -> Result<(), Error> {
        let cell = Self::any_cell(random);
        if random.below(4) == 0 {
            self.write(cell)?;
        }
        let version = self.run.log.try_cells(&[cell])?;
        let bytes = self.block(cell, version);
        let at = cell as usize * BLOCK_BYTES;
        if let Some(mapping) = &mut self.mapping {
            mapping.store(at, &bytes);
            mapping.sync(at, BLOCK_BYTES).told("msync", &self.path)?;
        }
        self.run.log.confirmed(version, Reach::Own)
    }
}

fn offset(cell: u32) -> u64 {
    u64::from(cell) * BLOCK_BYTES as u64
}
