//! Copying a bounded part of a real tree with plain reads and writes, in a fixed order.
//!
//! It must not use `std::fs::copy` or `std::io::copy`: those clone where the file system can.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use crate::error::{Error, Told};
use crate::walk::fill;

/// Files of a size class that are copied at most: below so many bytes, so many files.
///
/// The classes keep the whole below 48 MiB and still take real libraries and programs along.
const CLASSES: [(u64, usize); 3] = [(16 << 10, 2_100), (64 << 10, 150), (1 << 20, 5)];
/// Symlinks copied at most.
const SYMLINKS_MAX: usize = 400;
/// Reads and writes use this odd size, so that writes straddle pages.
const CHUNK_BYTES: usize = 60_001;

/// What of the source is copied, in the order of the walk.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    directories: BTreeSet<PathBuf>,
    files: Vec<PathBuf>,
    symlinks: Vec<PathBuf>,
}

/// What was copied, as paths of the copies.
#[derive(Debug, Default)]
pub(super) struct Copied {
    pub(super) files: Vec<PathBuf>,
    pub(super) directories: Vec<PathBuf>,
    pub(super) symlinks: Vec<PathBuf>,
    pub(super) bytes: u64,
}

/// Walks the source in the order of its names until every size class is full.
pub(super) fn choose(source: &Path, files_min: usize) -> Result<Chosen, Error> {
    let mut chosen = Chosen::default();
    let mut room = CLASSES.map(|(_, files)| files);
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        if room == [0; CLASSES.len()] {
            break;
        }
        let full = source.join(&path);
        let Ok(metadata) = fs::symlink_metadata(&full) else {
            continue;
        };
        if metadata.is_dir() {
            pending.extend(
                children(&full)?
                    .into_iter()
                    .rev()
                    .map(|name| path.join(name)),
            );
        } else if metadata.is_symlink() && chosen.symlinks.len() < SYMLINKS_MAX {
            chosen.take_parents(&path);
            chosen.symlinks.push(path);
        } else if metadata.is_file() && fits(metadata.len(), &mut room) {
            chosen.take_parents(&path);
            chosen.files.push(path);
        }
    }
    if chosen.files.len() < files_min {
        let found = chosen.files.len();
        return Err(Error::Source {
            path: source.into(),
            found,
            wanted: files_min,
        });
    }
    Ok(chosen)
}

impl Chosen {
    fn take_parents(&mut self, path: &Path) {
        self.directories
            .extend(path.ancestors().skip(1).map(Path::to_owned));
    }
}

fn children(directory: &Path) -> Result<Vec<std::ffi::OsString>, Error> {
    let mut names = Vec::new();
    for child in fs::read_dir(directory).told("list", directory)? {
        names.push(child.told("list", directory)?.file_name());
    }
    names.sort();
    Ok(names)
}

/// Takes a place of the file's size class; `false` if there is none left.
fn fits(len: u64, room: &mut [usize]) -> bool {
    let class = CLASSES
        .iter()
        .zip(room)
        .find(|((limit, _), _)| len <= *limit);
    match class {
        Some((_, left)) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    }
}

/// Copies what was chosen to `to`; directories get their times last.
pub(super) fn copy(source: &Path, chosen: &Chosen, to: &Path) -> Result<Copied, Error> {
    let mut copied = Copied::default();
    for path in &chosen.directories {
        let target = at(to, path);
        fs::create_dir(&target).told("make directory", &target)?;
        copied.directories.push(target);
    }
    for path in &chosen.files {
        let target = at(to, path);
        copied.bytes += copy_file(&source.join(path), &target)?;
        copied.files.push(target);
    }
    for path in &chosen.symlinks {
        let target = at(to, path);
        copy_symlink(&source.join(path), &target)?;
        copied.symlinks.push(target);
    }
    for path in chosen.directories.iter().rev() {
        let from = source.join(path);
        let metadata = fs::metadata(&from).told("look at", &from)?;
        let target = at(to, path);
        attributes(
            &File::open(&target).told("open", &target)?,
            &target,
            &metadata,
        )?;
    }
    Ok(copied)
}

/// `to/path`, without a trailing slash for the empty path.
fn at(to: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() {
        to.to_owned()
    } else {
        to.join(path)
    }
}

fn copy_file(from: &Path, to: &Path) -> Result<u64, Error> {
    let mut source = File::open(from).told("open", from)?;
    let metadata = source.metadata().told("look at", from)?;
    let mut target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .told("create", to)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let got = fill(&mut source, &mut buffer).told("read", from)?;
        let chunk = buffer.get(..got).unwrap_or_default();
        if chunk.is_empty() {
            break;
        }
        target.write_all(chunk).told("write", to)?;
        bytes += chunk.len() as u64;
    }
    attributes(&target, to, &metadata)?;
    Ok(bytes)
}

/// Owner first: a chown clears set-id bits.
fn attributes(target: &File, path: &Path, like: &Metadata) -> Result<(), Error> {
    fchown(target, Some(like.uid()), Some(like.gid())).told("change the owner of", path)?;
    target
        .set_permissions(Permissions::from_mode(like.mode() & 0o7777))
        .told("change the mode of", path)?;
    let modified = like.modified().told("read the time of", path)?;
    target
        .set_times(
            FileTimes::new()
                .set_accessed(modified)
                .set_modified(modified),
        )
        .told("set the times of", path)
}

fn copy_symlink(from: &Path, to: &Path) -> Result<(), Error> {
    let target = fs::read_link(from).told("read link", from)?;
    let metadata = fs::symlink_metadata(from).told("look at", from)?;
    symlink(target, to).told("make symlink", to)?;
    lchown(to, Some(metadata.uid()), Some(metadata.gid())).told("change the owner of", to)?;
    let time = TimeSpec::new(metadata.mtime(), metadata.mtime_nsec());
    utimensat(
        nix::fcntl::AT_FDCWD,
        to,
        &time,
        &time,
        UtimensatFlags::NoFollowSymlink,
    )
    .told("set the times of", to)
}
