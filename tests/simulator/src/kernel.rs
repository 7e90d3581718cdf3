//! One machine's kernel: page cache, hooks, ring and gate, for the time the volume is mounted.
//!
//! A call happens in several steps, so that anything else may come between: change the page cache,
//! reserve the record (both under the inode's lock), commit the record, return; an fsync notes the
//! ring's position, writes back, commits the journal, writes its mark, and waits at the gate.

mod records;
mod syncing;

use std::collections::{BTreeMap, BTreeSet};

use twinwrite::ids::Identity;
use twinwrite::mirror::gate::OpenTo;
use twinwrite::record::{RecordHeader, encode, gap, op};

use crate::disk::Disk;
use crate::gating::Wait;
use crate::history::{History, Promise, Scope};
use crate::image::{Image, Mutation, Set, Version};
use crate::random::Random;
use crate::ring::Ring;
pub use syncing::{Rule, Waits};

/// Application threads.
pub const THREADS: usize = 3;
/// As `ATTR_SIZE`, of modes and owners.
const ATTR_MODE: u64 = 1;
const ATTR_UID: u64 = 1 << 1;
/// Bytes of a mark's record.
const MARK_BYTES: u64 = 64;

/// A thread in a call.
#[derive(Clone, Debug)]
pub enum Call {
    /// In user space.
    Idle,
    /// Holds its locks, has changed the page cache, and is before its hook.
    Changed(Change),
    /// The record is reserved.
    Reserved(Change, Option<u64>),
    /// In an fsync-class call, before writing back.
    Entered(Sync),
    /// Written back, before the journal's commit.
    WrittenBack(Sync),
    /// Durable, before the hook at its exit.
    Durable(Sync),
    /// The mark is reserved here, and this is waited for.
    Marked(Sync, Option<u64>, Wait),
    /// Waits at the gate.
    Gated(Promise, Wait),
}

/// A change under way.
#[derive(Clone, Debug)]
pub struct Change {
    operation: usize,
    record: Vec<u8>,
    /// The change is not captured, but noticed.
    gap: Option<usize>,
    locks: Vec<Identity>,
    /// It is followed by a sync of these blocks.
    then: Option<(Identity, usize, usize)>,
}

/// An fsync-class call under way.
#[derive(Clone, Debug)]
pub struct Sync {
    /// `None`: the whole volume.
    inode: Option<Identity>,
    blocks: Option<(usize, usize)>,
    datasync: bool,
    /// The ring's position at its entry.
    entry: u64,
    /// The same, if nobody was changing the file then.
    seen: Option<u64>,
    /// The journal must be committed up to here.
    need: Version,
    promise: Promise,
}

/// A mounted volume.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The page cache: what applications see.
    pub live: Image,
    dirty: BTreeSet<(Identity, usize)>,
    /// Pages that can be stored to without anybody noticing.
    mapped: BTreeSet<(Identity, usize)>,
    locks: BTreeSet<Identity>,
    /// Threads.
    pub calls: Vec<Call>,
    /// Applications use it.
    pub served: bool,
    /// The programs are attached.
    pub attached: bool,
    /// The capture ring.
    pub ring: Ring,
    /// How far the gates are open: the control word.
    pub gate: OpenTo,
    /// No replay contains anything before this ring position: another control word.
    pub proven_to: u64,
    /// Gaps that nobody has to wait for any more: whatever they changed is on the disk, and no record
    /// that is older than such a change is left in the log. `None`: not one of them.
    pub gaps_settled: Option<[u64; gap::COUNT]>,
    /// The page that was last stored to.
    pub stored: Option<(Identity, usize)>,
    /// Calls that wait for a proof.
    pub proofs_wanted: u64,
    /// How many calls waited for what.
    pub waits: Waits,
    /// The gate's rule with a fault.
    pub rule: Rule,
    /// Changes noticed and not captured, by reason; and how many are acknowledged.
    pub gaps: [u64; gap::COUNT],
    /// See [`Kernel::gaps`].
    pub gaps_seen: [u64; gap::COUNT],
    /// When (by mutation) changes were made that are not captured.
    pub uncaptured: Vec<Version>,
    /// The words that outlive the agent.
    pub continuity: Option<Left>,
    generations: BTreeMap<u64, u32>,
    last_generation: u32,
    /// Tells what happens, if anybody listens.
    pub told: Option<String>,
}

/// What an agent leaves for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// The running epoch.
    pub epoch: u64,
    /// Events lost when it began.
    pub lost: u64,
    /// Gaps covered when it began.
    pub gaps: [u64; gap::COUNT],
    /// The last mutation then.
    pub at: Version,
}

/// What the kernel works with.
pub struct Under<'a> {
    /// The disk.
    pub disk: &'a mut Disk,
    /// The oracle.
    pub history: &'a mut History,
    /// The last mutation's number.
    pub version: &'a mut Version,
}

impl Under<'_> {
    fn next(&mut self) -> Version {
        *self.version += 1;
        *self.version
    }
}

impl Kernel {
    /// Mounts what the disk shows.
    pub fn mount(image: Image, ring_bytes: u64, generation: u32) -> Self {
        Self {
            live: image,
            dirty: BTreeSet::new(),
            mapped: BTreeSet::new(),
            locks: BTreeSet::new(),
            calls: vec![Call::Idle; THREADS],
            served: false,
            attached: false,
            ring: Ring::new(ring_bytes),
            gate: OpenTo::of_word(0),
            proven_to: 0,
            gaps_settled: None,
            stored: None,
            proofs_wanted: 0,
            waits: Waits::default(),
            rule: Rule::default(),
            gaps: [0; gap::COUNT],
            gaps_seen: [0; gap::COUNT],
            uncaptured: Vec::new(),
            continuity: None,
            generations: BTreeMap::new(),
            last_generation: generation,
            told: None,
        }
    }

    /// A fresh identity: numbers are reused, generations are not.
    pub fn allocate(&mut self) -> Identity {
        let ino = (10..)
            .find(|ino| !self.live.inodes.keys().any(|i| i.ino == *ino))
            .unwrap_or(10);
        self.last_generation += 1;
        self.generations.insert(ino, self.last_generation);
        Identity {
            ino,
            generation: self.last_generation,
        }
    }

    /// The last generation given.
    pub fn last_generation(&self) -> u32 {
        self.last_generation
    }

    /// A change of the page cache that no application made (replay's).
    pub fn mutate(&mut self, mutation: &Mutation, under: (&mut Disk, &mut Version)) {
        let (disk, version) = under;
        *version += 1;
        self.change(mutation, *version, disk);
    }

    fn change(&mut self, mutation: &Mutation, at: Version, disk: &mut Disk) {
        match mutation {
            Mutation::Write {
                inode,
                first,
                blocks,
                ..
            } => {
                self.dirty
                    .extend((*first..first + blocks.len()).map(|index| (*inode, index)));
            }
            Mutation::Truncate { inode, size } => {
                self.dirty
                    .retain(|(whose, index)| whose != inode || index < size);
                self.mapped
                    .retain(|(whose, index)| whose != inode || index < size);
            }
            _ => {}
        }
        self.live.apply(mutation, at);
        disk.log(at, mutation);
    }

    /// Sends dirty blocks to the device: all, one inode's, or some of one.
    pub fn write_back(&mut self, which: impl Fn(&(Identity, usize)) -> bool, disk: &mut Disk) {
        let chosen: Vec<(Identity, usize)> =
            self.dirty.iter().filter(|d| which(d)).copied().collect();
        for (inode, index) in chosen {
            self.dirty.remove(&(inode, index));
            self.mapped.remove(&(inode, index));
            let content = self
                .live
                .inodes
                .get(&inode)
                .and_then(|n| n.blocks.get(index));
            if let Some(content) = content {
                disk.send(inode, index, *content);
            }
        }
    }

    /// Background write-back of one block or one inode.
    pub fn write_back_some(&mut self, random: &mut Random, disk: &mut Disk) {
        let dirty: Vec<(Identity, usize)> = self.dirty.iter().copied().collect();
        let Some(chosen) = random.pick(&dirty) else {
            return;
        };
        let whole = random.chance(40);
        self.write_back(|d| *d == chosen || whole && d.0 == chosen.0, disk);
    }

    /// Whether somebody is between a change and its hook, holding this inode.
    pub fn is_locked(&self, inode: Identity) -> bool {
        self.locks.contains(&inode)
    }
    /// The inodes that somebody is changing.
    pub fn locked(&self) -> Vec<Identity> {
        self.locks.iter().copied().collect()
    }

    /// The pages that can be stored to without anybody noticing.
    pub fn mapped_pages(&self) -> Vec<(Identity, usize)> {
        self.mapped.iter().copied().collect()
    }

    /// A call that changes something begins: locks, page cache, and the oracle's books.
    pub fn begin_change(
        &mut self,
        thread: usize,
        mutation: &Mutation,
        how: How,
        under: &mut Under<'_>,
    ) -> bool {
        let locks = locks_of(mutation);
        if locks.iter().any(|inode| self.locks.contains(inode)) {
            return false;
        }
        self.locks.extend(&locks);
        let at = under.next();
        let from_tmpfile = matches!(mutation, Mutation::Link { inode, .. }
            if self.live.inodes.get(inode).is_some_and(|n| n.links == 0));
        self.change(mutation, at, under.disk);
        let operation = under.history.begin(at);
        self.keep_books(operation, mutation, under.history);
        self.keep_carried(operation, mutation, under.history);
        let record = self.record(mutation, how.bytes_in_ring, from_tmpfile);
        let then = match mutation {
            Mutation::Write {
                inode,
                first,
                blocks,
                ..
            } if how.dsync => Some((*inode, *first, first + blocks.len())),
            _ => None,
        };
        if self.told.is_some() {
            self.told = Some(format!(
                "thread {thread}: {mutation:?} is mutation {at}{}",
                how.told()
            ));
        }
        self.calls[thread] = Call::Changed(Change {
            operation,
            record,
            gap: how.gap,
            locks,
            then,
        });
        true
    }

    /// One step of a thread's call.
    pub fn step(&mut self, thread: usize, random: &mut Random, under: &mut Under<'_>) {
        let call = std::mem::replace(&mut self.calls[thread], Call::Idle);
        self.calls[thread] = match call {
            Call::Idle => Call::Idle,
            Call::Changed(change) => self.hook(change, under),
            Call::Reserved(change, at) => self.leave(thread, &change, at, under),
            Call::Entered(sync) => self.sync_data(sync, under),
            Call::WrittenBack(sync) => Self::sync_journal(sync, random, under),
            Call::Durable(sync) => self.mark(sync),
            Call::Marked(sync, at, wait) => {
                if let Some(at) = at {
                    self.ring.commit(at);
                }
                Call::Gated(sync.promise, wait)
            }
            Call::Gated(promise, wait) => {
                if self.passes(wait) {
                    if self.told.is_some() {
                        self.told = Some(format!("thread {thread}: is answered"));
                    }
                    under.history.confirm(&promise);
                    Call::Idle
                } else {
                    Call::Gated(promise, wait)
                }
            }
        };
    }

    fn hook(&mut self, change: Change, under: &mut Under<'_>) -> Call {
        let mut at = None;
        if self.attached {
            if let Some(reason) = change.gap {
                self.note_gap(reason);
            } else {
                at = self.ring.reserve(&change.record);
                if at.is_none() {
                    self.note_gap(gap::RING_FULL);
                }
            }
        }
        if self.attached && at.is_none() {
            self.uncaptured.push(under.next());
        }
        under.history.operations[change.operation].captured = at;
        under.history.operations[change.operation].noticed = self.attached && at.is_none();
        for inode in &change.locks {
            self.locks.remove(inode);
        }
        Call::Reserved(change, at)
    }

    /// Counts a change that is not captured; the first one after an acknowledgement has a record.
    fn note_gap(&mut self, reason: usize) {
        let first = self.gaps[reason] == self.gaps_seen[reason];
        self.gaps[reason] += 1;
        if first {
            let header = RecordHeader {
                op: op::GAP,
                arg: reason as u64,
                ..RecordHeader::default()
            };
            let mut record = Vec::new();
            encode::push(&mut record, header, b"");
            if let Some(at) = self.ring.reserve(&record) {
                self.ring.commit(at);
            }
        }
    }

    fn leave(
        &mut self,
        thread: usize,
        change: &Change,
        at: Option<u64>,
        under: &mut Under<'_>,
    ) -> Call {
        if let Some(at) = at {
            self.ring.commit(at);
        }
        under.history.operations[change.operation].returned = true;
        let Some((inode, first, end)) = change.then else {
            return Call::Idle;
        };
        self.begin_sync(thread, Scope::Range(inode, first, end), under);
        std::mem::replace(&mut self.calls[thread], Call::Idle)
    }

    /// A store through a shared mapping: noticed only when the page is first dirtied.
    pub fn store(&mut self, inode: Identity, index: usize, under: &mut Under<'_>) {
        let known = self.mapped.contains(&(inode, index));
        if self.locks.contains(&inode)
            || self
                .live
                .inodes
                .get(&inode)
                .is_none_or(|n| n.blocks.len() <= index)
        {
            return;
        }
        let at = under.next();
        let mutation = Mutation::Write {
            inode,
            first: index,
            blocks: vec![at as u32],
            stamped: !known,
        };
        if !known && self.attached {
            self.note_gap(gap::MAPPING);
        }
        self.change(&mutation, at, under.disk);
        self.mapped.insert((inode, index));
        self.stored = Some((inode, index));
        if !known && self.attached {
            self.uncaptured.push(at);
        }
        let operation = under.history.begin(at);
        self.keep_books(operation, &mutation, under.history);
        under.history.operations[operation].returned = true;
        under.history.operations[operation].noticed = self.attached;
        if self.told.is_some() {
            self.told = Some(format!(
                "a store through a mapping: block {index} of {inode} is mutation {at}"
            ));
        }
    }

    /// Reads a file's bytes; fewer than asked for at its end.
    pub fn read(&self, inode: Identity, pos: u64, len: u32) -> Vec<u8> {
        let Some(node) = self.live.inodes.get(&inode) else {
            return Vec::new();
        };
        let blocks: Vec<u32> = node.blocks.iter().map(|b: &Set<u32>| b.value).collect();
        let bytes = crate::history::bytes_of(&blocks);
        let from = (pos as usize).min(bytes.len());
        let to = (from + len as usize).min(bytes.len());
        bytes[from..to].to_vec()
    }

    /// What is dirty, for a sync of the whole volume.
    pub fn sync_all(&mut self, disk: &mut Disk) {
        self.write_back(|_| true, disk);
    }
}

/// Most blocks of a file.
pub const MAX_BLOCKS: usize = 6;

/// How a change is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// The hook copies the bytes.
    pub bytes_in_ring: bool,
    /// O_DSYNC.
    pub dsync: bool,
    /// It passes where it is only noticed.
    pub gap: Option<usize>,
}

impl How {
    fn told(self) -> String {
        let mut text = String::new();
        if let Some(reason) = self.gap {
            text += &format!(", not captured ({})", gap::NAMES[reason]);
        }
        if self.dsync {
            text += ", O_DSYNC";
        }
        if !self.bytes_in_ring {
            text += ", bytes not in the ring";
        }
        text
    }
}

fn locks_of(mutation: &Mutation) -> Vec<Identity> {
    match mutation {
        Mutation::Create { place, inode, .. } => {
            place.iter().map(|p| p.0).chain([*inode]).collect()
        }
        Mutation::Link { inode, place } | Mutation::Unlink { inode, place } => {
            vec![*inode, place.0]
        }
        Mutation::Rename {
            inode,
            from,
            to,
            victim,
        } => [*inode, from.0, to.0].into_iter().chain(*victim).collect(),
        Mutation::Exchange {
            inode,
            other,
            from,
            to,
        } => vec![*inode, *other, from.0, to.0],
        Mutation::Write { inode, .. }
        | Mutation::Truncate { inode, .. }
        | Mutation::Chown { inode, .. }
        | Mutation::Chmod { inode, .. }
        | Mutation::Times { inode, .. }
        | Mutation::Stamp { inode, .. } => vec![*inode],
    }
}
