//! The sentinel: a small file on the volume that says what of an epoch is durable.
//!
//! ```text
//! <mount>/.twinwrite/sentinel   8192 bytes: two slots of 4096, written in turn, in place
//! slot   0 magic "TWSENTIN" | 8 version u32 | 12 closed u32 | 16 counter u64 | 24 epoch u64
//!       32 seq u64 | 40 time_ns i64 | 48 cluster [u8; 64] | 112 volume [u8; 64]
//!      176 zero ... 4092 crc32c u32
//! ```
//!
//! Integers are little-endian. The valid slot with the larger counter counts, so that a torn write
//! leaves the one before. The file is written through once when it is made: later writes need no
//! space and no change of the file's layout.
//!
//! Users of the volume may be able to write into its root, so the directory is root's alone, and both are
//! opened without following symlinks or crossing a mount. Whoever writes checkpoints or replays holds the
//! file locked, so that an agent, a takeover and a replay by hand keep each other out.
//!
//! A write that has not been fsynced must never be reported as done.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ids::{Epoch, Seq};
use crate::region::layout::{Sealed, unpadded};

/// Directory at the volume's root that belongs to twinwrite.
pub const OWN_DIRECTORY: &str = ".twinwrite";
const FILE: &str = "sentinel";
const SLOT_BYTES: usize = 4096;
const VERSION: u32 = 1;

/// What the sentinel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentinel {
    /// Cluster name.
    pub cluster: String,
    /// Volume name.
    pub volume: String,
    /// The epoch it speaks of.
    pub epoch: Epoch,
    /// Everything up to here is durable on the volume.
    pub seq: Seq,
    /// The epoch ended on purpose: its region must never be replayed.
    pub closed: bool,
    /// When it was written, nanoseconds since 1970.
    pub time_ns: i64,
}

/// Why the sentinel could not be read or written.
#[derive(Debug, Error)]
pub enum SentinelError {
    /// There is none.
    #[error("{0}: there is no sentinel: this volume was never protected, or it is not the volume")]
    Missing(PathBuf),
    /// Neither slot is valid.
    #[error(
        "{0}: neither slot of the sentinel is valid: the volume is damaged, check it (fsck) before anything is merged into it"
    )]
    Damaged(PathBuf),
    /// Somebody else holds it.
    #[error(
        "{0} is held by another process: another agent or a replay works on this volume; stop it first"
    )]
    Held(PathBuf),
    /// Somebody else than root may have made it or may change it.
    #[error(
        "{path} {why}, so what it says cannot be trusted: if an administrator changed it, undo that (chown -R root:root, chmod 0700); otherwise move it out of the way"
    )]
    Untrusted {
        /// The directory or the file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A name is longer than the 64 bytes there are.
    #[error("the name {0:?} has more than 64 bytes: shorten it in the configuration")]
    Name(String),
    /// The system refused.
    #[error("{path}: {what}: {source}")]
    System {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct Slot {
    magic: [u8; 8],
    version: u32,
    closed: u32,
    counter: u64,
    epoch: u64,
    seq: u64,
    time_ns: i64,
    cluster: [u8; 64],
    volume: [u8; 64],
    zero: [[u8; 4]; 979],
    crc32c: u32,
}

const _: () = assert!(size_of::<Slot>() == SLOT_BYTES);

impl Sealed for Slot {
    const MAGIC: &'static [u8] = b"TWSENTIN";
}

fn padded(name: &str) -> Result<[u8; 64], SentinelError> {
    let mut out = [0; 64];
    out.get_mut(..name.len())
        .ok_or_else(|| SentinelError::Name(name.to_owned()))?
        .copy_from_slice(name.as_bytes());
    Ok(out)
}

impl Sentinel {
    fn slot(&self, counter: u64) -> Result<Slot, SentinelError> {
        let slot = Slot {
            magic: *b"TWSENTIN",
            version: VERSION,
            closed: self.closed.into(),
            counter,
            epoch: self.epoch.0,
            seq: self.seq.0,
            time_ns: self.time_ns,
            cluster: padded(&self.cluster)?,
            volume: padded(&self.volume)?,
            zero: [[0; 4]; 979],
            crc32c: 0,
        };
        Ok(slot.seal())
    }

    fn of(slot: &Slot) -> Self {
        Self {
            cluster: unpadded(&slot.cluster),
            volume: unpadded(&slot.volume),
            epoch: Epoch(slot.epoch),
            seq: Seq(slot.seq),
            closed: slot.closed != 0,
            time_ns: slot.time_ns,
        }
    }
}

/// The newest valid slot of a sentinel file's bytes: its index and what it says.
fn newest(bytes: &[u8]) -> Option<(usize, Slot)> {
    let valid = |index: usize| {
        let slot = Slot::open(bytes.get(index * SLOT_BYTES..(index + 1) * SLOT_BYTES)?)?;
        (slot.version == VERSION).then_some((index, slot))
    };
    [valid(0), valid(1)]
        .into_iter()
        .flatten()
        .max_by_key(|(_, slot)| slot.counter)
}

/// Where the sentinel of the volume mounted here lies.
#[must_use]
pub fn path_on(mount: &Path) -> PathBuf {
    mount.join(OWN_DIRECTORY).join(FILE)
}

pub(super) fn failed(
    path: &Path,
    what: &'static str,
) -> impl FnOnce(io::Error) -> SentinelError + use<> {
    let path = path.to_owned();
    move |source| SentinelError::System { path, what, source }
}

/// Opens `name` in `directory`, itself and nothing that it points to or that is mounted on it.
pub(super) fn open_in(
    directory: impl AsFd,
    name: &str,
    path: &Path,
    flags: OFlags,
) -> Result<File, SentinelError> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH | ResolveFlags::NO_XDEV;
    let mode = if flags.contains(OFlags::CREATE) {
        Mode::RUSR | Mode::WUSR
    } else {
        Mode::empty()
    };
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let untrusted = |why: &str| SentinelError::Untrusted {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    rustix::fs::openat2(directory, name, flags, mode, resolve)
        .map(File::from)
        .map_err(|error| match error {
            rustix::io::Errno::LOOP => untrusted("is a symlink"),
            rustix::io::Errno::XDEV => untrusted("is a mount point"),
            rustix::io::Errno::NOTDIR => untrusted("is no directory"),
            rustix::io::Errno::NOENT => SentinelError::Missing(path.to_owned()),
            other => failed(path, "open")(other.into()),
        })
}

/// Demands that nobody but root, or the user this process runs as, can have written here.
pub(super) fn require_own(
    file: &File,
    path: &Path,
    is_right_type: bool,
) -> Result<(), SentinelError> {
    let metadata = file.metadata().map_err(failed(path, "stat"))?;
    let (uid, mode) = (metadata.uid(), metadata.mode());
    let why = if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        format!("belongs to user {uid}")
    } else if mode & 0o022 != 0 {
        format!("may be written by others (mode {:04o})", mode & 0o7777)
    } else if !is_right_type {
        String::from("is not of the right type")
    } else {
        return Ok(());
    };
    let path = path.to_owned();
    Err(SentinelError::Untrusted { path, why })
}

pub(super) fn open_mount(mount: &Path) -> Result<File, SentinelError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(mount, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| failed(mount, "open")(error.into()))
}

pub(super) fn open_directory(mount_file: &File, mount: &Path) -> Result<File, SentinelError> {
    let path = mount.join(OWN_DIRECTORY);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let directory = open_in(mount_file, OWN_DIRECTORY, &path, flags)?;
    require_own(&directory, &path, true)?;
    Ok(directory)
}

fn open_file(directory: &File, path: &Path, flags: OFlags) -> Result<File, SentinelError> {
    let file = open_in(directory, FILE, path, flags)?;
    let is_file = file.metadata().map_err(failed(path, "stat"))?.is_file();
    require_own(&file, path, is_file)?;
    Ok(file)
}

fn bytes_of(file: &File, path: &Path) -> Result<Vec<u8>, SentinelError> {
    let mut bytes = Vec::new();
    file.take(2 * SLOT_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(failed(path, "read"))?;
    Ok(bytes)
}

/// Reads the sentinel of the volume mounted at `mount`, whoever holds it.
///
/// # Errors
/// [`SentinelError`]: missing, damaged, not to be trusted, or what the system answered.
pub fn read(mount: &Path) -> Result<Sentinel, SentinelError> {
    let path = path_on(mount);
    let directory = match open_directory(&open_mount(mount)?, mount) {
        Err(SentinelError::Missing(_)) => Err(SentinelError::Missing(path.clone())),
        other => other,
    }?;
    let bytes = bytes_of(&open_file(&directory, &path, OFlags::RDONLY)?, &path)?;
    match newest(&bytes) {
        Some((_, slot)) => Ok(Sentinel::of(&slot)),
        None if never_written(&bytes) => Err(SentinelError::Missing(path)),
        None => Err(SentinelError::Damaged(path)),
    }
}

/// The first write goes to the first slot, the second to the second: where that one is still blank and
/// the first not valid, no write has ever ended.
fn never_written(bytes: &[u8]) -> bool {
    bytes
        .get(SLOT_BYTES..)
        .is_none_or(|second| second.iter().all(|byte| *byte == 0))
}

/// The sentinel file, held open and locked by whoever writes checkpoints or replays.
#[derive(Debug)]
pub struct SentinelFile {
    path: PathBuf,
    file: Flock<File>,
    next_index: usize,
    next_counter: u64,
}

impl SentinelFile {
    /// Opens the sentinel file of the volume mounted at `mount` and locks it until this is dropped; makes
    /// it (without a valid slot, both slots written through and durable) if there is none.
    ///
    /// # Errors
    /// [`SentinelError::Held`] while somebody else, in this process or another, has it;
    /// [`SentinelError::Untrusted`]; or what the system answered.
    pub fn open(mount: &Path) -> Result<Self, SentinelError> {
        let path = path_on(mount);
        let mount_file = open_mount(mount)?;
        match rustix::fs::mkdirat(&mount_file, OWN_DIRECTORY, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(failed(&path, "create its directory")(error.into())),
        }
        let directory = open_directory(&mount_file, mount)?;
        directory
            .set_permissions(std::fs::Permissions::from_mode(0o700))
            .map_err(failed(&path, "set the mode of its directory"))?;
        let file = open_file(&directory, &path, OFlags::RDWR | OFlags::CREATE)?;
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, error)| match error {
                    Errno::EWOULDBLOCK => SentinelError::Held(path.clone()),
                    other => failed(&path, "lock")(other.into()),
                },
            )?;
        let bytes = bytes_of(&file, &path)?;
        let (next_index, next_counter) =
            newest(&bytes).map_or((0, 1), |(index, slot)| (1 - index, slot.counter + 1));
        if bytes.len() != 2 * SLOT_BYTES {
            let missing = vec![0; (2 * SLOT_BYTES).saturating_sub(bytes.len())];
            file.write_all_at(&missing, bytes.len() as u64)
                .map_err(failed(&path, "write"))?;
            file.sync_all().map_err(failed(&path, "fsync"))?;
            for parent in [&directory, &mount_file] {
                parent
                    .sync_all()
                    .map_err(failed(&path, "fsync its directory"))?;
            }
        }
        Ok(Self {
            path,
            file,
            next_index,
            next_counter,
        })
    }

    /// Writes into the older slot and fsyncs. What the sentinel will say must be on the disk before it: a
    /// syncfs may have left it in the device's volatile cache (XFS), from which a power cut keeps any
    /// part. So the device is flushed first, by an fsync of the file as it is. After an error nothing is known to have changed, and the
    /// next write goes to the same slot.
    ///
    /// # Errors
    /// What the system answered: the sentinel then proves nothing new.
    pub fn write(&mut self, sentinel: &Sentinel) -> Result<(), SentinelError> {
        let slot = sentinel.slot(self.next_counter)?;
        let offset = (self.next_index * SLOT_BYTES) as u64;
        self.file
            .sync_all()
            .map_err(failed(&self.path, "fsync before the write"))?;
        self.file
            .write_all_at(slot.as_bytes(), offset)
            .map_err(failed(&self.path, "write"))?;
        self.file.sync_all().map_err(failed(&self.path, "fsync"))?;
        self.next_index = 1 - self.next_index;
        self.next_counter += 1;
        Ok(())
    }
}
