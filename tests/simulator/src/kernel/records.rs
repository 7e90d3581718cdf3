//! What the hooks write, and what the oracle notes of it.

use twinwrite::ids::Identity;
use twinwrite::record::{AttrBody, NameBody, RecordHeader, encode, flag, op};
use twinwrite_abi::ATTR_SIZE;

use super::{ATTR_MODE, ATTR_UID, Kernel, MAX_BLOCKS};
use crate::history::{History, Register, as_value};
use crate::image::{BLOCK_BYTES, Mutation};

impl Kernel {
    pub(super) fn header(&self, operation: u8, inode: Identity) -> RecordHeader {
        let node = self.live.inodes.get(&inode);
        RecordHeader {
            op: operation,
            ino: inode.ino,
            generation: inode.generation,
            mode: node.map_or(0, crate::image::Inode::full_mode),
            size_after: node.map_or(0, crate::image::Inode::size_bytes),
            time_ns: node.map_or(0, |n| n.mtime_ns.value),
            ..RecordHeader::default()
        }
    }

    /// The record that the hook will write; the page cache shows the change already.
    pub(super) fn record(
        &self,
        mutation: &Mutation,
        bytes_in_ring: bool,
        from_tmpfile: bool,
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(192);
        match mutation {
            Mutation::Write {
                inode,
                first,
                blocks,
                ..
            } => {
                let header = RecordHeader {
                    pos: (first * BLOCK_BYTES) as u64,
                    ..self.header(op::WRITE, *inode)
                };
                if bytes_in_ring {
                    encode::push_write(&mut out, header, &crate::history::bytes_of(blocks));
                } else {
                    let len = (blocks.len() * BLOCK_BYTES) as u32;
                    encode::push_write_without_bytes(&mut out, header, len);
                }
            }
            Mutation::Truncate { inode, .. } => self.setattr(&mut out, *inode, ATTR_SIZE),
            Mutation::Chown { inode, .. } => self.setattr(&mut out, *inode, ATTR_UID),
            Mutation::Chmod { inode, .. } => self.setattr(&mut out, *inode, ATTR_MODE),
            Mutation::Times { .. } | Mutation::Stamp { .. } => {}
            names => self.name_record(&mut out, names, from_tmpfile),
        }
        out
    }

    pub(super) fn setattr(&self, out: &mut Vec<u8>, inode: Identity, valid: u64) {
        let node = self.live.inodes.get(&inode);
        let attributes = AttrBody {
            uid: node.map_or(0, |n| n.uid.value),
            nlink: node.map_or(0, |n| n.links),
            ..AttrBody::default()
        };
        let header = RecordHeader {
            arg: valid,
            ..self.header(op::SETATTR, inode)
        };
        encode::push_setattr(out, header, attributes);
    }

    pub(super) fn name_record(&self, out: &mut Vec<u8>, mutation: &Mutation, from_tmpfile: bool) {
        let links = |who: Identity| self.live.inodes.get(&who).map_or(0, |n| n.links);
        let mtime_ns = |who: Identity| {
            let node = self.live.inodes.get(&who);
            node.map_or(0, |n| n.mtime_ns.value)
        };
        let head = |operation: u8, who: Identity, parent: Option<Identity>| {
            let node = self.live.inodes.get(&who);
            let header = RecordHeader {
                pos: parent.map_or(0, |p| p.ino),
                arg: parent.map_or(0, |p| p.generation.into()),
                ..self.header(operation, who)
            };
            let names = NameBody {
                uid: node.map_or(0, |n| n.uid.value),
                nlink: links(who),
                parent_time_ns: parent.map_or(0, mtime_ns),
                ..NameBody::default()
            };
            (header, names)
        };
        let to_new = |names: NameBody, to: Identity, victim: Option<Identity>| NameBody {
            new_parent_ino: to.ino,
            new_parent_generation: to.generation,
            new_parent_time_ns: mtime_ns(to),
            victim_ino: victim.map_or(0, |v| v.ino),
            victim_generation: victim.map_or(0, |v| v.generation),
            victim_nlink: victim.map_or(0, links),
            ..names
        };
        match mutation {
            Mutation::Create {
                inode,
                place: Some((directory, name)),
                ..
            } => {
                let (header, names) = head(op::CREATE, *inode, Some(*directory));
                encode::push_name(out, header, names, name, b"", b"");
            }
            Mutation::Create { inode, .. } => {
                let (header, names) = head(op::TMPFILE, *inode, None);
                encode::push_name(out, header, names, b"", b"", b"");
            }
            Mutation::Link { inode, place } => {
                let (mut header, names) = head(op::LINK, *inode, Some(place.0));
                if from_tmpfile {
                    header.flags |= flag::FROM_TMPFILE;
                }
                encode::push_name(out, header, names, &place.1, b"", b"");
            }
            Mutation::Unlink { inode, place } => {
                let (header, names) = head(op::UNLINK, *inode, Some(place.0));
                encode::push_name(out, header, names, &place.1, b"", b"");
            }
            Mutation::Rename {
                inode,
                from,
                to,
                victim,
            } => {
                let (header, names) = head(op::RENAME, *inode, Some(from.0));
                encode::push_name(
                    out,
                    header,
                    to_new(names, to.0, *victim),
                    &from.1,
                    &to.1,
                    b"",
                );
            }
            Mutation::Exchange {
                inode,
                other,
                from,
                to,
            } => {
                let (header, names) = head(op::EXCHANGE, *inode, Some(from.0));
                encode::push_name(
                    out,
                    header,
                    to_new(names, to.0, Some(*other)),
                    &from.1,
                    &to.1,
                    b"",
                );
            }
            _ => {}
        }
    }

    /// What the mutation changed, for the oracle; the page cache shows it.
    pub(super) fn keep_books(&self, operation: usize, mutation: &Mutation, history: &mut History) {
        let origin = |who: Identity| self.live.inodes.get(&who).map_or(who, |n| n.origin);
        let links = |who: Identity| self.live.inodes.get(&who).map_or(0, |n| n.links);
        let mut set = |register, value| history.set(operation, register, value);
        let name = |place: &crate::image::Place| Register::Name(origin(place.0), place.1.clone());
        match mutation {
            Mutation::Create {
                inode,
                mode,
                place,
                directory,
            } => {
                set(Register::Owner(*inode), 0);
                set(Register::Mode(*inode), (*mode).into());
                if !directory {
                    set(Register::Size(*inode), 0);
                    let mtime = self.live.inodes.get(inode).map_or(0, |n| n.mtime_ns.value);
                    set(Register::Time(*inode), mtime as u64);
                }
                if let Some(place) = place {
                    set(Register::Exists(*inode), 1);
                    set(name(place), as_value(*inode));
                }
            }
            Mutation::Link { inode, place } => {
                if links(*inode) == 1 {
                    set(Register::Exists(origin(*inode)), 1);
                }
                set(name(place), as_value(origin(*inode)));
            }
            Mutation::Unlink { inode, place } => {
                set(name(place), 0);
                if links(*inode) == 0 {
                    set(Register::Exists(origin(*inode)), 0);
                }
            }
            Mutation::Rename {
                inode,
                from,
                to,
                victim,
            } => {
                set(name(from), 0);
                set(name(to), as_value(origin(*inode)));
                if let Some(victim) = victim.filter(|v| links(*v) == 0) {
                    set(Register::Exists(origin(victim)), 0);
                }
            }
            Mutation::Exchange {
                inode,
                other,
                from,
                to,
            } => {
                set(name(from), as_value(origin(*other)));
                set(name(to), as_value(origin(*inode)));
            }
            Mutation::Chown { inode, uid } => set(Register::Owner(origin(*inode)), (*uid).into()),
            Mutation::Chmod { inode, mode } => set(Register::Mode(origin(*inode)), (*mode).into()),
            Mutation::Write { inode, .. } | Mutation::Truncate { inode, .. } => {
                self.keep_content(operation, *inode, mutation, history);
            }
            Mutation::Times { .. } | Mutation::Stamp { .. } => {}
        }
    }

    /// Every record of an inode carries its attributes.
    pub(super) fn keep_carried(
        &self,
        operation: usize,
        mutation: &Mutation,
        history: &mut History,
    ) {
        let (Mutation::Write { inode, .. }
        | Mutation::Truncate { inode, .. }
        | Mutation::Chown { inode, .. }
        | Mutation::Chmod { inode, .. }) = mutation
        else {
            return;
        };
        let Some(node) = self.live.inodes.get(inode) else {
            return;
        };
        let who = node.origin;
        history.carry(operation, Register::Mode(who), node.mode.value.into());
        history.carry(operation, Register::Time(who), node.mtime_ns.value as u64);
        if !matches!(mutation, Mutation::Write { .. }) {
            history.carry(operation, Register::Owner(who), node.uid.value.into());
        }
        if matches!(mutation, Mutation::Write { .. }) {
            history.carry(operation, Register::Size(who), node.blocks.len() as u64);
        }
    }

    pub(super) fn keep_content(
        &self,
        operation: usize,
        inode: Identity,
        mutation: &Mutation,
        history: &mut History,
    ) {
        let Some(node) = self.live.inodes.get(&inode) else {
            return;
        };
        let at = history.operations[operation].at;
        let who = node.origin;
        if node.size_at == at {
            history.set(operation, Register::Size(who), node.blocks.len() as u64);
        }
        if node.mtime_ns.at == at {
            history.set(operation, Register::Time(who), node.mtime_ns.value as u64);
        }
        for (index, block) in node.blocks.iter().enumerate() {
            if block.at == at {
                history.set(operation, Register::Block(who, index), block.value.into());
            }
        }
        if let Mutation::Truncate { size, .. } = mutation {
            for index in *size..MAX_BLOCKS {
                history.set(operation, Register::Block(who, index), 0);
            }
        }
    }
}
