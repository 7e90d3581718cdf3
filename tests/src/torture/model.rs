//! What an application was told: a tree in memory that every operation that returned has changed.

use std::collections::BTreeMap;

use super::action::{
    Acl, Action, AllocateWay, RenameWay, ResizeWay, Special, SyncWay, Target, WriteWay,
};
use crate::escape::PathBytes;

/// Descriptors that a thread keeps on its own files.
pub(super) const OWN_SLOTS: usize = 4;

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) body: Body,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Where an operation set it; everything else sets the time of day.
    pub(super) mtime_ns: Option<i64>,
    pub(super) xattrs: BTreeMap<&'static str, Vec<u8>>,
    pub(super) acl: Option<Acl>,
    pub(super) flags: u32,
}

/// What an inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    File(Vec<u8>),
    Directory(Children),
    Symlink(PathBytes),
    Special(Special),
}

/// A directory's names.
pub(super) type Children = BTreeMap<Vec<u8>, NodeId>;

/// An inode's number in the model; never used twice.
pub(super) type NodeId = usize;

/// The operation cannot have succeeded on the tree that the model holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Impossible;

/// The tree, and the descriptors.
#[derive(Clone, Debug)]
pub(super) struct Model {
    nodes: Vec<Node>,
    open: [Option<NodeId>; OWN_SLOTS],
    /// Behind these descriptors are inodes that were made without a name, and have none yet.
    linkable: [bool; OWN_SLOTS],
    /// Inodes that the last operation changed.
    changed: Vec<NodeId>,
}

/// The top directory.
pub(super) const TOP: NodeId = 0;

impl Node {
    fn new(body: Body, mode: u32) -> Self {
        Self {
            body,
            mode,
            uid: 0,
            gid: 0,
            mtime_ns: None,
            xattrs: BTreeMap::new(),
            acl: None,
            flags: 0,
        }
    }

    pub(super) fn directory(mode: u32) -> Self {
        Self::new(Body::Directory(BTreeMap::new()), mode)
    }

    pub(super) const fn is_file(&self) -> bool {
        matches!(self.body, Body::File(_))
    }

    pub(super) const fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }

    pub(super) fn children(&self) -> Option<&Children> {
        match &self.body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    pub(super) fn content(&self) -> Option<&[u8]> {
        match &self.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }
}

impl Model {
    /// The directory `top`, and nothing in it.
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![Node::directory(0o755)],
            open: [None; OWN_SLOTS],
            linkable: [false; OWN_SLOTS],
            changed: vec![TOP],
        }
    }

    pub(super) fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id)
    }

    pub(super) fn changed(&self) -> &[NodeId] {
        &self.changed
    }

    /// The inode behind a descriptor.
    pub(super) fn opened(&self, slot: usize) -> Option<NodeId> {
        self.open.get(slot).copied().flatten()
    }

    /// Whether the inode behind a descriptor was made without a name and has none yet.
    pub(super) fn is_linkable(&self, slot: usize) -> bool {
        self.linkable
            .get(slot)
            .is_some_and(|is_linkable| *is_linkable)
    }

    /// All paths below the top with their inodes, sorted.
    pub(super) fn paths(&self) -> Vec<(PathBytes, NodeId)> {
        let mut found = Vec::new();
        let mut pending = vec![(Vec::new(), TOP)];
        while let Some((path, id)) = pending.pop() {
            let children = self.node(id).and_then(Node::children);
            for (name, child) in children.into_iter().flatten() {
                let path = joined(&path, name);
                pending.push((path.clone(), *child));
                found.push((PathBytes(path), *child));
            }
        }
        found.sort();
        found
    }

    pub(super) fn find(&self, path: &PathBytes) -> Option<NodeId> {
        path.0
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
            .try_fold(TOP, |id, name| {
                self.node(id)?.children()?.get(name).copied()
            })
    }

    fn target(&self, target: &Target) -> Result<NodeId, Impossible> {
        match target {
            Target::Path(path) => self.find(path),
            Target::Open(slot) => self.opened(*slot),
        }
        .ok_or(Impossible)
    }

    /// What the operation does.
    pub(super) fn apply(&mut self, action: &Action) -> Result<(), Impossible> {
        self.changed.clear();
        match action {
            Action::Create { .. }
            | Action::MakeDirectory { .. }
            | Action::MakeSpecial { .. }
            | Action::MakeSymlink { .. } => self.make(action),
            Action::Link { from, to } => {
                let id = self.find(from).ok_or(Impossible)?;
                self.bind(to, id)
            }
            Action::Unlink { path } | Action::RemoveDirectory { path } => {
                self.unbind(path).map(drop)
            }
            Action::Rename { from, to, way } => self.rename(from, to, *way),
            Action::Open { .. }
            | Action::OpenUnnamed { .. }
            | Action::LinkOpen { .. }
            | Action::Close { .. } => self.descriptor(action),
            Action::Write { .. }
            | Action::Copy { .. }
            | Action::Reflink { .. }
            | Action::Store { .. }
            | Action::Resize { .. }
            | Action::Allocate { .. } => self.data(action),
            Action::ChangeMode { path, .. }
            | Action::ChangeOwner { path, .. }
            | Action::SetTimes { path, .. }
            | Action::SetXattr { path, .. }
            | Action::RemoveXattr { path, .. }
            | Action::SetAcl { path, .. }
            | Action::SetFlags { path, .. } => {
                let id = self.find(path).ok_or(Impossible)?;
                attribute(self.change(id)?, action);
                Ok(())
            }
            Action::Sync { .. } => Ok(()),
        }
    }

    fn change(&mut self, id: NodeId) -> Result<&mut Node, Impossible> {
        self.changed.push(id);
        self.nodes.get_mut(id).ok_or(Impossible)
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        self.changed.push(self.nodes.len() - 1);
        self.nodes.len() - 1
    }

    fn make(&mut self, action: &Action) -> Result<(), Impossible> {
        let (path, node) = match action {
            Action::Create { path, mode } => (path, Node::new(Body::File(Vec::new()), *mode)),
            Action::MakeDirectory { path, mode } => (path, Node::directory(*mode)),
            Action::MakeSpecial {
                path,
                special,
                mode,
            } => (path, Node::new(Body::Special(*special), *mode)),
            Action::MakeSymlink { path, target } => {
                (path, Node::new(Body::Symlink(target.clone()), 0o777))
            }
            _ => return Err(Impossible),
        };
        let id = self.add(node);
        self.bind(path, id)
    }

    /// The directory that holds a name, to change it.
    fn holder<'a>(&mut self, path: &'a PathBytes) -> Result<(&mut Children, &'a [u8]), Impossible> {
        let (parent, name) = split(path);
        let id = self.find(&parent).ok_or(Impossible)?;
        let node = self.change(id)?;
        node.mtime_ns = None;
        match &mut node.body {
            Body::Directory(children) => Ok((children, name)),
            _ => Err(Impossible),
        }
    }

    fn bind(&mut self, path: &PathBytes, id: NodeId) -> Result<(), Impossible> {
        let (children, name) = self.holder(path)?;
        match children.insert(name.to_vec(), id) {
            Some(_) => Err(Impossible),
            None => Ok(()),
        }
    }

    fn unbind(&mut self, path: &PathBytes) -> Result<NodeId, Impossible> {
        let (children, name) = self.holder(path)?;
        children.remove(name).ok_or(Impossible)
    }

    fn rename(
        &mut self,
        from: &PathBytes,
        to: &PathBytes,
        way: RenameWay,
    ) -> Result<(), Impossible> {
        let moved = self.find(from).ok_or(Impossible)?;
        let there = self.find(to);
        // Two names of one inode: POSIX says that nothing is done.
        if there == Some(moved) {
            return Ok(());
        }
        match (way, there) {
            (RenameWay::Exchange, Some(there)) => {
                self.unbind(from)?;
                self.unbind(to)?;
                self.bind(from, there)?;
                if split(from).0 != split(to).0 {
                    self.forget_times([moved, there])?;
                }
            }
            (RenameWay::Replace, Some(_)) => {
                self.unbind(to)?;
                self.unbind(from)?;
            }
            (RenameWay::Replace | RenameWay::NoReplace, None) => drop(self.unbind(from)?),
            _ => return Err(Impossible),
        }
        self.bind(to, moved)
    }

    /// XFS sets the times of directories that are exchanged for one of another directory; others do not.
    fn forget_times(&mut self, ids: [NodeId; 2]) -> Result<(), Impossible> {
        for id in ids {
            if self.node(id).is_some_and(Node::is_directory) {
                self.change(id)?.mtime_ns = None;
            }
        }
        Ok(())
    }

    fn descriptor(&mut self, action: &Action) -> Result<(), Impossible> {
        let (slot, held) = match action {
            Action::Open { path, slot } => (*slot, Some(self.find(path).ok_or(Impossible)?)),
            Action::OpenUnnamed { slot, mode, .. } => (
                *slot,
                Some(self.add(Node::new(Body::File(Vec::new()), *mode))),
            ),
            Action::Close { slot } => (*slot, None),
            Action::LinkOpen { slot, to } => {
                let id = self.opened(*slot).ok_or(Impossible)?;
                *self.linkable.get_mut(*slot).ok_or(Impossible)? = false;
                return self.bind(to, id);
            }
            _ => return Err(Impossible),
        };
        *self.open.get_mut(slot).ok_or(Impossible)? = held;
        let is_linkable = matches!(action, Action::OpenUnnamed { .. });
        *self.linkable.get_mut(slot).ok_or(Impossible)? = is_linkable;
        Ok(())
    }

    fn data(&mut self, action: &Action) -> Result<(), Impossible> {
        let (Action::Write { target, .. }
        | Action::Copy { target, .. }
        | Action::Reflink { target, .. }
        | Action::Store { target, .. }
        | Action::Resize { target, .. }
        | Action::Allocate { target, .. }) = action
        else {
            return Err(Impossible);
        };
        let id = self.target(target)?;
        let source = match action {
            Action::Copy { from, .. } | Action::Reflink { from, .. } => {
                let source = self.find(from).and_then(|id| self.node(id));
                let content = source.and_then(Node::content);
                content.ok_or(Impossible)?.to_vec()
            }
            _ => Vec::new(),
        };
        let node = self.change(id)?;
        node.mtime_ns = None;
        let Body::File(content) = &mut node.body else {
            return Err(Impossible);
        };
        match action {
            Action::Write { way, at, fill, .. } => {
                let at = if way.appends() {
                    content.len()
                } else {
                    index(*at)
                };
                put(content, at, &fill.content());
            }
            Action::Store { at, fill, .. } => put(content, index(*at), &fill.content()),
            Action::Copy {
                from_at, at, bytes, ..
            } => {
                let from = source.get(index(*from_at)..).unwrap_or_default();
                let bytes = from.get(..*bytes).unwrap_or(from);
                if !bytes.is_empty() {
                    put(content, index(*at), bytes);
                }
            }
            Action::Reflink { .. } => put(content, 0, &source),
            Action::Resize { bytes, way, .. } => {
                let bytes = if *way == ResizeWay::Open { 0 } else { *bytes };
                content.resize(index(bytes), 0);
            }
            Action::Allocate { at, bytes, way, .. } => {
                let (at, end) = (index(*at), index(at + bytes));
                if matches!(way, AllocateWay::Plain | AllocateWay::Zero) && end > content.len() {
                    content.resize(end, 0);
                }
                if matches!(way, AllocateWay::Punch | AllocateWay::Zero) {
                    let end = end.min(content.len());
                    content.get_mut(at..end).unwrap_or_default().fill(0);
                }
            }
            _ => return Err(Impossible),
        }
        Ok(())
    }
}

fn attribute(node: &mut Node, action: &Action) {
    match action {
        Action::ChangeMode { mode, .. } => node.mode = *mode,
        Action::ChangeOwner { uid, gid, .. } => {
            (node.uid, node.gid) = (*uid, *gid);
            if !node.is_directory() {
                node.mode &= !0o4000;
                if node.mode & 0o2010 == 0o2010 {
                    node.mode &= !0o2000;
                }
            }
        }
        Action::SetTimes { mtime_ns, .. } => node.mtime_ns = Some(*mtime_ns),
        Action::SetXattr { name, fill, .. } => drop(node.xattrs.insert(name, fill.content())),
        Action::RemoveXattr { name, .. } => drop(node.xattrs.remove(name)),
        Action::SetAcl { acl, .. } => {
            node.acl = Some(*acl);
            node.mode = Acl::mode(node.mode);
        }
        Action::SetFlags { flags, .. } => node.flags = *flags,
        _ => {}
    }
}

/// What an operation confirmed to be durable when it returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Confirms {
    /// All that was done before.
    Everything,
    /// One inode: its bytes, and also its attributes if so.
    Inode { id: NodeId, attributes: bool },
    /// Bytes of one inode.
    Range { id: NodeId, at: usize, bytes: usize },
}

impl Model {
    /// What this operation, which has just been applied, confirmed.
    pub(super) fn confirmed_by(&self, action: &Action) -> Option<Confirms> {
        match action {
            Action::Sync {
                way: SyncWay::Volume,
                ..
            } => Some(Confirms::Everything),
            Action::Sync { target, way } => {
                let id = self.target(target).ok()?;
                let attributes = *way == SyncWay::All;
                Some(Confirms::Inode { id, attributes })
            }
            Action::Write {
                target,
                way: WriteWay::Sync | WriteWay::DataSync,
                at,
                fill,
            } => {
                let (id, at) = (self.target(target).ok()?, index(*at));
                let bytes = fill.bytes;
                Some(Confirms::Range { id, at, bytes })
            }
            Action::Store {
                target,
                at,
                fill,
                sync: true,
            } => {
                let (id, at) = (self.target(target).ok()?, index(*at));
                let bytes = fill.bytes;
                Some(Confirms::Range { id, at, bytes })
            }
            _ => None,
        }
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}

fn put(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    if let Some(range) = content.get_mut(at..end) {
        range.copy_from_slice(bytes);
    }
}

pub(super) fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// The directory of a path, and the name in it.
pub(super) fn split(path: &PathBytes) -> (PathBytes, &[u8]) {
    match path.0.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (
            PathBytes(path.0.get(..at).unwrap_or_default().to_vec()),
            path.0.get(at + 1..).unwrap_or_default(),
        ),
        None => (PathBytes::default(), &path.0),
    }
}
