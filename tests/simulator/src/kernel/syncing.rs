//! Calls of the fsync class: what they write back, what they mark, what they wait for.

use twinwrite::ids::{Identity, RingPos};
use twinwrite::mirror::gate::OpenTo;
use twinwrite::record::{RecordHeader, encode, flag, gap, op};

use super::{Call, Kernel, MARK_BYTES, Sync, Under};
use crate::gating::{Confirms, Known, Wait, wait_for};
use crate::history::{Promise, Scope};
use crate::image::BLOCK_BYTES;
use crate::random::Random;

/// The gate's rule, whole or with a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// Whole.
    #[default]
    Whole,
    /// Nobody waits.
    NoGate,
    /// The ring's position at the entry counts also while somebody is changing the file.
    WritersIgnored,
    /// The log is taken as whole whatever was noticed.
    GapsIgnored,
    /// What takes a proof is answered once it is mirrored.
    MirroredWillDo,
    /// A sync of the volume takes a proof only if the log lacks something.
    SyncTrustsWholeLog,
    /// A sync of names that somebody is changing waits for its mark.
    MarkForNames,
}

/// How many calls waited for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// What was captured when they began.
    pub entries: u64,
    /// Their marks.
    pub marks: u64,
    /// A checkpoint.
    pub proofs: u64,
    /// The end of the epoch.
    pub ends: u64,
}

impl Waits {
    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.entries += other.entries;
        self.marks += other.marks;
        self.proofs += other.proofs;
        self.ends += other.ends;
    }
}

impl Kernel {
    /// An fsync-class call begins.
    pub fn begin_sync(&mut self, thread: usize, scope: Scope, under: &mut Under<'_>) {
        let origin = |who: Identity| self.live.inodes.get(&who).map_or(who, |n| n.origin);
        let (inode, blocks, datasync, scope) = match scope {
            Scope::Volume => (None, None, false, Scope::Volume),
            Scope::Full(inode) => (Some(inode), None, false, Scope::Full(origin(inode))),
            Scope::Data(inode) => (Some(inode), None, true, Scope::Data(origin(inode))),
            Scope::Range(inode, first, end) => {
                let range = Scope::Range(origin(inode), first, end);
                (Some(inode), Some((first, end)), true, range)
            }
        };
        // What has no name is gone after a crash; and fdatasync need not make a later name durable.
        let nameless = |inode: Identity| {
            let node = self.live.inodes.get(&inode);
            node.is_none_or(|n| n.links == 0 || datasync && n.born > n.size_at)
        };
        let promise = if inode.is_some_and(nameless) {
            Promise::new()
        } else {
            under.history.promise(scope)
        };
        if self.told.is_some() {
            self.told = Some(format!("thread {thread}: enters a sync of {scope:?}"));
        }
        self.calls[thread] = Call::Entered(Sync {
            inode,
            blocks,
            datasync,
            entry: self.ring.producer(),
            seen: self.seen(inode),
            need: 0,
            promise,
        });
    }

    pub(super) fn sync_data(&mut self, mut sync: Sync, under: &mut Under<'_>) -> Call {
        if under.disk.fails() {
            return Call::Idle;
        }
        let inside = |dirty: &(Identity, usize)| {
            sync.inode.is_none_or(|inode| dirty.0 == inode)
                && sync
                    .blocks
                    .is_none_or(|(first, end)| (first..end).contains(&dirty.1))
        };
        self.write_back(inside, under.disk);
        sync.need = match sync.inode {
            None => *under.version,
            Some(inode) if sync.datasync => self.live.inodes.get(&inode).map_or(0, |n| n.size_at),
            Some(inode) => under.disk.last_touch(inode),
        };
        Call::WrittenBack(sync)
    }

    pub(super) fn sync_journal(sync: Sync, random: &mut Random, under: &mut Under<'_>) -> Call {
        if under.disk.fails() {
            return Call::Idle;
        }
        let to = if random.chance(50) {
            sync.need
        } else {
            random.between(sync.need, *under.version)
        };
        under.disk.commit(to);
        under.disk.flush();
        Call::Durable(sync)
    }

    pub(super) fn mark(&mut self, sync: Sync) -> Call {
        if !self.attached {
            return Call::Gated(sync.promise, Wait::Mirrored(0));
        }
        let Some(inode) = sync.inode else {
            // It leaves no mark: that would clip nothing.
            let wait = self.wait(&sync, None);
            return Call::Gated(sync.promise, wait);
        };
        let unlinked = self.live.inodes.get(&inode).is_none_or(|n| n.links == 0);
        let (first, last) = match sync.blocks {
            Some((first, end)) => ((first * BLOCK_BYTES) as u64, (end * BLOCK_BYTES) as u64 - 1),
            None => (0, i64::MAX as u64),
        };
        let flags = if sync.datasync { flag::DATASYNC } else { 0 }
            | if unlinked { flag::UNLINKED } else { 0 };
        let header = RecordHeader {
            pos: first,
            size_after: last,
            arg: sync.entry,
            flags,
            ..self.header(op::FSYNC, inode)
        };
        let mut record = Vec::new();
        encode::push(&mut record, header, b"");
        let at = self.ring.reserve(&record);
        if at.is_none() {
            self.note_gap(gap::RING_FULL);
        }
        let wait = self.wait(&sync, at.map(|at| at + MARK_BYTES));
        if wait == Wait::Closed && at.is_some() {
            // Nothing else would end the epoch.
            self.note_gap(gap::UNGATED);
        }
        Call::Marked(sync, at, wait)
    }

    /// The ring position before which everything has its record that anybody can see of a file now.
    fn seen(&self, inode: Option<Identity>) -> Option<u64> {
        let is_changing = inode.is_some_and(|inode| self.is_locked(inode));
        (!is_changing || self.rule == Rule::WritersIgnored).then(|| self.ring.producer())
    }

    /// What a call that is about to answer waits for.
    fn wait(&mut self, sync: &Sync, mark_end: Option<u64>) -> Wait {
        let is_directory = |inode| self.live.inodes.get(&inode).is_some_and(|n| n.directory);
        let confirms = match sync.inode {
            None => Confirms::Volume,
            Some(inode) if is_directory(inode) => Confirms::Directory,
            Some(_) => Confirms::File,
        };
        let known = Known {
            seen_at_entry: sync.seen,
            seen_at_exit: self.seen(sync.inode),
            mark_end,
            producer: self.ring.producer(),
            is_log_whole: self.gaps_settled == Some(self.gaps) || self.rule == Rule::GapsIgnored,
            lacks_stores: self
                .gaps_settled
                .is_none_or(|settled| settled[gap::MAPPING] != self.gaps[gap::MAPPING]),
        };
        let wait = match (self.rule, wait_for(confirms, known)) {
            (Rule::MirroredWillDo, Wait::Proven(position)) => Wait::Mirrored(position),
            (Rule::SyncTrustsWholeLog, Wait::Proven(position))
                if confirms == Confirms::Volume && known.is_log_whole =>
            {
                Wait::Mirrored(position)
            }
            (Rule::MarkForNames, Wait::Proven(_)) if confirms == Confirms::Directory => {
                Wait::Mirrored(mark_end.unwrap_or(known.producer))
            }
            (_, wait) => wait,
        };
        match wait {
            Wait::Proven(_) => {
                self.proofs_wanted += 1;
                self.waits.proofs += 1;
            }
            Wait::Mirrored(position) if Some(position) == mark_end => self.waits.marks += 1,
            Wait::Mirrored(_) => self.waits.entries += 1,
            Wait::Closed => self.waits.ends += 1,
        }
        wait
    }

    /// Whether what a call waits for has come about.
    pub(super) fn passes(&self, wait: Wait) -> bool {
        // Without programs there is no mark, no gate, and no region to revert anything.
        if !self.attached || self.gate == OpenTo::All || self.rule == Rule::NoGate {
            return true;
        }
        match wait {
            Wait::Mirrored(position) => self.gate.admits(RingPos(position)),
            Wait::Proven(position) => self.proven_to >= position,
            Wait::Closed => false,
        }
    }
}
