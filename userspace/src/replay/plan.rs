//! The final state that a region's records tell: names, bytes, sizes and attributes.
//!
//! Operations are not executed again, because that is not idempotent: what counts is where they
//! lead. Identity decides everything; a name is only a place where an identity is finally bound.
//! Pure. It must never read a disk, and never copy payload.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::extents::{Extents, Source};
use crate::ids::{Epoch, Identity, RingPos, Seq};
use crate::record::gap;

/// Something a record told, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told<T> {
    /// What it told.
    pub value: T,
    /// Ring position of the record.
    pub at: RingPos,
    /// A mark proved it durable.
    pub confirmed: bool,
}

/// What the log tells of a file's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// It is this.
    Exactly(u64),
    /// It is not below this, and no record of the log tells more: what the disk has beyond it stays.
    AtLeast(u64),
}

impl Size {
    /// What it is at least.
    #[must_use]
    pub fn least(self) -> u64 {
        match self {
            Self::Exactly(size) | Self::AtLeast(size) => size,
        }
    }

    /// What a file of `now` bytes must be cut or extended to; `None`: nothing is to be done.
    #[must_use]
    pub fn to_set(self, now: u64) -> Option<u64> {
        match self {
            Self::Exactly(size) => (size != now).then_some(size),
            Self::AtLeast(size) => (size > now).then_some(size),
        }
    }
}

/// What to make when an inode is to be made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symlink to this target.
    Symlink(&'a [u8]),
    /// A device node, fifo or socket.
    Special {
        /// `S_IFMT` bits of its mode.
        format: u32,
        /// `i_rdev`: major << 20 | minor.
        rdev: u32,
    },
}

/// Where an inode comes from, as far as the log knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// It was there before the log's first record.
    Earlier,
    /// The log made it.
    Created(Kind<'a>),
    /// It got its first name in the log, but was made (`O_TMPFILE`) before: it cannot be made anew.
    LinkedOnly,
}

/// Everything the log tells of one inode.
#[derive(Clone, Debug)]
pub struct Inode<'a> {
    /// Where it comes from.
    pub origin: Origin<'a>,
    /// Ring position since which it has had a name (the largest one: it never had).
    pub named_at: RingPos,
    /// That name came after the inode (`O_TMPFILE`).
    pub named_later: bool,
    /// A full-range mark proved it durable, with at least one link.
    pub proven: bool,
    /// The log saw its last link go.
    pub dead: bool,
    /// Link count last told.
    pub links: Option<u32>,
    /// Bytes; confirmed ones only where they may be needed to make the file anew.
    pub content: Extents<'a>,
    /// Size last told.
    pub size: Option<Told<Size>>,
    /// `i_mode` last told.
    pub mode: Option<Told<u32>>,
    /// Owner and group last told.
    pub owner: Option<Told<(u32, u32)>>,
    /// Modification time last told, nanoseconds since 1970.
    pub mtime_ns: Option<Told<i64>>,
    /// Access time last told, nanoseconds since 1970.
    pub atime_ns: Option<Told<i64>>,
    /// Extended state last told: the bytes of an [`Extended`](crate::record::extended::Extended).
    pub extended: Option<Told<&'a [u8]>>,
}

impl Inode<'_> {
    /// Nothing told yet.
    pub(super) fn unknown() -> Self {
        Self {
            origin: Origin::Earlier,
            named_at: RingPos(0),
            named_later: false,
            proven: false,
            dead: false,
            links: None,
            content: Extents::default(),
            size: None,
            mode: None,
            owner: None,
            mtime_ns: None,
            atime_ns: None,
            extended: None,
        }
    }

    /// Whether it can be made anew should it not be on the disk.
    #[must_use]
    pub fn can_be_made(&self) -> bool {
        matches!(self.origin, Origin::Created(_)) && !self.proven && !self.dead
    }
}

/// A name: its directory's identity, and the name.
pub type Place<'a> = (Identity, &'a [u8]);

/// The final state.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The region's epoch.
    pub epoch: Epoch,
    /// The cut: last record of the log.
    pub last: Seq,
    /// Records merged.
    pub records: u64,
    /// Records left out because the sentinel proves them durable.
    pub skipped: u64,
    /// Changes that were noticed and not captured, by reason: the state is not whole.
    pub gaps: BTreeMap<u64, u64>,
    /// The last binding of every name the log mentions.
    pub names: BTreeMap<Place<'a>, Option<Identity>>,
    /// When a name got its last binding, as far as its record tells: nanoseconds since 1970.
    pub named_ns: BTreeMap<Place<'a>, i64>,
    /// Inodes that had no name yet at the cut (`O_TMPFILE`), as far as the log knows.
    pub nameless: BTreeSet<Identity>,
    /// Every inode the log mentions.
    pub inodes: BTreeMap<Identity, Inode<'a>>,
}

impl<'a> Plan<'a> {
    /// The names each inode is finally bound to.
    #[must_use]
    pub fn places(&self) -> BTreeMap<Identity, Vec<Place<'a>>> {
        let mut places: BTreeMap<Identity, Vec<Place<'a>>> = BTreeMap::new();
        for (place, child) in &self.names {
            if let Some(child) = child {
                places.entry(*child).or_default().push(*place);
            }
        }
        places
    }

    /// What the log tells of changes that it does not hold, in words; `None` if it tells of none.
    #[must_use]
    pub fn told_gaps(&self) -> Option<String> {
        let told = self.gaps.iter().map(|(reason, count)| {
            let name = usize::try_from(*reason)
                .ok()
                .and_then(|reason| gap::NAMES.get(reason));
            format!("{} ({count} or more)", name.unwrap_or(&"unknown"))
        });
        let told = told.collect::<Vec<_>>().join(", ");
        (!told.is_empty()).then(|| {
            format!("changes that were noticed and not captured: {told} are not in what was merged")
        })
    }

    /// Bytes of payload to be written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let unconfirmed = |inode: &Inode<'_>| -> u64 {
            let told = inode.content.iter().filter(|(_, s)| !s.confirmed);
            told.map(|(start, s)| {
                if s.source == Source::Zero {
                    0
                } else {
                    s.end - start
                }
            })
            .sum()
        };
        self.inodes
            .values()
            .filter(|inode| !inode.dead)
            .map(unconfirmed)
            .sum()
    }
}

impl fmt::Display for Plan<'_> {
    /// One line an action; what of it the disk already shows turns out only when it is applied.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "epoch {}: merge {} records up to {} ({} are durable already)",
            self.epoch, self.records, self.last, self.skipped
        )?;
        if let Some(gaps) = self.told_gaps() {
            writeln!(f, "warning: {gaps}")?;
        }
        for ((directory, name), child) in &self.names {
            let name = name.escape_ascii();
            match child {
                Some(child) => writeln!(f, "bind {directory}/{name} to {child}")?,
                None => writeln!(f, "remove the name {directory}/{name}")?,
            }
        }
        for (identity, inode) in &self.inodes {
            write_inode(f, *identity, inode)?;
        }
        Ok(())
    }
}

fn write_inode(f: &mut fmt::Formatter<'_>, identity: Identity, inode: &Inode<'_>) -> fmt::Result {
    if inode.dead {
        return writeln!(f, "remove {identity}: its last link is gone");
    }
    if inode.can_be_made() {
        writeln!(f, "make {identity} unless it is there")?;
    }
    for (start, segment) in inode.content.iter().filter(|(_, s)| !s.confirmed) {
        match segment.source {
            Source::Bytes(bytes) => {
                writeln!(f, "write {identity}: {} bytes at {start}", bytes.len())?;
            }
            Source::Zero => writeln!(f, "zero {identity}: from {start} to {}", segment.end)?,
        }
    }
    if let Some(size) = inode.size.filter(|t| !t.confirmed) {
        match size.value {
            Size::Exactly(size) => writeln!(f, "size {identity}: {size}")?,
            Size::AtLeast(size) => writeln!(f, "size {identity}: at least {size}")?,
        }
    }
    if let Some(mode) = inode.mode.filter(|t| !t.confirmed) {
        writeln!(f, "mode {identity}: {:o}", mode.value)?;
    }
    if let Some(owner) = inode.owner.filter(|t| !t.confirmed) {
        writeln!(f, "owner {identity}: {}:{}", owner.value.0, owner.value.1)?;
    }
    if let Some(extended) = inode.extended.filter(|t| !t.confirmed) {
        let bytes = extended.value.len();
        writeln!(
            f,
            "extended attributes and flags of {identity}: {bytes} bytes"
        )?;
    }
    if let Some(mtime) = inode.mtime_ns.filter(|t| !t.confirmed) {
        writeln!(f, "mtime {identity}: {} ns", mtime.value)?;
    }
    Ok(())
}
