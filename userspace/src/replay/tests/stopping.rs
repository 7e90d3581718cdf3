//! A volume that stops working after some changing steps.

use std::collections::BTreeMap;
use std::io;

use crate::ids::Identity;
use crate::record::extended::InodeFlags;
use crate::replay::plan::Kind;
use crate::replay::volume::{Stamp, Stat, Step, Volume, VolumeError};

/// Lets `left` changing steps through, then fails each.
pub(super) struct Stopping<V> {
    pub(super) volume: V,
    pub(super) left: u64,
    pub(super) taken: u64,
}

impl<V> Stopping<V> {
    pub(super) fn new(volume: V, left: u64) -> Self {
        Self {
            volume,
            left,
            taken: 0,
        }
    }

    fn spend(&mut self) -> Step<()> {
        if self.taken == self.left {
            let source = io::Error::from_raw_os_error(libc::EINTR);
            return Err(VolumeError {
                what: String::from("stopped"),
                source,
            });
        }
        self.taken += 1;
        Ok(())
    }
}

impl<V: Volume> Volume for Stopping<V> {
    fn root(&mut self) -> Step<Identity> {
        self.volume.root()
    }

    fn stat(&mut self, inode: Identity) -> Step<Option<Stat>> {
        self.volume.stat(inode)
    }

    fn lookup(&mut self, directory: Identity, name: &[u8]) -> Step<Option<Identity>> {
        self.volume.lookup(directory, name)
    }

    fn list(&mut self, directory: Identity) -> Step<Vec<Vec<u8>>> {
        self.volume.list(directory)
    }

    fn place_of(&mut self, directory: Identity) -> Step<(Identity, Vec<u8>)> {
        self.volume.place_of(directory)
    }

    fn stamp(&mut self, inode: Identity) -> Step<Option<Stamp>> {
        self.volume.stamp(inode)
    }

    fn create(&mut self, directory: Identity, name: &[u8], kind: Kind<'_>) -> Step<Identity> {
        self.spend()?;
        self.volume.create(directory, name, kind)
    }

    fn pass_on_project(&mut self, directory: Identity, like: Option<Identity>) -> Step<()> {
        self.volume.pass_on_project(directory, like)
    }

    fn set_stamp(&mut self, inode: Identity, stamp: Option<Stamp>) -> Step<()> {
        self.spend()?;
        self.volume.set_stamp(inode, stamp)
    }

    fn link(&mut self, inode: Identity, directory: Identity, name: &[u8]) -> Step<()> {
        self.spend()?;
        self.volume.link(inode, directory, name)
    }

    fn rename(&mut self, from: (Identity, &[u8]), to: (Identity, &[u8])) -> Step<()> {
        self.spend()?;
        self.volume.rename(from, to)
    }

    fn unlink(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        self.spend()?;
        self.volume.unlink(directory, name)
    }

    fn remove_directory(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        self.spend()?;
        self.volume.remove_directory(directory, name)
    }

    fn write(&mut self, inode: Identity, offset: u64, bytes: &[u8]) -> Step<()> {
        self.spend()?;
        self.volume.write(inode, offset, bytes)
    }

    fn zero(&mut self, inode: Identity, start: u64, end: u64) -> Step<()> {
        self.spend()?;
        self.volume.zero(inode, start, end)
    }

    fn set_size(&mut self, inode: Identity, size: u64) -> Step<()> {
        self.spend()?;
        self.volume.set_size(inode, size)
    }

    fn set_owner(&mut self, inode: Identity, uid: u32, gid: u32) -> Step<()> {
        self.spend()?;
        self.volume.set_owner(inode, uid, gid)
    }

    fn set_permissions(&mut self, inode: Identity, mode: u32) -> Step<()> {
        self.spend()?;
        self.volume.set_permissions(inode, mode)
    }

    fn set_times(
        &mut self,
        inode: Identity,
        atime_ns: Option<i64>,
        mtime_ns: Option<i64>,
    ) -> Step<()> {
        self.spend()?;
        self.volume.set_times(inode, atime_ns, mtime_ns)
    }

    fn attributes(&mut self, inode: Identity) -> Step<BTreeMap<Vec<u8>, Vec<u8>>> {
        self.volume.attributes(inode)
    }

    fn set_attribute(&mut self, inode: Identity, name: &[u8], value: Option<&[u8]>) -> Step<()> {
        self.spend()?;
        self.volume.set_attribute(inode, name, value)
    }

    fn flags(&mut self, inode: Identity) -> Step<Option<InodeFlags>> {
        self.volume.flags(inode)
    }

    fn set_flags(&mut self, inode: Identity, flags: InodeFlags) -> Step<()> {
        self.spend()?;
        self.volume.set_flags(inode, flags)
    }

    fn sync(&mut self) -> Step<()> {
        self.spend()?;
        self.volume.sync()
    }
}
