//! Carrying an operation out that changes a file's bytes or size.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek as _, SeekFrom, Write as _};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::sendfile::sendfile;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate, ioctl_ficlone};
use rustix::io::{ReadWriteFlags, pwritev2};

use super::act::Hands;
use super::action::{Action, AllocateWay, CopyWay, Fill, ResizeWay, Target, WriteWay};
use crate::mapping::Mapping;

/// Where a direct write may begin, and what its length is a multiple of.
pub(super) const SECTOR_BYTES: usize = 4096;

pub(super) fn carry_out(hands: &Hands, action: &Action) -> io::Result<()> {
    match action {
        Action::Write {
            target,
            way,
            at,
            fill,
        } => write(hands, target, *way, *at, *fill),
        Action::Copy {
            from,
            from_at,
            target,
            at,
            bytes,
            way,
        } => {
            let from = hands.file(&Target::Path(from.clone()), 0)?;
            let to = hands.file(target, 0)?;
            copy(&from, *from_at, &to, *at, *bytes, *way)
        }
        Action::Reflink { from, target } => {
            let from = hands.file(&Target::Path(from.clone()), 0)?;
            Ok(ioctl_ficlone(&*hands.file(target, 0)?, &*from)?)
        }
        Action::Store {
            target,
            at,
            fill,
            sync,
        } => store(&*hands.file(target, 0)?, *at, *fill, *sync),
        Action::Resize { target, bytes, way } => resize(hands, target, *bytes, *way),
        Action::Allocate {
            target,
            at,
            bytes,
            way,
        } => {
            let mode = match way {
                AllocateWay::Plain => FallocateFlags::empty(),
                AllocateWay::KeepSize => FallocateFlags::KEEP_SIZE,
                AllocateWay::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                AllocateWay::Zero => FallocateFlags::ZERO_RANGE,
            };
            Ok(fallocate(&*hands.file(target, 0)?, mode, *at, *bytes)?)
        }
        _ => Ok(()),
    }
}

fn write(hands: &Hands, target: &Target, way: WriteWay, at: u64, fill: Fill) -> io::Result<()> {
    let flags = match way {
        WriteWay::Append => libc::O_APPEND,
        WriteWay::Sync => libc::O_SYNC,
        WriteWay::DataSync => libc::O_DSYNC,
        WriteWay::Direct => libc::O_DIRECT,
        _ => 0,
    };
    let file = hands.file(target, flags)?;
    let mut file = &*file;
    let content = fill.content();
    match way {
        WriteWay::Plain => {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&content)
        }
        WriteWay::Append => file.write_all(&content),
        WriteWay::At | WriteWay::Sync | WriteWay::DataSync => file.write_all_at(&content, at),
        WriteWay::Vector => {
            file.seek(SeekFrom::Start(at))?;
            whole(file.write_vectored(&parts(&content))?, &content)
        }
        WriteWay::VectorAt => {
            let flags = ReadWriteFlags::empty();
            whole(pwritev2(file, &parts(&content), at, flags)?, &content)
        }
        WriteWay::VectorAppend => {
            let flags = ReadWriteFlags::APPEND;
            whole(pwritev2(file, &parts(&content), 0, flags)?, &content)
        }
        WriteWay::Direct => {
            let mut bytes = vec![0; content.len() + SECTOR_BYTES];
            let begin = bytes.as_ptr().align_offset(SECTOR_BYTES);
            let aligned = bytes.get_mut(begin..begin + content.len());
            let aligned = aligned.ok_or(io::ErrorKind::InvalidInput)?;
            aligned.copy_from_slice(&content);
            file.write_all_at(aligned, at)
        }
    }
}

/// Three, of which none begins on a page.
fn parts(content: &[u8]) -> [IoSlice<'_>; 3] {
    let (first, rest) = content.split_at(content.len() / 5);
    let (second, third) = rest.split_at(rest.len() / 3);
    [first, second, third].map(IoSlice::new)
}

/// A vector is not written on from its middle: the model knows whole operations only.
fn whole(written: usize, content: &[u8]) -> io::Result<()> {
    if written == content.len() {
        return Ok(());
    }
    Err(io::ErrorKind::WriteZero.into())
}

fn copy(
    from: &File,
    from_at: u64,
    mut to: &File,
    at: u64,
    bytes: usize,
    way: CopyWay,
) -> io::Result<()> {
    let (mut from_at, mut at, mut left) = (from_at, at, bytes);
    if way == CopyWay::Sendfile {
        to.seek(SeekFrom::Start(at))?;
    }
    let signed = |at: u64| i64::try_from(at).map_err(io::Error::other);
    let (reader, writer) = io::pipe()?;
    while left > 0 {
        let done = match way {
            CopyWay::Sendfile => {
                let mut offset = signed(from_at)?;
                sendfile(to, from, Some(&mut offset), left)?
            }
            CopyWay::Splice => {
                let (mut source, flags) = (signed(from_at)?, SpliceFFlags::empty());
                let piped = splice(from, Some(&mut source), &writer, None, left, flags)?;
                let mut drained = 0;
                while drained < piped {
                    let mut offset = signed(at + drained as u64)?;
                    let left = piped - drained;
                    drained += splice(&reader, None, to, Some(&mut offset), left, flags)?;
                }
                piped
            }
            CopyWay::CopyRange => {
                let (mut source, mut offset) = (from_at, at);
                copy_file_range(from, Some(&mut source), to, Some(&mut offset), left)?
            }
        };
        if done == 0 {
            break;
        }
        (from_at, at, left) = (from_at + done as u64, at + done as u64, left - done);
    }
    Ok(())
}

fn store(file: &File, at: u64, fill: Fill, sync: bool) -> io::Result<()> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let index = |number: u64| usize::try_from(number).map_err(|_| invalid());
    let length = NonZeroUsize::new(index(file.metadata()?.len())?).ok_or_else(invalid)?;
    let mut mapping = Mapping::new(file, length)?;
    let at = index(at)?;
    if !mapping.store(at, &fill.content()) {
        return Err(invalid());
    }
    if sync {
        let page = at / SECTOR_BYTES * SECTOR_BYTES;
        mapping.sync(page, at + fill.bytes - page)?;
    }
    Ok(())
}

fn resize(hands: &Hands, target: &Target, bytes: u64, way: ResizeWay) -> io::Result<()> {
    match (way, target) {
        (ResizeWay::Path, Target::Path(path)) => {
            let bytes = i64::try_from(bytes).map_err(io::Error::other)?;
            Ok(nix::unistd::truncate(&hands.at(path), bytes)?)
        }
        (ResizeWay::Open, Target::Path(path)) => {
            let mut options = OpenOptions::new();
            let options = options.write(true).truncate(true);
            // A pipe without a reader would wait for one.
            let options = options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
            options.open(hands.at(path)).map(drop)
        }
        _ => hands.file(target, 0)?.set_len(bytes),
    }
}
