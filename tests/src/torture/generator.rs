//! What a thread does next. A seed decides it, together with the tree that the thread has made so far.
//!
//! On its own files a thread does only what must succeed. In the subtree that all share it draws names
//! from a small pool, so that threads meet: whether an operation succeeds there depends on the others.

mod values;

use std::collections::BTreeSet;

use rustix::fs::IFlags;

use super::action::{Action, CopyWay, Kind, RenameWay, Special, SyncWay, Target, WriteWay};
use super::model::{Body, Model, Node, NodeId, OWN_SLOTS, TOP, joined};
use crate::escape::PathBytes;
use crate::random::Random;

/// Descriptors that a thread keeps on shared files.
pub(super) const SHARED_SLOTS: usize = 2;
/// Directories that all threads share.
pub(super) const SHARED_DIRECTORIES: [&str; 4] = ["", "d0", "d1", "d0/d2"];
/// Names below one of them.
const SHARED_NAMES: u64 = 7;
/// With fewer names a thread makes one.
const NAMES_MIN: usize = 4;
/// A thread that has so many names rather removes one than to make another.
const NAMES_MAX: usize = 40;
const DEPTH_MAX: usize = 4;
/// No own file becomes longer than this and one write.
const REACH_BYTES: u64 = 128 * 1024;
const OWNERS: [u32; 6] = [0, 1_000, 1_234, 65_534, 70_000, 2_000_000_000];
const FILE_MODES: [u32; 8] = [0o600, 0o644, 0o640, 0o4755, 0o2755, 0o6711, 0o1666, 0o000];
const DIRECTORY_MODES: [u32; 5] = [0o755, 0o700, 0o1777, 0o711, 0o750];
const USER_XATTRS: [&str; 3] = [
    "user.one",
    "user.two",
    "user.a-rather-longer-name.of-an-attribute",
];
const TRUSTED_XATTRS: [&str; 4] = ["trusted.one", "trusted.two", "security.one", "security.two"];
/// Flags that keep nobody from working on.
const MILD_FLAGS: [IFlags; 4] = [
    IFlags::NODUMP,
    IFlags::NOATIME,
    IFlags::NODUMP.union(IFlags::NOATIME),
    IFlags::empty(),
];
/// Flags of shared files: operations on them may be refused until somebody takes them away.
const HARSH_FLAGS: [IFlags; 4] = [
    IFlags::IMMUTABLE,
    IFlags::APPEND,
    IFlags::empty(),
    IFlags::empty(),
];

/// Where an operation takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the thread's own directory.
    Own,
    /// In that of all.
    Shared,
}

/// A thread's operations, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Generator {
    random: Random,
    kinds: Vec<Kind>,
    /// So many operations of a hundred go to the shared subtree.
    shared_percent: u64,
}

impl Generator {
    pub(super) fn new(seed: u64, thread: u64, kinds: &[Kind], shared_percent: u64) -> Self {
        Self {
            random: Random::new(seed ^ thread.wrapping_add(1).wrapping_mul(0xD1B5_4A32_D192_ED03)),
            kinds: kinds.to_vec(),
            shared_percent,
        }
    }

    pub(super) fn next(&mut self, model: &Model) -> (Place, Action) {
        if self.random.below(100) < self.shared_percent {
            if !self.kinds.contains(&Kind::Names) && self.is_one_in(6) {
                let path = self.shared_path();
                return (Place::Shared, self.create(path));
            }
            let kind = self.kind();
            return (Place::Shared, self.shared(kind));
        }
        for _ in 0..20 {
            if model.paths().len() < NAMES_MIN {
                break;
            }
            let kind = self.kind();
            if let Some(action) = self.own(kind, model) {
                return (Place::Own, action);
            }
        }
        // There is nothing that these kinds could be tried on.
        let path = self.new_path(model);
        (Place::Own, Action::Create { path, mode: 0o644 })
    }

    fn kind(&mut self) -> Kind {
        let total = self.kinds.iter().map(|kind| kind.weight()).sum();
        let mut at = self.random.below(total);
        for kind in &self.kinds {
            if at < kind.weight() {
                return *kind;
            }
            at -= kind.weight();
        }
        Kind::Names
    }

    /// An operation on the shared subtree. Not through mappings: a size that shrinks under one ends
    /// the process.
    fn shared(&mut self, kind: Kind) -> Action {
        let (path, other) = (self.shared_path(), self.shared_path());
        let target = self.shared_target(&path);
        match kind {
            Kind::Names => self.shared_names(path, other),
            Kind::Mappings | Kind::Data => self.write(target, REACH_BYTES / 4, &DATA_WAYS),
            Kind::Sync if self.is_one_in(2) => Action::Sync {
                target,
                way: self.pick(&SYNC_WAYS, SyncWay::All),
            },
            Kind::Sync => self.write(target, REACH_BYTES / 4, &SYNC_WRITES),
            Kind::Direct => self.write(Target::Path(path), REACH_BYTES / 4, &[WriteWay::Direct]),
            Kind::Sizes => self.resize(target, REACH_BYTES / 4),
            Kind::Space => self.allocate(target, REACH_BYTES / 4),
            Kind::Clones if self.is_one_in(2) => Action::Reflink {
                from: other,
                target,
            },
            Kind::Clones => self.copy(other, REACH_BYTES / 4, target, &[CopyWay::CopyRange]),
            Kind::Attributes | Kind::Xattrs => self.attribute(kind, path, true),
            Kind::Flags => Action::SetFlags {
                path,
                flags: self.pick(&HARSH_FLAGS, IFlags::empty()).bits(),
            },
        }
    }

    fn shared_path(&mut self) -> PathBytes {
        let directory = self.pick(&SHARED_DIRECTORIES, "");
        let name = match self.random.below(SHARED_NAMES + 1) {
            SHARED_NAMES => "s".repeat(255),
            number => format!("n{number}"),
        };
        PathBytes(joined(directory.as_bytes(), name.as_bytes()))
    }

    fn shared_target(&mut self, path: &PathBytes) -> Target {
        if self.is_one_in(4) {
            return Target::Open(self.slot(SHARED_SLOTS));
        }
        Target::Path(path.clone())
    }

    fn shared_names(&mut self, path: PathBytes, other: PathBytes) -> Action {
        match self.random.below(22) {
            0..=5 => self.create(path),
            6 | 7 => Action::MakeDirectory { path, mode: 0o777 },
            8 => self.make_special(path),
            9 => Action::MakeSymlink {
                path,
                target: self.symlink_target(),
            },
            10 | 11 => Action::Link {
                from: path,
                to: other,
            },
            12 | 13 => Action::Unlink { path },
            14 => Action::RemoveDirectory { path },
            15..=18 => Action::Rename {
                from: path,
                to: other,
                way: self.pick(&RENAME_WAYS, RenameWay::Replace),
            },
            19 => Action::Open {
                path,
                slot: self.slot(SHARED_SLOTS),
            },
            20 => Action::OpenUnnamed {
                directory: PathBytes::default(),
                slot: self.slot(SHARED_SLOTS),
                mode: 0o640,
            },
            _ => Action::LinkOpen {
                slot: self.slot(SHARED_SLOTS),
                to: path,
            },
        }
    }

    fn create(&mut self, path: PathBytes) -> Action {
        let mode = self.pick(&FILE_MODES, 0o644) & 0o777;
        Action::Create { path, mode }
    }

    fn make_special(&mut self, path: PathBytes) -> Action {
        let all = [Special::Fifo, Special::Socket, Special::Device];
        Action::MakeSpecial {
            path,
            special: self.pick(&all, Special::Fifo),
            mode: 0o640,
        }
    }

    /// An operation on the thread's own files; `None` if there is nothing to try it on.
    fn own(&mut self, kind: Kind, model: &Model) -> Option<Action> {
        if matches!(kind, Kind::Attributes | Kind::Xattrs) {
            let paths = model.paths();
            let (path, id) = self.random.pick(&paths)?.clone();
            let node = model.node(id)?;
            let mut action = self.attribute(kind, path.clone(), node.is_directory());
            if !is_taken_by(node, &action) {
                let mtime_ns = self.mtime_ns();
                action = Action::SetTimes { path, mtime_ns };
            }
            if let Action::RemoveXattr { name, .. } = &mut action {
                *name = node.xattrs.keys().next().copied()?;
            }
            return Some(action);
        }
        if kind == Kind::Names {
            return self.own_names(model);
        }
        let (target, id, path) = self.own_file(model)?;
        let size = model.node(id)?.content()?.len() as u64;
        let reach = (size + 9_000).min(REACH_BYTES);
        let action = match kind {
            Kind::Data if self.is_one_in(5) => {
                let from = self.source(model, id)?;
                self.copy(
                    from,
                    size.max(1),
                    target,
                    &[CopyWay::Sendfile, CopyWay::Splice],
                )
            }
            Kind::Data => self.write(target, reach, &DATA_WAYS),
            Kind::Sync if self.is_one_in(2) => Action::Sync {
                target,
                way: self.pick(&SYNC_WAYS, SyncWay::All),
            },
            Kind::Sync => self.write(Target::Path(path?), reach, &SYNC_WRITES),
            Kind::Direct => self.write(Target::Path(path?), reach, &[WriteWay::Direct]),
            Kind::Sizes => self.resize(target, reach),
            Kind::Space => self.allocate(target, reach),
            Kind::Clones if self.is_one_in(2) => Action::Reflink {
                from: self.source(model, id)?,
                target,
            },
            Kind::Clones => {
                let from = self.source(model, id)?;
                self.copy(from, size.max(1), target, &[CopyWay::CopyRange])
            }
            Kind::Mappings => {
                let at = self.random.below(size);
                let bytes = self
                    .length()
                    .min(size.checked_sub(at).filter(|left| *left > 0)?);
                Action::Store {
                    target,
                    at,
                    fill: self.fill(bytes),
                    sync: self.kinds.contains(&Kind::Sync) && self.is_one_in(3),
                }
            }
            Kind::Flags => Action::SetFlags {
                path: path?,
                flags: self.pick(&MILD_FLAGS, IFlags::empty()).bits(),
            },
            Kind::Names | Kind::Attributes | Kind::Xattrs => return None,
        };
        Some(action)
    }

    /// A file: by one of its names, or through a descriptor, whether it has a name or not.
    fn own_file(&mut self, model: &Model) -> Option<(Target, NodeId, Option<PathBytes>)> {
        if self.is_one_in(4) {
            let slot = self.slot(OWN_SLOTS);
            if let Some(id) = model.opened(slot) {
                return Some((Target::Open(slot), id, None));
            }
        }
        let (path, id) = self.own_path(model, |node| node.is_file())?;
        Some((Target::Path(path.clone()), id, Some(path)))
    }

    fn own_path(
        &mut self,
        model: &Model,
        wanted: impl Fn(&Node) -> bool,
    ) -> Option<(PathBytes, NodeId)> {
        let mut paths = model.paths();
        paths.retain(|(_, id)| model.node(*id).is_some_and(&wanted));
        self.random.pick(&paths).cloned()
    }

    /// Another file than this one.
    fn source(&mut self, model: &Model, not: NodeId) -> Option<PathBytes> {
        let mut paths = model.paths();
        paths.retain(|(_, id)| *id != not && model.node(*id).is_some_and(|node| node.is_file()));
        let (path, _) = self.random.pick(&paths)?;
        Some(path.clone())
    }

    /// A directory, the thread's top among them.
    fn directory(&mut self, model: &Model) -> PathBytes {
        let mut paths = model.paths();
        paths.retain(|(path, id)| {
            let depth = path.0.iter().filter(|byte| **byte == b'/').count() + 1;
            depth < DEPTH_MAX && model.node(*id).is_some_and(|node| node.is_directory())
        });
        paths.push((PathBytes::default(), TOP));
        let picked = self.random.pick(&paths);
        picked.map_or_else(PathBytes::default, |(path, _)| path.clone())
    }

    /// A path at which nothing is yet.
    fn new_path(&mut self, model: &Model) -> PathBytes {
        loop {
            let (directory, name) = (self.directory(model), self.name());
            let path = PathBytes(joined(&directory.0, &name));
            if model.find(&path).is_none() {
                return path;
            }
        }
    }

    fn own_names(&mut self, model: &Model) -> Option<Action> {
        let is_full = model.paths().len() >= NAMES_MAX;
        match self.random.below(26) {
            _ if is_full && self.is_one_in(2) => self.remove(model),
            0..=5 if !is_full => {
                let path = self.new_path(model);
                Some(self.create(path))
            }
            6 | 7 if !is_full => Some(Action::MakeDirectory {
                path: self.new_path(model),
                mode: 0o755,
            }),
            8 if !is_full => {
                let path = self.new_path(model);
                Some(self.make_special(path))
            }
            9 if !is_full => Some(Action::MakeSymlink {
                path: self.new_path(model),
                target: self.symlink_target(),
            }),
            10 | 11 if !is_full => Some(Action::Link {
                from: self.own_path(model, |node| !node.is_directory())?.0,
                to: self.new_path(model),
            }),
            12..=14 => self.remove(model),
            15..=20 => self.rename(model),
            21 | 22 => Some(Action::Open {
                path: self.own_path(model, |node| node.is_file())?.0,
                slot: self.slot(OWN_SLOTS),
            }),
            23 => Some(Action::OpenUnnamed {
                directory: self.directory(model),
                slot: self.slot(OWN_SLOTS),
                mode: 0o640,
            }),
            24 => {
                let slot = self.slot(OWN_SLOTS);
                model.is_linkable(slot).then_some(())?;
                Some(Action::LinkOpen {
                    slot,
                    to: self.new_path(model),
                })
            }
            _ => {
                let slot = self.slot(OWN_SLOTS);
                model.opened(slot)?;
                Some(Action::Close { slot })
            }
        }
    }

    fn remove(&mut self, model: &Model) -> Option<Action> {
        let is_empty = |node: &Node| node.children().is_none_or(|all| all.is_empty());
        let (path, id) = self.own_path(model, is_empty)?;
        if model.node(id)?.is_directory() {
            return Some(Action::RemoveDirectory { path });
        }
        Some(Action::Unlink { path })
    }

    fn rename(&mut self, model: &Model) -> Option<Action> {
        let (from, id) = self.own_path(model, |_| true)?;
        let below = |inner: &PathBytes, outer: &PathBytes| {
            let rest = inner.0.strip_prefix(outer.0.as_slice());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        let way = self.pick(&RENAME_WAYS, RenameWay::Replace);
        let to = match way {
            RenameWay::Replace if self.is_one_in(2) => {
                let is_directory = model.node(id)?.is_directory();
                let fits = |node: &Node| {
                    node.is_directory() == is_directory
                        && node.children().is_none_or(|all| all.is_empty())
                };
                self.own_path(model, fits)?.0
            }
            RenameWay::Exchange => self.own_path(model, |_| true)?.0,
            RenameWay::Replace | RenameWay::NoReplace => self.new_path(model),
        };
        let apart = !below(&to, &from) && !below(&from, &to);
        apart.then_some(Action::Rename { from, to, way })
    }

    fn attribute(&mut self, kind: Kind, path: PathBytes, is_directory: bool) -> Action {
        if kind == Kind::Xattrs {
            return self.xattr(path, is_directory);
        }
        match self.random.below(3) {
            0 => {
                let modes: &[u32] = if is_directory {
                    &DIRECTORY_MODES
                } else {
                    &FILE_MODES
                };
                let mode = self.pick(modes, 0o700);
                Action::ChangeMode { path, mode }
            }
            1 => Action::ChangeOwner {
                path,
                uid: self.pick(&OWNERS, 0),
                gid: self.pick(&OWNERS, 0),
            },
            _ => Action::SetTimes {
                path,
                mtime_ns: self.mtime_ns(),
            },
        }
    }

    fn xattr(&mut self, path: PathBytes, is_directory: bool) -> Action {
        let bytes = self.random.below(200);
        match self.random.below(6) {
            0 => Action::RemoveXattr {
                path,
                name: self.pick(&USER_XATTRS, "user.one"),
            },
            1 if !is_directory => Action::SetAcl {
                path,
                acl: self.acl(),
            },
            1..=3 => Action::SetXattr {
                path,
                name: self.pick(&TRUSTED_XATTRS, "trusted.one"),
                fill: self.fill(bytes),
            },
            _ => Action::SetXattr {
                path,
                name: self.pick(&USER_XATTRS, "user.one"),
                fill: self.fill(bytes),
            },
        }
    }
}

const DATA_WAYS: [WriteWay; 6] = [
    WriteWay::Plain,
    WriteWay::At,
    WriteWay::Vector,
    WriteWay::VectorAt,
    WriteWay::VectorAppend,
    WriteWay::Append,
];
const SYNC_WRITES: [WriteWay; 2] = [WriteWay::Sync, WriteWay::DataSync];
/// A `syncfs` leaves nothing that a crash could take: rarely.
const SYNC_WAYS: [SyncWay; 7] = [
    SyncWay::All,
    SyncWay::All,
    SyncWay::All,
    SyncWay::Data,
    SyncWay::Data,
    SyncWay::Data,
    SyncWay::Volume,
];
const RENAME_WAYS: [RenameWay; 4] = [
    RenameWay::Replace,
    RenameWay::Replace,
    RenameWay::NoReplace,
    RenameWay::Exchange,
];

/// Whether an inode of this type takes a change of attributes.
fn is_taken_by(node: &Node, action: &Action) -> bool {
    match action {
        Action::ChangeMode { .. } => !matches!(node.body, Body::Symlink(_)),
        Action::SetAcl { .. } => node.is_file(),
        Action::SetXattr { name, .. } | Action::RemoveXattr { name, .. } => {
            node.is_file() || node.is_directory() || !USER_XATTRS.contains(name)
        }
        _ => true,
    }
}

/// The kinds, each once; all if none was chosen.
pub(super) fn usable(kinds: &[Kind]) -> Vec<Kind> {
    let unique: BTreeSet<Kind> = kinds.iter().copied().collect();
    if unique.is_empty() {
        return Kind::all();
    }
    unique.into_iter().collect()
}
