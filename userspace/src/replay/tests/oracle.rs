//! What must be true after a replay, from the applications' view.

use std::collections::BTreeSet;

use super::attributes::extended_of;
use super::model::{Body, Model};
use super::world::{Event, Name, Op};
use crate::ids::{Epoch, Identity};

/// What operations after the cut touched, as far as they may have reached the disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Touched {
    pub(super) names: BTreeSet<(Identity, Name)>,
    pub(super) content: BTreeSet<Identity>,
    pub(super) attributes: BTreeSet<Identity>,
    /// Inodes whose extended attributes or flags it may have changed.
    pub(super) extended: BTreeSet<Identity>,
    pub(super) links: BTreeSet<Identity>,
    /// Inodes whose last link went.
    pub(super) removed: BTreeSet<Identity>,
}

impl Touched {
    /// Of the events `from..`, those that `landed`; `states(i)` is the model after `i` events.
    pub(super) fn by(
        events: &[Event],
        from: usize,
        landed: &dyn Fn(usize) -> bool,
        states: &dyn Fn(usize) -> Model,
    ) -> Self {
        let mut touched = Self::default();
        for (index, event) in events.iter().enumerate().skip(from) {
            if landed(index) {
                touched.add(event, &states(index), &states(index + 1));
            }
        }
        touched
    }

    fn add(&mut self, event: &Event, before: &Model, after: &Model) {
        match &event.op {
            Op::Write { file: inode, .. }
            | Op::Direct { file: inode, .. }
            | Op::Store { file: inode, .. }
            | Op::Zero { file: inode, .. }
            | Op::Truncate { file: inode, .. } => {
                self.content.insert(*inode);
                self.attributes.insert(*inode);
                self.extended.insert(*inode);
            }
            Op::SetAttribute { inode, .. }
            | Op::SetFlags { inode, .. }
            | Op::Chmod { inode, .. }
            | Op::Chown { inode, .. } => {
                self.attributes.insert(*inode);
                self.extended.insert(*inode);
            }
            Op::Utimes { inode, .. } => {
                self.attributes.insert(*inode);
            }
            Op::Create {
                directory, name, ..
            } => {
                self.name(*directory, name);
            }
            Op::Link {
                file,
                directory,
                name,
            } => {
                self.name(*directory, name);
                self.links.insert(*file);
            }
            Op::Unlink { directory, name } => {
                self.name(*directory, name);
                self.links.insert(before.entries(*directory)[name]);
            }
            Op::Rename { from, to } | Op::Exchange { from, to } => {
                self.name(from.0, &from.1);
                self.name(to.0, &to.1);
                // Bound again at the cut's name, the name of after the cut may stay.
                self.links.extend(before.entries(from.0).get(&from.1));
                self.links.extend(before.entries(to.0).get(&to.1));
            }
            Op::Tmpfile | Op::Fsync { .. } | Op::Flush | Op::Checkpoint => {}
        }
        let gone = before
            .nodes
            .keys()
            .filter(|inode| !after.nodes.contains_key(inode));
        self.removed.extend(gone);
    }

    fn name(&mut self, directory: Identity, name: &Name) {
        self.names.insert((directory, name.clone()));
        self.attributes.insert(directory);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty() && self.content.is_empty() && self.attributes.is_empty()
    }
}

/// Everything the oracle knows.
pub(super) struct Oracle<'m> {
    /// The model at the cut.
    pub(super) want: &'m Model,
    /// The disk before the replay.
    pub(super) before: &'m Model,
    /// The disk after it.
    pub(super) got: &'m Model,
    pub(super) touched: &'m Touched,
    /// Names the merged records mention.
    pub(super) mentioned: &'m BTreeSet<(Identity, Name)>,
    /// Inodes the merged records made and no mark proved durable.
    pub(super) can_be_made: &'m BTreeSet<Identity>,
    /// Inodes that existed before the cut, dead or alive.
    pub(super) known: &'m BTreeSet<Identity>,
}

impl Oracle<'_> {
    fn stands_for(&self, inode: Identity) -> Identity {
        match self.got.nodes.get(&inode).and_then(|node| node.stamp) {
            Some(stamp) if stamp.epoch == Epoch(7) => stamp.identity,
            _ => self.noted_for(inode).unwrap_or(inode),
        }
    }

    /// What a note under staging says, of an inode that is locked.
    fn noted_for(&self, inode: Identity) -> Option<Identity> {
        let Identity { ino, generation } = inode;
        let noted = format!("made-{ino}-{generation}-");
        let names = self.staged();
        let mut told = names.iter().filter_map(|name| {
            let text = std::str::from_utf8(name).ok()?;
            text.strip_prefix(noted.as_str())?.split_once('.')
        });
        let (ino, generation) = told.next()?;
        Some(Identity {
            ino: ino.parse().ok()?,
            generation: generation.parse().ok()?,
        })
    }

    fn staged(&self) -> Vec<Name> {
        let own = self.got.entries(self.got.root)[b".twinwrite".as_slice()];
        let staging = self.got.entries(own)[b"staging".as_slice()];
        self.got.entries(staging).into_keys().collect()
    }

    /// Something older than the cut had been moved to this name after it.
    fn was_moved_there(&self, directory: Identity, name: &Name) -> bool {
        let there = |model: &Model| {
            let node = model.nodes.get(&directory)?;
            node.is_directory()
                .then(|| model.entries(directory).get(name).copied())?
        };
        let now = there(self.got);
        now.is_some_and(|inode| there(self.before) == now && self.want.reachable().contains(&inode))
    }

    /// Something of the log was at this name before the replay.
    fn before_had(&self, directory: Identity, name: &Name) -> bool {
        let there = self.before.nodes.get(&directory);
        let entries = there.filter(|node| node.is_directory());
        let there = entries.and_then(|_| self.before.entries(directory).get(name).copied());
        there.is_some_and(|inode| self.want.reachable().contains(&inode))
    }

    /// After the cut it had been moved from here over something that is gone since, and is still there.
    fn was_moved_over(&self, place: &(Identity, Name), child: Identity) -> bool {
        self.touched.names.contains(place)
            && self.before.nodes.iter().any(|(directory, node)| {
                node.is_directory()
                    && self.before.entries(*directory).iter().any(|(name, there)| {
                        let is_there = |model: &Model| {
                            let node = model.nodes.get(directory);
                            node.is_some_and(super::model::Node::is_directory)
                                && model.entries(*directory).get(name) == Some(&child)
                        };
                        let wanted = self.want.nodes.get(directory);
                        let wanted = wanted.filter(|node| node.is_directory());
                        let wanted =
                            wanted.and_then(|_| self.want.entries(*directory).get(name).copied());
                        *there == child
                            && is_there(self.got)
                            && wanted.is_some_and(|wanted| self.deleted_ahead(wanted))
                    })
            })
    }

    fn deleted_ahead(&self, inode: Identity) -> bool {
        self.touched.removed.contains(&inode) && !self.can_be_made.contains(&inode)
    }

    /// Checks all of it.
    pub(super) fn check(&self) -> Result<(), String> {
        self.directory(self.want.root, self.got.root, "")?;
        self.nothing_is_lost()?;
        self.staging_is_empty()
    }

    fn directory(&self, want: Identity, got: Identity, path: &str) -> Result<(), String> {
        let mut got_entries = self.got.entries(got);
        got_entries.remove(b".twinwrite".as_slice());
        let mut want_entries = self.want.entries(want);
        want_entries.remove(b".twinwrite".as_slice());
        for (name, child) in want_entries {
            let path = format!("{path}/{}", name.escape_ascii());
            let place = (want, name.clone());
            let was_ahead = self.deleted_ahead(child);
            // Of a name that no merged record mentions nobody can know whose it was.
            let was_taken = self.mentioned.contains(&place)
                && self.before_had(got, &name)
                && !got_entries.contains_key(&name);
            if was_ahead && was_taken {
                return Err(format!("{path}: what the disk had there was taken away"));
            }
            let free = was_ahead
                || self.was_moved_there(got, &name)
                || self.was_moved_over(&place, child)
                || self.touched.names.contains(&place) && !self.mentioned.contains(&place);
            match got_entries.remove(&name) {
                None if free => {}
                None => return Err(format!("{path} ({child}) is missing")),
                Some(there) if self.stands_for(there) == child => {
                    self.inode(child, there, &path)?;
                }
                Some(_) if free => {}
                Some(there) => return Err(format!("{path} is {there} instead of {child}")),
            }
        }
        for (name, there) in got_entries {
            let place = (want, name.clone());
            let touched = self.touched.names.contains(&place);
            let moved = touched && self.was_moved_there(got, &name);
            if !moved && (!touched || self.mentioned.contains(&place)) {
                let name = name.escape_ascii();
                return Err(format!("{path}/{name} ({there}) should not be there"));
            }
        }
        Ok(())
    }

    fn inode(&self, want_id: Identity, got_id: Identity, path: &str) -> Result<(), String> {
        let (want, got) = (&self.want.nodes[&want_id], &self.got.nodes[&got_id]);
        let what = |field: &str, want: String, got: String| {
            Err(format!(
                "{path} ({want_id}): {field} is {got} instead of {want}"
            ))
        };
        if want.mode & 0o170_000 != got.mode & 0o170_000 {
            return what(
                "type",
                format!("{:o}", want.mode),
                format!("{:o}", got.mode),
            );
        }
        let remade = want_id != got_id;
        let same = |set: &BTreeSet<Identity>| remade || !set.contains(&want_id);
        if same(&self.touched.attributes) {
            if (want.mode, want.uid, want.gid) != (got.mode, got.uid, got.gid) {
                let show = |n: &super::model::Node| format!("{:o} {}:{}", n.mode, n.uid, n.gid);
                return what("mode, owner", show(want), show(got));
            }
            if want.mtime_ns != got.mtime_ns {
                return what("mtime", want.mtime_ns.to_string(), got.mtime_ns.to_string());
            }
        }
        if same(&self.touched.extended) && extended_of(want) != extended_of(got) {
            let show = |node| format!("{:x?}", extended_of(node));
            return what("extended state", show(want), show(got));
        }
        match &want.body {
            Body::Directory(_) => return self.directory(want_id, got_id, path),
            Body::File(_) if !same(&self.touched.content) => {}
            body if *body == got.body => {}
            body => return what("body", format!("{body:?}"), format!("{:?}", got.body)),
        }
        if same(&self.touched.links) && want.links != got.links {
            return what("link count", want.links.to_string(), got.links.to_string());
        }
        Ok(())
    }

    fn nothing_is_lost(&self) -> Result<(), String> {
        let after: BTreeSet<Identity> = self
            .got
            .reachable()
            .into_iter()
            .map(|inode| self.stands_for(inode))
            .collect();
        for inode in self.want.reachable() {
            if !self.want.is_own(inode)
                && !after.contains(&inode)
                && !self.touched.removed.contains(&inode)
            {
                return Err(format!("{inode} was alive at the cut and is nowhere"));
            }
        }
        for inode in self.before.reachable() {
            let dead = self.known.contains(&inode) && !self.want.nodes.contains_key(&inode);
            if !after.contains(&inode) && !dead {
                return Err(format!(
                    "{inode} was on the disk, is not proven dead, and is nowhere"
                ));
            }
        }
        Ok(())
    }

    /// But for the notes that stand for the stamps of what is locked.
    fn staging_is_empty(&self) -> Result<(), String> {
        let is_of_locked = |name: &Name| {
            let mut locked = self.got.nodes.iter().filter(|(_, n)| n.flags.locks() != 0);
            locked.any(|(Identity { ino, generation }, node)| {
                node.stamp.is_none()
                    && name.starts_with(format!("made-{ino}-{generation}-").as_bytes())
            })
        };
        match self.staged().iter().find(|name| !is_of_locked(name)) {
            None => Ok(()),
            Some(name) => Err(format!("{} is left in staging", name.escape_ascii())),
        }
    }
}

/// Paths with what is at them, for comparing two results whatever the new inodes' numbers are.
pub(super) fn tree(model: &Model) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = vec![(String::new(), model.root)];
    let mut first_path = std::collections::BTreeMap::new();
    while let Some((path, inode)) = open.pop() {
        let node = &model.nodes[&inode];
        let first = first_path
            .entry(inode)
            .or_insert_with(|| path.clone())
            .clone();
        let body = match &node.body {
            Body::Directory(_) => String::from("directory"),
            other => format!("{other:?} links {}", node.links),
        };
        let own = path.starts_with("/.twinwrite");
        let time = if own && node.is_directory() {
            0
        } else {
            node.mtime_ns
        };
        lines.push(format!(
            "{path} = {first} {:o} {}:{} {time} {body} {:x?}",
            node.mode,
            node.uid,
            node.gid,
            extended_of(node)
        ));
        for (name, child) in model.entries(inode).into_iter().rev() {
            let path = format!("{path}/{}", name.escape_ascii());
            // A note that stands for a stamp is made anew where the run that made it was interrupted.
            if !path.starts_with("/.twinwrite/staging/made-") {
                open.push((path, child));
            }
        }
    }
    lines.sort();
    lines
}
