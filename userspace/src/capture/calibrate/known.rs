//! A record as it must be, or as it was seen, in comparable form.

use std::fmt;
use std::fs::{File, Metadata};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::capture::page_cache::identity_of;
use crate::capture::{CaptureError, to_kernel_device};
use crate::ids::Identity;
use crate::record::{AttrBody, NameBody, RecordHeader, RecordView, op};

/// Everything a record tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) header: RecordHeader,
    pub(super) names: NameBody,
    pub(super) attributes: AttrBody,
    pub(super) name: Vec<u8>,
    pub(super) name2: Vec<u8>,
    pub(super) target: Vec<u8>,
    pub(super) data: Vec<u8>,
}

impl Known {
    /// What a record of the ring tells.
    pub(super) fn seen(view: &RecordView<'_>) -> Self {
        let mut known = Self {
            header: RecordHeader {
                len_word: 0,
                page_offset: 0,
                ..view.header
            },
            names: if view.has_names() {
                view.names()
            } else {
                NameBody::default()
            },
            attributes: if view.header.op == op::SETATTR {
                view.attributes()
            } else {
                AttrBody::default()
            },
            name: view.name().to_vec(),
            name2: view.name2().to_vec(),
            target: view.target().to_vec(),
            data: view.data().to_vec(),
        };
        known.forget_other_sizes();
        known
    }

    /// What the record of an operation on `item` must tell, from the item's state after it.
    pub(super) fn expected(op: u8, item: &Item) -> Result<Self, CaptureError> {
        let metadata = item.metadata()?;
        let mut known = Self {
            header: RecordHeader {
                op,
                ino: item.identity.ino,
                generation: item.identity.generation,
                mode: metadata.mode(),
                size_after: metadata.size(),
                time_ns: mtime_ns(&metadata),
                ..RecordHeader::default()
            },
            names: NameBody::default(),
            attributes: AttrBody::default(),
            name: Vec::new(),
            name2: Vec::new(),
            target: Vec::new(),
            data: Vec::new(),
        };
        known.forget_other_sizes();
        Ok(known)
    }

    /// A WRITE of `data` at `pos`.
    pub(super) fn write(item: &Item, pos: u64, data: &[u8]) -> Result<Self, CaptureError> {
        let mut known = Self::expected(op::WRITE, item)?;
        known.header.pos = pos;
        known.header.data_len = data.len() as u32;
        known.data = data.to_vec();
        Ok(known)
    }

    /// A name operation: `name` in `parent`.
    pub(super) fn named(
        op: u8,
        item: &Item,
        parent: &Item,
        name: &str,
    ) -> Result<Self, CaptureError> {
        let mut known = Self::expected(op, item)?;
        let metadata = item.metadata()?;
        known.header.pos = parent.identity.ino;
        known.header.arg = parent.identity.generation.into();
        known.header.name_len = name.len() as u16;
        known.name = name.as_bytes().to_vec();
        known.names.uid = metadata.uid();
        known.names.gid = metadata.gid();
        known.names.rdev = to_kernel_device(metadata.rdev());
        known.names.nlink = metadata.nlink() as u32;
        known.names.parent_time_ns = mtime_ns(&parent.metadata()?);
        Ok(known)
    }

    /// Adds the new name of a RENAME or EXCHANGE, and what was there.
    pub(super) fn to(
        mut self,
        parent: &Item,
        name: &str,
        victim: Option<&Item>,
    ) -> Result<Self, CaptureError> {
        self.name2 = name.as_bytes().to_vec();
        self.names.name2_len = name.len() as u32;
        self.names.new_parent_ino = parent.identity.ino;
        self.names.new_parent_generation = parent.identity.generation;
        self.names.new_parent_time_ns = mtime_ns(&parent.metadata()?);
        if let Some(victim) = victim {
            self.names.victim_ino = victim.identity.ino;
            self.names.victim_generation = victim.identity.generation;
            self.names.victim_nlink = victim.metadata()?.nlink() as u32;
        }
        Ok(self)
    }

    /// Sizes of anything but files and symlinks are the file system's own affair.
    fn forget_other_sizes(&mut self) {
        let format = self.header.mode & libc::S_IFMT;
        // A record without a mode is one of bytes.
        let has_size = matches!(format, libc::S_IFREG | libc::S_IFLNK | 0);
        if self.header.op != op::FSYNC && !has_size {
            self.header.size_after = 0;
        }
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RecordHeader {
            op,
            flags,
            name_len,
            data_len,
            ino,
            generation,
            mode,
            pos,
            size_after,
            time_ns,
            arg,
            ..
        } = self.header;
        write!(
            f,
            "op {op} flags {flags} inode {ino}.{generation} mode {mode:o} pos {pos} arg {arg} \
             size_after {size_after} time {time_ns} name_len {name_len} data_len {data_len}"
        )?;
        if self.names != NameBody::default() {
            write!(f, " {:?}", self.names)?;
        }
        if self.attributes != AttrBody::default() {
            let AttrBody {
                atime_ns,
                uid,
                gid,
                nlink,
                ..
            } = self.attributes;
            write!(f, " atime {atime_ns} uid {uid} gid {gid} nlink {nlink}")?;
        }
        for (what, bytes) in [
            ("name", &self.name),
            ("name2", &self.name2),
            ("target", &self.target),
        ] {
            if !bytes.is_empty() {
                write!(f, " {what} {:?}", String::from_utf8_lossy(bytes))?;
            }
        }
        if !self.data.is_empty() {
            write!(
                f,
                " bytes {} crc {:#010x}",
                self.data.len(),
                crc32c::crc32c(&self.data)
            )?;
        }
        Ok(())
    }
}

/// A file or directory held by a descriptor that outlives its names.
#[derive(Debug)]
pub(super) struct Item {
    file: File,
    path: PathBuf,
    pub(super) identity: Identity,
}

impl Item {
    /// Takes hold of what `path` names.
    pub(super) fn hold(path: &Path) -> Result<Self, CaptureError> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(path)
            .map_err(|source| {
                CaptureError::system(format!("holding {}", path.display()), source)
            })?;
        Ok(Self {
            file,
            path: path.to_owned(),
            identity: identity_of(path)?,
        })
    }

    /// Takes hold of an open file that has no name.
    pub(super) fn hold_file(file: &File, through: &Path) -> Result<Self, CaptureError> {
        let file = file
            .try_clone()
            .map_err(|source| CaptureError::system("duplicating a descriptor", source))?;
        let identity = crate::capture::page_cache::identity_of_file(&file)?;
        Ok(Self {
            file,
            path: through.to_owned(),
            identity,
        })
    }

    /// Its state now.
    pub(super) fn metadata(&self) -> Result<Metadata, CaptureError> {
        self.file.metadata().map_err(|source| {
            CaptureError::system(format!("looking at {}", self.path.display()), source)
        })
    }
}

pub(super) fn mtime_ns(metadata: &Metadata) -> i64 {
    metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec()
}

pub(super) fn atime_ns(metadata: &Metadata) -> i64 {
    metadata.atime() * 1_000_000_000 + metadata.atime_nsec()
}
