//! Size and space.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, ioctl_ficlone};

use super::{BASE, BASE_BYTES, Group, Probe, Work, base, nothing, pattern};

const fn probe(name: &'static str, prepare: Work, act: Work) -> Probe {
    Probe {
        name,
        group: Group::Space,
        prepare,
        act,
    }
}

pub(super) const PROBES: &[Probe] = &[
    probe("truncate-shorter", nothing, |dir| {
        base(dir)?.set_len(10_001)
    }),
    probe("truncate-longer", nothing, |dir| {
        base(dir)?.set_len(1 << 20)
    }),
    probe("truncate-by-path", nothing, |dir| {
        Ok(nix::unistd::truncate(&dir.join(BASE), 123)?)
    }),
    probe("open-truncate", nothing, |dir| {
        File::create(dir.join(BASE)).map(drop)
    }),
    probe("fallocate", nothing, |dir| {
        allocate(dir, FallocateFlags::empty(), BASE_BYTES as u64, 1 << 20)
    }),
    probe("fallocate-keep-size-and-write", nothing, |dir| {
        allocate(dir, FallocateFlags::KEEP_SIZE, BASE_BYTES as u64, 1 << 20)?;
        super::overwrite(&base(dir)?, 5, 4_000, BASE_BYTES as u64)
    }),
    probe("punch-hole", nothing, |dir| {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        allocate(dir, mode, 4_000, 20_000)
    }),
    probe("zero-range", nothing, |dir| {
        allocate(dir, FallocateFlags::ZERO_RANGE, 4_000, 20_000)
    }),
    probe("zero-range-beyond-the-end", nothing, |dir| {
        allocate(
            dir,
            FallocateFlags::ZERO_RANGE,
            BASE_BYTES as u64 - 100,
            9_000,
        )
    }),
    probe("collapse-range", nothing, |dir| {
        allocate(dir, FallocateFlags::COLLAPSE_RANGE, 65_536, 65_536)
    }),
    probe("insert-range", nothing, |dir| {
        allocate(dir, FallocateFlags::INSERT_RANGE, 65_536, 65_536)
    }),
    probe("reflink", empty_target, |dir| {
        let to = File::options().write(true).open(dir.join("target"))?;
        Ok(ioctl_ficlone(to, base(dir)?)?)
    }),
    probe("reflink-over", clone_target, |dir| {
        let to = File::options().write(true).open(dir.join("target"))?;
        Ok(ioctl_ficlone(to, base(dir)?)?)
    }),
];

fn allocate(directory: &Path, mode: FallocateFlags, at: u64, bytes: u64) -> io::Result<()> {
    Ok(fallocate(base(directory)?, mode, at, bytes)?)
}

fn empty_target(directory: &Path) -> io::Result<()> {
    File::create_new(directory.join("target")).map(drop)
}

fn clone_target(directory: &Path) -> io::Result<()> {
    std::fs::write(directory.join("target"), pattern(8, BASE_BYTES))
}
