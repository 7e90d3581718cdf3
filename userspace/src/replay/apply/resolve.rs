//! Finding each inode of the log on the disk.

use std::collections::BTreeSet;

use super::extended::is_to_be_done;
use super::{Apply, Found, Stage};
use crate::faults::{Fault, injected};
use crate::ids::Identity;
use crate::replay::plan::{Inode, Kind, Origin};
use crate::replay::volume::{Stamp, Step, Volume};

/// Name in the staging directory of an inode made by replay.
pub(super) fn made_name(identity: Identity) -> Vec<u8> {
    format!("{}-{}", identity.ino, identity.generation).into_bytes()
}

/// Name in the staging directory of a survivor.
pub(super) fn kept_name(identity: Identity) -> Vec<u8> {
    format!("kept-{}-{}", identity.ino, identity.generation).into_bytes()
}

/// Name in the staging directory of a directory about to be removed.
pub(super) fn dead_name(identity: Identity) -> Vec<u8> {
    format!("dead-{}-{}", identity.ino, identity.generation).into_bytes()
}

impl<'a, V: Volume> Apply<'_, 'a, V> {
    /// Fills `found` for every inode of the log.
    pub(super) fn resolve(&mut self) -> Step<()> {
        self.discard_unfinished()?;
        let plan = self.plan;
        let total = plan.inodes.len() as u64;
        for (done, (identity, inode)) in plan.inodes.iter().enumerate() {
            if done.is_multiple_of(1024) {
                self.tell(Stage::Resolve, done as u64, total);
            }
            self.resolve_with_parents(*identity, inode)?;
        }
        for (identity, inode) in &plan.inodes {
            match self.found.get(identity) {
                Some(Found::Gone) if !inode.dead => self.outcome.deleted_ahead.push(*identity),
                Some(Found::Lost) => self.outcome.lost.push(format!(
                    "LOST: inode {identity} got its first name in the log, was made before it without a name, and is not on the disk: its bytes are in no record"
                )),
                _ => {}
            }
        }
        self.tell(Stage::Resolve, total, total);
        Ok(())
    }

    /// What is to be made may have been made already, below directories that were: those come first.
    fn resolve_with_parents(&mut self, identity: Identity, inode: &Inode<'a>) -> Step<()> {
        let mut open = vec![(identity, false)];
        let mut entered = BTreeSet::new();
        while let Some((top, parents_done)) = open.pop() {
            if self.found.contains_key(&top) {
                continue;
            }
            let top_inode = if top == identity {
                Some(inode)
            } else {
                self.inode(top)
            };
            let Some(top_inode) = top_inode else { continue };
            if !parents_done && entered.insert(top) && self.present(top)?.is_none() {
                open.push((top, true));
                let parents = self.places.get(&top).into_iter().flatten();
                open.extend(parents.map(|(directory, _)| (*directory, false)));
                continue;
            }
            let found = self.find(top, top_inode)?;
            if let Some(disk) = match found {
                Found::Kept => Some(top),
                Found::Made(made) => Some(made),
                _ => None,
            } {
                self.planned.insert(disk, top);
            }
            self.found.insert(top, found);
        }
        Ok(())
    }

    /// Whether there is an inode with this identity, and whether it is the one the log means.
    ///
    /// XFS counts a number's generations up by one, and btrfs gives out the next number and its
    /// transaction's, so that what replay made may bear, by number and generation, an identity that the log
    /// gave to something that never reached the disk. The stamp tells.
    fn present(&mut self, identity: Identity) -> Step<Option<Found>> {
        if [self.own, self.staging, self.recovered].contains(&identity)
            || self.volume.stat(identity)?.is_none()
        {
            return Ok(None);
        }
        Ok(match self.stamp(identity)? {
            Some(stamp) if stamp.epoch == self.plan.epoch => {
                (stamp.identity == identity).then_some(Found::Made(identity))
            }
            _ => Some(Found::Kept),
        })
    }

    fn find(&mut self, identity: Identity, inode: &Inode<'a>) -> Step<Found> {
        if let Some(found) = self.present(identity)? {
            if found != Found::Kept {
                self.outcome.created.push(identity);
            }
            return Ok(found);
        }
        if inode.origin == Origin::LinkedOnly && !inode.proven && !inode.dead {
            return Ok(Found::Lost);
        }
        if injected(Fault::PathFallback) {
            for (directory, name) in self.places.get(&identity).cloned().unwrap_or_default() {
                if let Some(directory) = self.on_disk(directory)
                    && let Some(there) = self.volume.lookup(directory, name)?
                {
                    return Ok(Found::Made(there));
                }
            }
        }
        if !inode.can_be_made() && !injected(Fault::DeletedAheadRemade)
            || !matches!(inode.origin, Origin::Created(_))
        {
            return Ok(Found::Gone);
        }
        if let Some(made) = self.find_made(identity)? {
            self.outcome.created.push(made);
            return Ok(Found::Made(made));
        }
        let places = self.places.get(&identity).into_iter().flatten();
        let mut directories = places.map(|(directory, _)| self.found.get(directory));
        // A directory that was removed after the cut had been emptied before.
        let reachable = directories.any(|d| !matches!(d, Some(Found::Gone | Found::Lost)));
        Ok(if reachable {
            Found::ToMake
        } else {
            Found::Gone
        })
    }

    /// What an earlier, interrupted run made for this inode: in staging, or at one of its names.
    fn find_made(&mut self, identity: Identity) -> Step<Option<Identity>> {
        let wanted = Stamp {
            epoch: self.plan.epoch,
            identity,
        };
        let staged = made_name(identity);
        if let Some(made) = self.volume.lookup(self.staging, &staged)?
            && self.stamp(made)? == Some(wanted)
        {
            return Ok(Some(made));
        }
        for (directory, name) in self.places.get(&identity).cloned().unwrap_or_default() {
            if let Some(directory) = self.on_disk(directory)
                && let Some(made) = self.volume.lookup(directory, name)?
                && self.stamp(made)? == Some(wanted)
            {
                return Ok(Some(made));
            }
        }
        // Its place was taken by something that stays: see `ahead`.
        let aside: Vec<Vec<u8>> = self.aside.clone();
        for name in aside.iter().filter(|name| name.ends_with(&staged)) {
            if let Some(made) = self.volume.lookup(self.recovered, name)?
                && self.stamp(made)? == Some(wanted)
            {
                return Ok(Some(made));
            }
        }
        Ok(None)
    }

    /// What lies under staging without this epoch's stamp was made and not stamped before an interruption,
    /// or is left of another epoch's replay. It goes before anything is looked for by identity.
    fn discard_unfinished(&mut self) -> Step<()> {
        for name in self.volume.list(self.staging)? {
            if name.starts_with(b"kept-") || name.starts_with(b"dead-") {
                continue;
            }
            let Some(made) = self.volume.lookup(self.staging, &name)? else {
                continue;
            };
            match self.volume.stamp(made)? {
                Some(stamp) if stamp.epoch == self.plan.epoch => {}
                // Of a replay that never came to its end: what it says is still to be done.
                Some(_) if is_to_be_done(&name) => self.stamp_note(made)?,
                _ => self.discard(&name, made)?,
            }
        }
        self.read_notes()
    }

    fn discard(&mut self, name: &[u8], made: Identity) -> Step<()> {
        let Some(stat) = self.volume.stat(made)? else {
            return Ok(());
        };
        if stat.is_directory() && self.volume.list(made)?.is_empty() {
            self.volume.remove_directory(self.staging, name)
        } else if stat.links > 1 || (!stat.is_directory() && (stat.size == 0 || !stat.is_file())) {
            self.volume.unlink(self.staging, name)
        } else {
            self.recover(self.staging, name, made)
        }
    }

    /// Makes what is missing, under staging, and stamps it; directories before what belongs into them, because
    /// they pass their quota project on.
    pub(super) fn make_missing(&mut self) -> Step<()> {
        let is_to_make = |(_, found): &(&Identity, &Found)| **found == Found::ToMake;
        let missing = self.found.iter().filter(is_to_make);
        let mut open: Vec<(Identity, bool)> =
            missing.map(|(identity, _)| (*identity, false)).collect();
        let mut entered = BTreeSet::new();
        while let Some((identity, parents_done)) = open.pop() {
            if self.found.get(&identity) != Some(&Found::ToMake) {
                continue;
            }
            if !parents_done && entered.insert(identity) {
                open.push((identity, true));
                let places = self.places.get(&identity).into_iter().flatten();
                open.extend(places.map(|(directory, _)| (*directory, false)));
                continue;
            }
            self.make_one(identity)?;
        }
        self.volume.pass_on_project(self.staging, None)
    }

    fn make_one(&mut self, identity: Identity) -> Step<()> {
        let Some(kind) = self.made_kind(identity) else {
            return Ok(());
        };
        let places = self.places.get(&identity).into_iter().flatten();
        let home = places
            .filter_map(|(directory, _)| self.on_disk(*directory))
            .next();
        self.volume.pass_on_project(self.staging, home)?;
        let name = made_name(identity);
        let made = self.volume.create(self.staging, &name, kind)?;
        let stamp = Stamp {
            epoch: self.plan.epoch,
            identity,
        };
        self.volume.set_stamp(made, Some(stamp))?;
        self.found.insert(identity, Found::Made(made));
        self.planned.insert(made, identity);
        self.outcome.created.push(made);
        Ok(())
    }

    /// Whether the log says that this inode is a directory.
    pub(super) fn is_directory(&mut self, disk: Identity) -> Step<bool> {
        Ok(self
            .volume
            .stat(disk)?
            .is_some_and(|stat| stat.is_directory()))
    }

    /// The kind the log made an inode as.
    pub(super) fn made_kind(&self, identity: Identity) -> Option<Kind<'a>> {
        match self.inode(identity)?.origin {
            Origin::Created(kind) => Some(kind),
            _ => None,
        }
    }
}
