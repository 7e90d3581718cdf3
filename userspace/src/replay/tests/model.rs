//! A file system in memory, with identities, for running apply without a mount.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::attributes::IMMUTABLE;
use crate::ids::Identity;
use crate::record::extended::InodeFlags;
use crate::replay::plan::Kind;
use crate::replay::sentinel::OWN_DIRECTORY;
use crate::replay::volume::{Stamp, Stat, Step, Volume, VolumeError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    File(Vec<u8>),
    Directory(BTreeMap<Vec<u8>, Identity>),
    Symlink(Vec<u8>),
    Special(u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    pub(super) mtime_ns: i64,
    pub(super) atime_ns: i64,
    pub(super) body: Body,
    pub(super) stamp: Option<Stamp>,
    pub(super) born_ns: i64,
    pub(super) attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) flags: InodeFlags,
}

impl Node {
    pub(super) fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }

    pub(super) fn size(&self) -> u64 {
        if let Body::File(bytes) = &self.body {
            bytes.len() as u64
        } else {
            0
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) nodes: BTreeMap<Identity, Node>,
    pub(super) root: Identity,
    /// Inodes without a link that something holds open.
    pub(super) held: BTreeSet<Identity>,
    pub(super) now_ns: i64,
    /// The last generation of each number, counted up by one as XFS does: what replay makes may get
    /// an identity that the log knows.
    pub(super) generations: BTreeMap<u64, u32>,
    /// Changing steps still allowed, and the error after them.
    pub(super) budget: Option<(u64, i32)>,
    pub(super) steps: u64,
    /// An attribute that cannot be set, and the error.
    pub(super) refused: Option<(Vec<u8>, i32)>,
    /// Flags that this file system has not.
    pub(super) refused_flags: u32,
}

fn error(what: &str, code: i32) -> VolumeError {
    VolumeError {
        what: what.to_owned(),
        source: io::Error::from_raw_os_error(code),
    }
}

/// All attributes of one inode take no more, as in the one block that ext4 has for them.
pub(super) const ATTRIBUTE_BYTES_MAX: usize = 180;

pub(super) fn attribute_bytes(attributes: &BTreeMap<Vec<u8>, Vec<u8>>) -> usize {
    attributes.iter().map(|(n, v)| n.len() + v.len()).sum()
}

impl Model {
    pub(super) fn new(root: Identity) -> Self {
        let node = Node {
            mode: 0o040_755,
            uid: 0,
            gid: 0,
            links: 2,
            mtime_ns: 1,
            atime_ns: 1,
            body: Body::Directory(BTreeMap::new()),
            stamp: None,
            born_ns: 1,
            attributes: BTreeMap::new(),
            flags: InodeFlags::default(),
        };
        let mut model = Self {
            nodes: BTreeMap::from([(root, node)]),
            root,
            held: BTreeSet::new(),
            now_ns: 1000,
            generations: BTreeMap::new(),
            budget: None,
            steps: 0,
            refused: None,
            refused_flags: 0,
        };
        // Where the sentinel lives: it was made when the protection began.
        let own = Identity {
            ino: 3,
            generation: 1,
        };
        model.insert(own, Kind::Directory, 0o040_700);
        model.entries_mut(root).insert(OWN_DIRECTORY.into(), own);
        model
    }

    /// A fresh identity; numbers are reused at once, as file systems do.
    pub(super) fn allocate(&mut self) -> Identity {
        let used: BTreeSet<u64> = self.nodes.keys().map(|identity| identity.ino).collect();
        let ino = (10..).find(|ino| !used.contains(ino)).unwrap_or(10);
        let generation = self.generations.get(&ino).map_or(100, |last| last + 1);
        Identity { ino, generation }
    }

    pub(super) fn entries(&self, directory: Identity) -> BTreeMap<Vec<u8>, Identity> {
        match self.nodes.get(&directory).map(|node| &node.body) {
            Some(Body::Directory(entries)) => entries.clone(),
            _ => BTreeMap::new(),
        }
    }

    pub(super) fn entries_mut(&mut self, directory: Identity) -> &mut BTreeMap<Vec<u8>, Identity> {
        let now_ns = self.now_ns;
        let node = self
            .nodes
            .get_mut(&directory)
            .expect("a directory that exists");
        node.mtime_ns = now_ns;
        match &mut node.body {
            Body::Directory(entries) => entries,
            _ => panic!("{directory} is no directory"),
        }
    }

    pub(super) fn insert(&mut self, identity: Identity, kind: Kind<'_>, mode: u32) {
        let body = match kind {
            Kind::File => Body::File(Vec::new()),
            Kind::Directory => Body::Directory(BTreeMap::new()),
            Kind::Symlink(target) => Body::Symlink(target.to_vec()),
            Kind::Special { rdev, .. } => Body::Special(rdev),
        };
        let node = Node {
            mode,
            uid: 0,
            gid: 0,
            links: 1,
            mtime_ns: self.now_ns,
            atime_ns: self.now_ns,
            body,
            stamp: None,
            born_ns: self.now_ns,
            attributes: BTreeMap::new(),
            flags: InodeFlags::default(),
        };
        self.nodes.insert(identity, node);
        self.generations.insert(identity.ino, identity.generation);
    }

    /// Takes a link away; the inode goes with the last one unless it is held.
    pub(super) fn drop_link(&mut self, identity: Identity) {
        let held = self.held.contains(&identity);
        if let Some(node) = self.nodes.get_mut(&identity) {
            node.links = if node.is_directory() {
                0
            } else {
                node.links - 1
            };
            if node.links == 0 && !held {
                self.nodes.remove(&identity);
            }
        }
    }

    pub(super) fn write_bytes(&mut self, identity: Identity, at: usize, bytes: &[u8]) {
        let now_ns = self.now_ns;
        if let Some(Node {
            body: Body::File(data),
            mtime_ns,
            ..
        }) = self.nodes.get_mut(&identity)
        {
            if data.len() < at + bytes.len() {
                data.resize(at + bytes.len(), 0);
            }
            data[at..at + bytes.len()].copy_from_slice(bytes);
            *mtime_ns = now_ns;
        }
    }

    /// Zeros over a range; as far as the file goes, unless it `grows`.
    pub(super) fn zero_bytes(&mut self, inode: Identity, at: usize, len: usize, grows: bool) {
        let now_ns = self.now_ns;
        if let Some(Node {
            body: Body::File(data),
            mtime_ns,
            ..
        }) = self.nodes.get_mut(&inode)
        {
            if grows && data.len() < at + len {
                data.resize(at + len, 0);
            }
            let end = data.len().min(at + len);
            if at < end {
                data[at..end].fill(0);
            }
            *mtime_ns = now_ns;
        }
    }

    pub(super) fn file_bytes(&self, inode: Identity) -> Vec<u8> {
        match self.nodes.get(&inode).map(|node| &node.body) {
            Some(Body::File(bytes)) => bytes.clone(),
            _ => Vec::new(),
        }
    }

    pub(super) fn resize(&mut self, identity: Identity, size: usize) {
        let now_ns = self.now_ns;
        if let Some(Node {
            body: Body::File(data),
            mtime_ns,
            ..
        }) = self.nodes.get_mut(&identity)
        {
            data.resize(size, 0);
            *mtime_ns = now_ns;
        }
    }

    /// Whether this is the directory at the root that no operation of the tests touches.
    pub(super) fn is_own(&self, inode: Identity) -> bool {
        self.entries(self.root).get(OWN_DIRECTORY.as_bytes()) == Some(&inode)
    }

    /// Every inode that a path leads to.
    pub(super) fn reachable(&self) -> BTreeSet<Identity> {
        let mut seen = BTreeSet::from([self.root]);
        let mut open = vec![self.root];
        while let Some(directory) = open.pop() {
            for child in self.entries(directory).into_values() {
                if seen.insert(child) {
                    open.push(child);
                }
            }
        }
        seen
    }

    pub(super) fn contains_directory(&self, ancestor: Identity, below: Identity) -> bool {
        ancestor == below
            || self
                .entries(ancestor)
                .into_values()
                .any(|c| self.nodes[&c].is_directory() && self.contains_directory(c, below))
    }

    fn spend(&mut self) -> Step<()> {
        self.now_ns += 1;
        self.steps += 1;
        match &mut self.budget {
            Some((0, code)) => Err(error("interrupted", *code)),
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn free(&self, directory: Identity, name: &[u8]) -> Step<()> {
        match self.nodes.get(&directory).map(|node| &node.body) {
            Some(Body::Directory(entries)) if entries.contains_key(name) => {
                Err(error("name taken", libc::EEXIST))
            }
            Some(Body::Directory(_)) => Ok(()),
            _ => Err(error("no such directory", libc::ESTALE)),
        }
    }

    fn known(&self, inode: Identity) -> Step<&Node> {
        self.nodes
            .get(&inode)
            .ok_or_else(|| error(&format!("inode {inode}"), libc::ESTALE))
    }

    /// As the kernel: an inode with a lock takes no bytes and attributes, gives up no name and gets none.
    fn unlocked(&self, inode: Identity) -> Step<()> {
        match self.known(inode)?.flags.locks() {
            0 => Ok(()),
            _ => Err(error("locked", libc::EPERM)),
        }
    }

    /// An append-only directory gets new names.
    fn takes_names(&self, directory: Identity) -> Step<()> {
        if self.is_immutable(directory) {
            return Err(error("immutable", libc::EPERM));
        }
        Ok(())
    }

    fn known_mut(&mut self, inode: Identity) -> Step<&mut Node> {
        self.nodes
            .get_mut(&inode)
            .ok_or_else(|| error(&format!("inode {inode}"), libc::ESTALE))
    }
}

impl Volume for Model {
    fn root(&mut self) -> Step<Identity> {
        Ok(self.root)
    }

    fn stat(&mut self, inode: Identity) -> Step<Option<Stat>> {
        Ok(self
            .nodes
            .get(&inode)
            .filter(|node| node.links > 0)
            .map(|node| Stat {
                mode: node.mode,
                links: node.links,
                uid: node.uid,
                gid: node.gid,
                size: node.size(),
                mtime_ns: node.mtime_ns,
                born_ns: Some(node.born_ns),
                is_locked: node.flags.locks() != 0,
            }))
    }

    fn lookup(&mut self, directory: Identity, name: &[u8]) -> Step<Option<Identity>> {
        match &self.known(directory)?.body {
            Body::Directory(entries) => Ok(entries.get(name).copied()),
            _ => Err(error("lookup", libc::ENOTDIR)),
        }
    }

    fn list(&mut self, directory: Identity) -> Step<Vec<Vec<u8>>> {
        self.known(directory)?;
        Ok(self.entries(directory).into_keys().collect())
    }

    fn place_of(&mut self, directory: Identity) -> Step<(Identity, Vec<u8>)> {
        for parent in self.nodes.keys().copied().collect::<Vec<_>>() {
            for (name, child) in self.entries(parent) {
                if child == directory {
                    return Ok((parent, name));
                }
            }
        }
        Err(error("place", libc::ENOENT))
    }

    fn stamp(&mut self, inode: Identity) -> Step<Option<Stamp>> {
        Ok(self.known(inode)?.stamp)
    }

    fn create(&mut self, directory: Identity, name: &[u8], kind: Kind<'_>) -> Step<Identity> {
        self.free(directory, name)?;
        self.takes_names(directory)?;
        self.spend()?;
        let identity = self.allocate();
        let format = match kind {
            Kind::File => 0o100_000,
            Kind::Directory => 0o040_000,
            Kind::Symlink(_) => 0o120_000,
            Kind::Special { format, .. } => format,
        };
        let permissions = if matches!(kind, Kind::Symlink(_)) {
            0o777
        } else {
            0o600
        };
        self.insert(identity, kind, format | permissions);
        self.entries_mut(directory).insert(name.to_vec(), identity);
        Ok(identity)
    }

    fn pass_on_project(&mut self, _: Identity, _: Option<Identity>) -> Step<()> {
        Ok(())
    }

    fn set_stamp(&mut self, inode: Identity, stamp: Option<Stamp>) -> Step<()> {
        self.unlocked(inode)?;
        self.spend()?;
        self.known_mut(inode)?.stamp = stamp;
        Ok(())
    }

    fn link(&mut self, inode: Identity, directory: Identity, name: &[u8]) -> Step<()> {
        self.free(directory, name)?;
        let node = self.known(inode)?;
        if node.is_directory() || node.links == 0 {
            return Err(error("link", libc::EPERM));
        }
        self.unlocked(inode)?;
        self.takes_names(directory)?;
        self.spend()?;
        self.known_mut(inode)?.links += 1;
        self.entries_mut(directory).insert(name.to_vec(), inode);
        Ok(())
    }

    fn rename(&mut self, from: (Identity, &[u8]), to: (Identity, &[u8])) -> Step<()> {
        self.free(to.0, to.1)?;
        let child = self
            .lookup(from.0, from.1)?
            .ok_or_else(|| error("rename", libc::ENOENT))?;
        if self.known(child)?.is_directory() && self.contains_directory(child, to.0) {
            return Err(error("rename into itself", libc::EINVAL));
        }
        self.unlocked(from.0)?;
        self.unlocked(child)?;
        self.takes_names(to.0)?;
        self.spend()?;
        self.entries_mut(from.0).remove(from.1);
        self.entries_mut(to.0).insert(to.1.to_vec(), child);
        Ok(())
    }

    fn unlink(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        let child = self
            .lookup(directory, name)?
            .ok_or_else(|| error("unlink", libc::ENOENT))?;
        if self.known(child)?.is_directory() {
            return Err(error("unlink", libc::EISDIR));
        }
        self.unlocked(directory)?;
        self.unlocked(child)?;
        self.spend()?;
        self.entries_mut(directory).remove(name);
        self.drop_link(child);
        Ok(())
    }

    fn remove_directory(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        let child = self
            .lookup(directory, name)?
            .ok_or_else(|| error("rmdir", libc::ENOENT))?;
        match &self.known(child)?.body {
            Body::Directory(entries) if entries.is_empty() => {}
            Body::Directory(_) => return Err(error("rmdir", libc::ENOTEMPTY)),
            _ => return Err(error("rmdir", libc::ENOTDIR)),
        }
        self.unlocked(directory)?;
        self.unlocked(child)?;
        self.spend()?;
        self.entries_mut(directory).remove(name);
        self.drop_link(child);
        Ok(())
    }

    fn write(&mut self, inode: Identity, offset: u64, bytes: &[u8]) -> Step<()> {
        self.unlocked(inode)?;
        self.spend()?;
        self.write_bytes(inode, offset as usize, bytes);
        self.lose_capability(inode);
        Ok(())
    }

    fn zero(&mut self, inode: Identity, start: u64, end: u64) -> Step<()> {
        if end > self.known(inode)?.size() || start >= end {
            return Err(error("zero beyond the size", libc::EINVAL));
        }
        self.unlocked(inode)?;
        self.spend()?;
        self.zero_bytes(inode, start as usize, (end - start) as usize, false);
        self.lose_capability(inode);
        Ok(())
    }

    fn set_size(&mut self, inode: Identity, size: u64) -> Step<()> {
        self.unlocked(inode)?;
        self.spend()?;
        self.resize(inode, size as usize);
        self.lose_capability(inode);
        Ok(())
    }

    fn set_owner(&mut self, inode: Identity, uid: u32, gid: u32) -> Step<()> {
        self.unlocked(inode)?;
        self.spend()?;
        let node = self.known_mut(inode)?;
        (node.uid, node.gid) = (uid, gid);
        if !node.is_directory() {
            node.mode &= !0o6000;
        }
        node.lose_capability();
        Ok(())
    }

    fn set_permissions(&mut self, inode: Identity, mode: u32) -> Step<()> {
        self.unlocked(inode)?;
        self.spend()?;
        self.known_mut(inode)?.set_mode(mode);
        Ok(())
    }

    fn set_times(
        &mut self,
        inode: Identity,
        atime_ns: Option<i64>,
        mtime_ns: Option<i64>,
    ) -> Step<()> {
        self.unlocked(inode)?;
        self.spend()?;
        let node = self.known_mut(inode)?;
        node.atime_ns = atime_ns.unwrap_or(node.atime_ns);
        node.mtime_ns = mtime_ns.unwrap_or(node.mtime_ns);
        Ok(())
    }

    fn attributes(&mut self, inode: Identity) -> Step<BTreeMap<Vec<u8>, Vec<u8>>> {
        Ok(self.known(inode)?.attributes.clone())
    }

    fn set_attribute(&mut self, inode: Identity, name: &[u8], value: Option<&[u8]>) -> Step<()> {
        self.unlocked(inode)?;
        if let Some((refused, code)) = &self.refused
            && refused == name
        {
            return Err(error("refused", *code));
        }
        self.spend()?;
        let node = self.known_mut(inode)?;
        let mut then = node.attributes.clone();
        then.insert(name.to_vec(), value.unwrap_or_default().to_vec());
        if value.is_some() && attribute_bytes(&then) > ATTRIBUTE_BYTES_MAX {
            return Err(error("no room for attributes", libc::ENOSPC));
        }
        node.put_attribute(name, value);
        Ok(())
    }

    fn flags(&mut self, inode: Identity) -> Step<Option<InodeFlags>> {
        let node = self.nodes.get(&inode);
        let has_flags = |node: &&Node| matches!(node.body, Body::File(_) | Body::Directory(_));
        Ok(node.filter(has_flags).map(|node| node.flags))
    }

    fn set_flags(&mut self, inode: Identity, flags: InodeFlags) -> Step<()> {
        let now = self.known(inode)?.flags;
        let only_locks = InodeFlags {
            flags: now.flags & !InodeFlags::LOCKS | flags.flags & InodeFlags::LOCKS,
            ..now
        };
        if self.is_immutable(inode) && flags.flags & IMMUTABLE != 0 && flags != only_locks {
            return Err(error("immutable", libc::EPERM));
        }
        if flags.flags & self.refused_flags != 0 {
            return Err(error("flags", libc::EOPNOTSUPP));
        }
        self.spend()?;
        self.known_mut(inode)?.flags = flags;
        Ok(())
    }

    fn sync(&mut self) -> Step<()> {
        self.spend()
    }
}
