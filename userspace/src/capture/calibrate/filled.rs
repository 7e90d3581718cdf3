//! Changes whose records hold no bytes, because the agent fills them: extended state, ranges, mapped pages.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use rustix::fs::{
    FallocateFlags, IFlags, XattrFlags, fallocate, fremovexattr, fsetxattr, ioctl_ficlone,
    ioctl_getflags, ioctl_setflags,
};
use twinwrite_abi::{EXTENDED_BYTES_MAX, MAPPED_PAGE_BYTES};

use super::bench::{BLOCK_BYTES, Bench, done};
use super::btrfs;
use super::gaps::store;
use super::known::{Item, Known};
use crate::capture::probe::bpf_lsm_active;
use crate::capture::{CaptureError, Filesystem, handle};
use crate::record::{flag, op};

/// fallocate's modes, a direct write and a reflink.
pub(super) fn ranges(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let file = bench.file_of_blocks("ranges")?;
    let item = bench.hold("ranges")?;
    bench.begin()?;
    let block = BLOCK_BYTES as u64;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (plain, zero) = (FallocateFlags::empty(), FallocateFlags::ZERO_RANGE);
    for (operation, mode, pos, bytes, told, grown_to) in [
        ("fallocate", plain, 0, 8 * block, 0, 8 * block),
        ("punch a hole", punch, block, block, block, 0),
        ("zero a range", zero, 0, block, block, block),
        (
            "punch beyond the end",
            punch,
            7 * block,
            9 * block,
            block,
            0,
        ),
    ] {
        if let Err(error) = fallocate(&file, mode, pos, bytes) {
            bench.skip(operation, error);
            continue;
        }
        let known = range(&item, if told == 0 { 0 } else { pos }, told, grown_to)?;
        bench.expect("vfs_fallocate", operation, vec![known])?;
    }
    direct(bench, &item, 2 * block)?;
    reflink(bench, &file, 8 * block)
}

#[repr(C, align(4096))]
struct AlignedBlock([u8; BLOCK_BYTES]);

fn direct(bench: &mut Bench<'_>, item: &Item, pos: u64) -> Result<(), CaptureError> {
    let own;
    let (name, item) = if bench.capture.options().filesystem == Filesystem::Btrfs {
        own = btrfs::direct_file(bench)?;
        (btrfs::DIRECT, &own)
    } else {
        ("ranges", item)
    };
    let written = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(bench.path(name))
        .and_then(|file| file.write_all_at(&AlignedBlock([9; BLOCK_BYTES]).0, pos));
    if let Err(error) = written {
        bench.skip("write with O_DIRECT", error);
        return Ok(());
    }
    let bytes = BLOCK_BYTES as u64;
    let known = range(item, pos, bytes, pos + bytes)?;
    bench.expect("iomap_dio_complete", "write with O_DIRECT", vec![known])
}

fn reflink(bench: &mut Bench<'_>, from: &File, bytes: u64) -> Result<(), CaptureError> {
    let target = done("create", File::create(bench.path("reflink")))?;
    let item = bench.hold("reflink")?;
    bench.begin()?;
    if let Err(error) = ioctl_ficlone(&target, from) {
        bench.skip("FICLONE", error);
        return Ok(());
    }
    let known = range(&item, 0, bytes, bytes)?;
    bench.expect("vfs_clone_file_range", "FICLONE", vec![known])
}

/// A page that is stored into through a mapping, and the snapshot of it that the agent asks for.
pub(super) fn mapped(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    if !bpf_lsm_active() {
        bench.skip("a snapshot of a mapped page", "BPF LSM is not in use");
        return Ok(());
    }
    let page = MAPPED_PAGE_BYTES;
    let file = bench.file_of_blocks("mapped")?;
    let item = bench.hold("mapped")?;
    bench.begin()?;
    if let Err(error) = store(&file, 1, false) {
        bench.skip("a store through a shared mapping", error);
        return Ok(());
    }
    let mut known = range(&item, page, 0, 0)?;
    known.header.flags |= flag::MAPPED;
    known.header.arg = page;
    bench.expect(
        "do_page_mkwrite",
        "a store through a shared mapping",
        vec![known],
    )?;
    handle::ask_for_snapshot(&file, 1, 2);
    let mut known = range(&item, page, 2 * page, 0)?;
    known.header.flags |= flag::MAPPED;
    bench.expect("file_ioctl", "a snapshot of mapped pages", vec![known])
}

/// A WRITE whose `bytes` at `pos` are to be filled; without any it tells only that the file has grown.
fn range(item: &Item, pos: u64, bytes: u64, grown_to: u64) -> Result<Known, CaptureError> {
    let mut known = Known::expected(op::WRITE, item)?;
    // Told without the inode's lock.
    known.header.mode = 0;
    known.header.pos = pos;
    known.header.data_len = bytes as u32;
    known.header.size_after = grown_to;
    known.header.flags = flag::SIZE_RAISES;
    if bytes != 0 {
        known.header.flags |= flag::NO_BYTES;
    }
    Ok(known)
}

/// Extended attributes, ACLs and flags.
pub(super) fn extended(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    let file = done("create", File::create(bench.path("extended")))?;
    let item = bench.hold("extended")?;
    bench.begin()?;
    let name = c"user.twinwrite";
    told(bench, &item, "__vfs_setxattr_noperm", "setxattr", || {
        fsetxattr(&file, name, b"1", XattrFlags::empty())
    })?;
    told(bench, &item, "__vfs_removexattr", "removexattr", || {
        fremovexattr(&file, name)
    })?;
    told(bench, &item, "vfs_fileattr_set", "FS_IOC_SETFLAGS", || {
        ioctl_setflags(&file, ioctl_getflags(&file)? | IFlags::NODUMP)
    })?;
    inherited_acl(bench)
}

/// A directory gets a default ACL, then a file is created in it.
fn inherited_acl(bench: &mut Bench<'_>) -> Result<(), CaptureError> {
    // Version 2; owner rwx, owning group r-x, others none (include/uapi/linux/posix_acl_xattr.h).
    let entries: [(u16, u16); 3] = [(0x01, 7), (0x04, 5), (0x20, 0)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    done("mkdir", std::fs::create_dir(bench.path("acl")))?;
    let directory = bench.hold("acl")?;
    let opened = done("open", File::open(bench.path("acl")))?;
    bench.begin()?;
    let name = c"system.posix_acl_default";
    let was_set = told(
        bench,
        &directory,
        "vfs_set_acl",
        "set a default ACL",
        || fsetxattr(&opened, name, &acl, XattrFlags::empty()),
    )?;
    if !was_set || bench.is_new_told {
        return Ok(());
    }
    done("create", File::create(bench.path("acl/heir")))?;
    let heir = bench.hold("acl/heir")?;
    let seen = bench.collect()?;
    let created = Known::named(op::CREATE, &heir, &directory, "heir")?;
    let expected = [created, state(&heir)?];
    let operation = "create a file that inherits an ACL";
    bench.compare("d_instantiate", operation, &expected, &seen)
}

fn state(item: &Item) -> Result<Known, CaptureError> {
    let mut known = Known::expected(op::EXTENDED, item)?;
    known.header.flags = flag::NO_BYTES;
    known.header.data_len = EXTENDED_BYTES_MAX;
    Ok(known)
}

/// Does `act` and demands that it is told, once or twice: one function calls another that is hooked, too.
/// False if it cannot be done here.
fn told(
    bench: &mut Bench<'_>,
    item: &Item,
    hook: &'static str,
    operation: &str,
    act: impl FnOnce() -> rustix::io::Result<()>,
) -> Result<bool, CaptureError> {
    if let Err(error) = act() {
        bench.skip(operation, error);
        return Ok(false);
    }
    let expected = state(item)?;
    let mut seen = bench.collect()?;
    seen.dedup_by(|(_, a), (_, b)| a == b);
    bench.compare(hook, operation, &[expected], &seen)?;
    Ok(true)
}
