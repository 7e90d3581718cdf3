//! The mounted volume as replay sees it.

use std::collections::BTreeMap;
use std::io;

use twinwrite::ids::Identity;
use twinwrite::record::extended::InodeFlags;
use twinwrite::replay::plan::Kind;
use twinwrite::replay::volume::{Stamp, Stat, Step, Volume, VolumeError};

use crate::disk::Disk;
use crate::history::blocks_of;
use crate::image::{BLOCK_BYTES, Inode, Mutation, ROOT, Version};
use crate::kernel::Kernel;

/// A kernel's mount, changed by replay.
pub struct Mounted<'a> {
    /// The kernel.
    pub kernel: &'a mut Kernel,
    /// The disk under it.
    pub disk: &'a mut Disk,
    /// The last mutation's number.
    pub version: &'a mut Version,
    /// Changing steps until the machine dies.
    pub budget: Option<usize>,
    /// A sync writes back and commits, and does not flush.
    pub lazy: bool,
    /// The file system tells when an inode was made.
    pub births: bool,
}

fn error(what: &str, code: i32) -> VolumeError {
    VolumeError {
        what: what.to_owned(),
        source: io::Error::from_raw_os_error(code),
    }
}

impl Mounted<'_> {
    fn spend(&mut self) -> Step<()> {
        match &mut self.budget {
            Some(0) => Err(error("the machine died", libc::EIO)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn change(&mut self, mutation: &Mutation) -> Step<()> {
        self.spend()?;
        self.kernel.mutate(mutation, (self.disk, self.version));
        Ok(())
    }

    fn known(&self, inode: Identity) -> Step<&Inode> {
        let found = self.kernel.live.inodes.get(&inode);
        found.ok_or_else(|| error(&format!("inode {inode}"), libc::ESTALE))
    }

    fn free(&self, directory: Identity, name: &[u8]) -> Step<()> {
        if !self.known(directory)?.directory {
            return Err(error("no directory", libc::ENOTDIR));
        }
        match self.kernel.live.lookup(directory, name) {
            Some(_) => Err(error("name taken", libc::EEXIST)),
            None => Ok(()),
        }
    }

    fn forget_dead(&mut self, inode: Identity) {
        if self.known(inode).is_ok_and(|node| node.links == 0) {
            self.kernel.live.inodes.remove(&inode);
        }
    }
}

impl Volume for Mounted<'_> {
    fn root(&mut self) -> Step<Identity> {
        Ok(ROOT)
    }

    fn stat(&mut self, inode: Identity) -> Step<Option<Stat>> {
        let node = self.kernel.live.inodes.get(&inode).filter(|n| n.links > 0);
        Ok(node.map(|node| Stat {
            mode: node.full_mode(),
            links: node.links,
            uid: node.uid.value,
            gid: 0,
            size: node.size_bytes(),
            mtime_ns: node.mtime_ns.value,
            born_ns: self.births.then_some(node.made as i64),
            is_locked: false,
        }))
    }

    fn lookup(&mut self, directory: Identity, name: &[u8]) -> Step<Option<Identity>> {
        self.known(directory)?;
        Ok(self.kernel.live.lookup(directory, name))
    }

    fn list(&mut self, directory: Identity) -> Step<Vec<Vec<u8>>> {
        Ok(self
            .known(directory)?
            .names()
            .map(|(name, _)| name.clone())
            .collect())
    }

    fn place_of(&mut self, directory: Identity) -> Step<(Identity, Vec<u8>)> {
        let place = self.kernel.live.place_of(directory);
        place.ok_or_else(|| error("place", libc::ENOENT))
    }

    fn stamp(&mut self, inode: Identity) -> Step<Option<Stamp>> {
        Ok(self.known(inode)?.stamp)
    }

    fn create(&mut self, directory: Identity, name: &[u8], kind: Kind<'_>) -> Step<Identity> {
        self.free(directory, name)?;
        let inode = self.kernel.allocate();
        let directory_made = kind == Kind::Directory;
        self.change(&Mutation::Create {
            inode,
            directory: directory_made,
            mode: 0o600,
            place: Some((directory, name.to_vec())),
        })?;
        Ok(inode)
    }

    fn pass_on_project(&mut self, _: Identity, _: Option<Identity>) -> Step<()> {
        Ok(())
    }

    fn set_stamp(&mut self, inode: Identity, stamp: Option<Stamp>) -> Step<()> {
        self.known(inode)?;
        self.change(&Mutation::Stamp { inode, stamp })
    }

    fn link(&mut self, inode: Identity, directory: Identity, name: &[u8]) -> Step<()> {
        self.free(directory, name)?;
        let node = self.known(inode)?;
        if node.directory || node.links == 0 {
            return Err(error("link", libc::EPERM));
        }
        let place = (directory, name.to_vec());
        self.change(&Mutation::Link { inode, place })
    }

    fn rename(&mut self, from: (Identity, &[u8]), to: (Identity, &[u8])) -> Step<()> {
        self.free(to.0, to.1)?;
        let inode = self.lookup(from.0, from.1)?;
        let inode = inode.ok_or_else(|| error("rename", libc::ENOENT))?;
        if self.known(inode)?.directory && self.kernel.live.contains(inode, to.0) {
            return Err(error("rename into itself", libc::EINVAL));
        }
        self.change(&Mutation::Rename {
            inode,
            from: (from.0, from.1.to_vec()),
            to: (to.0, to.1.to_vec()),
            victim: None,
        })
    }

    fn unlink(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        let inode = self.lookup(directory, name)?;
        let inode = inode.ok_or_else(|| error("unlink", libc::ENOENT))?;
        if self.known(inode)?.directory {
            return Err(error("unlink", libc::EISDIR));
        }
        let place = (directory, name.to_vec());
        self.change(&Mutation::Unlink { inode, place })?;
        self.forget_dead(inode);
        Ok(())
    }

    fn remove_directory(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        let inode = self.lookup(directory, name)?;
        let inode = inode.ok_or_else(|| error("rmdir", libc::ENOENT))?;
        let node = self.known(inode)?;
        if !node.directory {
            return Err(error("rmdir", libc::ENOTDIR));
        }
        if node.names().next().is_some() {
            return Err(error("rmdir", libc::ENOTEMPTY));
        }
        let place = (directory, name.to_vec());
        self.change(&Mutation::Unlink { inode, place })?;
        self.forget_dead(inode);
        Ok(())
    }

    fn write(&mut self, inode: Identity, offset: u64, bytes: &[u8]) -> Step<()> {
        self.known(inode)?;
        self.change(&Mutation::Write {
            inode,
            first: offset as usize / BLOCK_BYTES,
            blocks: blocks_of(bytes),
            stamped: true,
        })
    }

    fn zero(&mut self, inode: Identity, start: u64, end: u64) -> Step<()> {
        if end > self.known(inode)?.size_bytes() || start >= end {
            return Err(error("zero beyond the size", libc::EINVAL));
        }
        self.change(&Mutation::Write {
            inode,
            first: start as usize / BLOCK_BYTES,
            blocks: vec![0; (end - start) as usize / BLOCK_BYTES],
            stamped: true,
        })
    }

    fn set_size(&mut self, inode: Identity, size: u64) -> Step<()> {
        self.known(inode)?;
        let size = size as usize / BLOCK_BYTES;
        self.change(&Mutation::Truncate { inode, size })
    }

    fn set_owner(&mut self, inode: Identity, uid: u32, _: u32) -> Step<()> {
        self.known(inode)?;
        self.change(&Mutation::Chown { inode, uid })
    }

    fn set_permissions(&mut self, inode: Identity, mode: u32) -> Step<()> {
        self.known(inode)?;
        let mode = mode & 0o7777;
        self.change(&Mutation::Chmod { inode, mode })
    }

    fn set_times(&mut self, inode: Identity, _: Option<i64>, mtime_ns: Option<i64>) -> Step<()> {
        self.known(inode)?;
        match mtime_ns {
            Some(mtime_ns) => self.change(&Mutation::Times { inode, mtime_ns }),
            None => Ok(()),
        }
    }

    fn attributes(&mut self, _: Identity) -> Step<BTreeMap<Vec<u8>, Vec<u8>>> {
        Ok(BTreeMap::new())
    }

    fn set_attribute(&mut self, _: Identity, _: &[u8], _: Option<&[u8]>) -> Step<()> {
        Err(error("attributes", libc::EOPNOTSUPP))
    }

    fn flags(&mut self, _: Identity) -> Step<Option<InodeFlags>> {
        Ok(None)
    }

    fn set_flags(&mut self, _: Identity, _: InodeFlags) -> Step<()> {
        Err(error("flags", libc::EOPNOTSUPP))
    }

    fn sync(&mut self) -> Step<()> {
        self.spend()?;
        self.kernel.sync_all(self.disk);
        self.disk.commit(*self.version);
        if !self.lazy {
            self.disk.flush();
        }
        Ok(())
    }
}
