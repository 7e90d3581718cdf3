use std::process::{Child, Command};

use super::super::host::{Group, Marked};
use super::*;

const THIS: (u32, u64) = (1, 1);
const ONE: u64 = 11;
const OTHER: u64 = 22;

/// The host's maps, without a kernel.
#[derive(Default)]
struct Maps {
    threads: BTreeMap<Key, Entry>,
    groups: BTreeMap<u32, Group>,
    marked: BTreeMap<u32, Marked>,
    turns: u64,
    /// Comes to a gate just before the next turn begins, after the entries were read.
    late: Option<(Key, Entry)>,
}

impl HeldMaps for Maps {
    fn entries(&self) -> Vec<(Key, Entry)> {
        self.threads
            .iter()
            .map(|(key, entry)| (*key, *entry))
            .collect()
    }

    fn change(&mut self, key: &Key, entry: &Entry) -> bool {
        let found = self.threads.get_mut(key);
        found.map(|found| *found = *entry).is_some()
    }

    fn forget(&mut self, key: &Key) {
        self.threads.remove(key);
    }

    fn group(&self, group: u32) -> Option<Group> {
        self.groups.get(&group).copied()
    }

    fn enter_group(&mut self, group: u32, record: Group) {
        self.groups.entry(group).or_insert(record);
    }

    fn forget_group(&mut self, group: u32) {
        self.groups.remove(&group);
    }

    fn groups(&self) -> Vec<u32> {
        self.groups.keys().copied().collect()
    }

    fn unmark(&mut self, group: u32, started: u64) -> Option<Marked> {
        let is_it = self.marked.get(&group)?[held::MARKED_STARTED_TICKS] == started;
        is_it.then(|| self.marked.remove(&group)).flatten()
    }

    fn mark(&mut self, group: u32, marked: Marked) {
        self.marked.entry(group).or_insert(marked);
    }

    fn in_turn<T>(&mut self, _: u32, _: (u32, u64), act: impl FnOnce(&mut Self) -> T) -> T {
        self.turns += 1;
        self.threads.extend(self.late.take());
        act(self)
    }
}

fn stand(device: u64, open_to: u64) -> Stand {
    Stand {
        device,
        open_to,
        proven_to: 0,
        generation: 7,
    }
}

fn entry(position: u64, started: u64, state: u64) -> Entry {
    let mut entry = [0; held::WORDS];
    entry[held::POSITION] = position;
    entry[held::OPEN_WORD] = control::GATE_OPEN_TO as u64;
    entry[held::GENERATION] = 7;
    entry[held::STARTED_TICKS] = started;
    entry[held::STATE] = state;
    entry
}

/// A process that is stopped as the programs do it.
struct Stopped {
    child: Child,
    started: u64,
}

impl Stopped {
    fn start() -> Self {
        let child = Command::new("sleep").arg("600").spawn().expect("a child");
        let stat = fs_stat(child.id()).expect("readable").expect("it lives");
        let started = start_ticks(&stat).expect("a start");
        let stopped = Self { child, started };
        stopped.signal(Signal::STOP);
        stopped.becomes(true);
        stopped
    }

    fn signal(&self, signal: Signal) {
        let process = find(self.group(), self.started)
            .expect("found")
            .expect("it lives");
        pidfd_send_signal(process, signal).expect("sent");
    }

    fn group(&self) -> u32 {
        self.child.id()
    }

    fn key(&self, device: u64, since: u64) -> Key {
        [
            u64::from(self.group()) << 32 | u64::from(self.group()),
            device,
            since,
        ]
    }

    fn is_stopped(&self) -> bool {
        let stat = fs_stat(self.group()).expect("readable").unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    fn becomes(&self, stopped: bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.is_stopped() != stopped {
            assert!(Instant::now() < deadline, "stopped: {}", self.is_stopped());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn a_thread_passes_when_its_position_did_or_its_epoch_ended() {
    let waits = entry(4096, 0, held::STOPPED);
    assert!(!stand(ONE, 4095).may_pass(&waits));
    assert!(stand(ONE, 4096).may_pass(&waits));
    let ended = Stand {
        generation: 8,
        ..stand(ONE, 0)
    };
    assert!(ended.may_pass(&waits));
    let until_closed = entry(held::UNTIL_CLOSED, 0, held::STOPPED);
    assert!(!stand(ONE, u64::MAX - 4096).may_pass(&until_closed));
    assert!(stand(ONE, control::GATE_OPEN).may_pass(&until_closed));
    assert!(!ended.may_pass(&entry(4096, 0, held::STOPPING)));
}

#[test]
fn who_waits_for_a_checkpoint_does_not_pass_with_what_is_mirrored() {
    let mut waits = entry(4096, 0, held::STOPPED);
    waits[held::OPEN_WORD] = control::GATE_PROVEN_TO as u64;
    assert!(!stand(ONE, 8192).may_pass(&waits));
    let proven = Stand {
        proven_to: 4096,
        ..stand(ONE, 0)
    };
    assert!(proven.may_pass(&waits));
}

#[test]
fn a_group_goes_on_only_when_no_volume_holds_it_any_more() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    for (device, since) in [(ONE, 1), (OTHER, 2)] {
        let waits = entry(100, process.started, held::STOPPED);
        maps.threads.insert(process.key(device, since), waits);
    }
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!((held.remaining, held.for_others), (1, 1));
    assert!(process.is_stopped());
    // The other volume's agent does not pass it either, before its own position is reached.
    let held = release(&mut maps, &stand(OTHER, 99), THIS);
    assert_eq!((held.remaining, held.for_others), (1, 0));
    assert!(process.is_stopped());
    let held = release(&mut maps, &stand(OTHER, 100), THIS);
    assert_eq!((held.remaining, held.waited_ns.len()), (0, 1));
    process.becomes(false);
    assert!(maps.threads.is_empty() && maps.groups.is_empty());
}

#[test]
fn a_thread_that_comes_while_its_group_is_being_continued_keeps_it_stopped() {
    let process = Stopped::start();
    let late = (
        process.key(ONE, 2),
        entry(200, process.started, held::STOPPING),
    );
    let mut maps = Maps {
        late: Some(late),
        ..Maps::default()
    };
    let waits = entry(100, process.started, held::STOPPED);
    maps.threads.insert(process.key(ONE, 1), waits);
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!((held.remaining, maps.turns), (1, 1));
    assert!(process.is_stopped());
    assert_eq!(maps.threads.len(), 2, "nobody is forgotten");
    // It does not go on before the programs say that the last stop signal is sent.
    release(&mut maps, &stand(ONE, 200), THIS);
    assert!(process.is_stopped());
    maps.threads
        .insert(late.0, entry(200, process.started, held::STOPPED));
    let held = release(&mut maps, &stand(ONE, 200), THIS);
    assert_eq!((held.remaining, held.waited_ns.len()), (0, 2));
    process.becomes(false);
}

#[test]
fn who_was_stopped_by_others_stays_so_and_is_not_held_any_more() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    let waits = entry(100, process.started, held::STOPPED);
    maps.threads.insert(process.key(ONE, 1), waits);
    let by_stop = Signal::STOP.as_raw().unsigned_abs().into();
    maps.groups
        .insert(process.group(), [by_stop, process.started]);
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!(held.remaining, 0);
    assert!(process.is_stopped());
    assert!(maps.threads.is_empty() && maps.groups.is_empty());
}

#[test]
fn a_process_that_only_got_the_number_is_left_alone() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    let waits = entry(100, process.started.wrapping_sub(1), held::STOPPED);
    maps.threads.insert(process.key(ONE, 1), waits);
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!(held.remaining, 0);
    assert!(
        process.is_stopped(),
        "somebody else's process was continued"
    );
    assert!(maps.threads.is_empty());
}

#[test]
fn what_is_left_of_a_dead_process_neither_waits_nor_holds_who_has_its_number() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    let dead = entry(200, process.started.wrapping_sub(1), held::STOPPING);
    maps.threads.insert(process.key(OTHER, 1), dead);
    let waits = entry(100, process.started, held::STOPPED);
    maps.threads.insert(process.key(ONE, 2), waits);
    maps.groups.insert(process.group(), [0, process.started]);
    maps.marked.insert(process.group(), [process.started, 1]);
    let held = release(&mut maps, &stand(ONE, 99), THIS);
    assert_eq!((held.remaining, maps.threads.len()), (1, 1));
    assert!(maps.groups.contains_key(&process.group()));
    assert!(maps.marked.contains_key(&process.group()));
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!((held.remaining, held.waited_ns.len()), (0, 1));
    process.becomes(false);
    assert!(maps.threads.is_empty() && maps.groups.is_empty());
}

#[test]
fn a_record_without_an_entry_keeps_nobody_from_being_continued() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    maps.groups.insert(process.group(), [0, process.started]);
    maps.groups.insert(1, [0, 1]);
    maps.threads.insert(
        process.key(ONE, 2),
        entry(100, process.started, held::STOPPED),
    );
    forget_left_over(&mut maps, THIS);
    assert!(maps.groups.contains_key(&process.group()) && maps.groups.len() == 1);
    // Who comes to the gate meanwhile keeps it.
    maps.late = maps.threads.pop_first();
    forget_left_over(&mut maps, THIS);
    assert_eq!(maps.groups.len(), 1);
    maps.threads.clear();
    forget_left_over(&mut maps, THIS);
    assert!(maps.groups.is_empty());
}

#[test]
fn the_marks_go_with_the_group_that_goes_on() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    let group = process.group();
    maps.groups.insert(group, [0, process.started]);
    maps.marked.insert(group, [process.started, 1]);
    let waits = entry(100, process.started, held::STOPPED);
    maps.threads.insert(process.key(ONE, 1), waits);
    release(&mut maps, &stand(ONE, 99), THIS);
    assert!(maps.marked.contains_key(&group));
    release(&mut maps, &stand(ONE, 100), THIS);
    process.becomes(false);
    assert!(maps.marked.is_empty());
}

#[test]
fn a_stop_by_the_tick_goes_with_the_thread_that_waits_and_counts_no_wait() {
    let process = Stopped::start();
    let mut maps = Maps::default();
    let by_tick = entry(0, process.started, held::STOPPING);
    let key = process.key(ONE, held::BY_TICK);
    maps.threads.insert(key, by_tick);
    maps.threads.insert(
        process.key(ONE, 2),
        entry(100, process.started, held::STOPPED),
    );
    // Its signal may still be on the way.
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!(held.remaining, 1);
    assert!(process.is_stopped());
    maps.threads
        .insert(key, entry(0, process.started, held::STOPPED));
    let held = release(&mut maps, &stand(ONE, 100), THIS);
    assert_eq!((held.remaining, held.waited_ns.len()), (0, 1));
    process.becomes(false);
    assert!(maps.threads.is_empty() && maps.groups.is_empty());
}

#[test]
fn a_process_is_known_by_its_start_whatever_its_name() {
    let fields: Vec<String> = (4..=30).map(|field| field.to_string()).collect();
    let stat = format!("17 (a) b (c) S {}", fields.join(" "));
    assert_eq!(start_ticks(&stat), Some(22));
    assert_eq!(start_ticks("17 (a"), None);
}
