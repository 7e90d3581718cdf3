//! Real file systems: images on loop devices, crashed by copying the image while it is mounted.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, RenameFlags};

use super::attributes::{FLAGS, Seen};
use super::model::{Body, Model, Node};
use super::world::{Live, NewKind, Op};
use crate::capture::{extended, handle};
use crate::ids::Identity;
use crate::record::extended::InodeFlags;
use crate::replay::disk::Disk;
use crate::replay::volume::Volume;

/// Whether real mounts are to be left out; says so, once a test, if they are.
pub(super) fn left_out(test: &str) -> bool {
    if std::env::var_os("TWINWRITE_NO_LOOP").is_some() {
        println!("{test}: SKIPPED, because TWINWRITE_NO_LOOP is set");
        return true;
    }
    assert!(
        nix::unistd::Uid::effective().is_root(),
        "{test} mounts loop devices and must run as root (or set TWINWRITE_NO_LOOP to leave it out)"
    );
    false
}

/// The file systems under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Ext4,
    /// Whose fsync writes a short log of what changed, and the journal only later.
    Ext4FastCommit,
    /// With quota projects, which not every kernel has.
    Ext4Projects,
    Xfs,
    /// Whose fsync writes a log of that one file.
    Btrfs,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Ext4FastCommit => "ext4 with fast commits",
            Self::Ext4Projects => "ext4 with projects",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// How large an image must be.
    pub(super) fn image_bytes(self) -> u64 {
        match self {
            Self::Ext4 | Self::Ext4FastCommit | Self::Ext4Projects => 24 << 20,
            Self::Xfs => 320 << 20,
            Self::Btrfs => 128 << 20,
        }
    }
}

fn run(command: &str, arguments: &[&str]) {
    if let Err(text) = try_to_run(command, arguments) {
        panic!("{text}");
    }
}

fn try_to_run(command: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(command)
        .args(arguments)
        .output()
        .expect("the command exists");
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command} {arguments:?}: {text}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("an own path")
}

/// An image file and, while it lives, its mount.
pub(super) struct Mounted {
    pub(super) image: PathBuf,
    pub(super) mount: PathBuf,
}

impl Mounted {
    /// Makes an empty file system.
    pub(super) fn make(directory: &Path, name: &str, format: Format, bytes: u64) -> Self {
        let image = directory.join(format!("{name}.img"));
        let file = std::fs::File::create(&image).expect("create the image");
        file.set_len(bytes).expect("size the image");
        let image_text = text(&image).to_owned();
        match format {
            Format::Ext4 => run("mkfs.ext4", &["-q", "-F", "-m", "0", &image_text]),
            Format::Ext4FastCommit => {
                let options = ["-q", "-F", "-m", "0", "-O", "fast_commit"];
                run("mkfs.ext4", &[&options[..], &[&image_text]].concat());
            }
            Format::Btrfs => run("mkfs.btrfs", &["-q", "-f", &image_text]),
            Format::Ext4Projects => {
                let features = "project,quota";
                run("mkfs.ext4", &["-q", "-F", "-O", features, &image_text]);
            }
            Format::Xfs => run("mkfs.xfs", &["-q", "-f", &image_text]),
        }
        Self::mount(directory, name, image)
    }

    fn mount(directory: &Path, name: &str, image: PathBuf) -> Self {
        Self::try_to_mount(directory, name, image, "loop,noatime").expect("a mount")
    }

    fn try_to_mount(
        directory: &Path,
        name: &str,
        image: PathBuf,
        options: &str,
    ) -> Result<Self, String> {
        let mount = directory.join(name);
        std::fs::create_dir_all(&mount).expect("a mount point");
        try_to_run("mount", &["-o", options, text(&image), text(&mount)])?;
        Ok(Self { image, mount })
    }

    /// What a power cut now would leave, mounted.
    pub(super) fn crash(&self, directory: &Path, name: &str, format: Format) -> Self {
        self.try_to_crash(directory, name, format).expect("a mount")
    }

    /// As [`Self::crash`]; what the kernel says if its own recovery fails.
    pub(super) fn try_to_crash(
        &self,
        directory: &Path,
        name: &str,
        format: Format,
    ) -> Result<Self, String> {
        let image = directory.join(format!("{name}.img"));
        run("cp", &["--sparse=always", text(&self.image), text(&image)]);
        // The copy has its origin's UUID, and XFS mounts one of a kind.
        let options = match format {
            Format::Xfs => "loop,noatime,nouuid",
            _ => "loop,noatime",
        };
        Self::try_to_mount(directory, name, image, options)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A child that another test's thread has just forked holds every descriptor until it runs its
        // command, and with them this mount.
        for _ in 0..100 {
            match nix::mount::umount(&self.mount) {
                Err(nix::errno::Errno::EBUSY) => std::thread::sleep(Duration::from_millis(20)),
                _ => break,
            }
        }
        let _ = std::fs::remove_file(&self.image);
    }
}

/// Writes the dirty pages back now, so that bytes get ahead of the journal.
fn write_back(fd: &OwnedFd) {
    rustix::fs::fadvise(fd, 0, None, rustix::fs::Advice::DontNeed).expect("fadvise");
}

/// Runs the operations of a world on a mounted file system.
pub(super) struct LiveDisk {
    root: OwnedFd,
    disk: Disk,
    tmpfiles: BTreeMap<Identity, OwnedFd>,
    mount: PathBuf,
}

impl LiveDisk {
    pub(super) fn new(mount: &Path) -> Self {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        Self {
            root: rustix::fs::open(mount, flags, Mode::empty()).expect("open the mount"),
            disk: Disk::open(mount).expect("a file system with handles"),
            tmpfiles: BTreeMap::new(),
            mount: mount.to_owned(),
        }
    }

    pub(super) fn root(&mut self) -> Identity {
        self.disk.root().expect("a root")
    }

    fn open(&self, inode: Identity, flags: i32) -> OwnedFd {
        if let Some(fd) = self.tmpfiles.get(&inode) {
            return fd.try_clone().expect("one more descriptor");
        }
        handle::open(&self.root, inode, flags)
            .expect("open by handle")
            .expect("it exists")
    }

    fn directory(&self, inode: Identity) -> OwnedFd {
        self.open(inode, libc::O_RDONLY | libc::O_DIRECTORY)
    }

    fn create(&self, directory: Identity, name: &[u8], kind: &NewKind, mode: u32) -> Identity {
        let fd = self.directory(directory);
        let mode = Mode::from_raw_mode(mode);
        match kind {
            NewKind::File => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
                drop(rustix::fs::openat(&fd, name, flags, mode).expect("create"));
            }
            NewKind::Directory => rustix::fs::mkdirat(&fd, name, mode).expect("mkdir"),
            NewKind::Symlink(target) => {
                rustix::fs::symlinkat(target.as_slice(), &fd, name).expect("symlink");
            }
            NewKind::Fifo | NewKind::Device(_) => {
                let kind_of = rustix::fs::FileType::from_raw_mode(kind.format());
                let rdev = if let NewKind::Device(rdev) = kind {
                    *rdev
                } else {
                    0
                };
                let device = rustix::fs::makedev(rdev >> 20, rdev & 0xf_ffff);
                rustix::fs::mknodat(&fd, name, kind_of, mode, device).expect("mknod");
            }
        }
        let name = std::ffi::CString::new(name).expect("an own name");
        handle::identity_at(&fd, &name)
            .expect("a handle")
            .expect("made just now")
    }

    fn rename(&self, from: &(Identity, Vec<u8>), to: &(Identity, Vec<u8>), flags: RenameFlags) {
        let (source, target) = (self.directory(from.0), self.directory(to.0));
        rustix::fs::renameat_with(&source, from.1.as_slice(), &target, to.1.as_slice(), flags)
            .expect("rename");
    }
}

impl Live for LiveDisk {
    fn run(&mut self, op: &Op) -> Option<Identity> {
        match op {
            Op::Write {
                file, at, bytes, ..
            } => {
                let is_append = self
                    .disk
                    .stat(*file)
                    .expect("stat")
                    .is_some_and(|stat| stat.size == *at as u64);
                let append = if is_append { libc::O_APPEND } else { 0 };
                let fd = self.open(*file, libc::O_RDWR | append);
                rustix::io::pwrite(&fd, bytes, *at as u64).expect("write");
                if at % 3 == 0 {
                    write_back(&fd);
                }
            }
            Op::Direct { file, at, bytes } => {
                let fd = self.open(*file, libc::O_RDWR | libc::O_DIRECT);
                let mut room = vec![0; bytes.len() + 511];
                let start = room.as_ptr().align_offset(512);
                room[start..start + bytes.len()].copy_from_slice(bytes);
                rustix::io::pwrite(&fd, &room[start..start + bytes.len()], *at as u64)
                    .expect("write past the cache");
            }
            // Not by a mapping, which would take unsafe code.
            Op::Store { file, at, bytes } => {
                let fd = self.open(*file, libc::O_RDWR);
                rustix::io::pwrite(&fd, bytes, *at as u64).expect("write");
                write_back(&fd);
            }
            Op::Zero {
                file,
                at,
                len,
                grows,
            } => {
                let fd = self.open(*file, libc::O_RDWR);
                let flags = if *grows {
                    FallocateFlags::ZERO_RANGE
                } else {
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
                };
                rustix::fs::fallocate(&fd, flags, *at as u64, *len as u64).expect("fallocate");
            }
            Op::SetAttribute { inode, name, value } => {
                let fd = self.open(*inode, libc::O_PATH | libc::O_NOFOLLOW);
                let path = handle::magic_path(&fd);
                let flags = rustix::fs::XattrFlags::empty();
                match value {
                    Some(value) => rustix::fs::setxattr(path, name.as_slice(), value, flags),
                    None => rustix::fs::removexattr(path, name.as_slice()),
                }
                .expect("an attribute");
            }
            Op::SetFlags {
                inode,
                flags,
                project,
            } => {
                let fd = self.open(*inode, libc::O_RDONLY | libc::O_NOFOLLOW);
                let now = handle::flags_of(&fd).expect("flags").expect("it has flags");
                let then = InodeFlags {
                    flags: now.flags & !FLAGS | flags,
                    project: *project,
                    ..now
                };
                handle::set_flags(&fd, then).expect("set flags");
            }
            Op::Truncate { file, size } => {
                let fd = self.open(*file, libc::O_RDWR);
                rustix::fs::ftruncate(&fd, *size as u64).expect("truncate");
            }
            Op::Create {
                directory,
                name,
                kind,
                mode,
            } => {
                return Some(self.create(*directory, name, kind, *mode));
            }
            Op::Tmpfile => {
                let flags = OFlags::TMPFILE | OFlags::RDWR;
                let fd = rustix::fs::open(&self.mount, flags, Mode::from_raw_mode(0o600))
                    .expect("O_TMPFILE");
                let identity = handle::identity_of(&fd).expect("a handle");
                self.tmpfiles.insert(identity, fd);
                return Some(identity);
            }
            Op::Link {
                file,
                directory,
                name,
            } => {
                let fd = self.open(*file, libc::O_PATH | libc::O_NOFOLLOW);
                let target = self.directory(*directory);
                rustix::fs::linkat(&fd, "", &target, name.as_slice(), AtFlags::EMPTY_PATH)
                    .expect("link");
                self.tmpfiles.remove(file);
            }
            Op::Unlink { directory, name } => {
                let fd = self.directory(*directory);
                if rustix::fs::unlinkat(&fd, name.as_slice(), AtFlags::empty()).is_err() {
                    rustix::fs::unlinkat(&fd, name.as_slice(), AtFlags::REMOVEDIR).expect("rmdir");
                }
            }
            Op::Rename { from, to } => self.rename(from, to, RenameFlags::empty()),
            Op::Exchange { from, to } => self.rename(from, to, RenameFlags::EXCHANGE),
            Op::Chmod { inode, mode } => {
                self.disk.set_permissions(*inode, *mode).expect("chmod");
            }
            Op::Chown { inode, uid, gid } => {
                self.disk.set_owner(*inode, *uid, *gid).expect("chown");
            }
            Op::Utimes {
                inode,
                atime_ns,
                mtime_ns,
            } => {
                self.disk
                    .set_times(*inode, Some(*atime_ns), Some(*mtime_ns))
                    .expect("utimes");
            }
            Op::Fsync {
                inode, datasync, ..
            } => {
                let fd = self.open(*inode, libc::O_RDONLY);
                let done = if *datasync {
                    rustix::fs::fdatasync(fd)
                } else {
                    rustix::fs::fsync(fd)
                };
                done.expect("fsync");
            }
            Op::Flush | Op::Checkpoint => rustix::fs::syncfs(&self.root).expect("syncfs"),
        }
        None
    }

    fn see(&mut self, inode: Identity) -> Option<Seen> {
        let fd = match self.tmpfiles.get(&inode) {
            Some(fd) => fd.try_clone().expect("one more descriptor"),
            None => {
                handle::open(&self.root, inode, libc::O_PATH | libc::O_NOFOLLOW).expect("open")?
            }
        };
        let s = rustix::fs::fstat(&fd).expect("stat");
        let ns = |seconds: i64, ns: u64| seconds * 1_000_000_000 + ns as i64;
        let state = extended::read(&self.root, inode).expect("read attributes")?;
        Some(Seen {
            mode: s.st_mode,
            uid: s.st_uid,
            gid: s.st_gid,
            mtime_ns: ns(s.st_mtime, s.st_mtime_nsec),
            atime_ns: ns(s.st_atime, s.st_atime_nsec),
            attributes: state.attributes,
            flags: state.flags.unwrap_or_default(),
        })
    }
}

/// Reads a whole mounted file system into a model.
pub(super) fn read(mount: &Path) -> Model {
    let mut disk = Disk::open(mount).expect("open");
    let root = disk.root().expect("root");
    let root_fd = rustix::fs::open(mount, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
        .expect("open the mount");
    let mut model = Model::new(root);
    model.nodes.clear();
    let mut open = vec![root];
    while let Some(inode) = open.pop() {
        if model.nodes.contains_key(&inode) {
            continue;
        }
        let stat = disk.stat(inode).expect("stat").expect("it has a name");
        let body = match stat.mode & 0o170_000 {
            0o040_000 => {
                let mut entries = BTreeMap::new();
                for name in disk.list(inode).expect("list") {
                    let child = disk.lookup(inode, &name).expect("look up").expect("listed");
                    if name != b"lost+found" && name != b"sentinel" {
                        entries.insert(name, child);
                        open.push(child);
                    }
                }
                Body::Directory(entries)
            }
            format => read_body(&root_fd, inode, format),
        };
        let stamp = disk.stamp(inode).expect("stamp");
        let state = extended::read(&root_fd, inode).expect("attributes");
        let state = state.expect("it exists");
        model.nodes.insert(
            inode,
            Node {
                mode: stat.mode,
                uid: stat.uid,
                gid: stat.gid,
                links: stat.links,
                mtime_ns: stat.mtime_ns,
                atime_ns: 0,
                body,
                stamp,
                born_ns: stat.born_ns.unwrap_or(0),
                attributes: state.attributes,
                flags: state.flags.unwrap_or_default(),
            },
        );
    }
    model
}

fn read_body(root: &OwnedFd, inode: Identity, format: u32) -> Body {
    let open = |flags| {
        handle::open(root, inode, flags)
            .expect("open")
            .expect("it exists")
    };
    match format {
        0o100_000 => {
            let fd = open(libc::O_RDONLY);
            let path = handle::magic_path(&fd);
            Body::File(std::fs::read(path).expect("read"))
        }
        0o120_000 => {
            let fd = open(libc::O_PATH | libc::O_NOFOLLOW);
            let target = rustix::fs::readlinkat(&fd, "", Vec::new()).expect("readlink");
            Body::Symlink(target.into_bytes())
        }
        _ => {
            let fd = open(libc::O_PATH | libc::O_NOFOLLOW);
            let device = rustix::fs::fstat(&fd).expect("stat").st_rdev;
            Body::Special(rustix::fs::major(device) << 20 | rustix::fs::minor(device))
        }
    }
}
