//! What an operation does to a model.

use super::attributes::FLAGS;
use super::model::Model;
use super::world::{Event, Op};
use crate::ids::Identity;
use crate::replay::plan::Kind;

/// The inodes whose attributes an operation changes.
pub(super) fn affected(before: &Model, op: &Op, made: Option<Identity>) -> Vec<Identity> {
    let mut inodes: Vec<Identity> = made.into_iter().collect();
    match op {
        Op::Write { file: inode, .. }
        | Op::Direct { file: inode, .. }
        | Op::Store { file: inode, .. }
        | Op::Zero { file: inode, .. }
        | Op::Truncate { file: inode, .. }
        | Op::SetAttribute { inode, .. }
        | Op::SetFlags { inode, .. }
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
    match op {
        Op::Write {
            file, at, bytes, ..
        }
        | Op::Direct { file, at, bytes } => {
            model.write_bytes(*file, *at, bytes);
            model.lose_capability(*file);
        }
        Op::Store { file, at, bytes } => model.write_bytes(*file, *at, bytes),
        Op::Zero {
            file,
            at,
            len,
            grows,
        } => {
            model.zero_bytes(*file, *at, *len, *grows);
            model.lose_capability(*file);
        }
        Op::Truncate { file, size } => {
            model.resize(*file, *size);
            model.lose_capability(*file);
        }
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
                node.set_mode(*mode);
            }
        }
        Op::Chown { inode, uid, gid } => {
            if let Some(node) = model.nodes.get_mut(inode) {
                (node.uid, node.gid) = (*uid, *gid);
                if !node.is_directory() {
                    node.mode &= !0o6000;
                }
                node.lose_capability();
            }
        }
        Op::SetAttribute { inode, name, value } => {
            if let Some(node) = model.nodes.get_mut(inode) {
                node.put_attribute(name, value.as_deref());
            }
        }
        Op::SetFlags {
            inode,
            flags,
            project,
        } => {
            if let Some(node) = model.nodes.get_mut(inode) {
                node.flags.flags = node.flags.flags & !FLAGS | flags;
                node.flags.project = *project;
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
}

/// Sets the attributes that an event left.
pub(super) fn adopt(model: &mut Model, event: &Event) {
    for (inode, seen) in &event.attributes {
        if let Some(node) = model.nodes.get_mut(inode) {
            seen.put_into(node);
            if event.made == Some(*inode) {
                node.born_ns = seen.mtime_ns;
            }
        }
    }
}
