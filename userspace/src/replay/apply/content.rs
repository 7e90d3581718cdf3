//! Bytes, sizes, owners, modes and times.

use super::{Apply, Found, Stage};
use crate::ids::Identity;
use crate::replay::extents::{END, Source};
use crate::replay::plan::{Inode, Kind, Told};
use crate::replay::volume::{Stat, Step, Volume};

/// Most bytes of one write, so that progress can be told and an interruption waits for no more.
const WRITE_BYTES_MAX: usize = 1 << 20;

impl<'a, V: Volume> Apply<'_, 'a, V> {
    /// Writes bytes and sizes.
    pub(super) fn content(&mut self) -> Step<()> {
        let plan = self.plan;
        let total = plan.bytes();
        for (identity, inode) in &plan.inodes {
            let Some(disk) = self.on_disk(*identity) else {
                continue;
            };
            let made = matches!(self.found.get(identity), Some(Found::Made(_)));
            let size = wanted(inode.size, made);
            if size.is_none() && inode.content.is_empty() {
                continue;
            }
            let Some(stat) = self.volume.stat(disk)? else {
                continue;
            };
            if !stat.is_file() {
                self.outcome.warnings.push(format!(
                    "the log has bytes or a size for inode {identity}, which is no regular file"
                ));
                continue;
            }
            if made && stat.size == 0 {
                self.set_in_place(disk, inode)?;
            }
            self.fill(disk, inode, &stat, made, total)?;
        }
        self.tell(Stage::Content, self.outcome.bytes_written, total);
        Ok(())
    }

    fn fill(
        &mut self,
        disk: Identity,
        inode: &Inode<'a>,
        stat: &Stat,
        made: bool,
        total: u64,
    ) -> Step<()> {
        let mut changed = false;
        let mut size_now = stat.size;
        let size = wanted(inode.size, made);
        if size.is_some() || inode.content.iter().any(|(_, s)| made || !s.confirmed) {
            self.keep_capability(disk, inode, made)?;
        }
        for (start, segment) in inode.content.iter() {
            if segment.confirmed && !made {
                continue;
            }
            match segment.source {
                Source::Zero => {
                    let end = segment.end.min(size_now);
                    if start < end {
                        self.volume.zero(disk, start, end)?;
                        changed = true;
                    }
                }
                Source::Bytes(bytes) => {
                    let mut at = start;
                    for piece in bytes.chunks(WRITE_BYTES_MAX) {
                        self.volume.write(disk, at, piece)?;
                        at += piece.len() as u64;
                        self.outcome.bytes_written += piece.len() as u64;
                        self.tell(Stage::Content, self.outcome.bytes_written, total);
                    }
                    size_now = size_now.max(at);
                    changed = true;
                }
            }
        }
        if let Some(size) = size.and_then(|size| size.to_set(size_now))
            && size <= END
        {
            self.volume.set_size(disk, size)?;
            changed = true;
        }
        if changed {
            self.written.insert(disk);
            self.outcome.files_written += 1;
        }
        Ok(())
    }

    /// Sets owners, modes and times: files first, directories last.
    pub(super) fn attributes(&mut self) -> Step<()> {
        let plan = self.plan;
        let total = plan.inodes.len() as u64;
        let mut done = 0u64;
        let mut directories = Vec::new();
        for (identity, inode) in &plan.inodes {
            done += 1;
            if done.is_multiple_of(1024) {
                self.tell(Stage::Attributes, done, total);
            }
            let Some(disk) = self.on_disk(*identity) else {
                continue;
            };
            let Some(stat) = self.volume.stat(disk)? else {
                continue;
            };
            let made = matches!(self.found.get(identity), Some(Found::Made(_)));
            // A new owner takes capabilities and set-user-ID bits away, and an ACL sets permissions: so the
            // owner comes first, and the mode, whose group bits are also the ACL's mask, last.
            let owner_changed = self.owner(disk, inode, &stat, made)?;
            self.extended(disk, inode, made)?;
            self.mode(disk, inode, &stat, made, owner_changed)?;
            if stat.is_directory() {
                directories.push((disk, inode));
            } else {
                self.file_times(disk, inode, &stat, made)?;
            }
            self.check_links(*identity, inode, &stat);
        }
        for (disk, inode) in directories {
            // A later change of a directory always has its own record, so what was told last is right
            // whether or not it was confirmed; what replay itself did to the time must not stay.
            let mtime = inode.mtime_ns.map(|told| told.value);
            if mtime.is_some() || inode.atime_ns.is_some() {
                self.volume
                    .set_times(disk, inode.atime_ns.map(|t| t.value), mtime)?;
            }
            if mtime.is_some() {
                self.touched.remove(&disk);
            }
        }
        for (directory, mtime_ns) in std::mem::take(&mut self.touched) {
            if self.volume.stat(directory)?.is_some() {
                self.volume.set_times(directory, None, Some(mtime_ns))?;
            }
        }
        self.tell(Stage::Attributes, total, total);
        Ok(())
    }

    fn owner(&mut self, disk: Identity, inode: &Inode<'a>, stat: &Stat, made: bool) -> Step<bool> {
        if let Some((uid, gid)) = wanted(inode.owner, made)
            && (uid, gid) != (stat.uid, stat.gid)
        {
            self.volume.set_owner(disk, uid, gid)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// `stat` is from before any attribute was set.
    fn mode(
        &mut self,
        disk: Identity,
        inode: &Inode<'a>,
        stat: &Stat,
        made: bool,
        owner_changed: bool,
    ) -> Step<()> {
        let is_symlink = stat.mode & 0o170_000 == 0o120_000;
        // Writing and changing the owner clear set-user-ID bits, so what must stay is set again.
        let mode = wanted(inode.mode, made).or_else(|| {
            let disturbed = owner_changed || self.written.contains(&disk);
            disturbed.then(|| inode.mode.map_or(stat.mode, |told| told.value))
        });
        if let Some(mode) = mode
            && !is_symlink
            && let Some(now) = self.volume.stat(disk)?
            && mode & 0o7777 != now.mode & 0o7777
        {
            self.volume.set_permissions(disk, mode)?;
        }
        Ok(())
    }

    fn file_times(
        &mut self,
        disk: Identity,
        inode: &Inode<'a>,
        stat: &Stat,
        made: bool,
    ) -> Step<()> {
        let mut mtime = wanted(inode.mtime_ns, made);
        if mtime.is_none() && self.written.contains(&disk) {
            mtime = inode.mtime_ns.map(|told| told.value);
        }
        let atime = wanted(inode.atime_ns, made);
        if atime.is_some() || mtime.is_some_and(|mtime| mtime != stat.mtime_ns) {
            self.volume.set_times(disk, atime, mtime)?;
        }
        Ok(())
    }

    fn check_links(&mut self, identity: Identity, inode: &Inode<'a>, stat: &Stat) {
        let Some(told) = inode.links else { return };
        if !inode.dead && !stat.is_directory() && told != 0 && told != stat.links {
            self.outcome.warnings.push(format!(
                "inode {identity} has {} names, the log tells {told}: something after the cut gave or took one",
                stat.links
            ));
        }
        if self.made_kind(identity) == Some(Kind::Directory) && !stat.is_directory() {
            self.outcome.warnings.push(format!(
                "inode {identity} is not the directory the log made"
            ));
        }
    }
}

/// What must be set: what was told, unless a mark proved it durable and the inode is still the old one.
fn wanted<T: Copy>(told: Option<Told<T>>, made: bool) -> Option<T> {
    told.filter(|told| made || !told.confirmed)
        .map(|told| told.value)
}
