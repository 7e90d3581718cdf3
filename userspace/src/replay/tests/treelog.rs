//! What btrfs may show after a power cut: the last transaction, and, of every file that was fsynced since, a
//! log of that one file. So an older operation on another file may be missing where a later one is there.

use std::collections::BTreeSet;

use super::crash::{Crash, state_after};
use super::model::{Body, Model};
use super::world::{Event, Name, Op, Random};
use crate::ids::Identity;

/// Cuts the power after all of `events`.
pub(super) fn crash(root: Identity, events: &[Event], random: &mut Random) -> Crash {
    let is_flush = |event: &Event| matches!(event.op, Op::Flush | Op::Checkpoint);
    let base = (events.iter().rposition(is_flush)).map_or(0, |index| index + 1);
    let committed = base + random.below((events.len() - base) / 2 + 1);
    let mut disk = state_after(root, events, committed);
    let mut landed: BTreeSet<usize> = (0..committed).collect();
    for (index, event) in events.iter().enumerate().skip(committed) {
        let Op::Fsync { inode, .. } = event.op else {
            continue;
        };
        let then = state_after(root, events, index);
        let mut replayed = disk.clone();
        let mut log = Log {
            disk: &mut replayed,
            then: &then,
            seen: BTreeSet::new(),
        };
        log.file(inode);
        // What a log of one file cannot tell commits the transaction.
        disk = if log.is_tree() { replayed } else { then };
        landed.extend(committed..=index);
    }
    disk.held.clear();
    disk.nodes.retain(|_, node| node.links > 0);
    Crash { disk, landed }
}

/// The log of one file, being replayed.
struct Log<'m> {
    disk: &'m mut Model,
    /// What there was when the file was fsynced.
    then: &'m Model,
    seen: BTreeSet<Identity>,
}

fn names_of(model: &Model, inode: Identity) -> BTreeSet<(Identity, Name)> {
    let mut names = BTreeSet::new();
    for directory in model.nodes.keys() {
        let entries = model.entries(*directory).into_iter();
        names.extend(
            entries
                .filter(|(_, child)| *child == inode)
                .map(|(name, _)| (*directory, name)),
        );
    }
    names
}

impl Log<'_> {
    /// Makes one inode and its names what they were, and whatever is in their way.
    fn file(&mut self, inode: Identity) {
        if !self.seen.insert(inode) {
            return;
        }
        let now = names_of(self.disk, inode);
        let wanted = names_of(self.then, inode);
        if inode != self.then.root && wanted.is_empty() {
            for child in self.disk.entries(inode).into_values() {
                self.file(child);
            }
        } else {
            self.inode(inode);
        }
        for (directory, name) in now.difference(&wanted) {
            self.name(*directory, name, None);
        }
        for (directory, name) in wanted {
            if !self.disk.nodes.contains_key(&directory) {
                self.file(directory);
            }
            match self.disk.entries(directory).get(&name) {
                Some(other) if *other != inode => self.file(*other),
                _ => {}
            }
            self.name(directory, &name, Some(inode));
        }
        if self
            .then
            .nodes
            .get(&inode)
            .is_some_and(|node| node.is_directory())
        {
            let (then, now) = (self.then.entries(inode), self.disk.entries(inode));
            for child in then.values().chain(now.values()) {
                let is_same = |model: &Model| {
                    names_of(model, *child)
                        .into_iter()
                        .filter(|(d, _)| *d == inode)
                        .collect::<Vec<_>>()
                };
                if is_same(self.then) != is_same(self.disk) {
                    self.file(*child);
                }
            }
        }
    }

    fn name(&mut self, directory: Identity, name: &Name, child: Option<Identity>) {
        if self.disk.entries(directory).get(name).copied() == child {
            return;
        }
        let entries = self.disk.entries_mut(directory);
        match child {
            Some(child) => entries.insert(name.clone(), child),
            None => entries.remove(name),
        };
        if let Some(then) = self.then.nodes.get(&directory)
            && let Some(now) = self.disk.nodes.get_mut(&directory)
        {
            now.mtime_ns = then.mtime_ns;
        }
    }

    fn inode(&mut self, inode: Identity) {
        let mut node = self.then.nodes[&inode].clone();
        if let Body::Directory(entries) = &mut node.body {
            *entries = self.disk.entries(inode);
        }
        self.disk.nodes.insert(inode, node);
        self.disk.generations.insert(inode.ino, inode.generation);
    }

    /// Counts links again; whether every directory has one place below the root.
    fn is_tree(&mut self) -> bool {
        let root = self.disk.root;
        let all: Vec<Identity> = self.disk.nodes.keys().copied().collect();
        let reachable = self.disk.reachable();
        for inode in all {
            let names = names_of(self.disk, inode).len() as u32;
            let is_directory = self.disk.nodes[&inode].is_directory();
            if inode == root {
                continue;
            }
            if names == 0 {
                self.disk.nodes.remove(&inode);
            } else if is_directory && names != 1 || !reachable.contains(&inode) {
                return false;
            } else if let Some(node) = self.disk.nodes.get_mut(&inode) {
                node.links = names;
            }
        }
        self.disk
            .reachable()
            .iter()
            .all(|inode| self.disk.nodes.contains_key(inode))
    }
}
