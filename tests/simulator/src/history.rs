//! What applications did and what they were told: the oracle.
//!
//! Everything that a volume shows is a register: a block, a size, an owner, a name. Each has its
//! history of values; the last confirmed one may never be lost nor reverted, and after a takeover a
//! register shows its value at the cut, or what the disk had already of a later operation.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use twinwrite::ids::Identity;

use crate::image::{BLOCK_BYTES, Image, Name, OWN, ROOT, Version};

#[cfg(test)]
mod tests;

/// One thing that has a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// Whether an inode exists (has a name).
    Exists(Identity),
    /// A block of its contents, 0 beyond its end.
    Block(Identity, usize),
    /// Its size in blocks.
    Size(Identity),
    /// Its owner.
    Owner(Identity),
    /// Its permission bits.
    Mode(Identity),
    /// Its modification time, of a file.
    Time(Identity),
    /// Who has a name; 0: nobody.
    Name(Identity, Name),
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists(inode) => write!(f, "inode {inode}"),
            Self::Block(inode, index) => write!(f, "block {index} of {inode}"),
            Self::Size(inode) => write!(f, "the size of {inode}"),
            Self::Owner(inode) => write!(f, "the owner of {inode}"),
            Self::Mode(inode) => write!(f, "the mode of {inode}"),
            Self::Time(inode) => write!(f, "the time of {inode}"),
            Self::Name(directory, name) => {
                write!(f, "the name {directory}/{}", name.escape_ascii())
            }
        }
    }
}

impl Register {
    fn inode(&self) -> Identity {
        match self {
            Self::Exists(inode)
            | Self::Block(inode, _)
            | Self::Size(inode)
            | Self::Owner(inode)
            | Self::Mode(inode)
            | Self::Time(inode)
            | Self::Name(inode, _) => *inode,
        }
    }
}

/// An identity as a register's value.
pub fn as_value(inode: Identity) -> u64 {
    inode.ino << 32 | u64::from(inode.generation)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    value: u64,
    /// Index of the operation.
    operation: usize,
}

#[derive(Clone, Debug, Default)]
struct Track {
    entries: Vec<Entry>,
    /// How many of them are confirmed.
    confirmed: usize,
}

/// One change that an application made.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// Its mutation.
    pub at: Version,
    /// Where its record lies in the ring.
    pub captured: Option<u64>,
    /// It was noticed that it is not captured.
    pub noticed: bool,
    /// Its record is in the log all the same: it may be merged.
    pub may_merge: bool,
    /// The call that made it has returned.
    pub returned: bool,
}

/// What a call will confirm when it answers: registers, and how many of their entries.
pub type Promise = Vec<(Register, usize)>;

/// What an fsync-class call confirms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    Volume,
    /// Everything of an inode.
    Full(Identity),
    /// Bytes and size.
    Data(Identity),
    /// Bytes of some blocks, and the size.
    Range(Identity, usize, usize),
}

/// What happened since the volume was mounted.
#[derive(Clone, Debug, Default)]
pub struct History {
    base: Image,
    tracks: BTreeMap<Register, Track>,
    /// All operations, in the order in which they happened.
    pub operations: Vec<Operation>,
}

impl History {
    /// A fresh history: all that `base` shows is confirmed.
    pub fn new(base: Image) -> Self {
        Self {
            base,
            ..Self::default()
        }
    }

    /// An operation happened; its changes follow.
    pub fn begin(&mut self, at: Version) -> usize {
        self.operations.push(Operation {
            at,
            captured: None,
            noticed: false,
            may_merge: false,
            returned: false,
        });
        self.operations.len() - 1
    }

    /// It changed this.
    pub fn set(&mut self, operation: usize, register: Register, value: u64) {
        let entries = &mut self.tracks.entry(register).or_default().entries;
        entries.push(Entry { value, operation });
    }

    /// Its record tells this beside, which an uncaptured operation may have changed.
    pub fn carry(&mut self, operation: usize, register: Register, value: u64) {
        let operations = &self.operations;
        if let Some(track) = self.tracks.get_mut(&register) {
            let known =
                |last: &Entry| last.value == value && operations[last.operation].captured.is_some();
            if !track.entries.last().is_some_and(known) {
                track.entries.push(Entry { value, operation });
            }
        } else if Shown::of(&self.base).get(&register).0 != value {
            self.set(operation, register, value);
        }
    }

    /// What a call that begins now will confirm.
    pub fn promise(&self, scope: Scope) -> Promise {
        let mut promise = Promise::new();
        for (register, track) in &self.tracks {
            let inside = match scope {
                Scope::Volume => true,
                Scope::Full(inode) => register.inode() == inode,
                Scope::Data(inode) => {
                    register.inode() == inode
                        && matches!(register, Register::Block(..) | Register::Size(_))
                }
                Scope::Range(inode, first, end) => match register {
                    Register::Block(whose, index) => {
                        *whose == inode && (first..end).contains(index)
                    }
                    Register::Size(whose) => *whose == inode,
                    _ => false,
                },
            };
            if inside {
                // What anybody can see counts, whether or not the call that changes it has returned; of a
                // range only its bytes.
                let visible = !matches!((scope, register), (Scope::Range(..), Register::Size(_)));
                let counts = |entry: &&Entry| visible || self.operations[entry.operation].returned;
                let count = track.entries.iter().take_while(counts).count();
                if count > 0 {
                    promise.push((register.clone(), count));
                }
            }
        }
        promise
    }

    /// The call answered.
    pub fn confirm(&mut self, promise: &Promise) {
        for (register, count) in promise {
            if let Some(track) = self.tracks.get_mut(register) {
                track.confirmed = track.confirmed.max(*count);
            }
        }
    }

    /// A checkpoint that ends an epoch has proven everything that was changed up to `at`.
    pub fn settle(&mut self, at: Version) {
        let count = self
            .operations
            .partition_point(|operation| operation.at <= at);
        for track in self.tracks.values_mut() {
            let settled = track
                .entries
                .partition_point(|entry| entry.operation < count);
            track.confirmed = track.confirmed.max(settled);
        }
    }

    /// What a checkpoint within an epoch says: everything captured before the ring position `before` is
    /// durable, and so are these changes, which were noticed and not captured.
    pub fn settle_up_to(&mut self, before: u64, noticed: &[usize]) {
        let operations = &self.operations;
        let is_settled = |entry: &Entry| {
            let captured = operations[entry.operation].captured;
            captured.is_some_and(|at| at < before)
                || noticed.binary_search(&entry.operation).is_ok()
        };
        // What has no name then is gone after a crash, whatever was synced.
        let shown = Shown::of(&self.base);
        let named: BTreeSet<Identity> = self
            .tracks
            .keys()
            .map(Register::inode)
            .filter(|inode| {
                let exists = Register::Exists(*inode);
                let track = self.tracks.get(&exists);
                let last = track.and_then(|t| t.entries.iter().rfind(|e| is_settled(e)));
                last.map_or(shown.get(&exists).0, |entry| entry.value) == 1
            })
            .collect();
        for (register, track) in &mut self.tracks {
            let is_exists = matches!(register, Register::Exists(_));
            if !is_exists && !named.contains(&register.inode()) {
                continue;
            }
            let settled = track
                .entries
                .iter()
                .rposition(is_settled)
                .map_or(0, |index| index + 1);
            track.confirmed = track.confirmed.max(settled);
        }
    }

    /// The record at this ring position was found unable to bring its change back: a gap.
    pub fn uncapture(&mut self, at: u64) {
        if let Some(operation) = self.operations.iter_mut().find(|o| o.captured == Some(at)) {
            operation.captured = None;
            operation.noticed = true;
            operation.may_merge = true;
        }
    }

    /// The operations that were noticed and not captured.
    pub fn noticed(&self) -> Vec<usize> {
        let operations = self.operations.iter().enumerate();
        operations
            .filter(|(_, o)| o.noticed && o.captured.is_none())
            .map(|(index, _)| index)
            .collect()
    }

    /// Checks what a volume shows after a crash. `cut`: ring position behind the last record that was
    /// merged or is durable, if there was a region; `before`: what the disk had.
    ///
    /// # Errors
    /// What is missing, reverted or torn.
    pub fn check(&self, cut: Option<u64>, before: &Image, after: &Image) -> Result<(), String> {
        let (base, before, after) = (Shown::of(&self.base), Shown::of(before), Shown::of(after));
        let mut registers: BTreeSet<&Register> = self.tracks.keys().collect();
        registers.extend(base.values.keys());
        registers.extend(after.values.keys());
        for register in registers {
            self.check_one(register, cut, (&base, &before, &after))?;
        }
        Ok(())
    }

    fn check_one(
        &self,
        register: &Register,
        cut: Option<u64>,
        (base, before, after): (&Shown, &Shown, &Shown),
    ) -> Result<(), String> {
        let (shown, _) = after.get(register);
        let ((value, version), confirmed) = self.least(register, cut, base);
        if shown == value
            || self.is_excused(register, (value, version), cut, (base, before, after))
            || !confirmed && self.is_nameless(register, cut, base)
            || !confirmed && self.is_kept_by_its_name(register, value, cut, after)
        {
            return Ok(());
        }
        // It was deleted after all that, on the disk too; what is made anew is as at the cut.
        let (there, deleted_at) = before.get(&Register::Exists(register.inode()));
        let remade = there == 0 && deleted_at > version;
        if remade && shown == self.at_cut(register, cut, base).0 {
            return Ok(());
        }
        // What the disk had of a later operation may stay.
        let (on_disk, on_disk_at) = before.get(register);
        if shown == on_disk && on_disk_at > version || self.may_be_merged(register, shown, version)
        {
            return Ok(());
        }
        let why = if confirmed { "confirmed" } else { "at the cut" };
        Err(format!(
            "{register} is {} and must be {} ({why}, operation {version}) or of a later operation that the disk had ({} of {on_disk_at})",
            told(register, shown),
            told(register, value),
            told(register, on_disk)
        ))
    }

    /// A later change that was not captured may be merged all the same: a late read may show it, and
    /// the link of a file whose making was purged is in the log.
    fn may_be_merged(&self, register: &Register, shown: u64, version: Version) -> bool {
        self.tracks.get(register).is_some_and(|track| {
            let later = |entry: &Entry| {
                let operation = &self.operations[entry.operation];
                operation.at > version && (operation.may_merge || operation.captured.is_none())
            };
            track
                .entries
                .iter()
                .any(|entry| entry.value == shown && later(entry))
        })
    }

    /// A file without a name at the cut is nobody's, also if its later name has reached the disk.
    fn is_nameless(&self, register: &Register, cut: Option<u64>, base: &Shown) -> bool {
        let exists = Register::Exists(register.inode());
        *register != exists && self.least(&exists, cut, base).0.0 == 0
    }

    /// An inode that should be gone still has a name, because the log lacks the change that took that name
    /// away: the records behind that one remove another name, and the name is judged by its own register.
    fn is_kept_by_its_name(
        &self,
        register: &Register,
        value: u64,
        cut: Option<u64>,
        after: &Shown,
    ) -> bool {
        let Register::Exists(inode) = register else {
            return false;
        };
        let mut names = after.values.iter().filter(|(name, (child, _))| {
            matches!(name, Register::Name(..)) && *child == as_value(*inode)
        });
        value == 0 && names.any(|(name, _)| self.lacks_a_change_of(name, cut))
    }

    /// A change of this register behind its value at the cut was noticed and not captured.
    fn lacks_a_change_of(&self, register: &Register, cut: Option<u64>) -> bool {
        let Some(track) = self.tracks.get(register) else {
            return false;
        };
        let operation = |entry: &Entry| self.operations[entry.operation];
        let merged = |entry: &Entry| operation(entry).captured.zip(cut);
        let at_cut = track
            .entries
            .iter()
            .rposition(|entry| merged(entry).is_some_and(|(at, cut)| at < cut));
        let behind = at_cut.map_or(0, |index| index + 1);
        track.entries[behind..]
            .iter()
            .any(|entry| operation(entry).noticed && operation(entry).captured.is_none())
    }

    /// Its value at the cut, whatever was confirmed since.
    fn at_cut(&self, register: &Register, cut: Option<u64>, base: &Shown) -> (u64, Version) {
        let track = self.tracks.get(register);
        let merged = |entry: &&Entry| {
            let captured = self.operations[entry.operation].captured;
            captured.zip(cut).is_some_and(|(at, cut)| at < cut)
        };
        let last = track.and_then(|track| track.entries.iter().rfind(merged));
        last.map_or_else(
            || base.get(register),
            |entry| (entry.value, self.operations[entry.operation].at),
        )
    }

    /// The earliest value that a register may show, with its operation, and whether it is confirmed.
    fn least(&self, register: &Register, cut: Option<u64>, base: &Shown) -> ((u64, Version), bool) {
        let empty = Track::default();
        let track = self.tracks.get(register).unwrap_or(&empty);
        let merged = |entry: &&Entry| {
            let captured = self.operations[entry.operation].captured;
            captured.zip(cut).is_some_and(|(at, cut)| at < cut)
        };
        let at_cut = track.entries.iter().rposition(|entry| merged(&entry));
        let least = at_cut.map_or(0, |index| index + 1).max(track.confirmed);
        let value = match least {
            0 => base.get(register),
            count => {
                let entry = track.entries[count - 1];
                (entry.value, self.operations[entry.operation].at)
            }
        };
        (value, least == track.confirmed && least > 0)
    }

    /// Whether another register's lawful state explains this one.
    fn is_excused(
        &self,
        register: &Register,
        (value, version): (u64, Version),
        cut: Option<u64>,
        (base, before, after): (&Shown, &Shown, &Shown),
    ) -> bool {
        let inode = register.inode();
        if !matches!(register, Register::Exists(_)) && after.get(&Register::Exists(inode)).0 == 0 {
            // The inode itself is judged by its own register.
            return true;
        }
        match register {
            // Beyond the end, which is judged by its own register.
            Register::Block(_, index) => {
                let size = after.get(&Register::Size(inode)).0 as usize;
                *index >= size
            }
            // Deleted ahead: the deletion came after what is asked for, and had reached the disk.
            Register::Exists(_) => {
                let (there, at) = before.get(register);
                value == 1 && there == 0 && at > version
            }
            Register::Name(..) => {
                let child = Register::Exists(Identity {
                    ino: value >> 32,
                    generation: value as u32,
                });
                // What should be there was deleted ahead; what took its place may be elsewhere.
                let (there, at) = before.get(&child);
                let gone = there == 0 && at > version && after.get(&child).0 == 0;
                // Something after the cut had moved it, and its old name to a directory that the log puts
                // elsewhere: it is where it was moved to.
                let moved = before.get(register).1 > version
                    && after.get(register).0 == 0
                    && after.get(&child).0 == 1
                    && !after.recovered.contains(&child);
                // Its making was not captured: no log brings it back.
                let unknown = self.least(&child, cut, base).0.0 == 0 && after.get(&child).0 == 0;
                value != 0 && (gone || moved || unknown && after.get(register).0 == 0)
            }
            _ => false,
        }
    }
}

fn told(register: &Register, value: u64) -> String {
    match register {
        Register::Name(..) if value == 0 => "nobody".to_owned(),
        Register::Name(..) => format!("{}.{}", value >> 32, value as u32),
        _ => value.to_string(),
    }
}

/// The registers that an image shows.
struct Shown {
    values: BTreeMap<Register, (u64, Version)>,
    /// Those kept aside by replay.
    recovered: BTreeSet<Register>,
    /// Inodes that are gone.
    absent: BTreeMap<Identity, Version>,
}

impl Shown {
    fn of(image: &Image) -> Self {
        let mut values = BTreeMap::new();
        let mut origins: BTreeMap<Identity, Identity> = BTreeMap::new();
        let reachable = image.reachable();
        let own = [
            Some(OWN),
            image.lookup(OWN, b"staging"),
            image.lookup(OWN, b"recovered"),
        ];
        let own: Vec<Identity> = own.into_iter().flatten().collect();
        for inode in &reachable {
            if let Some(node) = image.inodes.get(inode) {
                origins.insert(*inode, node.origin);
            }
        }
        for inode in &reachable {
            let Some(node) = image.inodes.get(inode) else {
                continue;
            };
            let who = node.origin;
            if own.contains(inode) {
                continue;
            }
            values.insert(Register::Exists(who), (1, node.born));
            values.insert(Register::Owner(who), (node.uid.value.into(), node.uid.at));
            values.insert(Register::Mode(who), (node.mode.value.into(), node.mode.at));
            if node.directory {
                for (name, child) in &node.entries {
                    if *inode == ROOT && child.value == Some(OWN) {
                        continue;
                    }
                    let origin = child.value.map(|c| origins.get(&c).copied().unwrap_or(c));
                    let value = origin.map_or(0, as_value);
                    values.insert(Register::Name(who, name.clone()), (value, child.at));
                }
                continue;
            }
            values.insert(
                Register::Size(who),
                (node.blocks.len() as u64, node.size_at),
            );
            values.insert(
                Register::Time(who),
                (node.mtime_ns.value as u64, node.mtime_ns.at),
            );
            for (index, block) in node.blocks.iter().enumerate() {
                values.insert(Register::Block(who, index), (block.value.into(), block.at));
            }
        }
        let aside = image
            .lookup(OWN, b"recovered")
            .and_then(|i| image.inodes.get(&i));
        let aside = aside
            .into_iter()
            .flat_map(|node| node.names().map(|(_, child)| child));
        let recovered = aside.filter_map(|i| origins.get(&i).map(|who| Register::Exists(*who)));
        Self {
            recovered: recovered.collect(),
            values,
            absent: image.removed.clone(),
        }
    }

    fn get(&self, register: &Register) -> (u64, Version) {
        if let Some(found) = self.values.get(register) {
            return *found;
        }
        match register {
            Register::Exists(inode) => (0, self.absent.get(inode).copied().unwrap_or(0)),
            Register::Block(inode, _) => {
                let size = self.values.get(&Register::Size(*inode));
                (0, size.map_or(0, |size| size.1))
            }
            _ => (0, 0),
        }
    }
}

/// Bytes as blocks.
pub fn blocks_of(bytes: &[u8]) -> Vec<u32> {
    let whole = bytes.chunks(BLOCK_BYTES);
    whole
        .map(|chunk| {
            let mut block = [0; BLOCK_BYTES];
            block[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(block)
        })
        .collect()
}

/// Blocks as bytes.
pub fn bytes_of(blocks: &[u32]) -> Vec<u8> {
    blocks
        .iter()
        .flat_map(|block| block.to_le_bytes())
        .collect()
}
