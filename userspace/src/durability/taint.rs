//! Taint: what a failed write-back leaves in doubt, and what may be called durable in spite of it.
//!
//! After a failed write-back the kernel marks the pages clean. The next `syncfs` and the next fsync
//! succeed, although the bytes are on no disk (measured): only the page cache, as long as it keeps
//! those pages, and the log have them. So from a noticed error on nothing is proven by a sync until
//! the bytes were written again and synced after that:
//!
//! | state | S may advance, records may leave | how it goes on |
//! |---|---|---|
//! | clean | yes, by a checkpoint with a [`Permit`] that still holds when it has synced | an error is noticed |
//! | an inode's write-back failed | no: a [`Permit`] is not given | its unproven bytes are written again |
//! | an error of nobody in particular | no | the unproven bytes of every inode are written again |
//! | written again | not yet: a checkpoint that begins now gets a [`Permit`] | it is proven: clean |
//!
//! S is a prefix, and so is what has left the region: both stay where they are as long as any inode is
//! tainted. An epoch must not be closed meanwhile, because a closed sentinel voids the log: see
//! [`Taint::may_close`]. Who cannot write the bytes again keeps the epoch open with its gates held, and
//! has the volume taken over: a merge writes them again from the log, into another page cache.
//!
//! A failed `syncfs` or fsync is an error that was noticed: it was told once, and not again. The driver
//! must count errors where the kernel notes them, compare the count after a checkpoint's `syncfs`
//! and before its sentinel with the one in the [`Permit`], and tell this core before it asks.
//!
//! It must never believe a sync because it succeeded.

use std::collections::BTreeMap;

use crate::ids::{Identity, RingPos};

#[cfg(test)]
mod tests;

/// Whose write-back failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    /// An inode's pages.
    Inode(Identity),
    /// Not known, or the file system's own blocks: anybody's.
    Anybody,
}

/// How far the mending of one taint has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its bytes are to be written again.
    Noticed,
    /// They were, and are not proven.
    WrittenAgain,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    stage: Stage,
    /// Marks at this ring position and behind it may be later than the error.
    since: RingPos,
}

/// What is to be written again, from the log or from a page cache that has it still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rewrite {
    /// Nothing.
    Nothing,
    /// The unproven bytes of these inodes.
    Inodes(Vec<Identity>),
    /// Those of every inode with unproven records.
    Everything,
}

/// Leave to make a checkpoint that may be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit {
    errors: u64,
}

impl Permit {
    /// Whether a `syncfs` that has just succeeded may be believed; `errors`: the kernel's count now,
    /// read behind it. The sentinel must not be written otherwise.
    #[must_use]
    pub const fn holds(&self, errors: u64) -> bool {
        self.errors == errors
    }
}

/// The taints of one epoch.
#[derive(Clone, Debug)]
pub struct Taint {
    entries: BTreeMap<Whose, Entry>,
    /// The kernel's count at the last look.
    errors: u64,
    /// Everything before this ring position was taken before the last look at the count.
    looked_at: RingPos,
}

impl Taint {
    /// For an epoch that begins at `start`. `errors` is the kernel's count, read before the epoch's
    /// first checkpoint begins: what failed earlier is covered by that checkpoint only if it is
    /// written again, so a driver that cannot tell starts with [`Taint::noticed`] for anybody.
    #[must_use]
    pub const fn new(errors: u64, start: RingPos) -> Self {
        Self {
            entries: BTreeMap::new(),
            errors,
            looked_at: start,
        }
    }

    /// A look at the kernel's books: `errors`, the count; `named`, whose they were as far as it is
    /// known, one for each new error; `taken`: the ring position before which all records had been
    /// taken before the count was read. What the names do not explain is anybody's.
    pub fn looked(
        &mut self,
        errors: u64,
        named: impl IntoIterator<Item = Identity>,
        taken: RingPos,
    ) {
        let mut unexplained = errors.wrapping_sub(self.errors);
        self.errors = errors;
        for identity in named {
            unexplained = unexplained.saturating_sub(1);
            self.enter(Whose::Inode(identity));
        }
        if unexplained > 0 {
            self.enter(Whose::Anybody);
        }
        self.looked_at = self.looked_at.max(taken);
    }

    /// An error was noticed elsewhere: a sync failed.
    pub fn noticed(&mut self, whose: Whose) {
        self.enter(whose);
    }

    fn enter(&mut self, whose: Whose) {
        let since = self.looked_at;
        let entry = self.entries.entry(whose).or_insert(Entry {
            stage: Stage::Noticed,
            since,
        });
        entry.stage = Stage::Noticed;
    }

    /// Whether anything is in doubt.
    #[must_use]
    pub fn is_tainted(&self) -> bool {
        !self.entries.is_empty()
    }

    /// What is to be written again now.
    #[must_use]
    pub fn rewrite(&self) -> Rewrite {
        let waiting = self.entries.iter();
        let waiting: Vec<Whose> = waiting
            .filter(|(_, entry)| entry.stage == Stage::Noticed)
            .map(|(whose, _)| *whose)
            .collect();
        if waiting.contains(&Whose::Anybody) {
            return Rewrite::Everything;
        }
        let inodes: Vec<Identity> = waiting
            .iter()
            .filter_map(|whose| match whose {
                Whose::Inode(identity) => Some(*identity),
                Whose::Anybody => None,
            })
            .collect();
        if inodes.is_empty() {
            Rewrite::Nothing
        } else {
            Rewrite::Inodes(inodes)
        }
    }

    /// All that `asked` named has been written again; what failed since was noticed before this call.
    /// `errors`: the kernel's count when the writing began, as of a look then.
    pub fn rewritten(&mut self, asked: &Rewrite, errors: u64) {
        if errors != self.errors {
            return;
        }
        for (whose, entry) in &mut self.entries {
            let done = match (asked, whose) {
                (Rewrite::Everything, _) => true,
                (Rewrite::Inodes(inodes), Whose::Inode(identity)) => inodes.contains(identity),
                (Rewrite::Inodes(_), Whose::Anybody) | (Rewrite::Nothing, _) => false,
            };
            if done {
                entry.stage = Stage::WrittenAgain;
            }
        }
    }

    /// Leave for a checkpoint that begins now; `None`: whatever it synced, it would prove nothing.
    #[must_use]
    pub fn permit(&self) -> Option<Permit> {
        let waits = |entry: &Entry| entry.stage == Stage::Noticed;
        let errors = self.errors;
        (!self.entries.values().any(waits)).then_some(Permit { errors })
    }

    /// A checkpoint has synced and its sentinel's fsync succeeded. Whether it counts: if not, S stays
    /// and nothing leaves the region because of it. To be called after a look.
    pub fn proven(&mut self, permit: Permit) -> bool {
        let counts = permit.holds(self.errors) && self.permit() == Some(permit);
        if counts {
            self.entries.clear();
        }
        counts
    }

    /// Whether a mark in the ring at `at` proves anything of this inode. One that is later than an
    /// error does not, whatever the call returned: it must neither purge nor clip. Replay, which has
    /// the log only, learns it from the mark's own flag.
    #[must_use]
    pub fn believes_mark(&self, identity: Identity, at: RingPos) -> bool {
        let doubted = |whose: Whose| {
            let entry = self.entries.get(&whose);
            entry.is_some_and(|entry| at >= entry.since)
        };
        !doubted(Whose::Inode(identity)) && !doubted(Whose::Anybody)
    }

    /// Whether the epoch may be closed: its closing checkpoint would have to prove what nothing
    /// proves, and void the only other copy. Until then the gates stay held.
    #[must_use]
    pub fn may_close(&self) -> bool {
        self.permit().is_some()
    }

    /// For status and log; `None` while nothing is in doubt.
    #[must_use]
    pub fn told(&self) -> Option<String> {
        let keeps = "its records are kept until the bytes were written again and synced";
        let inodes = self.entries.keys().filter_map(|whose| match whose {
            Whose::Inode(identity) => Some(identity.to_string()),
            Whose::Anybody => None,
        });
        let inodes: Vec<String> = inodes.take(3).collect();
        if self.entries.contains_key(&Whose::Anybody) {
            let all = "all records are kept until the bytes were written again and synced";
            return Some(format!("a write-back failed on the volume: {all}"));
        }
        (!inodes.is_empty()).then(|| {
            let count = self.entries.len();
            let more = if count > inodes.len() {
                format!(" and {} more", count - inodes.len())
            } else {
                String::new()
            };
            format!(
                "write-back of inode {}{more} failed: {keeps}",
                inodes.join(", ")
            )
        })
    }
}
