//! The records that capture would have written for an operation.

use super::attributes::{extended_of, fill_of};
use super::model::Model;
use super::perform::affected;
use super::world::{NewKind, Op, World};
use crate::ids::Identity;
use crate::record::{AttrBody, NameBody, RecordHeader, encode, flag, op};

/// Bytes of a page of a mapping, here.
const PAGE_BYTES: usize = 16;
const EXTENDED_BYTES_MAX: u32 = 256 * 1024;

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
    /// All records of an operation.
    pub(super) fn record(&mut self, before: &Model, op: &Op, made: Option<Identity>) {
        let changed = self.changed_extended(before, op, made);
        for inode in changed.iter().filter(|inode| made != Some(**inode)) {
            self.record_extended(*inode);
        }
        if let Op::Store { file, at, bytes } = op {
            self.record_store(*file, *at, bytes.len());
        } else {
            self.record_itself(before, op, made);
        }
        for inode in changed.iter().filter(|inode| made == Some(**inode)) {
            self.record_extended(*inode);
        }
    }

    /// Whose extended state changed with an operation; but for the mask of an ACL, which goes with the mode.
    fn changed_extended(&self, before: &Model, op: &Op, made: Option<Identity>) -> Vec<Identity> {
        let is_changed = |inode: &Identity| {
            let Some(now) = self.model.nodes.get(inode) else {
                return false;
            };
            match before.nodes.get(inode) {
                Some(then) => extended_of(then) != extended_of(now),
                None => extended_of(now) != Default::default(),
            }
        };
        match op {
            Op::Chmod { .. } => Vec::new(),
            Op::SetAttribute { inode, .. } | Op::SetFlags { inode, .. } => vec![*inode],
            _ => affected(before, op, made)
                .into_iter()
                .filter(is_changed)
                .collect(),
        }
    }

    fn record_extended(&mut self, inode: Identity) {
        let start = self.log.bytes.len();
        let head = RecordHeader {
            flags: flag::NO_BYTES,
            data_len: EXTENDED_BYTES_MAX,
            ..header(op::EXTENDED, inode, &self.model)
        };
        encode::push(&mut self.log.bytes, head, b"");
        let fill = self.model.nodes.get(&inode).map(fill_of);
        self.log.note(start, Some(fill.unwrap_or_default()));
    }

    /// A page became writable, and what stands in it then.
    fn record_store(&mut self, file: Identity, at: usize, len: usize) {
        let unlocked = RecordHeader {
            mode: 0,
            size_after: 0,
            flags: flag::MAPPED | flag::SIZE_RAISES,
            ..header(op::WRITE, file, &self.model)
        };
        let start = self.log.bytes.len();
        let from = at - at % PAGE_BYTES;
        let noticed = RecordHeader {
            pos: from as u64,
            arg: PAGE_BYTES as u64,
            ..unlocked
        };
        encode::push_write(&mut self.log.bytes, noticed, b"");
        self.log.note(start, None);
        let start = self.log.bytes.len();
        let bytes = self.model.file_bytes(file);
        let to = (at + len).next_multiple_of(PAGE_BYTES).min(bytes.len());
        let snapshot = RecordHeader {
            pos: from as u64,
            ..unlocked
        };
        let len = (to - from) as u32;
        encode::push_write_without_bytes(&mut self.log.bytes, snapshot, len);
        self.log.note(start, Some(bytes[from..to].to_vec()));
    }

    fn record_itself(&mut self, before: &Model, op: &Op, made: Option<Identity>) {
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
            Op::Direct { file, at, bytes } => {
                let header = RecordHeader {
                    mode: 0,
                    pos: *at as u64,
                    size_after: (at + bytes.len()) as u64,
                    flags: flag::SIZE_RAISES,
                    ..header(op::WRITE, *file, model)
                };
                encode::push_write_without_bytes(out, header, bytes.len() as u32);
                fill = Some(bytes.clone());
            }
            Op::Zero {
                file,
                at,
                len,
                grows,
            } => {
                let size = model.nodes[file].size() as usize;
                let end = (at + len).min(size);
                let header = RecordHeader {
                    mode: 0,
                    pos: *at as u64,
                    size_after: if *grows { end as u64 } else { 0 },
                    flags: flag::SIZE_RAISES,
                    ..header(op::WRITE, *file, model)
                };
                if end > *at {
                    encode::push_write_without_bytes(out, header, (end - at) as u32);
                    fill = Some(vec![0; end - at]);
                } else {
                    encode::push_write(out, header, b"");
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
            // Their records are others, or none.
            Op::SetAttribute { .. }
            | Op::SetFlags { .. }
            | Op::Store { .. }
            | Op::Flush
            | Op::Checkpoint => return,
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
