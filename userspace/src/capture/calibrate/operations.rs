//! The known operations, in an order in which each builds on those before it.

use std::fs::{self, File};
use std::io::{IoSlice, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, RenameFlags, linkat, makedev, mknodat, renameat_with,
};
use twinwrite_abi::ATTR_SIZE;

use super::bench::{Bench, done};
use super::known::{Item, Known, atime_ns};
use crate::capture::handle::magic_path;
use crate::capture::{CaptureError, Filesystem};
use crate::record::{flag, op};

const LARGE_BYTES: usize = 300 * 1024;

/// Bytes that differ at every place and from call to call.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    })
    .take(len)
    .collect()
}

fn write_hook(bench: &Bench<'_>) -> &'static str {
    match bench.capture.options().filesystem {
        Filesystem::Ext4 => "generic_perform_write",
        Filesystem::Xfs => "iomap_file_buffered_write",
        Filesystem::Btrfs => "pagecache_isize_extended",
    }
}

fn create_hook(bench: &Bench<'_>) -> &'static str {
    match bench.capture.options().filesystem {
        Filesystem::Ext4 | Filesystem::Btrfs => "d_instantiate_new",
        Filesystem::Xfs => "d_instantiate",
    }
}

/// Finds out where the write hook leaves the file position. The control word is still 0, which
/// takes it for the start.
pub(super) fn find_position(bench: &mut Bench<'_>) -> Result<bool, CaptureError> {
    let (pos, bytes) = (8191, pattern(1, 777));
    let file = done("create", File::create(bench.path("position")))?;
    let item = bench.hold("position")?;
    bench.begin()?;
    done("pwrite", file.write_all_at(&bytes, pos))?;
    let seen = bench.collect()?;
    let end = pos + bytes.len() as u64;
    match seen.as_slice() {
        [(_, known)] if known.header.op == op::WRITE && known.header.pos == pos => Ok(false),
        [(_, known)] if known.header.op == op::WRITE && known.header.pos == end => Ok(true),
        other => Err(CaptureError::Calibration {
            hook: write_hook(bench),
            operation: format!("pwrite of {} bytes at {pos}", bytes.len()),
            expected: format!("one record [{}]", Known::write(&item, pos, &bytes)?),
            seen: other
                .iter()
                .map(|(_, known)| format!("[{known}]"))
                .collect(),
        }),
    }
}

/// Bytes through every shape of write.
pub(super) fn data(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let hook = write_hook(bench);
    let mut file = done("create", File::create(bench.path("file")))?;
    let item = bench.hold("file")?;
    let created = Known::named(op::CREATE, &item, &bench.root, "file")?;
    bench.expect(create_hook(bench), "open with O_CREAT", vec![created])?;
    for (seed, pos, len) in [(2, 5, 777), (3, 8191, 4096), (4, 3, 1), (5, 70_001, 65_537)] {
        let bytes = pattern(seed, len);
        done("pwrite", file.write_all_at(&bytes, pos))?;
        let known = Known::write(&item, pos, &bytes)?;
        bench.expect(
            hook,
            &format!("pwrite of {len} bytes at {pos}"),
            vec![known],
        )?;
    }
    let (one, two, three) = (pattern(6, 1), pattern(7, 300), pattern(8, 5000));
    let slices = [&one[..], &two, &[], &three].map(IoSlice::new);
    done("lseek", file.seek(SeekFrom::Start(20_000)))?;
    let written = done("writev", file.write_vectored(&slices))?;
    let whole = [&one[..], &two, &three].concat();
    let known = Known::write(&item, 20_000, whole.get(..written).unwrap_or(&whole))?;
    bench.expect(hook, "writev of four segments", vec![known])?;

    let end = item.metadata()?.size();
    let bytes = pattern(9, 123);
    let mut appending = done(
        "open",
        File::options().append(true).open(bench.path("file")),
    )?;
    done("append", appending.write_all(&bytes))?;
    let known = Known::write(&item, end, &bytes)?;
    bench.expect(hook, "write with O_APPEND", vec![known])?;

    done(
        "large pwrite",
        file.write_all_at(&pattern(10, LARGE_BYTES), 100_000),
    )?;
    let mut known = Known::write(&item, 100_000, &[])?;
    known.header.data_len = LARGE_BYTES as u32;
    known.header.flags = flag::NO_BYTES;
    bench.expect(hook, "pwrite of 300 KiB", vec![known])
}

/// A mark of `item` over a range.
fn mark(item: &Item, first: u64, last: u64, flags: u8) -> Result<Known, CaptureError> {
    let mut known = Known::expected(op::FSYNC, item)?;
    known.header.pos = first;
    known.header.size_after = last;
    known.header.flags = flags;
    Ok(known)
}

/// fsync, fdatasync and O_DSYNC.
pub(super) fn marks(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    const HOOK: &str = "vfs_fsync_range";
    let whole = i64::MAX as u64;
    let item = bench.hold("file")?;
    let file = done("open", File::options().write(true).open(bench.path("file")))?;
    done("fsync", file.sync_all())?;
    let known = mark(&item, 0, whole, 0)?;
    bench.expect(HOOK, "fsync", vec![known])?;
    done("fdatasync", file.sync_data())?;
    let known = mark(&item, 0, whole, flag::DATASYNC)?;
    bench.expect(HOOK, "fdatasync", vec![known])?;

    let (pos, bytes) = (4000, pattern(11, 999));
    let path = bench.path("file");
    let options = File::options()
        .write(true)
        .custom_flags(libc::O_DSYNC)
        .open(path);
    done(
        "O_DSYNC pwrite",
        options.and_then(|file| file.write_all_at(&bytes, pos)),
    )?;
    let last = pos + bytes.len() as u64 - 1;
    let known = vec![
        Known::write(&item, pos, &bytes)?,
        mark(&item, pos, last, flag::DATASYNC)?,
    ];
    bench.expect(HOOK, "pwrite with O_DSYNC", known)
}

/// Every way a name comes to be.
pub(super) fn names(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let hook = create_hook(bench);
    done("mkdir", fs::create_dir(bench.path("directory")))?;
    let item = bench.hold("directory")?;
    let known = Known::named(op::CREATE, &item, &bench.root, "directory")?;
    bench.expect(hook, "mkdir", vec![known])?;

    for (name, mode, device) in [
        ("fifo", libc::S_IFIFO | 0o640, 0),
        ("device", libc::S_IFCHR | 0o600, makedev(1, 3)),
    ] {
        let (format, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode));
        match mknodat(CWD, bench.path(name), format, mode, device) {
            Ok(()) => {
                let item = bench.hold(name)?;
                let known = Known::named(op::CREATE, &item, &bench.root, name)?;
                bench.expect(hook, &format!("mknod of a {name}"), vec![known])?;
            }
            Err(error) => bench.skip(&format!("mknod of a {name}"), error),
        }
    }

    let long = "l".repeat(255);
    for (name, target_len) in [("symlink", 11), (long.as_str(), 700)] {
        let target: String = "/targets/"
            .chars()
            .chain(std::iter::repeat_n('t', target_len))
            .collect();
        done(
            "symlink",
            std::os::unix::fs::symlink(&target, bench.path(name)),
        )?;
        let item = bench.hold(name)?;
        let mut known = Known::named(op::SYMLINK, &item, &bench.root, name)?;
        known.header.data_len = target.len() as u32;
        known.target = target.into_bytes();
        bench.expect("vfs_symlink", "symlink", vec![known])?;
    }

    done(
        "link",
        fs::hard_link(bench.path("file"), bench.path("directory/linked")),
    )?;
    let (item, parent) = (bench.hold("file")?, bench.hold("directory")?);
    let known = Known::named(op::LINK, &item, &parent, "linked")?;
    bench.expect("d_instantiate", "link", vec![known])?;
    unnamed(bench)
}

/// O_TMPFILE, a write to it, and its first name.
fn unnamed(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let options = File::options()
        .read(true)
        .write(true)
        .mode(0o640)
        .custom_flags(libc::O_TMPFILE)
        .open(bench.path("."));
    let file = match options {
        Ok(file) => file,
        Err(error) => {
            bench.skip("O_TMPFILE", error);
            return Ok(());
        }
    };
    let item = Item::hold_file(&file, &bench.path("(unnamed)"))?;
    bench.own(&item);
    let mut known = Known::named(op::TMPFILE, &item, &bench.root, "")?;
    known.header.pos = 0;
    known.header.arg = 0;
    known.names.parent_time_ns = 0;
    bench.expect("d_tmpfile", "open with O_TMPFILE", vec![known])?;

    let bytes = pattern(12, 50);
    done("write to an unnamed file", file.write_all_at(&bytes, 0))?;
    let written = Known::write(&item, 0, &bytes)?;
    done("fsync of an unnamed file", file.sync_all())?;
    let marked = mark(&item, 0, i64::MAX as u64, flag::UNLINKED)?;
    bench.expect(
        "vfs_fsync_range",
        "write and fsync of an unnamed file",
        vec![written, marked],
    )?;

    let source = magic_path(&file);
    let target = bench.path("named");
    done(
        "linkat of an unnamed file",
        linkat(CWD, source, CWD, target, AtFlags::SYMLINK_FOLLOW),
    )?;
    let mut known = Known::named(op::LINK, &item, &bench.root, "named")?;
    known.header.flags = flag::FROM_TMPFILE;
    bench.expect("d_instantiate", "linkat of an unnamed file", vec![known])
}

/// Renames: plain, over a victim, exchanging.
pub(super) fn moves(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    const HOOK: &str = "d_move";
    let (item, parent) = (bench.hold("file")?, bench.hold("directory")?);
    done(
        "rename",
        fs::rename(bench.path("file"), bench.path("directory/moved")),
    )?;
    let known = Known::named(op::RENAME, &item, &bench.root, "file")?;
    let known = known.to(&parent, "moved", None)?;
    bench.expect(HOOK, "rename into a directory", vec![known])?;

    done("create", File::create(bench.path("victim")))?;
    let victim = bench.hold("victim")?;
    bench.begin()?;
    done(
        "rename",
        fs::rename(bench.path("directory/moved"), bench.path("victim")),
    )?;
    let known = Known::named(op::RENAME, &item, &parent, "moved")?;
    let known = known.to(&bench.root, "victim", Some(&victim))?;
    bench.expect(HOOK, "rename over a file", vec![known])?;

    let (left, right) = (bench.path("victim"), bench.path("directory/linked"));
    done(
        "create",
        fs::remove_file(&right).and_then(|()| File::create(&right)),
    )?;
    let other = bench.hold("directory/linked")?;
    bench.begin()?;
    let exchange = || renameat_with(CWD, &left, CWD, &right, RenameFlags::EXCHANGE);
    match exchange() {
        Ok(()) => {
            let known = Known::named(op::EXCHANGE, &item, &bench.root, "victim")?;
            let known = known.to(&parent, "linked", Some(&other))?;
            bench.expect("d_exchange", "rename with RENAME_EXCHANGE", vec![known])?;
            done("rename back", exchange())?;
            bench.begin()
        }
        Err(error) => {
            bench.skip("RENAME_EXCHANGE", error);
            Ok(())
        }
    }
}

/// Every attribute, compared with the state after; `arg` is compared in its size bit only, because
/// which other bits the kernel adds is its own affair.
pub(super) fn attributes(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let item = bench.hold("victim")?;
    let path = bench.path("victim");
    done(
        "truncate",
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(12_345)),
    )?;
    attribute(bench, &item, "ftruncate", ATTR_SIZE)?;
    done(
        "O_TRUNC",
        File::options().write(true).truncate(true).open(&path),
    )?;
    attribute(bench, &item, "open with O_TRUNC", ATTR_SIZE)?;
    done(
        "chmod",
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)),
    )?;
    attribute(bench, &item, "chmod", 0)?;
    match std::os::unix::fs::chown(&path, Some(1234), Some(5678)) {
        Ok(()) => attribute(bench, &item, "chown", 0)?,
        Err(error) => bench.skip("chown", error),
    }
    let past = SystemTime::UNIX_EPOCH + Duration::new(981_173_106, 123_456_789);
    let times = fs::FileTimes::new()
        .set_accessed(past)
        .set_modified(past + Duration::from_secs(7));
    done(
        "utimes",
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_times(times)),
    )?;
    attribute(bench, &item, "utimensat", 0)
}

fn attribute(
    bench: &mut Bench<'_>,
    item: &Item,
    operation: &str,
    size_bit: u64,
) -> Result<(), CaptureError> {
    const HOOK: &str = "notify_change";
    let metadata = item.metadata()?;
    let mut known = Known::expected(op::SETATTR, item)?;
    known.attributes.atime_ns = atime_ns(&metadata);
    known.attributes.uid = metadata.uid();
    known.attributes.gid = metadata.gid();
    known.attributes.nlink = metadata.nlink() as u32;
    let mut seen = bench.collect()?;
    if let [(_, seen)] = seen.as_mut_slice()
        && seen.header.arg & ATTR_SIZE == size_bit
    {
        known.header.arg = seen.header.arg;
    }
    bench.compare(HOOK, operation, &[known], &seen)
}

/// unlink and rmdir.
pub(super) fn removals(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    const HOOK: &str = "d_delete";
    let parent = bench.hold("directory")?;
    for (operation, path, name) in [
        ("unlink", "directory/linked", "linked"),
        ("unlink of a symlink", "symlink", "symlink"),
        ("unlink of a fifo", "fifo", "fifo"),
    ] {
        if !bench.path(path).exists() && fs::symlink_metadata(bench.path(path)).is_err() {
            continue;
        }
        let item = bench.hold(path)?;
        bench.begin()?;
        done(operation, fs::remove_file(bench.path(path)))?;
        let directory = if path == name { &bench.root } else { &parent };
        let known = Known::named(op::UNLINK, &item, directory, name)?;
        bench.expect(HOOK, operation, vec![known])?;
    }
    done("rmdir", fs::remove_dir(bench.path("directory")))?;
    let known = Known::named(op::UNLINK, &parent, &bench.root, "directory")?;
    bench.expect(HOOK, "rmdir", vec![known])
}
