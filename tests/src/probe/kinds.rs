//! Files of which a file system keeps the bytes in another way than of others.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::{BASE_BYTES, Group, Probe, Work, pattern};

/// What is written; a direct write may begin and end at its bounds.
const BLOCK_BYTES: usize = 4096;
const NAME: &str = "of-a-kind";

const fn probe(name: &'static str, prepare: Work, act: Work) -> Probe {
    Probe {
        name,
        group: Group::Data,
        prepare,
        act,
    }
}

pub(super) const PROBES: &[Probe] = &[
    probe("write-in-place", in_place, |dir| {
        of_kind(dir, IFlags::NOCOW, 0)?.write_all_at(&pattern(2, 6_000), 10)
    }),
    probe("direct-in-place", in_place, |dir| {
        let file = of_kind(dir, IFlags::NOCOW, libc::O_DIRECT)?;
        file.write_all_at(&Block([2; BLOCK_BYTES]).0, BLOCK_BYTES as u64)
    }),
    probe("write-compressed", compressed, |dir| {
        of_kind(dir, IFlags::COMPRESSED, 0)?.write_all_at(&[2; 100_000], 10)
    }),
];

/// Where a direct write may take its bytes from.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

fn in_place(directory: &Path) -> io::Result<()> {
    make(directory, IFlags::NOCOW)
}

fn compressed(directory: &Path) -> io::Result<()> {
    make(directory, IFlags::COMPRESSED)
}

/// A file of this kind, or, where there is no such kind, any.
fn make(directory: &Path, kind: IFlags) -> io::Result<()> {
    let file = File::create(directory.join(NAME))?;
    if let Ok(flags) = ioctl_getflags(&file) {
        let _ = ioctl_setflags(&file, flags | kind);
    }
    file.write_all_at(&pattern(1, BASE_BYTES), 0)
}

/// The file, if it is of this kind.
fn of_kind(directory: &Path, kind: IFlags, open_flags: i32) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(open_flags)
        .open(directory.join(NAME))?;
    if ioctl_getflags(&file).is_ok_and(|flags| flags.contains(kind)) {
        Ok(file)
    } else {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}
