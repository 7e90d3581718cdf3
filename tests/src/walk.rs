//! The one walker: describes a tree as it shows itself to an application.
//!
//! It never follows a symlink, never stops at the first thing it cannot read, and never changes
//! anything.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, lgetxattr, llistxattr};
use rustix::io::Errno;

use crate::error::Error;
use crate::escape::PathBytes;
use crate::manifest::{BLOCK_BYTES, Entry, Kind, Manifest};
use crate::{AGENT_DIRECTORY, LOST_AND_FOUND};

/// A tree as it was found.
#[derive(Debug, Default)]
pub struct Tree {
    /// Its paths.
    pub entries: BTreeMap<PathBytes, Entry>,
    /// What could not be read, and why.
    pub unreadable: Vec<(PathBytes, String)>,
}

/// The most that a list of extended attributes, or one's value, holds (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 * 1024;
/// Not those by which a file system tells how it keeps the inode.
pub(crate) const COMPARED_FLAGS: IFlags = IFlags::APPEND
    .union(IFlags::IMMUTABLE)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::SYNC)
    .union(IFlags::DIRSYNC)
    .union(IFlags::PROJECT_INHERIT);

/// By these an NFS client shows the mode, as an attribute that is not on the file system.
const NFS_ACL: &[u8] = b"system.nfs4_acl";

/// Names with their inode, to find which are the same file.
type Links = HashMap<(u64, u64), Vec<PathBytes>>;

/// Describes `prefix` below `root`; a prefix that is not there is an empty tree.
///
/// With an empty prefix the whole volume is described but for the root directory itself (twinwrite's
/// own directory changes its times) and what belongs to twinwrite or mkfs.
#[must_use]
pub fn walk(root: &Path, prefix: &Path) -> Tree {
    let mut tree = Tree::default();
    let mut links = Links::new();
    let mut pending = vec![prefix.to_path_buf()];
    while let Some(path) = pending.pop() {
        let key = PathBytes::from(path.as_path());
        match visit(root, &path, &mut links) {
            Ok((entry, children)) => {
                pending.extend(
                    children
                        .into_iter()
                        .map(|name| path.join(name))
                        .filter(kept),
                );
                if !path.as_os_str().is_empty() {
                    tree.entries.insert(key, entry);
                }
            }
            Err(error) if path == prefix && error.kind() == ErrorKind::NotFound => {}
            Err(error) => tree.unreadable.push((key, error.to_string())),
        }
    }
    group(&mut tree.entries, links);
    tree
}

/// Describes `prefix` below `root` as a manifest.
///
/// # Errors
/// [`Error::Unreadable`]: a manifest must be whole.
pub fn describe(root: &Path, prefix: &Path) -> Result<Manifest, Error> {
    let tree = walk(root, prefix);
    if let Some((path, error)) = tree.unreadable.first() {
        return Err(Error::Unreadable {
            path: root.join(prefix),
            count: tree.unreadable.len(),
            first: format!("{path}: {error}"),
        });
    }
    let entries = tree.entries.into_values().collect();
    Ok(Manifest {
        prefix: prefix.into(),
        entries,
        databases: Vec::new(),
    })
}

fn kept(path: &std::path::PathBuf) -> bool {
    path != Path::new(AGENT_DIRECTORY) && path != Path::new(LOST_AND_FOUND)
}

fn visit(
    root: &Path,
    path: &Path,
    links: &mut Links,
) -> io::Result<(Entry, Vec<std::ffi::OsString>)> {
    let full = root.join(path);
    let metadata = fs::symlink_metadata(&full)?;
    let mut entry = attributes(path, &metadata);
    entry.xattrs = xattrs(&full)?;
    if matches!(entry.kind, Kind::File | Kind::Directory) {
        entry.inode_flags = inode_flags(&full)?;
    }
    let mut children = Vec::new();
    match entry.kind {
        Kind::File => (entry.crc32c, entry.blocks) = content(&full)?,
        Kind::Symlink => entry.target = Some(fs::read_link(&full)?.as_path().into()),
        Kind::Directory => {
            for child in fs::read_dir(&full)? {
                children.push(child?.file_name());
            }
        }
        Kind::Fifo | Kind::Socket | Kind::CharacterDevice | Kind::BlockDevice => {}
    }
    if entry.links > 1 {
        links
            .entry((metadata.dev(), metadata.ino()))
            .or_default()
            .push(entry.path.clone());
    }
    Ok((entry, children))
}

fn attributes(path: &Path, metadata: &Metadata) -> Entry {
    let kind = kind_of(metadata);
    let device = matches!(kind, Kind::CharacterDevice | Kind::BlockDevice);
    let sized = matches!(kind, Kind::File | Kind::Symlink);
    Entry {
        path: path.into(),
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: if sized { metadata.size() } else { 0 },
        mtime_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
        links: if kind == Kind::Directory {
            0
        } else {
            metadata.nlink()
        },
        crc32c: None,
        blocks: Vec::new(),
        target: None,
        link_group: None,
        rdev: if device { metadata.rdev() } else { 0 },
        xattrs: BTreeMap::new(),
        inode_flags: 0,
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<PathBytes, u32>> {
    let mut names = vec![0; XATTR_BYTES_MAX];
    let length = match llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        result => result?,
    };
    let mut values = BTreeMap::new();
    let mut value = vec![0; XATTR_BYTES_MAX];
    for name in names
        .get(..length)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
    {
        if name.is_empty() || name == NFS_ACL {
            continue;
        }
        let length = lgetxattr(path, OsStr::from_bytes(name), &mut value)?;
        let crc = crc32c::crc32c(value.get(..length).unwrap_or_default());
        values.insert(PathBytes(name.to_vec()), crc);
    }
    Ok(values)
}

fn inode_flags(path: &Path) -> io::Result<u32> {
    match ioctl_getflags(File::open(path)?) {
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(0),
        result => Ok((result? & COMPARED_FLAGS).bits()),
    }
}

fn kind_of(metadata: &Metadata) -> Kind {
    let file_type = metadata.file_type();
    if file_type.is_dir() {
        Kind::Directory
    } else if file_type.is_symlink() {
        Kind::Symlink
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_socket() {
        Kind::Socket
    } else if file_type.is_char_device() {
        Kind::CharacterDevice
    } else if file_type.is_block_device() {
        Kind::BlockDevice
    } else {
        Kind::File
    }
}

/// Checksum of a file and of each of its blocks.
fn content(path: &Path) -> io::Result<(Option<u32>, Vec<u32>)> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut whole = 0;
    let mut blocks = Vec::new();
    loop {
        let got = fill(&mut file, &mut buffer)?;
        let block = buffer.get(..got).unwrap_or_default();
        if block.is_empty() {
            return Ok((Some(whole), blocks));
        }
        whole = crc32c::crc32c_append(whole, block);
        blocks.push(crc32c::crc32c(block));
    }
}

/// Reads until the buffer is full or the file ends.
pub(crate) fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn group(entries: &mut BTreeMap<PathBytes, Entry>, links: Links) {
    for paths in links.into_values() {
        let first = paths.iter().min().cloned();
        for path in &paths {
            if let Some(entry) = entries.get_mut(path) {
                entry.link_group.clone_from(&first);
            }
        }
    }
}
