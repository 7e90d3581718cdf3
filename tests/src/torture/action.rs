//! What a thread may do: one operation of an application, with all that decides its effect.

use clap::ValueEnum;

use crate::escape::PathBytes;
use crate::random::Random;

/// Kinds of operations that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    /// Bytes through the page cache: write, pwrite, writev, pwritev2, `O_APPEND`, sendfile, splice.
    Data,
    /// Sizes: ftruncate, truncate, `O_TRUNC`.
    Sizes,
    /// Names: create, mkdir, mknod, symlink, link, rename, unlink, rmdir, `O_TMPFILE`.
    Names,
    /// Mode, owner, times.
    Attributes,
    /// fsync, fdatasync, syncfs, `O_SYNC`, `O_DSYNC`.
    Sync,
    /// `O_DIRECT`.
    Direct,
    /// fallocate: plain, keeping the size, punching, zeroing.
    Space,
    /// `FICLONE`, `copy_file_range`.
    Clones,
    /// Extended attributes and ACLs.
    Xattrs,
    /// Inode flags.
    Flags,
    /// Stores through a shared mapping.
    Mappings,
}

impl Kind {
    /// How often it is drawn, in relation to the others.
    pub(super) const fn weight(self) -> u64 {
        match self {
            Self::Names => 34,
            Self::Data => 30,
            Self::Attributes => 12,
            Self::Sizes | Self::Xattrs => 8,
            Self::Space => 5,
            Self::Clones | Self::Mappings => 4,
            Self::Sync | Self::Direct => 3,
            Self::Flags => 2,
        }
    }

    /// All of them.
    #[must_use]
    pub fn all() -> Vec<Self> {
        Self::value_variants().to_vec()
    }
}

/// Bytes that a seed decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Decides them.
    pub seed: u64,
    /// How many.
    pub bytes: usize,
}

impl Fill {
    /// The bytes.
    #[must_use]
    pub fn content(self) -> Vec<u8> {
        Random::new(self.seed).bytes(self.bytes)
    }
}

/// A file to work on: by its name, or through a descriptor that was opened before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Opened for this operation alone.
    Path(PathBytes),
    /// The descriptor in this slot, whatever became of its name.
    Open(usize),
}

/// How bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteWay {
    /// `write` at the descriptor's position.
    Plain,
    /// `pwrite`.
    At,
    /// `writev` of three parts.
    Vector,
    /// `pwritev2` of three parts.
    VectorAt,
    /// `pwritev2` with `RWF_APPEND`.
    VectorAppend,
    /// `O_APPEND`.
    Append,
    /// `O_SYNC`.
    Sync,
    /// `O_DSYNC`.
    DataSync,
    /// `O_DIRECT`.
    Direct,
}

impl WriteWay {
    /// At the end, wherever that is then.
    pub(super) const fn appends(self) -> bool {
        matches!(self, Self::Append | Self::VectorAppend)
    }

    /// Durable when it returns.
    pub(super) const fn confirms(self) -> bool {
        matches!(self, Self::Sync | Self::DataSync)
    }
}

/// How bytes come from another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyWay {
    /// `sendfile`.
    Sendfile,
    /// `splice`, through a pipe.
    Splice,
    /// `copy_file_range`.
    CopyRange,
}

/// How a size is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResizeWay {
    /// `ftruncate`.
    Descriptor,
    /// `truncate`.
    Path,
    /// `O_TRUNC`: to nothing.
    Open,
}

/// What is done with space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocateWay {
    /// It is allocated, and the file grows.
    Plain,
    /// It is allocated.
    KeepSize,
    /// It becomes a hole.
    Punch,
    /// It reads as zeros, and the file grows.
    Zero,
}

/// How a name is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameWay {
    /// Over what is there.
    Replace,
    /// `RENAME_NOREPLACE`.
    NoReplace,
    /// `RENAME_EXCHANGE`.
    Exchange,
}

/// What `mknod` makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// The character device 1:3.
    Device,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncWay {
    /// `fsync`.
    All,
    /// `fdatasync`.
    Data,
    /// `syncfs`.
    Volume,
}

/// One operation. Paths are those below the case's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    Create {
        path: PathBytes,
        mode: u32,
    },
    MakeDirectory {
        path: PathBytes,
        mode: u32,
    },
    MakeSpecial {
        path: PathBytes,
        special: Special,
        mode: u32,
    },
    MakeSymlink {
        path: PathBytes,
        target: PathBytes,
    },
    Link {
        from: PathBytes,
        to: PathBytes,
    },
    Unlink {
        path: PathBytes,
    },
    RemoveDirectory {
        path: PathBytes,
    },
    Rename {
        from: PathBytes,
        to: PathBytes,
        way: RenameWay,
    },
    Open {
        path: PathBytes,
        slot: usize,
    },
    OpenUnnamed {
        directory: PathBytes,
        slot: usize,
        mode: u32,
    },
    LinkOpen {
        slot: usize,
        to: PathBytes,
    },
    Close {
        slot: usize,
    },
    Write {
        target: Target,
        way: WriteWay,
        at: u64,
        fill: Fill,
    },
    Copy {
        from: PathBytes,
        from_at: u64,
        target: Target,
        at: u64,
        bytes: usize,
        way: CopyWay,
    },
    Reflink {
        from: PathBytes,
        target: Target,
    },
    Store {
        target: Target,
        at: u64,
        fill: Fill,
        sync: bool,
    },
    Resize {
        target: Target,
        bytes: u64,
        way: ResizeWay,
    },
    Allocate {
        target: Target,
        at: u64,
        bytes: u64,
        way: AllocateWay,
    },
    ChangeMode {
        path: PathBytes,
        mode: u32,
    },
    ChangeOwner {
        path: PathBytes,
        uid: u32,
        gid: u32,
    },
    SetTimes {
        path: PathBytes,
        mtime_ns: i64,
    },
    SetXattr {
        path: PathBytes,
        name: &'static str,
        fill: Fill,
    },
    RemoveXattr {
        path: PathBytes,
        name: &'static str,
    },
    SetAcl {
        path: PathBytes,
        acl: Acl,
    },
    SetFlags {
        path: PathBytes,
        flags: u32,
    },
    Sync {
        target: Target,
        way: SyncWay,
    },
}

/// An ACL that names one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acl {
    /// What that user may do.
    pub named: u16,
    /// What the owner's group may do.
    pub group: u16,
}

impl Acl {
    /// The extended attribute that holds it.
    pub const ACCESS: &'static str = "system.posix_acl_access";
    /// Version 2, then entries of tag, permissions and id (include/uapi/linux/posix_acl_xattr.h).
    const VERSION: u32 = 2;
    const NO_ID: u32 = u32::MAX;
    const NAMED_USER: u32 = 1_234;

    /// The attribute's value on an inode whose mode is this one.
    #[must_use]
    pub fn value(self, mode: u32) -> Vec<u8> {
        let bits = |shift: u32| u16::try_from((mode >> shift) & 7).unwrap_or_default();
        let entries: [(u16, u16, u32); 5] = [
            (0x01, bits(6), Self::NO_ID),
            (0x02, self.named, Self::NAMED_USER),
            (0x04, self.group, Self::NO_ID),
            (0x10, bits(3), Self::NO_ID),
            (0x20, bits(0), Self::NO_ID),
        ];
        let mut value = Self::VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    /// The mode that setting it gives an inode: it says what the owner, its mask and others may do.
    pub(super) const fn mode(mode: u32) -> u32 {
        (mode & !0o777) | 0o675
    }
}
