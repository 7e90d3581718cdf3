//! The disk under the volume: a volatile cache, a journal that commits in order, bytes in any order.
//!
//! What a power cut leaves is chosen by dice among what the device may hold: the journal up to any
//! point at or behind what was flushed, and of every block any version at or behind it.

use std::collections::BTreeMap;

use twinwrite::ids::Identity;
use twinwrite::replay::Sentinel;

use crate::image::{Image, Mutation, Set, Version};
use crate::random::Random;

#[derive(Clone, Debug, Default)]
struct Block {
    /// What was sent to the device, in this order.
    sent: Vec<Set<u32>>,
    /// How many of them are behind its volatile cache.
    durable: usize,
}

/// A slot of the sentinel file.
type Slot = Option<(u64, Sentinel)>;

/// The device and the file system's journal on it.
#[derive(Clone, Debug)]
pub struct Disk {
    /// State when it was mounted.
    base: Image,
    journal: Vec<(Version, Mutation)>,
    /// Journal written to the device up to here, and flushed up to here.
    committed: Version,
    durable: Version,
    blocks: BTreeMap<(Identity, usize), Block>,
    sentinel: [Slot; 2],
    /// A slot being written: torn if the power goes now.
    sentinel_writing: Option<(usize, Sentinel)>,
    /// The next flush or write-back fails.
    pub failing: u32,
}

impl Disk {
    /// A formatted device.
    pub fn new() -> Self {
        Self {
            base: Image::fresh(),
            journal: Vec::new(),
            committed: 0,
            durable: 0,
            blocks: BTreeMap::new(),
            sentinel: [None, None],
            sentinel_writing: None,
            failing: 0,
        }
    }

    /// A mutation went into the running transaction.
    pub fn log(&mut self, at: Version, mutation: &Mutation) {
        self.journal.push((at, mutation.clone()));
    }

    /// The last mutation that touched an inode's metadata.
    pub fn last_touch(&self, whom: Identity) -> Version {
        let found = self.journal.iter().rev().find(|(_, m)| m.touches(whom));
        found.map_or(0, |(at, _)| *at)
    }

    /// A block is sent to the device.
    pub fn send(&mut self, inode: Identity, block: usize, content: Set<u32>) {
        let sent = &mut self.blocks.entry((inode, block)).or_default().sent;
        if sent.last() != Some(&content) {
            sent.push(content);
        }
    }

    /// The journal is written up to here.
    pub fn commit(&mut self, at: Version) {
        self.committed = self.committed.max(at);
    }

    /// The device empties its volatile cache.
    pub fn flush(&mut self) {
        self.durable = self.durable.max(self.committed);
        for block in self.blocks.values_mut() {
            block.durable = block.sent.len();
        }
    }

    /// Whether the device refuses this time.
    pub fn fails(&mut self) -> bool {
        if self.failing == 0 {
            return false;
        }
        self.failing -= 1;
        true
    }

    /// What the sentinel file says.
    pub fn sentinel(&self) -> Option<&Sentinel> {
        let newest = self
            .sentinel
            .iter()
            .flatten()
            .max_by_key(|(counter, _)| *counter);
        newest.map(|(_, sentinel)| sentinel)
    }

    /// The write into the older slot begins.
    pub fn begin_sentinel(&mut self, sentinel: Sentinel) {
        let counter = |slot: &Slot| slot.as_ref().map_or(0, |(counter, _)| *counter);
        let older = usize::from(counter(&self.sentinel[0]) > counter(&self.sentinel[1]));
        self.sentinel_writing = Some((older, sentinel));
    }

    fn land_sentinel(&mut self) {
        let counters = self.sentinel.iter().flatten().map(|(counter, _)| *counter);
        let counter = counters.max().unwrap_or(0) + 1;
        if let Some((index, sentinel)) = self.sentinel_writing.take() {
            self.sentinel[index] = Some((counter, sentinel));
        }
    }

    /// Its fsync succeeded: everything sent before is durable too.
    pub fn end_sentinel(&mut self) {
        self.land_sentinel();
        self.flush();
    }

    /// The power goes, the journal is recovered, the volume is mounted.
    pub fn power_cut(&mut self, random: &mut Random) -> Image {
        match (random.below(3), &self.sentinel_writing) {
            (1, Some((index, _))) => self.sentinel[*index] = None,
            (2, Some(_)) => self.land_sentinel(),
            _ => {}
        }
        self.sentinel_writing = None;
        let last = self.journal.last().map_or(0, |(at, _)| *at);
        let least = self.durable;
        let journal = match random.below(5) {
            0 => least,
            1 => self.committed.max(least),
            2 => last.max(least),
            _ => random.between(least, last.max(least)),
        };
        let mut image = self.base.clone();
        for (at, mutation) in self.journal.iter().take_while(|(at, _)| *at <= journal) {
            match mutation {
                Mutation::Write { .. } => self.redo_write(&mut image, mutation, *at),
                other => image.apply(other, *at),
            }
        }
        let lazy = random.below(101);
        for ((inode, index), block) in &self.blocks {
            self.land(
                &mut image,
                (*inode, *index),
                block,
                journal,
                (random.below(101) < lazy, random.next()),
            );
        }
        image.inodes.retain(|_, node| node.links > 0);
        self.mounted(image.clone());
        image
    }

    /// The journal holds sizes and times, not bytes.
    #[expect(clippy::unused_self, reason = "reads better beside its callers")]
    fn redo_write(&self, image: &mut Image, mutation: &Mutation, at: Version) {
        let Mutation::Write {
            inode,
            first,
            blocks,
            stamped,
        } = mutation
        else {
            return;
        };
        if let Some(node) = image.inodes.get_mut(inode) {
            if node.blocks.len() < first + blocks.len() {
                node.blocks.resize(first + blocks.len(), Set::by(0, at));
                node.size_at = at;
            }
            if *stamped {
                node.mtime_ns = Set::by(at as i64, at);
            }
        }
    }

    /// Puts one version of a block where the file's layout of then has it.
    fn land(
        &self,
        image: &mut Image,
        place: (Identity, usize),
        block: &Block,
        journal: Version,
        (newest, dice): (bool, u64),
    ) {
        let Some(node) = image.inodes.get_mut(&place.0) else {
            return;
        };
        let Some(target) = node.blocks.get_mut(place.1) else {
            return;
        };
        // A truncation between the block's write and the journal's end cut it off; one behind the
        // journal's end means that the write went to space which this layout does not have.
        let cut = |at: Version| {
            let (from, to) = (at.min(journal), at.max(journal));
            self.journal.iter().any(|(v, m)| {
                *v > from
                    && *v <= to
                    && matches!(m, Mutation::Truncate { inode, size } if *inode == place.0 && *size <= place.1)
            })
        };
        let valid = |(_, sent): &(usize, &Set<u32>)| !cut(sent.at);
        let durable = block.sent.iter().enumerate().take(block.durable);
        let durable = durable.rev().find(valid).map(|(_, sent)| *sent);
        let cached = block.sent.iter().enumerate().skip(block.durable);
        let cached: Vec<Set<u32>> = cached.filter(valid).map(|(_, sent)| *sent).collect();
        let chosen = match cached.last() {
            None => durable,
            Some(last) if newest => Some(*last),
            Some(_) => match dice as usize % (cached.len() + 1) {
                0 => durable,
                index => cached.get(index - 1).copied(),
            },
        };
        if let Some(chosen) = chosen {
            *target = chosen;
        }
    }

    /// Everything is durable as it is in `image` (an orderly unmount).
    pub fn mounted(&mut self, image: Image) {
        self.base = image;
        self.journal.clear();
        self.blocks.clear();
        (self.committed, self.durable) = (0, 0);
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self::new()
    }
}
