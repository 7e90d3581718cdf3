//! What a workload was told about a tree, as JSON lines: a header, then one line for each path and
//! each database.
//!
//! The header counts the lines, so that a manifest that was cut short is never taken for a whole
//! one. A manifest never lies on the volume it describes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Told};
use crate::escape::PathBytes;

/// Version of the manifest's lines.
pub const MANIFEST_VERSION: u32 = 2;
/// Content is checked in blocks of this many bytes, so that a difference can be counted.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// What a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
}

/// One path of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Path below the volume's root.
    pub path: PathBytes,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Permission bits with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a file or of a symlink's target; 0 for the rest (a directory's is its file system's).
    pub size: u64,
    /// Time of the last modification, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Names the inode has; 0 for directories.
    pub links: u64,
    /// CRC-32C of a file's content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc32c: Option<u32>,
    /// CRC-32C of each [`BLOCK_BYTES`] of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<u32>,
    /// A symlink's target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<PathBytes>,
    /// The first path of those that are the same inode, where it has more than one name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_group: Option<PathBytes>,
    /// A device's number; 0 for the rest.
    #[serde(default)]
    pub rdev: u64,
    /// CRC-32C of each extended attribute's value, ACLs among them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<PathBytes, u32>,
    /// The flags of a file's or directory's inode that its owner can set and clear (`chattr`).
    #[serde(default)]
    pub inode_flags: u32,
}

/// A database and the rows its last acknowledged commit left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// Path below the volume's root.
    pub path: PathBytes,
    /// Rows.
    pub rows: u64,
    /// CRC-32C of the rows in the order of their keys.
    pub rows_crc32c: u32,
    /// Acknowledged commits.
    pub commits: u64,
}

/// What one workload was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Directory below the volume's root that is described; empty for the whole volume.
    pub prefix: PathBytes,
    /// Its paths, sorted.
    pub entries: Vec<Entry>,
    /// The databases in it.
    pub databases: Vec<Database>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
enum Line {
    Header {
        version: u32,
        prefix: PathBytes,
        entries: usize,
        databases: usize,
    },
    Entry(Entry),
    Database(Database),
}

impl Manifest {
    /// Writes the lines.
    ///
    /// # Errors
    /// The writer's.
    pub fn write(&self, mut to: impl Write) -> std::io::Result<()> {
        let header = Line::Header {
            version: MANIFEST_VERSION,
            prefix: self.prefix.clone(),
            entries: self.entries.len(),
            databases: self.databases.len(),
        };
        let entries = self.entries.iter().cloned().map(Line::Entry);
        let databases = self.databases.iter().cloned().map(Line::Database);
        for line in std::iter::once(header).chain(entries).chain(databases) {
            serde_json::to_writer(&mut to, &line)?;
            to.write_all(b"\n")?;
        }
        to.flush()
    }

    /// Writes the file under another name, syncs it and renames it: it is there whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = Path::new(&partial);
        let file = File::create(partial).told("create", partial)?;
        self.write(BufWriter::new(&file)).told("write", partial)?;
        file.sync_all().told("sync", partial)?;
        fs::rename(partial, path).told("put in place", path)
    }

    /// Reads a manifest; refuses one that is not whole.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Format`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).told("open", path)?;
        let bad = |line: usize, reason: String| Error::Format {
            path: path.into(),
            line,
            reason,
        };
        let mut manifest = Self::default();
        let mut counted = None;
        let mut number = 0;
        for text in BufReader::new(file).lines() {
            number += 1;
            let text = text.told("read", path)?;
            let line =
                serde_json::from_str(&text).map_err(|error| bad(number, error.to_string()))?;
            match line {
                Line::Header {
                    version,
                    prefix,
                    entries,
                    databases,
                } => {
                    if version != MANIFEST_VERSION || number != 1 {
                        return Err(bad(number, format!("a header of version {version}")));
                    }
                    counted = Some((entries, databases));
                    manifest.prefix = prefix;
                }
                Line::Entry(entry) => manifest.entries.push(entry),
                Line::Database(database) => manifest.databases.push(database),
            }
        }
        if counted != Some((manifest.entries.len(), manifest.databases.len())) {
            return Err(bad(number, "the manifest is not whole".into()));
        }
        Ok(manifest)
    }
}
