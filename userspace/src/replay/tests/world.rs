//! Random operations on a model, and the records that capture would have written for them.

use std::collections::BTreeSet;

use super::model::Model;
use crate::ids::{Epoch, Identity, RingPos, Seq};
use crate::record::{AttrBody, NameBody, RecordHeader, RecordView, encode, flag, op};
use crate::replay::plan::Kind;
use crate::replay::{Fill, LogItem, ReplayInput};

/// SplitMix64: a seed is the whole reproduction.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(super) fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len())].clone())
    }
}

pub(super) type Name = Vec<u8>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NewKind {
    File,
    Directory,
    Symlink(Vec<u8>),
    Fifo,
    Device(u32),
}

impl NewKind {
    pub(super) fn kind(&self) -> Kind<'_> {
        match self {
            Self::File => Kind::File,
            Self::Directory => Kind::Directory,
            Self::Symlink(target) => Kind::Symlink(target),
            Self::Fifo => Kind::Special {
                format: 0o010_000,
                rdev: 0,
            },
            Self::Device(rdev) => Kind::Special {
                format: 0o020_000,
                rdev: *rdev,
            },
        }
    }

    pub(super) fn format(&self) -> u32 {
        match self {
            Self::File => 0o100_000,
            Self::Directory => 0o040_000,
            Self::Symlink(_) => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Device(_) => 0o020_000,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Write {
        file: Identity,
        at: usize,
        bytes: Vec<u8>,
        bytes_in_ring: bool,
    },
    Truncate {
        file: Identity,
        size: usize,
    },
    Create {
        directory: Identity,
        name: Name,
        kind: NewKind,
        mode: u32,
    },
    Tmpfile,
    Link {
        file: Identity,
        directory: Identity,
        name: Name,
    },
    Unlink {
        directory: Identity,
        name: Name,
    },
    Rename {
        from: (Identity, Name),
        to: (Identity, Name),
    },
    Exchange {
        from: (Identity, Name),
        to: (Identity, Name),
    },
    Chmod {
        inode: Identity,
        mode: u32,
    },
    Chown {
        inode: Identity,
        uid: u32,
        gid: u32,
    },
    Utimes {
        inode: Identity,
        atime_ns: i64,
        mtime_ns: i64,
    },
    /// `entered`: how many operations had happened when the call began.
    Fsync {
        inode: Identity,
        start: u64,
        last: u64,
        datasync: bool,
        entered: usize,
    },
    /// Everything is made durable, and no record tells (a background flush).
    Flush,
    /// Checkpoint: everything durable, and the sentinel says so.
    Checkpoint,
}

/// An operation that happened.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) op: Op,
    /// Identity of what it made.
    pub(super) made: Option<Identity>,
    /// Records in the log after it.
    pub(super) records: usize,
    /// The model's attributes after it: inode, mode, uid, gid, mtime, atime.
    pub(super) attributes: Vec<(Identity, u32, u32, u32, i64, i64)>,
}

#[derive(Clone, Debug)]
struct Entry {
    start: usize,
    end: usize,
    fill: Option<Vec<u8>>,
}

/// The log that capture writes.
#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Log {
    /// The ring position of the next record; the stream began long ago.
    pub(super) fn position(&self) -> u64 {
        (1 << 20) + self.bytes.len() as u64
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn note(&mut self, start: usize, fill: Option<Vec<u8>>) {
        self.entries.push(Entry {
            start,
            end: self.bytes.len(),
            fill,
        });
    }

    /// Records `from + 1 ..= to` as replay's input, behind S = `after`.
    pub(super) fn input(
        &self,
        from: usize,
        to: usize,
        after: usize,
    ) -> ReplayInput<Vec<LogItem<'_>>> {
        let item = |(index, entry): (usize, &'_ Entry)| -> (usize, usize, usize) {
            (index, entry.start, entry.end)
        };
        let items = self.entries[..to]
            .iter()
            .enumerate()
            .skip(from)
            .map(|pair| {
                let (index, start, end) = item(pair);
                let record = RecordView::parse(&self.bytes[start..end], start).expect("own record");
                let fill = self.entries[index].fill.as_ref().map(|bytes| {
                    let (left, right) = bytes.split_at(bytes.len() / 2);
                    Fill {
                        pieces: vec![(0, left), (left.len() as u32, right)],
                        gone: false,
                    }
                });
                let ring_pos = RingPos((1 << 20) + start as u64);
                LogItem {
                    seq: Seq(index as u64 + 1),
                    ring_pos,
                    record,
                    fill,
                }
            })
            .collect();
        ReplayInput {
            epoch: Epoch(7),
            after: Seq(after as u64),
            items,
        }
    }

    /// The names that records `from + 1 ..= to` mention.
    pub(super) fn mentioned(&self, from: usize, to: usize) -> BTreeSet<(Identity, Name)> {
        let mut names = BTreeSet::new();
        for item in self.input(from, to, from).items {
            let record = item.record;
            match record.header.op {
                op::CREATE | op::SYMLINK | op::LINK | op::UNLINK => {
                    names.insert((record.parent(), record.name().to_vec()));
                }
                op::RENAME | op::EXCHANGE => {
                    names.insert((record.parent(), record.name().to_vec()));
                    names.insert((record.new_parent(), record.name2().to_vec()));
                }
                _ => {}
            }
        }
        names
    }
}

/// What runs operations for real, and tells what came of them.
pub(super) trait Live {
    /// Runs it; the identity of what it made.
    fn run(&mut self, op: &Op) -> Option<Identity>;
    /// Mode, owner, group, mtime, atime of an inode now.
    fn attributes(&mut self, inode: Identity) -> Option<(u32, u32, u32, i64, i64)>;
}

/// A model, what happened to it, and the log.
pub(super) struct World<'l> {
    pub(super) model: Model,
    pub(super) events: Vec<Event>,
    pub(super) log: Log,
    /// Log position when each event began.
    positions: Vec<u64>,
    pub(super) live: Option<&'l mut dyn Live>,
    pub(super) random: Random,
    /// Largest file, in bytes.
    pub(super) file_bytes_max: usize,
}

fn header(operation: u8, identity: Identity, model: &Model) -> RecordHeader {
    let node = model.nodes.get(&identity);
    RecordHeader {
        op: operation,
        ino: identity.ino,
        generation: identity.generation,
        mode: node.map_or(0, |n| n.mode),
        size_after: node.map_or(0, super::model::Node::size),
        time_ns: node.map_or(0, |n| n.mtime_ns),
        ..RecordHeader::default()
    }
}

impl World<'_> {
    /// Runs one operation: live if there is a live file system, on the model, and into the log.
    pub(super) fn run(&mut self, op: Op) {
        self.positions.push(self.log.position());
        let before = self.model.clone();
        self.model.now_ns += 1000;
        let mut made = match &mut self.live {
            Some(live) => live.run(&op),
            None => None,
        };
        if matches!(op, Op::Create { .. } | Op::Tmpfile) && made.is_none() {
            made = Some(self.model.allocate());
        }
        perform(&mut self.model, &op, made);
        let mut attributes = Vec::new();
        for inode in affected(&before, &op, made) {
            if let Some(live) = &mut self.live
                && let Some(now) = live.attributes(inode)
                && let Some(node) = self.model.nodes.get_mut(&inode)
            {
                (node.mode, node.uid, node.gid, node.mtime_ns, node.atime_ns) = now;
            }
            if let Some(n) = self.model.nodes.get(&inode) {
                attributes.push((inode, n.mode, n.uid, n.gid, n.mtime_ns, n.atime_ns));
            }
        }
        self.record(&before, &op, made);
        self.events.push(Event {
            op,
            made,
            records: self.log.len(),
            attributes,
        });
    }

    fn record(&mut self, before: &Model, op: &Op, made: Option<Identity>) {
        let start = self.log.bytes.len();
        let mut fill = None;
        let (model, out) = (&self.model, &mut self.log.bytes);
        match op {
            Op::Write {
                file,
                at,
                bytes,
                bytes_in_ring,
            } => {
                let header = RecordHeader {
                    pos: *at as u64,
                    ..header(op::WRITE, *file, model)
                };
                if *bytes_in_ring {
                    encode::push_write(out, header, bytes);
                } else {
                    encode::push_write_without_bytes(out, header, bytes.len() as u32);
                    fill = Some(bytes.clone());
                }
            }
            Op::Truncate { file, .. } => setattr(out, model, *file, 1 << 3),
            Op::Chmod { inode, .. } => setattr(out, model, *inode, 1),
            Op::Chown { inode, .. } => setattr(out, model, *inode, 1 << 1 | 1 << 2),
            Op::Utimes { inode, .. } => setattr(out, model, *inode, 1 << 4 | 1 << 5 | 3 << 7),
            Op::Create {
                directory,
                name,
                kind,
                ..
            } => {
                let child = made.expect("made");
                let (operation, target) = match kind {
                    NewKind::Symlink(target) => (op::SYMLINK, target.as_slice()),
                    _ => (op::CREATE, &[][..]),
                };
                let (head, mut body) = name_record(operation, model, child, *directory);
                if let NewKind::Device(rdev) = kind {
                    body.rdev = *rdev;
                }
                encode::push_name(out, head, body, name, b"", target);
            }
            Op::Tmpfile => {
                let child = made.expect("made");
                let (mut head, body) = name_record(op::TMPFILE, model, child, model.root);
                (head.pos, head.arg) = (0, 0);
                encode::push_name(out, head, body, b"", b"", b"");
            }
            Op::Link {
                file,
                directory,
                name,
            } => {
                let (mut head, body) = name_record(op::LINK, model, *file, *directory);
                if before.nodes[file].links == 0 {
                    head.flags |= flag::FROM_TMPFILE;
                }
                encode::push_name(out, head, body, name, b"", b"");
            }
            Op::Unlink { directory, name } => {
                let child = before.entries(*directory)[name];
                let (mut head, mut body) = name_record(op::UNLINK, model, child, *directory);
                head.mode = before.nodes[&child].mode;
                body.nlink = model.nodes.get(&child).map_or(0, |n| n.links);
                encode::push_name(out, head, body, name, b"", b"");
            }
            Op::Rename { from, to } | Op::Exchange { from, to } => {
                let exchange = matches!(op, Op::Exchange { .. });
                let operation = if exchange { op::EXCHANGE } else { op::RENAME };
                let child = before.entries(from.0)[&from.1];
                let (head, mut body) = name_record(operation, model, child, from.0);
                body.new_parent_ino = to.0.ino;
                body.new_parent_generation = to.0.generation;
                body.new_parent_time_ns = model.nodes[&to.0].mtime_ns;
                if let Some(victim) = before.entries(to.0).get(&to.1) {
                    body.victim_ino = victim.ino;
                    body.victim_generation = victim.generation;
                    body.victim_nlink = model.nodes.get(victim).map_or(0, |n| n.links);
                }
                encode::push_name(out, head, body, &from.1, &to.1, b"");
            }
            Op::Fsync {
                inode,
                start,
                last,
                datasync,
                entered,
            } => {
                let unlinked = model.nodes[inode].links == 0;
                let flags = if *datasync { flag::DATASYNC } else { 0 }
                    | if unlinked { flag::UNLINKED } else { 0 };
                let arg = self.positions[*entered];
                let head = RecordHeader {
                    pos: *start,
                    size_after: *last,
                    arg,
                    flags,
                    ..header(op::FSYNC, *inode, model)
                };
                encode::push(out, head, b"");
            }
            Op::Flush | Op::Checkpoint => return,
        }
        self.log.note(start, fill);
    }
}

fn name_record(
    operation: u8,
    model: &Model,
    child: Identity,
    parent: Identity,
) -> (RecordHeader, NameBody) {
    let node = model.nodes.get(&child);
    let head = RecordHeader {
        pos: parent.ino,
        arg: parent.generation.into(),
        ..header(operation, child, model)
    };
    let body = NameBody {
        uid: node.map_or(0, |n| n.uid),
        gid: node.map_or(0, |n| n.gid),
        nlink: node.map_or(0, |n| n.links),
        parent_time_ns: model.nodes.get(&parent).map_or(0, |n| n.mtime_ns),
        ..NameBody::default()
    };
    (head, body)
}

fn setattr(out: &mut Vec<u8>, model: &Model, inode: Identity, valid: u64) {
    let node = &model.nodes[&inode];
    let attributes = AttrBody {
        atime_ns: node.atime_ns,
        uid: node.uid,
        gid: node.gid,
        nlink: node.links,
        reserved: [0; 11],
    };
    let head = RecordHeader {
        arg: valid,
        ..header(op::SETATTR, inode, model)
    };
    encode::push_setattr(out, head, attributes);
}

/// The inodes whose attributes an operation changes.
fn affected(before: &Model, op: &Op, made: Option<Identity>) -> Vec<Identity> {
    let mut inodes: Vec<Identity> = made.into_iter().collect();
    match op {
        Op::Write { file: inode, .. }
        | Op::Truncate { file: inode, .. }
        | Op::Chmod { inode, .. }
        | Op::Chown { inode, .. }
        | Op::Utimes { inode, .. } => inodes.push(*inode),
        Op::Create { directory, .. } => inodes.push(*directory),
        Op::Link {
            file, directory, ..
        } => inodes.extend([*file, *directory]),
        Op::Unlink { directory, name } => {
            inodes.extend([*directory, before.entries(*directory)[name]]);
        }
        Op::Rename { from, to } | Op::Exchange { from, to } => {
            inodes.extend([from.0, to.0]);
            inodes.extend(before.entries(from.0).get(&from.1));
            inodes.extend(before.entries(to.0).get(&to.1));
        }
        Op::Tmpfile | Op::Fsync { .. } | Op::Flush | Op::Checkpoint => {}
    }
    inodes
}

/// Runs an operation on a model, as far as its inodes are there.
pub(super) fn perform(model: &mut Model, op: &Op, made: Option<Identity>) {
    let now_ns = model.now_ns;
    match op {
        Op::Write {
            file, at, bytes, ..
        } => model.write_bytes(*file, *at, bytes),
        Op::Truncate { file, size } => model.resize(*file, *size),
        Op::Create {
            directory,
            name,
            kind,
            mode,
        } => {
            let identity = made.expect("made");
            model.insert(identity, kind.kind(), kind.format() | mode);
            model.entries_mut(*directory).insert(name.clone(), identity);
        }
        Op::Tmpfile => {
            let identity = made.expect("made");
            model.insert(identity, Kind::File, 0o100_600);
            model.held.insert(identity);
            if let Some(node) = model.nodes.get_mut(&identity) {
                node.links = 0;
            }
        }
        Op::Link {
            file,
            directory,
            name,
        } => {
            if let Some(node) = model.nodes.get_mut(file) {
                node.links += 1;
                model.held.remove(file);
                model.entries_mut(*directory).insert(name.clone(), *file);
            }
        }
        Op::Unlink { directory, name } => {
            if let Some(child) = model.entries_mut(*directory).remove(name) {
                model.drop_link(child);
            }
        }
        Op::Rename { from, to } => {
            let child = model.entries(from.0)[&from.1];
            if model.entries(to.0).get(&to.1) == Some(&child) {
                return;
            }
            model.entries_mut(from.0).remove(&from.1);
            if let Some(victim) = model.entries_mut(to.0).insert(to.1.clone(), child) {
                model.drop_link(victim);
            }
        }
        Op::Exchange { from, to } => {
            let (one, two) = (model.entries(from.0)[&from.1], model.entries(to.0)[&to.1]);
            model.entries_mut(from.0).insert(from.1.clone(), two);
            model.entries_mut(to.0).insert(to.1.clone(), one);
        }
        Op::Chmod { inode, mode } => {
            if let Some(node) = model.nodes.get_mut(inode) {
                node.mode = node.mode & 0o170_000 | mode;
            }
        }
        Op::Chown { inode, uid, gid } => {
            if let Some(node) = model.nodes.get_mut(inode) {
                (node.uid, node.gid) = (*uid, *gid);
                if !node.is_directory() {
                    node.mode &= !0o6000;
                }
            }
        }
        Op::Utimes {
            inode,
            atime_ns,
            mtime_ns,
        } => {
            if let Some(node) = model.nodes.get_mut(inode) {
                (node.atime_ns, node.mtime_ns) = (*atime_ns, *mtime_ns);
            }
        }
        Op::Fsync { .. } | Op::Flush | Op::Checkpoint => {}
    }
    let _ = now_ns;
}

/// Sets the attributes that an event left.
pub(super) fn adopt(model: &mut Model, event: &Event) {
    for (inode, mode, uid, gid, mtime_ns, atime_ns) in &event.attributes {
        if let Some(node) = model.nodes.get_mut(inode) {
            (node.mode, node.uid, node.gid) = (*mode, *uid, *gid);
            (node.mtime_ns, node.atime_ns) = (*mtime_ns, *atime_ns);
            if event.made == Some(*inode) {
                node.born_ns = *mtime_ns;
            }
        }
    }
}

impl<'l> World<'l> {
    pub(super) fn new(seed: u64, root: Identity, live: Option<&'l mut dyn Live>) -> Self {
        Self {
            model: Model::new(root),
            events: Vec::new(),
            log: Log::default(),
            positions: Vec::new(),
            live,
            random: Random(seed),
            file_bytes_max: 64,
        }
    }
}
