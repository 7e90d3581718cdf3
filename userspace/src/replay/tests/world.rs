//! Random operations on a model, and the records that capture would have written for them.

use std::collections::BTreeSet;

use super::attributes::Seen;
use super::model::Model;
use super::perform::{affected, perform};
use crate::ids::{Epoch, Identity, RingPos, Seq};
use crate::record::{RecordView, op};
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
    /// A write past the page cache, within the size and without the inode's lock.
    Direct {
        file: Identity,
        at: usize,
        bytes: Vec<u8>,
    },
    /// A store through a shared mapping, and the snapshot of its pages.
    Store {
        file: Identity,
        at: usize,
        bytes: Vec<u8>,
    },
    /// A hole, or zeroed blocks, which may make the file longer.
    Zero {
        file: Identity,
        at: usize,
        len: usize,
        grows: bool,
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
    SetAttribute {
        inode: Identity,
        name: Vec<u8>,
        value: Option<Vec<u8>>,
    },
    /// Of the flags those in [`super::attributes::FLAGS`].
    SetFlags {
        inode: Identity,
        flags: u32,
        project: u32,
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
    /// What it left of the inodes that it changed.
    pub(super) attributes: Vec<(Identity, Seen)>,
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
    pub(super) bytes: Vec<u8>,
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

    pub(super) fn note(&mut self, start: usize, fill: Option<Vec<u8>>) {
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
                let fill = self.entries[index].fill.as_ref();
                let fill = fill.map(|bytes| fill_of(&record, bytes));
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

/// The bytes of a record as the region has them: those of a WRITE in pieces.
fn fill_of<'a>(record: &RecordView<'_>, bytes: &'a [u8]) -> Fill<'a> {
    let len = match record.header.op {
        op::EXTENDED => bytes.len(),
        _ => bytes.len().div_ceil(3),
    };
    let mut offset = 0;
    let pieces = bytes.chunks(len.max(1)).map(|piece| {
        let at = offset;
        offset += piece.len() as u32;
        (at, piece)
    });
    Fill {
        pieces: pieces.collect(),
        gone: bytes.len() < record.header.data_len as usize,
    }
}

/// What runs operations for real, and tells what came of them.
pub(super) trait Live {
    /// Runs it; the identity of what it made.
    fn run(&mut self, op: &Op) -> Option<Identity>;
    /// What an inode is now.
    fn see(&mut self, inode: Identity) -> Option<Seen>;
}

/// A model, what happened to it, and the log.
pub(super) struct World<'l> {
    pub(super) model: Model,
    pub(super) events: Vec<Event>,
    pub(super) log: Log,
    /// Log position when each event began.
    pub(super) positions: Vec<u64>,
    pub(super) live: Option<&'l mut dyn Live>,
    pub(super) random: Random,
    /// Largest file, in bytes.
    pub(super) file_bytes_max: usize,
    /// The file system has quota projects.
    pub(super) has_projects: bool,
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
                && let Some(now) = live.see(inode)
                && let Some(node) = self.model.nodes.get_mut(&inode)
            {
                now.put_into(node);
            }
            if let Some(node) = self.model.nodes.get(&inode) {
                attributes.push((inode, Seen::of(node)));
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
}

/// Operations as tests write them down.
impl World<'_> {
    /// Its identity.
    pub(super) fn create(
        &mut self,
        directory: Identity,
        name: impl AsRef<[u8]>,
        kind: NewKind,
    ) -> Identity {
        let name = name.as_ref();
        let mode = match kind {
            NewKind::Directory => 0o755,
            _ => 0o644,
        };
        self.run(Op::Create {
            directory,
            name: name.to_vec(),
            kind,
            mode,
        });
        self.model.entries(directory)[name]
    }

    pub(super) fn write(&mut self, file: Identity, at: usize, bytes: &[u8]) {
        self.run(Op::Write {
            file,
            at,
            bytes: bytes.to_vec(),
            bytes_in_ring: true,
        });
    }

    pub(super) fn rename(&mut self, from: (Identity, &str), to: (Identity, &str)) {
        self.run(Op::Rename {
            from: (from.0, from.1.into()),
            to: (to.0, to.1.into()),
        });
    }

    pub(super) fn fsync(&mut self, inode: Identity, start: u64, last: u64) {
        let entered = self.events.len();
        self.run(Op::Fsync {
            inode,
            start,
            last,
            datasync: false,
            entered,
        });
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
            has_projects: true,
        }
    }
}
