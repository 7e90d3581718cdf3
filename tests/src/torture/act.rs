//! Carrying an operation out: names, attributes, descriptors. Bytes are [`super::bytes`]'s.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, lchown, symlink,
};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::linkat;
use rustix::fs::{IFlags, XattrFlags, ioctl_getflags, ioctl_setflags, lremovexattr, lsetxattr};

use super::action::{Acl, Action, RenameWay, Special, SyncWay, Target};
use super::bytes;
use crate::escape::PathBytes;
use crate::walk::COMPARED_FLAGS;

const NANOSECONDS: i64 = 1_000_000_000;

/// A thread's descriptors below one directory.
pub(super) struct Hands {
    root: PathBuf,
    open: Vec<Option<File>>,
}

impl Hands {
    pub(super) fn new(root: PathBuf, slots: usize) -> Self {
        let open = std::iter::repeat_with(|| None).take(slots).collect();
        Self { root, open }
    }

    pub(super) fn at(&self, path: &PathBytes) -> PathBuf {
        self.root.join(path.as_path())
    }

    /// What becomes of the operation is the system's answer, and of which nothing is changed by an error.
    pub(super) fn carry_out(&mut self, action: &Action) -> io::Result<()> {
        match action {
            Action::Create { path, mode } => {
                let mut options = OpenOptions::new();
                let options = options.write(true).create_new(true).mode(*mode);
                options.open(self.at(path)).map(drop)
            }
            Action::MakeDirectory { path, mode } => {
                DirBuilder::new().mode(*mode).create(self.at(path))
            }
            Action::MakeSpecial {
                path,
                special,
                mode,
            } => make_special(&self.at(path), *special, *mode),
            Action::MakeSymlink { path, target } => symlink(target.as_path(), self.at(path)),
            Action::Link { from, to } => fs::hard_link(self.at(from), self.at(to)),
            Action::Unlink { path } => fs::remove_file(self.at(path)),
            Action::RemoveDirectory { path } => fs::remove_dir(self.at(path)),
            Action::Rename { from, to, way } => rename(&self.at(from), &self.at(to), *way),
            Action::Open { .. }
            | Action::OpenUnnamed { .. }
            | Action::LinkOpen { .. }
            | Action::Close { .. } => self.descriptor(action),
            Action::ChangeMode { path, mode } => {
                fs::set_permissions(self.at(path), Permissions::from_mode(*mode))
            }
            Action::ChangeOwner { path, uid, gid } => lchown(self.at(path), Some(*uid), Some(*gid)),
            Action::SetTimes { path, mtime_ns } => set_times(&self.at(path), *mtime_ns),
            Action::SetXattr { path, name, fill } => {
                set_xattr(&self.at(path), name, &fill.content())
            }
            Action::RemoveXattr { path, name } => Ok(lremovexattr(self.at(path), *name)?),
            Action::SetAcl { path, acl } => {
                set_xattr(&self.at(path), Acl::ACCESS, &acl.value(Acl::mode(0)))
            }
            Action::SetFlags { path, flags } => {
                // To read: an immutable file is opened for nothing else.
                let file = opened(&self.at(path), OpenOptions::new().read(true), 0)?;
                let others = ioctl_getflags(&file)?.difference(COMPARED_FLAGS);
                let flags = others | IFlags::from_bits_retain(*flags);
                Ok(ioctl_setflags(&file, flags)?)
            }
            Action::Sync { target, way } => {
                let file = self.file(target, 0)?;
                match way {
                    SyncWay::All => file.sync_all(),
                    SyncWay::Data => file.sync_data(),
                    SyncWay::Volume => Ok(nix::unistd::syncfs(&*file)?),
                }
            }
            Action::Write { .. }
            | Action::Copy { .. }
            | Action::Reflink { .. }
            | Action::Store { .. }
            | Action::Resize { .. }
            | Action::Allocate { .. } => bytes::carry_out(self, action),
        }
    }

    /// The regular file, opened to read and write; nothing else is worked on, and nothing that blocks.
    pub(super) fn file(&self, target: &Target, flags: i32) -> io::Result<Held<'_>> {
        match target {
            Target::Open(slot) => {
                let file = self.open.get(*slot).and_then(Option::as_ref);
                file.map(Held::Kept)
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
            }
            Target::Path(path) => open(&self.at(path), flags).map(Held::Own),
        }
    }

    fn descriptor(&mut self, action: &Action) -> io::Result<()> {
        let (slot, file) = match action {
            Action::Open { path, slot } => (*slot, Some(open(&self.at(path), 0)?)),
            Action::OpenUnnamed {
                directory,
                slot,
                mode,
            } => {
                let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
                let mode = Mode::from_bits_truncate(*mode);
                let file = nix::fcntl::open(&self.at(directory), flags, mode)?;
                (*slot, Some(File::from(file)))
            }
            Action::LinkOpen { slot, to } => {
                let file = self.file(&Target::Open(*slot), 0)?;
                let from = format!("/proc/self/fd/{}", file.as_raw_fd());
                let follow = AtFlags::AT_SYMLINK_FOLLOW;
                return Ok(linkat(
                    AT_FDCWD,
                    from.as_str(),
                    AT_FDCWD,
                    &self.at(to),
                    follow,
                )?);
            }
            Action::Close { slot } => (*slot, None),
            _ => return Ok(()),
        };
        if let Some(place) = self.open.get_mut(slot) {
            *place = file;
        }
        Ok(())
    }
}

/// A file that an operation has opened, or that was open before.
pub(super) enum Held<'a> {
    Own(File),
    Kept(&'a File),
}

impl std::ops::Deref for Held<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Self::Own(file) => file,
            Self::Kept(file) => file,
        }
    }
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    opened(path, OpenOptions::new().read(true).write(true), flags)
}

fn opened(path: &Path, options: &mut OpenOptions, flags: i32) -> io::Result<File> {
    let flags = flags | libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = options.custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

fn make_special(path: &Path, special: Special, mode: u32) -> io::Result<()> {
    let (kind, device) = match special {
        Special::Fifo => (SFlag::S_IFIFO, 0),
        Special::Socket => (SFlag::S_IFSOCK, 0),
        Special::Device => (SFlag::S_IFCHR, DEVICE),
    };
    Ok(mknod(path, kind, Mode::from_bits_truncate(mode), device)?)
}

/// What [`Special::Device`] is.
pub(super) const DEVICE: u64 = makedev(1, 3);

fn rename(from: &Path, to: &Path, way: RenameWay) -> io::Result<()> {
    let flags = match way {
        RenameWay::Replace => return fs::rename(from, to),
        RenameWay::NoReplace => RenameFlags::RENAME_NOREPLACE,
        RenameWay::Exchange => RenameFlags::RENAME_EXCHANGE,
    };
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)?)
}

fn set_times(path: &Path, mtime_ns: i64) -> io::Result<()> {
    let time = TimeSpec::new(
        mtime_ns.div_euclid(NANOSECONDS),
        mtime_ns.rem_euclid(NANOSECONDS),
    );
    let follow = UtimensatFlags::NoFollowSymlink;
    Ok(utimensat(AT_FDCWD, path, &time, &time, follow)?)
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    Ok(lsetxattr(path, name, value, XattrFlags::empty())?)
}
