//! A mounted ext4, XFS or btrfs file system as a [`Volume`].
//!
//! Files are reached by handle, never by path; names are used only within a directory that was
//! reached by handle. It must never follow a symlink or leave the mounted file system.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, StatxAttributes,
    StatxFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};

use super::plan::Kind;
use super::volume::{Stamp, Stat, Step, Volume, VolumeError};
use crate::capture::extended;
use crate::capture::handle::{self, Project};
use crate::ids::{Epoch, Identity};
use crate::record::extended::{InodeFlags, VALUE_BYTES_MAX};

/// Holds the [`Stamp`] of an inode that replay made: `epoch ino generation` in decimal.
pub const STAMP_ATTRIBUTE: &str = "trusted.twinwrite.identity";

/// A mounted file system.
#[derive(Debug)]
pub struct Disk {
    mount: PathBuf,
    root_fd: OwnedFd,
    root: Identity,
    /// The directory and the file used last, so that runs of steps on one do not open it each time.
    directory: Option<(Identity, OwnedFd)>,
    file: Option<(Identity, File)>,
}

fn failed<E: Into<io::Error>>(what: impl FnOnce() -> String) -> impl FnOnce(E) -> VolumeError {
    move |source| VolumeError {
        what: what(),
        source: source.into(),
    }
}

fn printable(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

fn c_name(name: &[u8]) -> Step<CString> {
    CString::new(name).map_err(failed(|| format!("name {}", printable(name))))
}

impl Disk {
    /// Opens the file system mounted at `mount`.
    ///
    /// # Errors
    /// When it cannot be opened, or is of a type whose file handles are not known.
    pub fn open(mount: &Path) -> Step<Self> {
        let what = || format!("open {}", mount.display());
        let root_fd = rustix::fs::open(
            mount,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(failed(what))?;
        let root = handle::identity_of(&root_fd).map_err(failed(what))?;
        Ok(Self {
            mount: mount.to_owned(),
            root_fd,
            root,
            directory: None,
            file: None,
        })
    }

    fn find(&self, inode: Identity, flags: i32) -> Step<Option<OwnedFd>> {
        handle::open(&self.root_fd, inode, flags).map_err(failed(|| {
            format!("open inode {inode} of {}", self.mount.display())
        }))
    }

    fn must_find(&self, inode: Identity, flags: i32) -> Step<OwnedFd> {
        self.find(inode, flags)?.ok_or_else(|| VolumeError {
            what: format!("inode {inode} of {}", self.mount.display()),
            source: io::Error::from_raw_os_error(libc::ESTALE),
        })
    }

    fn directory(&mut self, inode: Identity) -> Step<&OwnedFd> {
        if self
            .directory
            .as_ref()
            .is_none_or(|(held, _)| *held != inode)
        {
            self.directory = None;
            let fd = self.must_find(inode, libc::O_RDONLY | libc::O_DIRECTORY)?;
            self.directory = Some((inode, fd));
        }
        match &self.directory {
            Some((_, fd)) => Ok(fd),
            None => Ok(&self.root_fd),
        }
    }

    fn file(&mut self, inode: Identity) -> Step<&File> {
        if self.file.as_ref().is_none_or(|(held, _)| *held != inode) {
            self.file = None;
            let fd = self.must_find(inode, libc::O_RDWR | libc::O_NOFOLLOW | libc::O_LARGEFILE)?;
            self.file = Some((inode, fd.into()));
        }
        match &self.file {
            Some((_, file)) => Ok(file),
            None => Err(VolumeError {
                what: format!("inode {inode}"),
                source: io::Error::from_raw_os_error(libc::ESTALE),
            }),
        }
    }

    fn path_fd(&self, inode: Identity) -> Step<OwnedFd> {
        self.must_find(inode, libc::O_PATH | libc::O_NOFOLLOW)
    }

    fn project(&mut self, directory: Identity) -> Step<Project> {
        let fd = self.directory(directory)?;
        handle::project_of(fd).map_err(failed(|| {
            format!("read the quota project of directory {directory}")
        }))
    }

    /// Gives an inode the quota project that a directory demands of its entries. That takes a descriptor on
    /// which an ioctl reaches the file system: symlinks and special files have none.
    fn adopt(&mut self, inode: Identity, directory: Identity) -> Step<()> {
        let what = || format!("give inode {inode} the quota project of directory {directory}");
        let wanted = self.project(directory)?;
        let is_directory = match self.stat(inode)? {
            Some(stat) if stat.is_directory() => true,
            Some(stat) if stat.is_file() => false,
            _ => return Err(failed(what)(io::Error::from_raw_os_error(libc::EXDEV))),
        };
        let fd = self.must_find(inode, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW)?;
        let project = Project {
            number: wanted.number,
            passed_on: wanted.passed_on && is_directory,
        };
        handle::set_project(&fd, project).map_err(failed(what))
    }

    fn link_as_it_is(&mut self, inode: Identity, directory: Identity, name: &[u8]) -> Step<()> {
        let file = self.path_fd(inode)?;
        let fd = self.directory(directory)?;
        rustix::fs::linkat(&file, "", fd, name, AtFlags::EMPTY_PATH).map_err(failed(|| {
            format!("link inode {inode} to {directory}/{}", printable(name))
        }))
    }

    fn rename_as_it_is(&mut self, from: (Identity, &[u8]), to: (Identity, &[u8])) -> Step<()> {
        let source = self.must_find(from.0, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let target = self.directory(to.0)?;
        rustix::fs::renameat_with(&source, from.1, target, to.1, RenameFlags::NOREPLACE).map_err(
            failed(|| {
                let (from_name, to_name) = (printable(from.1), printable(to.1));
                format!("rename {}/{from_name} to {}/{to_name}", from.0, to.0)
            }),
        )
    }

    fn make(&mut self, directory: Identity, name: &[u8], kind: Kind<'_>) -> io::Result<()> {
        let fd = self.directory(directory).map_err(|e| e.source)?;
        let private = Mode::RUSR | Mode::WUSR;
        match kind {
            Kind::File => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(fd, name, flags, private)?;
            }
            Kind::Directory => rustix::fs::mkdirat(fd, name, private | Mode::XUSR)?,
            Kind::Symlink(target) => {
                rustix::fs::symlinkat(OsStr::from_bytes(target), fd, OsStr::from_bytes(name))?;
            }
            Kind::Special { format, rdev } => {
                let device = rustix::fs::makedev(rdev >> 20, rdev & 0xf_ffff);
                let kind = FileType::from_raw_mode(format);
                rustix::fs::mknodat(fd, name, kind, private, device)?;
            }
        }
        Ok(())
    }

    /// Whether the file system has room for more than an inode's attributes can take.
    fn has_free_blocks(&self) -> bool {
        const ENOUGH_BYTES: u64 = 1 << 20;
        rustix::fs::fstatvfs(&self.root_fd)
            .is_ok_and(|info| info.f_bfree.saturating_mul(info.f_frsize) > ENOUGH_BYTES)
    }
}

impl Volume for Disk {
    fn root(&mut self) -> Step<Identity> {
        Ok(self.root)
    }

    fn stat(&mut self, inode: Identity) -> Step<Option<Stat>> {
        let Some(fd) = self.find(inode, libc::O_PATH | libc::O_NOFOLLOW)? else {
            return Ok(None);
        };
        let what = || format!("stat inode {inode}");
        let s = rustix::fs::fstat(&fd).map_err(failed(what))?;
        let (flags, mask) = (AtFlags::EMPTY_PATH, StatxFlags::BTIME);
        let x = rustix::fs::statx(&fd, c"", flags, mask).map_err(failed(what))?;
        let locks = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
        let is_born = StatxFlags::from_bits_retain(x.stx_mask).contains(StatxFlags::BTIME);
        Ok(Some(Stat {
            mode: s.st_mode,
            links: u32::try_from(s.st_nlink).unwrap_or(u32::MAX),
            uid: s.st_uid,
            gid: s.st_gid,
            size: u64::try_from(s.st_size).unwrap_or(0),
            mtime_ns: join_ns(s.st_mtime, i64::try_from(s.st_mtime_nsec).unwrap_or(0)),
            born_ns: is_born.then(|| join_ns(x.stx_btime.tv_sec, x.stx_btime.tv_nsec.into())),
            is_locked: x.stx_attributes.intersects(locks),
        }))
    }

    fn lookup(&mut self, directory: Identity, name: &[u8]) -> Step<Option<Identity>> {
        let c_name = c_name(name)?;
        let fd = self.directory(directory)?;
        handle::identity_at(fd, &c_name).map_err(failed(|| {
            format!("look up {directory}/{}", printable(name))
        }))
    }

    fn list(&mut self, directory: Identity) -> Step<Vec<Vec<u8>>> {
        let what = || format!("list directory {directory}");
        let fd = self.directory(directory)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(fd).map_err(failed(what))? {
            let entry = entry.map_err(failed(what))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        Ok(names)
    }

    fn place_of(&mut self, directory: Identity) -> Step<(Identity, Vec<u8>)> {
        let what = || format!("find the parent of directory {directory}");
        let fd = self.directory(directory)?;
        // The kernel connects a directory opened by handle to its path, and knows its name.
        let path = std::fs::read_link(handle::magic_path(fd)).map_err(failed(what))?;
        let parent_fd = rustix::fs::openat(fd, "..", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed(what))?;
        let parent = handle::identity_of(&parent_fd).map_err(failed(what))?;
        let guess = path.file_name().map(|n| n.as_bytes().to_vec());
        if let Some(name) = guess
            && self.lookup(parent, &name)? == Some(directory)
        {
            return Ok((parent, name));
        }
        for name in self.list(parent)? {
            if self.lookup(parent, &name)? == Some(directory) {
                return Ok((parent, name));
            }
        }
        Err(failed(what)(io::Error::from_raw_os_error(libc::ENOENT)))
    }

    fn stamp(&mut self, inode: Identity) -> Step<Option<Stamp>> {
        let fd = self.path_fd(inode)?;
        let mut text = [0; 128];
        match rustix::fs::getxattr(handle::magic_path(&fd), STAMP_ATTRIBUTE, &mut text[..]) {
            Ok(len) => Ok(parse_stamp(text.get(..len).unwrap_or(&[]))),
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::RANGE) => Ok(None),
            Err(error) => Err(failed(|| {
                format!("read {STAMP_ATTRIBUTE} of inode {inode}")
            })(error)),
        }
    }

    fn create(&mut self, directory: Identity, name: &[u8], kind: Kind<'_>) -> Step<Identity> {
        let what = || format!("create {directory}/{}", printable(name));
        self.make(directory, name, kind).map_err(failed(what))?;
        self.lookup(directory, name)?
            .ok_or_else(|| failed(what)(io::Error::from_raw_os_error(libc::ENOENT)))
    }

    fn set_stamp(&mut self, inode: Identity, stamp: Option<Stamp>) -> Step<()> {
        let what = || format!("set {STAMP_ATTRIBUTE} of inode {inode}");
        let fd = self.path_fd(inode)?;
        let path = handle::magic_path(&fd);
        match stamp {
            Some(Stamp { epoch, identity }) => {
                let text = format!("{epoch} {} {}", identity.ino, identity.generation);
                rustix::fs::setxattr(path, STAMP_ATTRIBUTE, text.as_bytes(), XattrFlags::empty())
                    .map_err(failed(what))
            }
            None => match rustix::fs::removexattr(path, STAMP_ATTRIBUTE) {
                Ok(()) | Err(rustix::io::Errno::NODATA) => Ok(()),
                Err(error) => Err(failed(what)(error)),
            },
        }
    }

    fn pass_on_project(&mut self, directory: Identity, like: Option<Identity>) -> Step<()> {
        let wanted = match like {
            Some(like) => self.project(like)?,
            None => Project::default(),
        };
        let now = self.project(directory)?;
        if now == wanted || !(now.passed_on || wanted.passed_on) {
            return Ok(());
        }
        let fd = self.directory(directory)?;
        handle::set_project(fd, wanted).map_err(failed(|| {
            format!("set the quota project of directory {directory}")
        }))
    }

    fn link(&mut self, inode: Identity, directory: Identity, name: &[u8]) -> Step<()> {
        match self.link_as_it_is(inode, directory, name) {
            Err(error) if error.is_of_another_project() => {
                self.adopt(inode, directory)?;
                self.link_as_it_is(inode, directory, name)
            }
            other => other,
        }
    }

    fn rename(&mut self, from: (Identity, &[u8]), to: (Identity, &[u8])) -> Step<()> {
        match self.rename_as_it_is(from, to) {
            Err(error) if error.is_of_another_project() => {
                if let Some(inode) = self.lookup(from.0, from.1)? {
                    self.adopt(inode, to.0)?;
                }
                self.rename_as_it_is(from, to)
            }
            other => other,
        }
    }

    fn unlink(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        let fd = self.directory(directory)?;
        rustix::fs::unlinkat(fd, name, AtFlags::empty())
            .map_err(failed(|| format!("unlink {directory}/{}", printable(name))))
    }

    fn remove_directory(&mut self, directory: Identity, name: &[u8]) -> Step<()> {
        let fd = self.directory(directory)?;
        rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR).map_err(failed(|| {
            format!("remove directory {directory}/{}", printable(name))
        }))
    }

    fn write(&mut self, inode: Identity, offset: u64, bytes: &[u8]) -> Step<()> {
        self.file(inode)?
            .write_all_at(bytes, offset)
            .map_err(failed(|| {
                format!("write {} bytes at {offset} of {inode}", bytes.len())
            }))
    }

    fn zero(&mut self, inode: Identity, start: u64, end: u64) -> Step<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.file(inode)?.as_fd(), flags, start, end - start)
            .map_err(failed(|| format!("zero {start}..{end} of inode {inode}")))
    }

    fn set_size(&mut self, inode: Identity, size: u64) -> Step<()> {
        self.file(inode)?.set_len(size).map_err(failed(|| {
            format!("set the size of inode {inode} to {size}")
        }))
    }

    fn set_owner(&mut self, inode: Identity, uid: u32, gid: u32) -> Step<()> {
        let fd = self.path_fd(inode)?;
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(&fd, "", uid, gid, AtFlags::EMPTY_PATH)
            .map_err(failed(|| format!("set the owner of inode {inode}")))
    }

    fn set_permissions(&mut self, inode: Identity, mode: u32) -> Step<()> {
        let fd = self.path_fd(inode)?;
        rustix::fs::chmod(handle::magic_path(&fd), Mode::from_raw_mode(mode & 0o7777))
            .map_err(failed(|| format!("set the mode of inode {inode}")))
    }

    fn set_times(
        &mut self,
        inode: Identity,
        atime_ns: Option<i64>,
        mtime_ns: Option<i64>,
    ) -> Step<()> {
        let fd = self.path_fd(inode)?;
        let times = Timestamps {
            last_access: timespec(atime_ns),
            last_modification: timespec(mtime_ns),
        };
        rustix::fs::utimensat(&fd, "", &times, AtFlags::EMPTY_PATH)
            .map_err(failed(|| format!("set the times of inode {inode}")))
    }

    fn attributes(&mut self, inode: Identity) -> Step<BTreeMap<Vec<u8>, Vec<u8>>> {
        let attributes = extended::read_attributes(&self.root_fd, inode).map_err(failed(|| {
            format!("read the extended attributes of inode {inode}")
        }))?;
        Ok(attributes.unwrap_or_default())
    }

    fn attribute(&mut self, inode: Identity, name: &[u8]) -> Step<Option<Vec<u8>>> {
        let fd = self.path_fd(inode)?;
        let mut value = vec![0; VALUE_BYTES_MAX];
        match rustix::fs::getxattr(handle::magic_path(&fd), name, &mut value[..]) {
            Ok(len) => {
                value.truncate(len);
                Ok(Some(value))
            }
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(failed(|| {
                format!("read the attribute {} of inode {inode}", printable(name))
            })(error)),
        }
    }

    fn set_attribute(&mut self, inode: Identity, name: &[u8], value: Option<&[u8]>) -> Step<()> {
        let answer = extended::set_attribute(&self.root_fd, inode, name, value).map_err(|error| {
            let is_full = error.raw_os_error() == Some(libc::ENOSPC);
            if is_full && self.has_free_blocks() {
                // The inode's own room for attributes is full: no more space on the volume would help.
                io::Error::from_raw_os_error(libc::E2BIG)
            } else {
                error
            }
        });
        answer.map_err(failed(|| {
            format!("set the attribute {} of inode {inode}", printable(name))
        }))
    }

    fn flags(&mut self, inode: Identity) -> Step<Option<InodeFlags>> {
        extended::read_flags(&self.root_fd, inode)
            .map_err(failed(|| format!("read the flags of inode {inode}")))
    }

    fn set_flags(&mut self, inode: Identity, flags: InodeFlags) -> Step<()> {
        // A descriptor that was opened for writing could write on.
        self.file = None;
        extended::set_flags(&self.root_fd, inode, flags)
            .map_err(failed(|| format!("set the flags of inode {inode}")))
    }

    fn sync(&mut self) -> Step<()> {
        self.file = None;
        rustix::fs::syncfs(&self.root_fd)
            .map_err(failed(|| format!("syncfs {}", self.mount.display())))
    }
}

fn parse_stamp(text: &[u8]) -> Option<Stamp> {
    let text = std::str::from_utf8(text).ok()?;
    let mut words = text.split(' ');
    let epoch = Epoch(words.next()?.parse().ok()?);
    let ino = words.next()?.parse().ok()?;
    let generation = words.next()?.parse().ok()?;
    words.next().is_none().then_some(Stamp {
        epoch,
        identity: Identity { ino, generation },
    })
}

fn join_ns(seconds: i64, nanoseconds: i64) -> i64 {
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

fn timespec(time_ns: Option<i64>) -> Timespec {
    match time_ns {
        Some(ns) => Timespec {
            tv_sec: ns.div_euclid(1_000_000_000),
            tv_nsec: ns.rem_euclid(1_000_000_000),
        },
        None => Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
    }
}
