//! What all volumes of a host share at their gates: the map of held threads, their groups, and the
//! words by which a group is continued; and the lock that lets one process at a time do that.
//!
//! A process may have files on several volumes, whose agents may be different processes, so no agent
//! alone knows whether it may go on. The maps are pinned apart from the volumes' own and live until no
//! volume has programs any more. They must never go away while somebody is held.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData, MapError};
use rustix::fs::{FlockOperation, flock};
use twinwrite_abi::held;

use super::CaptureError;
use super::sys::{Mapping, page_bytes};

/// A held thread: see `twinwrite_abi::held`.
pub(super) type Key = [u64; held::KEY_WORDS];
/// What it waits for.
pub(super) type Entry = [u64; held::WORDS];
/// A held group.
pub(super) type Group = [u64; held::GROUP_WORDS];
/// A marked group.
pub(super) type Marked = [u64; held::MARKED_WORDS];

const PIN_DIRECTORY: &str = "/sys/fs/bpf/twinwrite-gate";
/// The maps: names in the object, and of the pins.
const MAPS: [(&str, &str); 4] = [
    ("HELD", "held"),
    ("HELD_GROUPS", "groups"),
    ("HOST", "host"),
    ("MARKED_GROUPS", "marked"),
];
/// Beside the locks of the volumes; no volume's lock has a name with another ending.
const LOCK: &str = "/run/twinwrite-locks/gate.host";
const OWNER_ONLY: u32 = 0o600;
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;
/// After a takeover all volumes load their programs at once, each for as long as it takes to make its maps.
const LOCK_LIMIT: Duration = Duration::from_secs(60);

fn system(what: &str) -> impl FnOnce(io::Error) -> CaptureError {
    let what = what.to_owned();
    move |source| CaptureError::system(what, source)
}

/// The sole right to continue groups, and to make or remove the pins.
#[derive(Debug)]
pub(super) struct HostLock(File);

impl HostLock {
    /// Opens the file; takes nothing yet.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub(super) fn open() -> Result<Self, CaptureError> {
        let path = Path::new(LOCK);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)
                .map_err(system("making the directory of the host's lock"))?;
        }
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW)
            .mode(OWNER_ONLY)
            .open(path)
            .map_err(system("opening the host's lock"))?;
        // Whoever may open it may lock it, and nobody who is held would go on.
        file.set_permissions(Permissions::from_mode(OWNER_ONLY))
            .map_err(system("closing the host's lock to others"))?;
        Ok(Self(file))
    }

    /// Takes it if nobody has it.
    pub(super) fn try_take(&self) -> Option<Taken<'_>> {
        flock(&self.0, FlockOperation::NonBlockingLockExclusive)
            .is_ok()
            .then_some(Taken(self))
    }

    /// Takes it, and waits for who has it.
    ///
    /// # Errors
    /// [`CaptureError::System`] when somebody keeps it.
    pub(super) fn take(&self) -> Result<Taken<'_>, CaptureError> {
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            if let Some(taken) = self.try_take() {
                return Ok(taken);
            }
            if Instant::now() >= deadline {
                let kept = io::Error::new(io::ErrorKind::TimedOut, "another process keeps it");
                return Err(CaptureError::system(format!("taking {LOCK}"), kept));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The lock is given back when this goes.
#[derive(Debug)]
pub(super) struct Taken<'a>(&'a HostLock);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        // Closing the file would do it, too.
        flock(&self.0.0, FlockOperation::Unlock).ok();
    }
}

/// Where the host's maps are pinned: what the loader is told for each.
///
/// # Errors
/// [`CaptureError::Pin`].
pub(super) fn pins() -> Result<[(&'static str, PathBuf); 4], CaptureError> {
    let directory = PathBuf::from(PIN_DIRECTORY);
    fs::create_dir_all(&directory).map_err(|source| CaptureError::Pin {
        what: "creating (is bpffs mounted on /sys/fs/bpf?)",
        path: directory.clone(),
        source,
    })?;
    Ok(MAPS.map(|(name, pin)| (name, pin_of(pin))))
}

fn pin_of(pin: &str) -> PathBuf {
    Path::new(PIN_DIRECTORY).join(format!("v{}-{pin}", held::VERSION))
}

/// Removes the pins; only where no volume has programs and nobody is held.
pub(super) fn remove_pins() -> Result<(), CaptureError> {
    let removed = match fs::remove_dir_all(PIN_DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    removed.map_err(|source| CaptureError::Pin {
        what: "removing",
        path: PIN_DIRECTORY.into(),
        source,
    })
}

/// The host's maps.
#[derive(Debug)]
pub(super) struct Host {
    threads: HashMap<MapData, Key, Entry>,
    groups: HashMap<MapData, u32, Group>,
    /// Not there if the programs are of a build that marked none.
    marked: Option<HashMap<MapData, u32, Marked>>,
    words: Mapping,
}

impl Host {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// [`CaptureError::Load`] if they are not there, or of another kind.
    pub(super) fn open() -> Result<Self, CaptureError> {
        let other = |error: MapError| CaptureError::Load(format!("the host's maps: {error}"));
        let [threads, groups, words, marked] =
            MAPS.map(|(_, pin)| MapData::from_pin(pin_of(pin)).map_err(other));
        let marked = match marked {
            Ok(map) => Some(HashMap::try_from(Map::HashMap(map)).map_err(other)?),
            Err(_) => None,
        };
        let bytes = (held::HOST_WORDS * 8).next_multiple_of(page_bytes());
        Ok(Self {
            threads: HashMap::try_from(Map::HashMap(threads?)).map_err(other)?,
            groups: HashMap::try_from(Map::HashMap(groups?)).map_err(other)?,
            marked,
            words: Mapping::new(words?.fd().as_fd(), 0, bytes, true, "the host's words")?,
        })
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        assert!(word < held::HOST_WORDS, "the host has no word {word}");
        // SAFETY: the mapping holds HOST_WORDS words, is page-aligned, lives as long as `self`, and
        // other parties touch the words with single loads, stores and atomics only.
        unsafe { self.words.start().cast::<AtomicU64>().add(word).as_ref() }
    }

    /// Ends the turn of a process that died in it. Only by who has the lock.
    pub(super) fn mend_turn(&self) {
        let under_way = self.word(held::TURN_UNDER_WAY).load(Ordering::SeqCst);
        let at = usize::try_from(under_way)
            .ok()
            .and_then(|at| at.checked_sub(1));
        if let Some(at) = at.filter(|at| (held::TURNS..held::HOST_WORDS).contains(at)) {
            self.end_turn(at);
        }
    }

    fn begin_turn(&self, at: usize, this_process: (u32, u64)) {
        let write = |word, value| self.word(word).store(value, Ordering::SeqCst);
        write(held::CONTINUER_TICKS, this_process.1);
        write(held::CONTINUER, this_process.0.into());
        write(held::TURN_UNDER_WAY, at as u64 + 1);
        self.word(at).fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    fn end_turn(&self, at: usize) {
        if self.word(at).load(Ordering::SeqCst) & 1 == 1 {
            self.word(at).fetch_add(1, Ordering::SeqCst);
        }
        self.word(held::TURN_UNDER_WAY).store(0, Ordering::SeqCst);
        self.word(held::CONTINUER).store(0, Ordering::SeqCst);
    }
}

/// What continuing needs of the host's maps.
pub(super) trait HeldMaps {
    /// Everybody who is held, on any volume.
    fn entries(&self) -> Vec<(Key, Entry)>;
    /// Changes an entry that is there; whether it was.
    fn change(&mut self, key: &Key, entry: &Entry) -> bool;
    /// Drops an entry.
    fn forget(&mut self, key: &Key);
    /// The record of a held group.
    fn group(&self, group: u32) -> Option<Group>;
    /// Makes a record for a held group that has none.
    fn enter_group(&mut self, group: u32, record: Group);
    /// Drops a group's record.
    fn forget_group(&mut self, group: u32);
    /// All groups that have a record.
    fn groups(&self) -> Vec<u32>;
    /// Takes the marks of the group that began then away.
    fn unmark(&mut self, group: u32, started: u64) -> Option<Marked>;
    /// Gives them back, unless there are others by now.
    fn mark(&mut self, group: u32, marked: Marked);
    /// Does something while the group's turn is odd, which it is until the signal to go on is sent:
    /// threads of it that come to a gate meanwhile wait for the end of that, and those that came before
    /// are in the map.
    fn in_turn<T>(
        &mut self,
        group: u32,
        this_process: (u32, u64),
        act: impl FnOnce(&mut Self) -> T,
    ) -> T;
}

impl HeldMaps for Host {
    fn entries(&self) -> Vec<(Key, Entry)> {
        // An entry that vanishes meanwhile was taken back by its thread.
        self.threads.iter().filter_map(Result::ok).collect()
    }

    fn change(&mut self, key: &Key, entry: &Entry) -> bool {
        self.threads.insert(key, entry, BPF_EXIST).is_ok()
    }

    fn forget(&mut self, key: &Key) {
        self.threads.remove(key).ok();
    }

    fn group(&self, group: u32) -> Option<Group> {
        self.groups.get(&group, 0).ok()
    }

    fn enter_group(&mut self, group: u32, record: Group) {
        self.groups.insert(group, record, BPF_NOEXIST).ok();
    }

    fn forget_group(&mut self, group: u32) {
        self.groups.remove(&group).ok();
    }

    fn groups(&self) -> Vec<u32> {
        self.groups.keys().filter_map(Result::ok).collect()
    }

    fn unmark(&mut self, group: u32, started: u64) -> Option<Marked> {
        let map = self.marked.as_mut()?;
        let marked = map.get(&group, 0).ok()?;
        if marked[held::MARKED_STARTED_TICKS] != started {
            return None;
        }
        map.remove(&group).ok()?;
        Some(marked)
    }

    fn mark(&mut self, group: u32, marked: Marked) {
        if let Some(map) = &mut self.marked {
            map.insert(group, marked, BPF_NOEXIST).ok();
        }
    }

    fn in_turn<T>(
        &mut self,
        group: u32,
        this_process: (u32, u64),
        act: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let at = held::TURNS + (group as usize & (held::TURN_COUNT - 1));
        self.begin_turn(at, this_process);
        let result = act(self);
        self.end_turn(at);
        result
    }
}
