//! Attributes as the kernel treats them: an ACL is a part of the mode, and capabilities go with the first write.

use std::collections::BTreeMap;

use super::model::{Body, Model, Node};
use crate::ids::Identity;
use crate::record::extended::{Extended, InodeFlags};

pub(super) const ACL: &[u8] = b"system.posix_acl_access";
pub(super) const CAPABILITY: &[u8] = b"security.capability";
/// `FS_NODUMP_FL` and `FS_NOATIME_FL`.
pub(super) const HARMLESS_FLAGS: u32 = 0x40 | 0x80;
/// The flags that the operations set.
pub(super) const FLAGS: u32 = InodeFlags::LOCKS | HARMLESS_FLAGS;
/// `FS_IMMUTABLE_FL`.
pub(super) const IMMUTABLE: u32 = 0x10;

/// What an operation leaves of an inode, but for its bytes and names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime_ns: i64,
    pub(super) atime_ns: i64,
    pub(super) attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) flags: InodeFlags,
}

impl Seen {
    pub(super) fn of(node: &Node) -> Self {
        Self {
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            mtime_ns: node.mtime_ns,
            atime_ns: node.atime_ns,
            attributes: node.attributes.clone(),
            flags: node.flags,
        }
    }

    pub(super) fn put_into(&self, node: &mut Node) {
        (node.mode, node.uid, node.gid) = (self.mode, self.uid, self.gid);
        (node.mtime_ns, node.atime_ns) = (self.mtime_ns, self.atime_ns);
        node.attributes.clone_from(&self.attributes);
        node.flags = self.flags;
    }
}

/// What of an inode's extended state must be as it was.
pub(super) fn extended_of(node: &Node) -> (BTreeMap<Vec<u8>, Vec<u8>>, u32, u32) {
    let flags = node.flags;
    (node.attributes.clone(), flags.flags & FLAGS, flags.project)
}

/// The bytes an EXTENDED record of this inode is filled with.
pub(super) fn fill_of(node: &Node) -> Vec<u8> {
    let has_flags = matches!(node.body, Body::File(_) | Body::Directory(_));
    let state = Extended {
        mode: node.mode,
        flags: has_flags.then_some(node.flags),
        attributes: (node.attributes.iter())
            .map(|(name, value)| (&name[..], &value[..]))
            .collect(),
    };
    state.encode().expect("it is small")
}

/// `struct posix_acl_xattr_entry`s: owner, one more user, group, mask, others.
pub(super) fn acl(owner: u16, mask: u16, others: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let entries = [
        (1u16, owner, NOBODY),
        (2, 7, 1000),
        (4, 5, NOBODY),
        (0x10, mask, NOBODY),
        (0x20, others, NOBODY),
    ];
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Offsets of the permissions in an [`acl`] and how far each is shifted in a mode.
const SHARED: [(usize, u32); 3] = [(6, 6), (30, 3), (38, 0)];

pub(super) fn capability(number: u8) -> Vec<u8> {
    // `struct vfs_cap_data`, revision 2, effective.
    let mut bytes = 0x0200_0001u32.to_le_bytes().to_vec();
    bytes.extend([number, 0, 0, 0]);
    bytes.resize(20, 0);
    bytes
}

impl Node {
    /// The mode bits changed: so do the ACL's.
    pub(super) fn set_mode(&mut self, mode: u32) {
        self.mode = self.mode & 0o170_000 | mode & 0o7777;
        if let Some(acl) = self.attributes.get_mut(ACL) {
            for (at, shift) in SHARED {
                acl[at] = (mode >> shift & 7) as u8;
            }
        }
    }

    pub(super) fn put_attribute(&mut self, name: &[u8], value: Option<&[u8]>) {
        let Some(value) = value else {
            self.attributes.remove(name);
            return;
        };
        if name == ACL {
            for (at, shift) in SHARED {
                self.mode = self.mode & !(7 << shift) | u32::from(value[at]) << shift;
            }
        }
        self.attributes.insert(name.to_vec(), value.to_vec());
    }

    /// Bytes, size or owner changed.
    pub(super) fn lose_capability(&mut self) {
        self.attributes.remove(CAPABILITY);
    }
}

impl Model {
    pub(super) fn locks(&self, inode: Identity) -> u32 {
        self.nodes.get(&inode).map_or(0, |node| node.flags.locks())
    }

    pub(super) fn is_immutable(&self, inode: Identity) -> bool {
        self.locks(inode) & IMMUTABLE != 0
    }

    pub(super) fn lose_capability(&mut self, inode: Identity) {
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.lose_capability();
        }
    }
}
