//! The file that holds a region's memory: on a tmpfs or hugetlbfs, so that it survives the agent.
//!
//! An agent that starts again finds the region as it was. Before a replay the region is saved to a
//! local disk, so that it survives a second crash. This module checks sizes and the header; it
//! never looks into the log, and never changes a region that is not exactly the one expected.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use zerocopy::IntoBytes;

use super::layout::{
    LOG_BYTES_MAX, LOG_BYTES_MIN, LOG_OFFSET, REGION_MAGIC, REGION_VERSION, RegionHeader, Sealed,
    region_state,
};
use crate::link::{MemoryError, SharedMemory};

/// Bytes copied at a time when a region is saved.
const CHUNK_BYTES: usize = 1 << 20;

/// Why a region's file cannot be used.
#[derive(Debug, Error)]
pub enum BackingError {
    /// The memory could not be made, mapped or reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The configuration asks for a log that no region can have.
    #[error(
        "`region_bytes` = {log_bytes} of volume {volume} is not a multiple of 4096 between {LOG_BYTES_MIN} and {LOG_BYTES_MAX}: correct the configuration"
    )]
    LogBytes {
        /// The volume.
        volume: String,
        /// Bytes asked for.
        log_bytes: u64,
    },
    /// A name that does not fit the header or a file name.
    #[error(
        "the {what} name {name:?} is empty, longer than 63 bytes, or has a slash or a zero in it: correct the configuration"
    )]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The header's magic or checksum is wrong.
    #[error(
        "{path} has no valid region header: it is damaged or not a region; it cannot be replayed, and mirroring starts a new one"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Another version wrote the region.
    #[error(
        "{path} has region format {found}, this version reads {REGION_VERSION}: use the twinwrite version that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The header speaks of another log than the file holds.
    #[error(
        "{path} says its log has {said} bytes, but the file holds {held}: it is truncated or damaged"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes the header says.
        said: u64,
        /// Bytes there are.
        held: u64,
    },
    /// The region belongs to something else.
    #[error(
        "{path} is the region of {what} {found:?}, not {wanted:?}: remove the file if it is not needed, or correct the configuration"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the header says.
        found: String,
        /// What was expected.
        wanted: String,
    },
}

/// Whose region it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionIdentity {
    /// Cluster name.
    pub cluster: String,
    /// Volume name.
    pub volume: String,
    /// The node whose records it holds.
    pub owner: String,
    /// The node that holds it.
    pub mirror: String,
    /// UUID of the protected file system; `None` while it is not known.
    pub filesystem_uuid: Option<[u8; 16]>,
}

impl RegionIdentity {
    /// A sealed header with these names.
    ///
    /// # Errors
    /// [`BackingError::Name`].
    pub fn header(
        &self,
        state: u32,
        epoch: u64,
        log_bytes: u64,
    ) -> Result<RegionHeader, BackingError> {
        let header = RegionHeader {
            magic: REGION_MAGIC,
            version: REGION_VERSION,
            state,
            epoch,
            log_bytes,
            cluster: padded("cluster", &self.cluster)?,
            volume: padded("volume", &self.volume)?,
            owner: padded("owner", &self.owner)?,
            mirror: padded("mirror", &self.mirror)?,
            filesystem_uuid: self.filesystem_uuid.unwrap_or_default(),
            reserved: 0,
            crc32c: 0,
        };
        Ok(header.seal())
    }
}

/// Whether the region was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It was, with what it holds.
    Kept,
    /// It is new and empty.
    Created,
}

/// A region's file, mapped.
#[derive(Debug)]
pub struct RegionFile {
    path: PathBuf,
    memory: Arc<SharedMemory>,
    log_bytes: u64,
}

impl RegionFile {
    /// Where a volume's region is kept.
    ///
    /// # Errors
    /// [`BackingError::Name`].
    pub fn path_of(region_dir: &Path, volume: &str) -> Result<PathBuf, BackingError> {
        padded("volume", volume)?;
        Ok(region_dir.join(format!("{volume}.region")))
    }

    /// Opens the region of a volume, or makes an empty one. A region that is there is left as it
    /// is, whatever its header says: ask [`RegionFile::verify`].
    ///
    /// # Errors
    /// [`MemoryError::WrongSize`] if it was made with another `region_bytes`; what the system refused.
    pub fn open_or_create(
        region_dir: &Path,
        identity: &RegionIdentity,
        log_bytes: u64,
    ) -> Result<(Self, Found), BackingError> {
        let possible = (LOG_BYTES_MIN..=LOG_BYTES_MAX).contains(&log_bytes);
        if !possible || !log_bytes.is_multiple_of(4096) {
            return Err(BackingError::LogBytes {
                volume: identity.volume.clone(),
                log_bytes,
            });
        }
        let path = Self::path_of(region_dir, &identity.volume)?;
        if fs::exists(&path).map_err(file("look for", &path))? {
            let memory = Arc::new(SharedMemory::open_sized(&path, LOG_OFFSET + log_bytes)?);
            return Ok((
                Self {
                    path,
                    memory,
                    log_bytes,
                },
                Found::Kept,
            ));
        }
        let header = identity.header(region_state::EMPTY, 0, log_bytes)?;
        fs::create_dir_all(region_dir).map_err(file("create", region_dir))?;
        let partial = beside(&path);
        let memory = Arc::new(SharedMemory::create(&partial, LOG_OFFSET + log_bytes)?);
        let region = Self {
            path,
            memory,
            log_bytes,
        };
        region.write_header(&header)?;
        // Only a whole region gets the name: a crash before this leaves none.
        fs::rename(&partial, &region.path).map_err(file("rename", &partial))?;
        Ok((region, Found::Created))
    }

    /// Opens any region, such as a saved one; its size is judged by its own header.
    ///
    /// # Errors
    /// As [`RegionFile::header`]; what the system refused.
    pub fn open(path: &Path) -> Result<Self, BackingError> {
        let memory = Arc::new(SharedMemory::open(path)?);
        let log_bytes = memory.len().saturating_sub(LOG_OFFSET);
        let mut region = Self {
            path: path.to_owned(),
            memory,
            log_bytes,
        };
        region.log_bytes = region.header()?.log_bytes;
        Ok(region)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the log.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.log_bytes
    }

    /// The memory, to be exposed to the owner.
    #[must_use]
    pub fn memory(&self) -> Arc<SharedMemory> {
        Arc::clone(&self.memory)
    }

    /// Copies bytes out of the region.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), BackingError> {
        Ok(self.memory.read_at(offset, to)?)
    }

    /// The header, once magic, checksum, version and log size are right.
    ///
    /// # Errors
    /// [`BackingError::Damaged`], [`BackingError::Version`], [`BackingError::Truncated`].
    pub fn header(&self) -> Result<RegionHeader, BackingError> {
        let mut bytes = [0; size_of::<RegionHeader>()];
        let path = || self.path.clone();
        if self.memory.len() < LOG_OFFSET {
            return Err(BackingError::Damaged { path: path() });
        }
        self.memory.read_at(0, &mut bytes)?;
        let header = RegionHeader::open(&bytes);
        let header = header.ok_or_else(|| BackingError::Damaged { path: path() })?;
        if header.version != REGION_VERSION {
            return Err(BackingError::Version {
                path: path(),
                found: header.version,
            });
        }
        let held = self.log_bytes;
        let possible = (LOG_BYTES_MIN..=LOG_BYTES_MAX).contains(&header.log_bytes);
        // A saved region of a hugetlbfs may be longer than its log, never shorter.
        let fits = header.log_bytes <= held && header.log_bytes.is_multiple_of(4096);
        if !possible || !fits {
            let said = header.log_bytes;
            return Err(BackingError::Truncated {
                path: path(),
                said,
                held,
            });
        }
        Ok(header)
    }

    /// The header, once it is also that of the expected region.
    ///
    /// # Errors
    /// As [`RegionFile::header`], and [`BackingError::Foreign`].
    pub fn verify(&self, identity: &RegionIdentity) -> Result<RegionHeader, BackingError> {
        let header = self.header()?;
        let names = [
            ("cluster", header.cluster, &identity.cluster),
            ("volume", header.volume, &identity.volume),
            ("owner", header.owner, &identity.owner),
            ("mirror", header.mirror, &identity.mirror),
        ];
        let foreign = |what, found, wanted| {
            Err(BackingError::Foreign {
                path: self.path.clone(),
                what,
                found,
                wanted,
            })
        };
        for (what, found, wanted) in names {
            if found != padded(what, wanted)? {
                return foreign(what, name(&found), wanted.clone());
            }
        }
        // A region that never held an epoch knows no file system yet.
        match identity.filesystem_uuid {
            Some(wanted) if header.epoch != 0 && header.filesystem_uuid != wanted => {
                foreign("file system", hex(&header.filesystem_uuid), hex(&wanted))
            }
            _ => Ok(header),
        }
    }

    /// Writes the header. Only while no writer is connected.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn write_header(&self, header: &RegionHeader) -> Result<(), BackingError> {
        Ok(self.memory.write_at(0, header.seal().as_bytes())?)
    }

    /// Makes status page and log zero, and writes the header last. Only while no writer is connected.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn reset(&self, header: &RegionHeader) -> Result<(), BackingError> {
        self.memory.zero(0, LOG_OFFSET)?;
        self.memory.zero(LOG_OFFSET, self.log_bytes)?;
        self.write_header(header)
    }

    /// Copies the whole region to a file on a local disk; when this returns, it is durable under
    /// that name. A file of that name is replaced, and after a crash is either the old or the new.
    ///
    /// # Errors
    /// [`BackingError::File`]; the region is as it was.
    pub fn save_to(&self, path: &Path) -> Result<(), BackingError> {
        let partial = beside(path);
        let saved = self.write_copy(&partial);
        if saved.is_err() {
            // Best effort: the error that is told is the one that made the copy useless.
            let _ = fs::remove_file(&partial);
        }
        saved?;
        fs::rename(&partial, path).map_err(file("rename", &partial))?;
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let directory = parent.unwrap_or(Path::new("."));
        let opened = File::open(directory).map_err(file("open", directory))?;
        opened.sync_all().map_err(file("sync", directory))
    }

    fn write_copy(&self, path: &Path) -> Result<(), BackingError> {
        let total = LOG_OFFSET + self.log_bytes;
        let mut options = OpenOptions::new();
        let open = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path);
        let mut copy = open.map_err(file("create", path))?;
        let write = file("write", path);
        let copied = (|| {
            copy.set_len(total)?;
            let mut chunk = vec![0; CHUNK_BYTES];
            let mut done = 0;
            while done < total {
                let len = (total - done).min(CHUNK_BYTES as u64);
                let bytes = chunk.get_mut(..len as usize).unwrap_or_default();
                self.memory.read_at(done, bytes).map_err(io::Error::other)?;
                // Zeros stay a hole: a log that was never full is saved quickly.
                if bytes.iter().any(|byte| *byte != 0) {
                    copy.seek(SeekFrom::Start(done))?;
                    copy.write_all(bytes)?;
                }
                done += len;
            }
            copy.sync_all()
        })();
        copied.map_err(write)
    }
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackingError {
    let path = path.to_owned();
    move |source| BackingError::File { what, path, source }
}

fn beside(path: &Path) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// A name for the header: zero-padded, always with a zero at the end.
fn padded(what: &'static str, name: &str) -> Result<[u8; 64], BackingError> {
    let wrong = name.is_empty() || name.contains(['/', '\0']) || matches!(name, "." | "..");
    let mut field = [0; 64];
    match field.get_mut(..name.len()) {
        Some(place) if !wrong && name.len() < 64 => place.copy_from_slice(name.as_bytes()),
        _ => {
            return Err(BackingError::Name {
                what,
                name: name.to_owned(),
            });
        }
    }
    Ok(field)
}

fn name(field: &[u8; 64]) -> String {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
