//! Names: footholds for survivors, names taken away, what is missing made, names bound.

use super::extended::is_note;
use super::resolve::{dead_name, kept_name, made_name};
use super::{Apply, Found, STAGING, Stage};
use crate::faults::{Fault, injected};
use crate::ids::Identity;
use crate::replay::volume::{Step, Volume};

impl<'a, V: Volume> Apply<'_, 'a, V> {
    /// Makes every name of the plan so.
    pub(super) fn names(&mut self) -> Step<()> {
        self.tell(Stage::Names, 0, 4);
        self.leave_what_came_later()?;
        self.stage_survivors()?;
        self.tell(Stage::Names, 1, 4);
        self.unbind()?;
        self.remove_dead_directories()?;
        self.tell(Stage::Names, 2, 4);
        self.make_missing()?;
        self.tell(Stage::Names, 3, 4);
        self.bind()?;
        self.clear_staging()?;
        self.tell(Stage::Names, 4, 4);
        Ok(())
    }

    /// Whether this name is bound to this inode of the log already.
    fn is_bound(&mut self, place: (Identity, &[u8]), disk: Identity) -> Step<bool> {
        match self.on_disk(place.0) {
            Some(directory) => Ok(self.volume.lookup(directory, place.1)? == Some(disk)),
            None => Ok(false),
        }
    }

    /// Whether the name can be bound at all: its directory is there or will be.
    fn can_be_bound(&self, directory: Identity) -> bool {
        matches!(
            self.found.get(&directory),
            Some(Found::Kept | Found::Made(_) | Found::ToMake)
        )
    }

    /// Every inode with a name still to be bound gets a name under staging: a file a further one, a directory
    /// moves there. Then no name that is taken away can be its last, and no directory is in its own way.
    fn stage_survivors(&mut self) -> Step<()> {
        let places = std::mem::take(&mut self.places);
        for (identity, names) in &places {
            let Some(disk) = self.on_disk(*identity) else {
                continue;
            };
            let mut unbound = false;
            for (directory, name) in names {
                unbound |=
                    self.can_be_bound(*directory) && !self.is_bound((*directory, name), disk)?;
            }
            if unbound {
                self.stage(*identity, disk)?;
            }
        }
        self.places = places;
        Ok(())
    }

    fn stage(&mut self, identity: Identity, disk: Identity) -> Step<()> {
        if self.is_directory(disk)? {
            let (parent, name) = self.volume.place_of(disk)?;
            if parent != self.staging {
                self.touch(parent)?;
                self.volume
                    .rename((parent, &name), (self.staging, &kept_name(identity)))?;
            }
            return Ok(());
        }
        for name in [kept_name(identity), made_name(identity)] {
            if self.volume.lookup(self.staging, &name)? == Some(disk) {
                return Ok(());
            }
        }
        self.volume.link(disk, self.staging, &kept_name(identity))
    }

    /// Takes away what the log says is not (or no longer) at a name.
    fn unbind(&mut self) -> Step<()> {
        let plan = self.plan;
        for ((directory, name), child) in &plan.names {
            if injected(Fault::UnbindOmitted) && child.is_none()
                || self.left.contains(&(*directory, *name))
            {
                continue;
            }
            let Some(disk_directory) = self.on_disk(*directory) else {
                continue;
            };
            let Some(there) = self.volume.lookup(disk_directory, name)? else {
                continue;
            };
            let wanted = child.and_then(|child| self.on_disk(child));
            if there == self.own || wanted == Some(there) {
                continue;
            }
            let gone = child.is_some_and(|child| {
                matches!(self.found.get(&child), Some(Found::Gone | Found::Lost))
            });
            self.displace(disk_directory, name, there, gone)?;
        }
        Ok(())
    }

    /// Something is at a name where the log does not have it. `gone`: what should be there was deleted
    /// after the cut, so that whatever took its place is left alone unless it belongs elsewhere.
    fn displace(
        &mut self,
        directory: Identity,
        name: &[u8],
        there: Identity,
        gone: bool,
    ) -> Step<()> {
        let Some(stat) = self.volume.stat(there)? else {
            return Ok(());
        };
        if injected(Fault::VictimUnchecked) && !stat.is_directory() {
            return self.volume.unlink(directory, name);
        }
        let planned = self.planned.get(&there).copied();
        let dead = planned
            .and_then(|p| self.inode(p))
            .is_some_and(|inode| inode.dead);
        let elsewhere = planned.is_some_and(|p| self.places.contains_key(&p));
        if gone && !dead && !elsewhere {
            return Ok(());
        }
        self.touch(directory)?;
        self.unlock_one(there)?;
        if stat.is_directory() {
            if dead {
                let planned = planned.unwrap_or(there);
                let target = dead_name(planned);
                return self
                    .volume
                    .rename((directory, name), (self.staging, &target));
            }
            return self.recover(directory, name, there);
        }
        if dead || stat.links > 1 {
            self.outcome.names_removed += 1;
            return self.volume.unlink(directory, name);
        }
        self.recover(directory, name, there)
    }

    /// The dead directories are all under staging now. One that still holds something unknown is kept.
    fn remove_dead_directories(&mut self) -> Step<()> {
        for name in self.volume.list(self.staging)? {
            if !name.starts_with(b"dead-") {
                continue;
            }
            let Some(directory) = self.volume.lookup(self.staging, &name)? else {
                continue;
            };
            if self.volume.list(directory)?.is_empty() {
                self.volume.remove_directory(self.staging, &name)?;
                self.outcome.names_removed += 1;
            } else {
                self.recover(self.staging, &name, directory)?;
            }
        }
        Ok(())
    }

    fn bind(&mut self) -> Step<()> {
        let places = std::mem::take(&mut self.places);
        for (identity, names) in &places {
            let Some(disk) = self.on_disk(*identity) else {
                continue;
            };
            for (directory, name) in names {
                let Some(disk_directory) = self.on_disk(*directory) else {
                    continue;
                };
                if self.volume.lookup(disk_directory, name)? != Some(disk) {
                    self.bind_one(disk, disk_directory, name)?;
                }
            }
        }
        self.places = places;
        Ok(())
    }

    fn bind_one(&mut self, disk: Identity, directory: Identity, name: &[u8]) -> Step<()> {
        self.touch(directory)?;
        self.outcome.names_bound += 1;
        if !self.is_directory(disk)? {
            return self.volume.link(disk, directory, name);
        }
        self.leave_cycle(disk, directory)?;
        let (parent, from) = self.volume.place_of(disk)?;
        self.volume.rename((parent, &from), (directory, name))
    }

    /// The directory that `moving` belongs into may lie, after the cut, inside `moving` itself. Where it lay at
    /// the cut no record tells, so it is kept aside.
    fn leave_cycle(&mut self, moving: Identity, into: Identity) -> Step<()> {
        let root = self.volume.root()?;
        let mut at = into;
        while at != root && at != self.staging && at != self.recovered {
            let (parent, name) = self.volume.place_of(at)?;
            if parent == moving {
                let (parent, name) = if at == into {
                    (parent, name)
                } else {
                    self.volume.place_of(into)?
                };
                return self.recover(parent, &name, into);
            }
            at = parent;
        }
        Ok(())
    }

    /// Footholds are not needed any more; what is here and unknown is kept aside.
    fn clear_staging(&mut self) -> Step<()> {
        for name in self.volume.list(self.staging)? {
            if is_note(&name) {
                continue;
            }
            let Some(there) = self.volume.lookup(self.staging, &name)? else {
                continue;
            };
            let Some(stat) = self.volume.stat(there)? else {
                continue;
            };
            if !stat.is_directory() && stat.links > 1 {
                self.volume.unlink(self.staging, &name)?;
            } else {
                let (what, staging) = (name.escape_ascii(), STAGING.escape_ascii());
                self.outcome
                    .warnings
                    .push(if self.planned.contains_key(&there) {
                        format!("{what} is kept aside: something after the cut had taken its place")
                    } else {
                        format!("{what} was left in {staging} by an earlier replay")
                    });
                self.recover(self.staging, &name, there)?;
            }
        }
        Ok(())
    }
}
