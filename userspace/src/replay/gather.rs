//! From records to the [`Plan`]: one pass in log order.
//!
//! Pure. It must never take a record as proof of more than it says: a mark clips what was in the
//! ring when its call began, of its own inode and range, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use twinwrite_abi::{ATTR_SIZE, gap};

use super::ReplayError;
use super::extents::{END, Source};
use super::plan::{Inode, Kind, Origin, Plan, Size, Told};
use super::{LogItem, ReplayInput};
use crate::faults::{Fault, injected};
use crate::ids::{Identity, RingPos, Seq};
use crate::record::extended::Extended;
use crate::record::{NameBody, RecordHeader, flag, op};

const FORMAT_MASK: u32 = 0o170_000;
const FORMAT_DIRECTORY: u32 = 0o040_000;
const FORMAT_REGULAR: u32 = 0o100_000;
const FORMAT_SYMLINK: u32 = 0o120_000;
/// `ATTR_ATIME` and `ATTR_ATIME_SET` of `struct iattr::ia_valid`.
const ATTR_ATIME_ANY: u64 = 1 << 4 | 1 << 7;

/// Computes the final state that the records behind `input.after` tell.
///
/// # Errors
/// [`ReplayError`] when the records are not one log without holes, or contradict each other.
pub fn plan<'a, I>(input: ReplayInput<I>) -> Result<Plan<'a>, ReplayError>
where
    I: IntoIterator<Item = LogItem<'a>>,
{
    let mut gather = Gather {
        plan: Plan {
            epoch: input.epoch,
            last: Seq(0),
            records: 0,
            skipped: 0,
            gaps: BTreeMap::new(),
            names: BTreeMap::new(),
            named_ns: BTreeMap::new(),
            nameless: BTreeSet::new(),
            inodes: BTreeMap::new(),
        },
        ring_pos: RingPos(0),
    };
    for item in input.items {
        gather.order(&item)?;
        if item.seq <= input.after {
            gather.durable(&item)?;
        } else {
            gather.plan.records += 1;
            gather.record(&item)?;
        }
    }
    gather.finish()
}

struct Gather<'a> {
    plan: Plan<'a>,
    ring_pos: RingPos,
}

impl<'a> Gather<'a> {
    fn order(&mut self, item: &LogItem<'a>) -> Result<(), ReplayError> {
        let last = self.plan.last;
        if last != Seq(0) && (item.seq != last.next() || item.ring_pos <= self.ring_pos) {
            return Err(ReplayError::Order {
                seq: item.seq,
                after: last,
            });
        }
        self.plan.last = item.seq;
        self.ring_pos = item.ring_pos;
        Ok(())
    }

    /// A record that the sentinel covers: durable, unless it is about an inode without a name, which no
    /// checkpoint makes durable, because a crash removes it.
    fn durable(&mut self, item: &LogItem<'a>) -> Result<(), ReplayError> {
        self.plan.skipped += 1;
        let identity = item.record.identity();
        match item.record.header.op {
            op::TMPFILE => self.record(item),
            op::WRITE | op::SETATTR | op::EXTENDED if self.plan.nameless.contains(&identity) => {
                self.record(item)
            }
            op::LINK if self.plan.nameless.remove(&identity) => {
                self.plan.inodes.remove(&identity);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn record(&mut self, item: &LogItem<'a>) -> Result<(), ReplayError> {
        let record = &item.record;
        match record.header.op {
            op::WRITE => self.write(item)?,
            op::CREATE | op::SYMLINK => {
                self.create(item);
                let time_ns = record.names().parent_time_ns;
                self.bind(
                    record.parent(),
                    record.name(),
                    Some(record.identity()),
                    time_ns,
                );
            }
            op::TMPFILE => {
                self.create(item);
                self.plan.nameless.insert(record.identity());
            }
            op::LINK => self.link(item),
            op::UNLINK => self.unlink(item),
            op::RENAME => self.rename(item),
            op::EXCHANGE => self.exchange(item),
            op::SETATTR => self.setattr(item),
            op::EXTENDED => self.extended(item)?,
            op::FSYNC => self.mark(item),
            // Nothing is missing in the log.
            op::GAP if record.header.arg == gap::WRITEBACK as u64 => {}
            op::GAP => *self.plan.gaps.entry(record.header.arg).or_default() += 1,
            other => {
                return Err(ReplayError::Contradiction {
                    seq: item.seq,
                    what: format!("operation {other} is not known"),
                });
            }
        }
        Ok(())
    }

    fn inode(&mut self, identity: Identity) -> &mut Inode<'a> {
        self.plan
            .inodes
            .entry(identity)
            .or_insert_with(Inode::unknown)
    }

    /// `time_ns`: the directory's modification time, which this set; 0 if it is not known.
    fn bind(&mut self, directory: Identity, name: &'a [u8], child: Option<Identity>, time_ns: i64) {
        self.inode(directory);
        if let Some(child) = child {
            self.inode(child);
        }
        self.plan.names.insert((directory, name), child);
        if time_ns == 0 {
            self.plan.named_ns.remove(&(directory, name));
        } else {
            self.plan.named_ns.insert((directory, name), time_ns);
        }
    }

    fn write(&mut self, item: &LogItem<'a>) -> Result<(), ReplayError> {
        let header = item.record.header;
        let at = item.ring_pos;
        let inode = self.inode(item.record.identity());
        let mut lay = |offset: u64, bytes: &'a [u8]| {
            let start = header.pos + offset;
            inode
                .content
                .insert(start, start + bytes.len() as u64, Source::Bytes(bytes), at);
        };
        if item.record.needs_fill() {
            let missing = ReplayError::BytesMissing { seq: item.seq };
            let Some(fill) = &item.fill else {
                return Err(missing);
            };
            let mut covered = 0;
            for (offset, bytes) in &fill.pieces {
                let end = u64::from(*offset) + bytes.len() as u64;
                if end > header.data_len.into() {
                    return Err(missing);
                }
                covered += bytes.len() as u64;
                lay((*offset).into(), bytes);
            }
            if covered < header.data_len.into() && !fill.gone {
                return Err(missing);
            }
        } else {
            lay(0, item.record.data());
        }
        tell_size(inode, &header, at);
        tell_mode_and_mtime(inode, &header, at);
        Ok(())
    }

    fn create(&mut self, item: &LogItem<'a>) {
        let (record, at) = (&item.record, item.ring_pos);
        let names = record.names();
        let kind = match record.header.mode & FORMAT_MASK {
            FORMAT_DIRECTORY => Kind::Directory,
            FORMAT_SYMLINK => Kind::Symlink(record.target()),
            FORMAT_REGULAR => Kind::File,
            format => Kind::Special {
                format,
                rdev: names.rdev,
            },
        };
        let mut inode = Inode::unknown();
        inode.named_at = if record.header.op == op::TMPFILE {
            RingPos(u64::MAX)
        } else {
            item.ring_pos
        };
        inode.origin = Origin::Created(kind);
        inode.links = Some(names.nlink);
        inode.owner = Some(told((names.uid, names.gid), at));
        if kind == Kind::File {
            inode.size = Some(told(Size::Exactly(0), at));
        }
        tell_mode_and_mtime(&mut inode, &record.header, at);
        self.plan.inodes.insert(record.identity(), inode);
        if record.header.op != op::TMPFILE {
            self.tell_directory(record.parent(), names.parent_time_ns, at);
        }
    }

    fn link(&mut self, item: &LogItem<'a>) {
        let record = &item.record;
        let names = record.names();
        let identity = record.identity();
        let from_tmpfile = record.header.flags & flag::FROM_TMPFILE != 0;
        self.plan.nameless.remove(&identity);
        let inode = self.inode(identity);
        inode.links = Some(names.nlink);
        inode.dead = false;
        if from_tmpfile {
            inode.named_at = item.ring_pos;
            inode.named_later = true;
            if inode.origin == Origin::Earlier {
                inode.origin = Origin::LinkedOnly;
            }
        }
        self.bind(
            record.parent(),
            record.name(),
            Some(identity),
            names.parent_time_ns,
        );
        self.tell_directory(record.parent(), names.parent_time_ns, item.ring_pos);
    }

    fn unlink(&mut self, item: &LogItem<'a>) {
        let record = &item.record;
        let names = record.names();
        let is_directory = record.header.mode & FORMAT_MASK == FORMAT_DIRECTORY;
        self.links_left(record.identity(), names.nlink, is_directory);
        self.bind(record.parent(), record.name(), None, names.parent_time_ns);
        self.tell_directory(record.parent(), names.parent_time_ns, item.ring_pos);
    }

    fn rename(&mut self, item: &LogItem<'a>) {
        let record = &item.record;
        let names = record.names();
        let child = record.identity();
        if record.victim() == Some(child) {
            // Two names of one inode: the kernel answers "done" and changes nothing. Both are bound.
            self.bind(record.parent(), record.name(), Some(child), 0);
            self.bind(record.new_parent(), record.name2(), Some(child), 0);
            return;
        }
        if let Some(victim) = record.victim() {
            // A directory can only be replaced by a directory, and only when it is empty.
            let is_directory = record.header.mode & FORMAT_MASK == FORMAT_DIRECTORY;
            self.links_left(victim, names.victim_nlink, is_directory);
        }
        self.moved(item);
        let (from_ns, to_ns) = times_of_both(&names);
        self.bind(record.parent(), record.name(), None, from_ns);
        self.bind(record.new_parent(), record.name2(), Some(child), to_ns);
        self.tell_directory(record.parent(), names.parent_time_ns, item.ring_pos);
        self.tell_directory(record.new_parent(), names.new_parent_time_ns, item.ring_pos);
    }

    fn exchange(&mut self, item: &LogItem<'a>) {
        let record = &item.record;
        let names = record.names();
        let child = record.identity();
        self.moved(item);
        if let Some(other) = record.victim() {
            self.inode(other);
            let (from_ns, to_ns) = times_of_both(&names);
            self.bind(record.parent(), record.name(), Some(other), from_ns);
            self.bind(record.new_parent(), record.name2(), Some(child), to_ns);
        }
        self.tell_directory(record.parent(), names.parent_time_ns, item.ring_pos);
        self.tell_directory(record.new_parent(), names.new_parent_time_ns, item.ring_pos);
    }

    /// XFS changes the modification time of a directory that gets another parent.
    fn moved(&mut self, item: &LogItem<'a>) {
        let header = item.record.header;
        let inode = self.inode(item.record.identity());
        if header.mode & FORMAT_MASK == FORMAT_DIRECTORY && header.time_ns != 0 {
            inode.mtime_ns = Some(told(header.time_ns, item.ring_pos));
        }
    }

    fn links_left(&mut self, identity: Identity, links: u32, is_directory: bool) {
        let inode = self.inode(identity);
        inode.links = Some(links);
        if links == 0 || is_directory {
            inode.dead = true;
        }
    }

    fn setattr(&mut self, item: &LogItem<'a>) {
        let (header, at) = (item.record.header, item.ring_pos);
        let attributes = item.record.attributes();
        let inode = self.inode(item.record.identity());
        if header.arg & ATTR_SIZE != 0 {
            let size = header.size_after.min(END);
            inode.content.insert(size, END, Source::Zero, at);
            inode.size = Some(told(Size::Exactly(size), at));
        }
        inode.owner = Some(told((attributes.uid, attributes.gid), at));
        if header.arg & ATTR_ATIME_ANY != 0 {
            inode.atime_ns = Some(told(attributes.atime_ns, at));
        }
        tell_mode_and_mtime(inode, &header, at);
    }

    /// What an inode's extended state had become when it was read. It had no links left if nothing was read.
    fn extended(&mut self, item: &LogItem<'a>) -> Result<(), ReplayError> {
        let at = item.ring_pos;
        let pieces = item.fill.as_ref().map(|fill| fill.pieces.as_slice());
        let bytes = match pieces {
            Some([]) => return Ok(()),
            Some([(0, bytes)]) => *bytes,
            _ => return Err(ReplayError::BytesMissing { seq: item.seq }),
        };
        let state = Extended::decode(bytes).map_err(|error| ReplayError::Contradiction {
            seq: item.seq,
            what: error.to_string(),
        })?;
        let inode = self.inode(item.record.identity());
        inode.extended = Some(told(bytes, at));
        inode.mode = Some(told(state.mode, at));
        Ok(())
    }

    /// A directory's modification time, told by an operation on one of its names.
    fn tell_directory(&mut self, directory: Identity, time_ns: i64, at: RingPos) {
        if time_ns != 0 {
            self.inode(directory).mtime_ns = Some(told(time_ns, at));
        }
    }

    /// An fsync-class call succeeded.
    fn mark(&mut self, item: &LogItem<'a>) {
        let header = item.record.header;
        let unlinked = header.flags & flag::UNLINKED != 0;
        let tainted = header.flags & flag::TAINTED != 0;
        if unlinked && !injected(Fault::UnlinkedPurged) || injected(Fault::ClipOmitted) {
            return;
        }
        if tainted && !injected(Fault::TaintIgnored) {
            return;
        }
        let Some(inode) = self.plan.inodes.get_mut(&item.record.identity()) else {
            return;
        };
        let before = if injected(Fault::EntryPositionIgnored) {
            item.ring_pos
        } else {
            RingPos(header.arg)
        };
        if inode.named_at >= before && !injected(Fault::UnlinkedPurged) {
            // It got its (first) name while the call ran: what has no name is lost in a crash.
            return;
        }
        let end = header.size_after.saturating_add(1).min(END);
        let full = header.pos == 0 && end == END || injected(Fault::RangePurgesInode);
        let (start, end) = if full { (0, END) } else { (header.pos, end) };
        // fdatasync need not make a name durable that came after the inode (ext4).
        inode.proven |= full && !(inode.named_later && header.flags & flag::DATASYNC != 0);
        let keep = inode.can_be_made();
        inode.content.confirm(start, end, before, keep);
        if !full {
            return;
        }
        confirm(&mut inode.size, before);
        if header.flags & flag::DATASYNC == 0 || injected(Fault::DatasyncPurgesAttributes) {
            confirm(&mut inode.mode, before);
            confirm(&mut inode.owner, before);
            confirm(&mut inode.mtime_ns, before);
            confirm(&mut inode.atime_ns, before);
            confirm(&mut inode.extended, before);
        }
    }

    fn finish(mut self) -> Result<Plan<'a>, ReplayError> {
        for identity in &self.plan.nameless {
            self.plan.inodes.remove(identity);
        }
        for ((directory, name), child) in &self.plan.names {
            let Some(child) = child else { continue };
            if let Some(inode) = self.plan.inodes.get_mut(child) {
                // A link count read just after a neighbour's change may run ahead of the records.
                inode.dead = false;
            }
            if self.plan.inodes.get(directory).is_some_and(|d| d.dead) {
                return Err(ReplayError::Contradiction {
                    seq: self.plan.last,
                    what: format!(
                        "{directory}/{} is bound, but the log also says that it was removed",
                        name.escape_ascii()
                    ),
                });
            }
        }
        self.check_tree()?;
        Ok(self.plan)
    }

    /// Directories have one place each, and none lies in itself.
    fn check_tree(&self) -> Result<(), ReplayError> {
        let directories: BTreeSet<Identity> = self
            .plan
            .names
            .keys()
            .map(|(directory, _)| *directory)
            .collect();
        let contradiction = |what| ReplayError::Contradiction {
            seq: self.plan.last,
            what,
        };
        let mut parents = BTreeMap::new();
        for ((directory, _), child) in &self.plan.names {
            if let Some(child) = child.filter(|child| directories.contains(child))
                && parents.insert(child, *directory).is_some()
            {
                return Err(contradiction(format!("directory {child} has two names")));
            }
        }
        let mut checked = BTreeSet::new();
        for start in parents.keys() {
            let mut path = BTreeSet::new();
            let mut at = *start;
            while checked.insert(at) {
                path.insert(at);
                let Some(parent) = parents.get(&at) else {
                    break;
                };
                if path.contains(parent) {
                    return Err(contradiction(format!("directory {parent} lies in itself")));
                }
                at = *parent;
            }
        }
        Ok(())
    }
}

/// The modification times of a rename's directories; one time may stand for both.
fn times_of_both(names: &NameBody) -> (i64, i64) {
    let (from, to) = (names.parent_time_ns, names.new_parent_time_ns);
    (
        if from == 0 { to } else { from },
        if to == 0 { from } else { to },
    )
}

fn told<T>(value: T, at: RingPos) -> Told<T> {
    Told {
        value,
        at,
        confirmed: false,
    }
}

fn confirm<T>(told: &mut Option<Told<T>>, before: RingPos) {
    if let Some(told) = told
        && told.at < before
    {
        told.confirmed = true;
    }
}

/// What a WRITE tells of the size. Without the inode's lock it was read too early or too late, so that it proves
/// only where the write ended: it must not cut off what somebody else has written and confirmed behind that.
/// A store through a mapping changes no size, and tells none.
fn tell_size(inode: &mut Inode<'_>, header: &RecordHeader, at: RingPos) {
    let size = header.size_after.min(END);
    if header.flags & (flag::SIZE_RAISES | flag::MAPPED) == 0 {
        inode.size = Some(told(Size::Exactly(size), at));
        return;
    }
    if header.flags & flag::MAPPED != 0 || size == 0 {
        return;
    }
    match inode.size.map(|told| told.value) {
        Some(known) if known.least() >= size => {}
        Some(Size::Exactly(_)) => inode.size = Some(told(Size::Exactly(size), at)),
        Some(Size::AtLeast(_)) | None => inode.size = Some(told(Size::AtLeast(size), at)),
    }
}

fn tell_mode_and_mtime(inode: &mut Inode<'_>, header: &RecordHeader, at: RingPos) {
    if header.mode != 0 {
        inode.mode = Some(told(header.mode, at));
    }
    inode.mtime_ns = Some(told(header.time_ns, at));
}
