//! Names that the disk has from after the cut.
//!
//! Usually they are taken back: what was made after the cut is not whole. But whoever holds a name that
//! the log gives to somebody else (or to nobody), is older than that, and whose own names no record
//! touches, was whole on the disk when the log began and was moved there after the cut: had it been
//! there before, the record that gave the name away would tell of it. What its name was no record
//! tells, so to push it out would leave it without any. A file system commits changes of names in their
//! order, so everything up to the cut was on the disk too, and the disk shows a later state of this name:
//! it stays. Whatever belonged there stays where the disk has it now; if it is gone it is made anew and
//! kept aside.
//!
//! In the same way a name stays whose inode was deleted after the cut, and where the disk has another one
//! of the log, which the log has elsewhere: it was moved there over the first one. Taken back, the name
//! would be left without either, also where it was confirmed. The name it had before is not given to it
//! again: two names for it would be more than anybody ever made.

use std::collections::BTreeSet;

use super::{Apply, Found};
use crate::ids::Identity;
use crate::replay::plan::Place;
use crate::replay::volume::{Step, Volume};

impl<'a, V: Volume> Apply<'_, 'a, V> {
    /// Fills `left`. One name that stays may take the last place of an inode that holds another one,
    /// which then stays, too.
    pub(super) fn leave_what_came_later(&mut self) -> Step<()> {
        let plan = self.plan;
        let placed: BTreeSet<Identity> = self.places.keys().copied().collect();
        loop {
            let before = self.left.len();
            for ((directory, name), child) in &plan.names {
                let place = (*directory, *name);
                let Some(disk_directory) = self.on_disk(*directory) else {
                    continue;
                };
                if self.left.contains(&place) {
                    continue;
                }
                let Some(there) = self.volume.lookup(disk_directory, name)? else {
                    continue;
                };
                let wanted = child.and_then(|child| self.on_disk(child));
                let named_ns = plan.named_ns.get(&place).copied();
                if wanted == Some(there) {
                    continue;
                }
                if self.came_later(there, named_ns, &placed)? {
                    self.leave(place, *child);
                } else if self.was_moved_over(*child, there) {
                    self.leave(place, *child);
                    self.leave_old_names(there)?;
                }
            }
            if self.left.len() == before {
                break;
            }
        }
        Ok(())
    }

    fn leave(&mut self, place: Place<'a>, child: Option<Identity>) {
        self.left.insert(place);
        if let Some(places) = child.and_then(|child| self.places.get_mut(&child)) {
            places.retain(|other| *other != place);
        }
    }

    /// Whether `there` is an inode that the log names elsewhere, at a name whose own was deleted after the cut.
    fn was_moved_over(&self, child: Option<Identity>, there: Identity) -> bool {
        let is_gone = child.is_some_and(|child| self.found.get(&child) == Some(&Found::Gone));
        let planned = self.planned.get(&there);
        is_gone
            && planned.is_some_and(|planned| {
                self.inode(*planned).is_some_and(|inode| !inode.dead)
                    && self.places.contains_key(planned)
            })
    }

    /// The names that the log has for an inode, and the disk no longer: they stay as the disk has them.
    fn leave_old_names(&mut self, there: Identity) -> Step<()> {
        let Some(planned) = self.planned.get(&there).copied() else {
            return Ok(());
        };
        for (directory, name) in self.places.get(&planned).cloned().unwrap_or_default() {
            let Some(disk_directory) = self.on_disk(directory) else {
                continue;
            };
            if self.volume.lookup(disk_directory, name)? != Some(there) {
                self.leave((directory, name), Some(planned));
            }
        }
        Ok(())
    }

    /// Whether this inode, which was there before the cut, came after it to a name that the log gave away
    /// at `named_ns`. `placed`: the inodes that the log gives names to.
    fn came_later(
        &mut self,
        there: Identity,
        named_ns: Option<i64>,
        placed: &BTreeSet<Identity>,
    ) -> Step<bool> {
        let own = [self.own, self.staging, self.recovered];
        if own.contains(&there) || self.plan.nameless.contains(&there) {
            return Ok(false);
        }
        let stat = self.volume.stat(there)?;
        let Some(planned) = self.planned.get(&there).copied() else {
            let born_ns = stat.and_then(|stat| stat.born_ns);
            return Ok(born_ns
                .zip(named_ns)
                .is_some_and(|(born, named)| born < named));
        };
        let Some(inode) = self.inode(planned).filter(|inode| !inode.dead) else {
            return Ok(false);
        };
        if placed.contains(&planned) {
            return Ok(self.places.get(&planned).is_none_or(Vec::is_empty));
        }
        if inode.links.is_none() {
            return Ok(true);
        }
        // A name was taken from it, and it lives on under another one: so this is that, moved here.
        Ok(stat.is_some_and(|stat| !stat.is_directory() && stat.links == 1))
    }
}
