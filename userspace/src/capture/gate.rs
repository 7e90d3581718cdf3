//! Continuing what is held before a volume's gate.
//!
//! The programs stop a thread group and write each of its waiting threads into the host's map. The
//! volume's agent says of its own entries that they may pass; whoever finds that all entries of a group
//! may, of all volumes, continues it. It must never continue a group before that, nor one that somebody
//! else has stopped, nor a process that only got the number of one that ended; and it must never drop
//! an entry of a group that it could not continue.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use twinwrite_abi::{control, held};

use super::CaptureError;
use super::control::Control;
use super::host::{Entry, HeldMaps, Host, HostLock, Key};

/// A thread that looked at the gate before it was opened enters the map within this time.
const LAST_LOOKS: Duration = Duration::from_millis(100);
/// Longest wait for others who must let a group pass, too.
const OTHERS_LIMIT: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What one look at the held threads found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Threads that go on, and how long each has waited, nanoseconds.
    pub waited_ns: Vec<u64>,
    /// Thread groups that are still held, as far as this volume holds them.
    pub remaining: u64,
    /// Of these, how many only other volumes hold.
    pub for_others: u64,
}

/// The held threads of one volume.
#[derive(Debug)]
pub struct Gate {
    control: Control,
    host: Host,
    lock: HostLock,
    /// This process, as the programs know it.
    this_process: (u32, u64),
}

impl Gate {
    /// # Errors
    /// [`CaptureError::Load`] if the host's maps are not there.
    pub(super) fn open(control: Control) -> Result<Self, CaptureError> {
        let this_process = std::process::id();
        let started = fs_stat(this_process)
            .and_then(|stat| {
                stat.and_then(|stat| start_ticks(&stat))
                    .ok_or_else(|| io::Error::other("it has no start"))
            })
            .map_err(|source| CaptureError::system("looking at this process", source))?;
        Ok(Self {
            control,
            host: Host::open()?,
            lock: HostLock::open()?,
            this_process: (this_process, started),
        })
    }

    /// Everybody who is held by this volume, and lives.
    pub(super) fn own_entries(&self) -> Vec<(Key, Entry)> {
        let mut entries = self.host.entries();
        entries.retain(|(key, entry)| self.is_own(key) && is_alive(key, entry));
        entries
    }

    fn is_own(&self, key: &Key) -> bool {
        key[held::DEVICE] == self.control.get(control::DEVICE)
    }

    /// No epoch is open: everybody may pass. Whether nobody is left whom this volume holds.
    pub(super) fn open_for_all(&mut self) -> bool {
        self.control.open_gate();
        let since = Instant::now();
        loop {
            let held = self.release();
            let waits = held.is_none_or(|held| held.remaining > 0);
            if since.elapsed() >= if waits { OTHERS_LIMIT } else { LAST_LOOKS } {
                return !waits;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Ends the processes that wait for this volume: nobody can ever say any more that they succeeded.
    /// Who they were.
    pub(super) fn kill_held(&mut self) -> Vec<u32> {
        let mut killed = Vec::new();
        for (key, entry) in self.host.entries() {
            if !self.is_own(&key) {
                continue;
            }
            let group = group_of(&key);
            match find(group, entry[held::STARTED_TICKS]) {
                Ok(Some(process)) => {
                    if let Err(error) = pidfd_send_signal(process, Signal::KILL) {
                        tracing::error!(group, %error, "a held process cannot be ended");
                        continue;
                    }
                    killed.push(group);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(group, %error, "a held process cannot be found");
                    continue;
                }
            }
            self.host.forget(&key);
            self.host.forget_group(group);
            self.host.unmark(group, entry[held::STARTED_TICKS]);
        }
        killed
    }

    /// Continues whoever may pass; `None` if another process is at it.
    pub fn release(&mut self) -> Option<Held> {
        let _taken = self.lock.try_take()?;
        self.host.mend_turn();
        let stand = Stand {
            device: self.control.get(control::DEVICE),
            open_to: self.control.get(control::GATE_OPEN_TO),
            proven_to: self.control.get(control::GATE_PROVEN_TO),
            generation: self.control.get(control::GATE_GENERATION),
        };
        // Before the entries are read: an entry is made before its mark is counted.
        let marks = self.control.get(control::MARKS);
        let held = release(&mut self.host, &stand, self.this_process);
        forget_left_over(&mut self.host, self.this_process);
        if !self.host.entries().iter().any(|(key, _)| self.is_own(key)) {
            self.control.set(control::MARKS_SETTLED, marks);
        }
        Some(held)
    }
}

/// Where one volume's gate stands.
#[derive(Clone, Copy, Debug)]
struct Stand {
    device: u64,
    open_to: u64,
    proven_to: u64,
    generation: u64,
}

impl Stand {
    fn is_own(&self, key: &Key) -> bool {
        key[held::DEVICE] == self.device
    }

    /// Whether a thread may pass whose stop is sent.
    fn may_pass(&self, entry: &Entry) -> bool {
        let open_to = if entry[held::OPEN_WORD] == control::GATE_PROVEN_TO as u64 {
            self.proven_to
        } else {
            self.open_to
        };
        entry[held::STATE] == held::STOPPED
            && (open_to >= entry[held::POSITION] || self.generation != entry[held::GENERATION])
    }
}

/// Lets a volume's own entries pass, and continues the groups that no volume holds any more.
fn release(maps: &mut impl HeldMaps, stand: &Stand, this_process: (u32, u64)) -> Held {
    // By its start as well: what is left of a process that ended is not the one's that has its number now.
    let mut groups: BTreeMap<(u32, u64), Vec<(Key, Entry)>> = BTreeMap::new();
    for (key, entry) in maps.entries() {
        let group = (group_of(&key), entry[held::STARTED_TICKS]);
        groups.entry(group).or_default().push((key, entry));
    }
    let mut held = Held::default();
    for ((group, started), mut entries) in groups {
        // Whoever it waited for: that one's agent may not be there. Before a turn begins: threads of the
        // group may have to wait for its end.
        let Some(process) = find(group, started).transpose() else {
            forget_dead(maps, this_process, (group, started), &entries);
            continue;
        };
        if !entries.iter().any(|(key, _)| stand.is_own(key)) {
            continue;
        }
        // It came back to a gate while its record was being taken away.
        if maps.group(group).is_none() {
            maps.enter_group(group, [0, started]);
        }
        for (key, entry) in &mut entries {
            if stand.is_own(key) && stand.may_pass(entry) {
                let mut passed = *entry;
                passed[held::STATE] = held::PASSED;
                if maps.change(key, &passed) {
                    *entry = passed;
                }
            }
        }
        let passes = |(_, entry): &(Key, Entry)| entry[held::STATE] == held::PASSED;
        if entries.iter().all(passes) {
            let continued = process.and_then(|process| {
                continue_group(maps, this_process, (group, started), &process, &entries)
            });
            match continued {
                Ok(true) => {
                    let now_ns = monotonic_ns();
                    let own = entries.iter().filter(|(key, _)| {
                        stand.is_own(key) && key[held::SINCE_NS] != held::BY_TICK
                    });
                    let waits = own.map(|(key, _)| now_ns.saturating_sub(key[held::SINCE_NS]));
                    held.waited_ns.extend(waits);
                    continue;
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(group, %error, "a held process cannot be continued; tried again");
                }
            }
            held.remaining += 1;
            continue;
        }
        held.remaining += 1;
        let own_pass = entries
            .iter()
            .all(|each| !stand.is_own(&each.0) || passes(each));
        held.for_others += u64::from(own_pass);
    }
    held
}

/// Continues a group of which all entries may pass; `false` if one more has come meanwhile. What it
/// cannot continue keeps its entries.
fn continue_group(
    maps: &mut impl HeldMaps,
    this_process: (u32, u64),
    (group, started): (u32, u64),
    process: &OwnedFd,
    entries: &[(Key, Entry)],
) -> io::Result<bool> {
    maps.in_turn(group, this_process, |maps| {
        let all_known = maps
            .entries()
            .iter()
            .filter(|(key, entry)| group_of(key) == group && entry[held::STARTED_TICKS] == started)
            .all(|(key, _)| entries.iter().any(|(known, _)| known == key));
        if !all_known {
            return Ok(false);
        }
        // Read now: somebody may have stopped it since.
        let record = maps
            .group(group)
            .filter(|record| record[held::GROUP_STARTED_TICKS] == started)
            .unwrap_or_default();
        // Before the signal, which ends the turn: a worker that marks the group after that stays marked.
        let marked = maps.unmark(group, started);
        if let Err(error) = go_on(process, record[held::GROUP_SIGNAL]) {
            if let Some(marked) = marked {
                maps.mark(group, marked);
            }
            return Err(error);
        }
        forget(maps, group, entries);
        Ok(true)
    })
}

/// In a turn: a process that has got the number may just be coming to a gate.
fn forget_dead(
    maps: &mut impl HeldMaps,
    this_process: (u32, u64),
    (group, started): (u32, u64),
    entries: &[(Key, Entry)],
) {
    maps.in_turn(group, this_process, |maps| {
        maps.unmark(group, started);
        forget(maps, group, entries);
    });
}

/// Records of groups that nobody is held of any more, as a thread leaves one that enters its group while that
/// is continued. With a record nobody else could continue the group.
fn forget_left_over(maps: &mut impl HeldMaps, this_process: (u32, u64)) {
    let held_groups = |maps: &_| -> BTreeSet<u32> {
        let entries = HeldMaps::entries(maps);
        entries.iter().map(|(key, _)| group_of(key)).collect()
    };
    let groups = maps.groups();
    if groups.is_empty() {
        return;
    }
    let held = held_groups(maps);
    for group in groups.into_iter().filter(|group| !held.contains(group)) {
        // Who enters it just now begins anew after the turn.
        maps.in_turn(group, this_process, |maps| {
            if !held_groups(maps).contains(&group) {
                maps.forget_group(group);
            }
        });
    }
}

fn forget(maps: &mut impl HeldMaps, group: u32, entries: &[(Key, Entry)]) {
    for (key, _) in entries {
        maps.forget(key);
    }
    if !maps.entries().iter().any(|(key, _)| group_of(key) == group) {
        maps.forget_group(group);
    }
}

/// Continues a process, unless somebody else has stopped it for good.
fn go_on(process: &OwnedFd, stopped_by: u64) -> io::Result<()> {
    let stopped_by = i32::try_from(stopped_by).unwrap_or(0);
    if stopped_by == Signal::STOP.as_raw() {
        return Ok(());
    }
    let send = |signal| match pidfd_send_signal(process, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(io::Error::from(error)),
    };
    send(Signal::CONT)?;
    // A signal to go on takes these away, and the process might have wanted to know of it.
    match Signal::from_named_raw(stopped_by) {
        Some(signal @ (Signal::TSTP | Signal::TTIN | Signal::TTOU)) => send(signal),
        _ => Ok(()),
    }
}

fn group_of(key: &Key) -> u32 {
    (key[held::THREAD] >> 32) as u32
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn is_alive(key: &Key, entry: &Entry) -> bool {
    !matches!(find(group_of(key), entry[held::STARTED_TICKS]), Ok(None))
}

fn fs_stat(group: u32) -> io::Result<Option<String>> {
    // The kernel hands the line out whole, to one read that has room for it: who waits for this waits at the
    // gate.
    let mut line = [0; 4096];
    let read = std::fs::File::open(format!("/proc/{group}/stat")).and_then(|mut file| {
        let length = io::Read::read(&mut file, &mut line)?;
        Ok(line.get(..length).unwrap_or_default())
    });
    match read {
        Ok(stat) => Ok(Some(String::from_utf8_lossy(stat).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // The process ended while its file was read.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The process of this number if it is the one that began then; one that ended is no error.
fn find(group: u32, started_ticks: u64) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(group).ok().and_then(Pid::from_raw) else {
        return Ok(None);
    };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // Read while the descriptor holds the process: the number cannot be another's by now.
    let stat = fs_stat(group)?;
    let is_it = stat.is_some_and(|stat| start_ticks(&stat) == Some(started_ticks));
    Ok(is_it.then_some(process))
}

/// When a process started, from its /proc/PID/stat: ticks since boot.
fn start_ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything; the start is field 22, the state behind the name
    // is field 3.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests;
