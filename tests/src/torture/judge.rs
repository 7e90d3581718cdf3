//! Whether what a survivor shows of a thread's directory can be what the thread was told.
//!
//! The thread's operations follow from its seed, which of them succeeded from its log, and so does the
//! tree after each of them. The *floor* is the last operation that is known to be mirrored, or that a
//! confirmation of everything covers. Best is a tree that is exactly that after one operation at or
//! behind the floor. Otherwise, because a disk may be ahead of the mirror, each name, attribute and byte must be as it was
//! at the floor or after a later operation, and files changed after it may have holes: unconfirmed
//! operations after the cut may be there in part. What an fsync confirmed of one inode has a floor of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::act::DEVICE;
use super::action::{Acl, Action, Kind, Special};
use super::model::{Body, Confirms, Model, Node, NodeId, TOP, joined};
use super::{Case, log, thread};
use crate::error::{Error, Told as _};
use crate::escape::PathBytes;
use crate::manifest::{self, Entry};
use crate::walk::walk;

/// What a survivor shows of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Operations whose return was noted.
    pub acknowledged: u64,
    /// All up to this one must be there.
    pub floor: u64,
    /// The tree is exactly that after this operation; none: a disk was ahead.
    pub exact: Option<u64>,
    /// What no operation explains, in words.
    pub differences: Vec<String>,
}

/// The trees of a thread.
struct History {
    /// Each inode after the operations that changed it.
    versions: BTreeMap<NodeId, Vec<(u64, Node)>>,
    acknowledged: u64,
    /// Operations that may have happened.
    possible: u64,
    /// Of everything.
    floor: u64,
    bytes_floors: BTreeMap<NodeId, u64>,
    attribute_floors: BTreeMap<NodeId, u64>,
    range_floors: BTreeMap<NodeId, Vec<(u64, usize, usize)>>,
}

/// What is there.
struct Seen {
    entries: BTreeMap<PathBytes, Entry>,
    contents: BTreeMap<PathBytes, Vec<u8>>,
    unreadable: Vec<String>,
}

/// Judges one thread. Its log lies in `logs`; a copy of it from a moment at which all in it
/// was known to be mirrored in `mirrored`.
///
/// # Errors
/// If the log cannot be read, or is not that of the case.
pub fn judge(
    root: &Path,
    case: &Case,
    thread: u64,
    kinds: &[Kind],
    logs: &Path,
    mirrored: Option<&Path>,
) -> Result<Verdict, Error> {
    let path = log::path(logs, case, thread);
    let noted = log::load(&path)?;
    let mirrored = match mirrored {
        Some(directory) => {
            let path = log::path(directory, case, thread);
            // A thread that had not begun by then has none.
            if path.exists() {
                log::load(&path)?.len() as u64
            } else {
                0
            }
        }
        None => 0,
    };
    let history = History::replay(case, thread, kinds, &noted);
    let mut history = history
        .map_err(std::io::Error::other)
        .told("follow", &path)?;
    history.floor = history.floor.max(mirrored);
    let seen = observe(&root.join(case.directory()), &Case::thread(thread))?;
    let exact = (history.floor..=history.possible)
        .rev()
        .find(|at| history.first_difference(&seen, *at).is_none());
    let mut differences = seen.unreadable.clone();
    if exact.is_none() {
        let top = PathBytes::default();
        if let Err(words) = history.explain(&seen, &top, TOP) {
            differences.push(words);
            let difference = history.first_difference(&seen, history.floor);
            differences.extend(difference.map(|words| format!("at the floor: {words}")));
        }
    }
    Ok(Verdict {
        acknowledged: history.acknowledged,
        floor: history.floor,
        exact,
        differences,
    })
}

/// What a directory of a case shows.
fn observe(top: &Path, name: &str) -> Result<Seen, Error> {
    let tree = walk(&top.join(name), "".as_ref());
    let mut contents = BTreeMap::new();
    for (path, entry) in &tree.entries {
        if entry.kind == manifest::Kind::File {
            let full = top.join(name).join(path.as_path());
            contents.insert(path.clone(), fs::read(&full).told("read", &full)?);
        }
    }
    let unreadable = tree.unreadable.into_iter();
    Ok(Seen {
        entries: tree.entries,
        contents,
        unreadable: unreadable
            .map(|(path, error)| format!("{path}: cannot be read: {error}"))
            .collect(),
    })
}

impl Seen {
    fn children(&self, directory: &PathBytes) -> BTreeSet<Vec<u8>> {
        let prefix = joined(&directory.0, b"");
        let names = self.entries.keys().filter_map(|path| {
            let name = path.0.strip_prefix(prefix.as_slice())?;
            (!name.contains(&b'/')).then(|| name.to_vec())
        });
        names.collect()
    }
}

impl History {
    fn replay(case: &Case, thread: u64, kinds: &[Kind], noted: &[bool]) -> Result<Self, String> {
        let mut generator = thread::generator(case, thread, kinds, false);
        let mut model = Model::new();
        let acknowledged = noted.len() as u64;
        let mut history = Self {
            versions: BTreeMap::new(),
            acknowledged,
            possible: case.length.min(acknowledged + 1),
            floor: 0,
            bytes_floors: BTreeMap::new(),
            attribute_floors: BTreeMap::new(),
            range_floors: BTreeMap::new(),
        };
        history.note(&model, 0);
        for number in 1..=history.possible {
            let (_, action) = generator.next(&model);
            let noted = usize::try_from(number - 1)
                .ok()
                .and_then(|at| noted.get(at));
            if noted == Some(&false) {
                continue;
            }
            let applied = model.apply(&action);
            applied.map_err(|_| format!("operation {number} is impossible: {action:?}"))?;
            history.note(&model, number);
            if noted.is_some() {
                history.confirm(&model, &action, number);
            }
        }
        Ok(history)
    }

    fn note(&mut self, model: &Model, number: u64) {
        for id in model.changed() {
            if let Some(node) = model.node(*id) {
                let versions = self.versions.entry(*id).or_default();
                versions.push((number, node.clone()));
            }
        }
    }

    fn confirm(&mut self, model: &Model, action: &Action, number: u64) {
        match model.confirmed_by(action) {
            Some(Confirms::Everything) => self.floor = number,
            Some(Confirms::Inode { id, attributes }) => {
                self.bytes_floors.insert(id, number);
                if attributes {
                    self.attribute_floors.insert(id, number);
                }
            }
            Some(Confirms::Range { id, at, bytes }) => {
                let floors = self.range_floors.entry(id).or_default();
                floors.push((number, at, at + bytes));
            }
            None => {}
        }
    }

    /// An inode as it was after an operation.
    fn node_at(&self, id: NodeId, at: u64) -> Option<&Node> {
        let versions = self.versions.get(&id)?;
        let version = versions.iter().rfind(|(number, _)| *number <= at)?;
        Some(&version.1)
    }

    /// An inode as it was then and after each later operation.
    fn nodes_from(&self, id: NodeId, at: u64) -> Vec<&Node> {
        let versions = self.versions.get(&id).map_or(&[][..], Vec::as_slice);
        let begin = versions.iter().rposition(|(number, _)| *number <= at);
        let versions = versions.get(begin.unwrap_or(0)..).unwrap_or_default();
        versions.iter().map(|(_, node)| node).collect()
    }

    fn paths_at(&self, at: u64) -> BTreeMap<PathBytes, NodeId> {
        let mut found = BTreeMap::new();
        let mut pending = vec![(Vec::new(), TOP)];
        while let Some((path, id)) = pending.pop() {
            let children = self.node_at(id, at).and_then(Node::children);
            for (name, child) in children.into_iter().flatten() {
                let path = joined(&path, name);
                pending.push((path.clone(), *child));
                found.insert(PathBytes(path), *child);
            }
        }
        found
    }

    /// What keeps the tree from being exactly that after an operation.
    fn first_difference(&self, seen: &Seen, at: u64) -> Option<String> {
        let paths = self.paths_at(at);
        if let Some(missing) = paths.keys().find(|path| !seen.entries.contains_key(path)) {
            return Some(format!("{missing}: missing"));
        }
        let mut groups: BTreeMap<NodeId, Vec<&PathBytes>> = BTreeMap::new();
        for (path, id) in &paths {
            groups.entry(*id).or_default().push(path);
        }
        seen.entries.iter().find_map(|(path, entry)| {
            let Some(id) = paths.get(path) else {
                return Some(format!("{path}: nobody made it"));
            };
            let node = self.node_at(*id, at)?;
            let names = groups.get(id).map_or(&[][..], Vec::as_slice);
            let first = names.first().filter(|_| names.len() > 1).copied();
            if !node.is_directory() && entry.links != names.len() as u64
                || entry.link_group.as_ref() != first
            {
                let links = entry.links;
                return Some(format!("{path}: {links} links instead of {}", names.len()));
            }
            let words = is_as(&[node], entry);
            let content = seen.contents.get(path).map(Vec::as_slice);
            if words.is_none() && content != node.content() {
                return Some(format!("{path}: other bytes"));
            }
            words.map(|words| format!("{path}: {words}"))
        })
    }

    /// Whether what is seen at a path can be this inode at the floor or later, in part.
    fn explain(&self, seen: &Seen, path: &PathBytes, id: NodeId) -> Result<(), String> {
        let nodes = self.nodes_from(id, self.floor);
        if nodes.first().is_some_and(|node| node.is_directory()) {
            self.explain_names(seen, path, id)?;
        }
        let Some(entry) = seen.entries.get(path) else {
            // The thread's top, which nothing but names changes.
            return Ok(());
        };
        let floor = self
            .floor
            .max(self.attribute_floors.get(&id).copied().unwrap_or(0));
        if let Some(words) = is_as(&self.nodes_from(id, floor), entry) {
            return Err(format!("{path}: {words}"));
        }
        match seen.contents.get(path) {
            Some(content) => self
                .explain_bytes(id, content)
                .map_err(|words| format!("{path}: {words}")),
            None => Ok(()),
        }
    }

    fn explain_names(&self, seen: &Seen, path: &PathBytes, id: NodeId) -> Result<(), String> {
        let directories = self.nodes_from(id, self.floor);
        let children = || directories.iter().filter_map(|node| node.children());
        let known = children().flat_map(|all| all.keys().cloned());
        let names: BTreeSet<Vec<u8>> = known.chain(seen.children(path)).collect();
        for name in names {
            let child = PathBytes(joined(&path.0, &name));
            let bound: BTreeSet<Option<NodeId>> =
                children().map(|all| all.get(&name).copied()).collect();
            if !seen.entries.contains_key(&child) {
                if bound.contains(&None) {
                    continue;
                }
                return Err(format!("{child}: missing"));
            }
            let mut last = format!("{child}: nobody made it");
            let is_explained = bound.into_iter().flatten().any(|id| {
                let explained = self.explain(seen, &child, id);
                explained.map_err(|words| last = words).is_ok()
            });
            if !is_explained {
                return Err(last);
            }
        }
        Ok(())
    }

    /// Each byte must be one that was there at its floor or later; also a hole, in what was changed since.
    fn explain_bytes(&self, id: NodeId, content: &[u8]) -> Result<(), String> {
        let floor = self
            .floor
            .max(self.bytes_floors.get(&id).copied().unwrap_or(0));
        let nodes = self.nodes_from(id, floor);
        let versions: Vec<&[u8]> = nodes.iter().filter_map(|node| node.content()).collect();
        let sizes = || versions.iter().map(|version| version.len());
        let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
        if !(least..=most).contains(&content.len()) {
            let size = content.len();
            return Err(format!("{size} bytes instead of {least} to {most}"));
        }
        is_one_of(&versions, content, 0, content.len())?;
        for (number, at, end) in self.range_floors.get(&id).into_iter().flatten() {
            let nodes = self.nodes_from(id, floor.max(*number));
            let versions: Vec<&[u8]> = nodes.iter().filter_map(|node| node.content()).collect();
            is_one_of(&versions, content, *at, (*end).min(content.len()))
                .map_err(|words| format!("{words}, confirmed by operation {number}"))?;
        }
        Ok(())
    }
}

fn is_one_of(versions: &[&[u8]], content: &[u8], at: usize, end: usize) -> Result<(), String> {
    for index in at..end {
        let byte = content.get(index).copied().unwrap_or_default();
        let is_it = |version: &&[u8]| version.get(index).copied().unwrap_or_default() == byte;
        let is_hole = byte == 0 && versions.len() > 1;
        if !is_hole && !versions.iter().any(is_it) {
            return Err(format!("a byte at {index} that was never there since"));
        }
    }
    Ok(())
}

/// XFS lists how it keeps an ACL beside the ACL itself.
const XFS_ACL: &[u8] = b"trusted.SGI_ACL_";

/// What keeps an entry's type and attributes from being those of one of an inode's versions, each for itself.
fn is_as(versions: &[&Node], entry: &Entry) -> Option<String> {
    let any = |is_it: &dyn Fn(&Node) -> bool| versions.iter().any(|node| is_it(node));
    let wrong = |what: &str, shown: String| Some(format!("{what} {shown}, never since"));
    if !any(&|node| is_type(node, entry)) {
        return wrong("type", format!("{:?} {:?}", entry.kind, entry.target));
    }
    if !any(&|node| node.mode == entry.mode) {
        return wrong("mode", format!("{:o}", entry.mode));
    }
    if !any(&|node| node.uid == entry.uid) || !any(&|node| node.gid == entry.gid) {
        return wrong("owner", format!("{}:{}", entry.uid, entry.gid));
    }
    if !any(&|node| node.mtime_ns.is_none_or(|time| time == entry.mtime_ns)) {
        return wrong("mtime_ns", entry.mtime_ns.to_string());
    }
    if !any(&|node| node.flags == entry.inode_flags) {
        return wrong("inode flags", format!("{:x}", entry.inode_flags));
    }
    let acl_name = PathBytes(Acl::ACCESS.as_bytes().to_vec());
    let names = versions.iter().flat_map(|node| node.xattrs.keys());
    let known: BTreeSet<PathBytes> = names
        .map(|name| PathBytes(name.as_bytes().to_vec()))
        .chain(entry.xattrs.keys().cloned())
        .filter(|name| *name != acl_name && !name.0.starts_with(XFS_ACL))
        .collect();
    for name in known {
        let shown = entry.xattrs.get(&name).copied();
        let value = |node: &Node| {
            let all = node.xattrs.iter();
            let mut found = all.filter(|(each, _)| each.as_bytes() == name.0);
            found.next().map(|(_, value)| crc32c::crc32c(value))
        };
        if !any(&|node| value(node) == shown) {
            return wrong("extended attribute", name.to_string());
        }
    }
    let shown = entry.xattrs.get(&acl_name).copied();
    // A mode and an ACL of different ages make another ACL.
    let is_acl = |node: &Node| match node.acl {
        Some(acl) => {
            let value = |other: &&Node| Some(crc32c::crc32c(&acl.value(other.mode))) == shown;
            versions.iter().any(value)
        }
        None => shown.is_none(),
    };
    if !any(&is_acl) {
        return wrong("ACL", format!("{shown:x?}"));
    }
    None
}

fn is_type(node: &Node, entry: &Entry) -> bool {
    use manifest::Kind as Found;
    match &node.body {
        Body::File(_) => entry.kind == Found::File,
        Body::Directory(_) => entry.kind == Found::Directory,
        Body::Symlink(target) => {
            entry.kind == Found::Symlink && entry.target.as_ref() == Some(target)
        }
        Body::Special(Special::Fifo) => entry.kind == Found::Fifo,
        Body::Special(Special::Socket) => entry.kind == Found::Socket,
        Body::Special(Special::Device) => {
            entry.kind == Found::CharacterDevice && entry.rdev == DEVICE
        }
    }
}
