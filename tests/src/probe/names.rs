//! Names.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{linkat, mkfifo};

use super::{BASE, Group, Probe, Work, base, nothing, overwrite, pattern};

/// Deeper than the programs walk, and than a path can name at once.
const DEPTH: usize = 120;

const fn probe(name: &'static str, prepare: Work, act: Work) -> Probe {
    Probe {
        name,
        group: Group::Names,
        prepare,
        act,
    }
}

pub(super) const PROBES: &[Probe] = &[
    probe("create", nothing, |dir| {
        File::create_new(dir.join("new")).map(drop)
    }),
    probe("create-255-bytes-long", nothing, |dir| {
        File::create_new(dir.join("n".repeat(255))).map(drop)
    }),
    probe("create-not-utf-8", nothing, |dir| {
        let every: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
        for name in every.chunks(200) {
            File::create_new(dir.join(OsStr::from_bytes(name)))?;
        }
        Ok(())
    }),
    probe("mkdir", nothing, |dir| fs::create_dir(dir.join("new"))),
    probe("mkdir-and-create-in-it", nothing, |dir| {
        fs::create_dir(dir.join("new"))?;
        fs::write(dir.join("new/file"), pattern(2, 100))
    }),
    probe("create-deep-down", deep, |dir| {
        let mut at = std::fs::File::open(dir)?;
        for _ in 0..DEPTH {
            at = below(&at)?;
        }
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let file = rustix::fs::openat(&at, "file", flags, mode)?;
        File::from(file).write_all(&pattern(2, 333))
    }),
    probe("mkfifo", nothing, |dir| {
        Ok(mkfifo(&dir.join("new"), Mode::from_bits_truncate(0o640))?)
    }),
    probe("mknod-device", nothing, |dir| {
        let mode = Mode::from_bits_truncate(0o640);
        Ok(mknod(
            &dir.join("new"),
            SFlag::S_IFCHR,
            mode,
            makedev(1, 3),
        )?)
    }),
    probe("bind-socket", nothing, |dir| {
        // The name of a socket is short, whatever the directory's is.
        let open = File::open(dir)?;
        let at = format!("/proc/self/fd/{}/new", descriptor(&open));
        std::os::unix::net::UnixListener::bind(at).map(drop)
    }),
    probe("symlink", nothing, |dir| {
        symlink("some/where", dir.join("new"))
    }),
    probe("symlink-1000-bytes-long", nothing, |dir| {
        symlink("t".repeat(1_000), dir.join("new"))
    }),
    probe("symlink-4095-bytes-long", nothing, |dir| {
        symlink("t/".repeat(2_047) + "t", dir.join("new"))
    }),
    probe("link", nothing, |dir| {
        fs::hard_link(dir.join(BASE), dir.join("new"))
    }),
    probe("tmpfile-and-link", nothing, |dir| {
        let file = unnamed(dir)?;
        overwrite(&file, 2, 5_000, 0)?;
        let from = format!("/proc/self/fd/{}", descriptor(&file));
        let to = dir.join("new");
        Ok(linkat(
            AT_FDCWD,
            from.as_str(),
            AT_FDCWD,
            &to,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?)
    }),
    probe("rename", nothing, |dir| {
        fs::rename(dir.join(BASE), dir.join("new"))
    }),
    probe("rename-replace", other, |dir| {
        fs::rename(dir.join(BASE), dir.join("other"))
    }),
    probe("rename-noreplace", nothing, |dir| {
        rename(dir, BASE, "new", RenameFlags::RENAME_NOREPLACE)
    }),
    probe("rename-exchange", other, |dir| {
        rename(dir, BASE, "other", RenameFlags::RENAME_EXCHANGE)
    }),
    probe("rename-whiteout", nothing, |dir| {
        rename(dir, BASE, "new", RenameFlags::RENAME_WHITEOUT)
    }),
    probe("rename-across-directories", directories, |dir| {
        fs::rename(dir.join("one/file"), dir.join("two/moved"))
    }),
    probe("rename-directory", directories, |dir| {
        fs::rename(dir.join("one"), dir.join("two/one"))
    }),
    probe("rename-directory-with-open-file", directories, |dir| {
        let file = File::options().write(true).open(dir.join("one/file"))?;
        fs::rename(dir.join("one"), dir.join("two/one"))?;
        overwrite(&file, 6, 3_000, 50)
    }),
    probe("unlink", other, |dir| fs::remove_file(dir.join("other"))),
    probe("unlink-one-of-two-names", two_names, |dir| {
        fs::remove_file(dir.join("second"))
    }),
    probe("unlink-open-and-write", other, |dir| {
        let file = File::options().write(true).open(dir.join("other"))?;
        fs::remove_file(dir.join("other"))?;
        overwrite(&file, 6, 3_000, 50)
    }),
    probe("rmdir", directories, |dir| fs::remove_dir(dir.join("two"))),
    probe("number-used-at-once-again", other, |dir| {
        fs::remove_file(dir.join("other"))?;
        for (seed, name) in [(3, "again"), (4, "other")] {
            fs::write(dir.join(name), pattern(seed, 2_000))?;
        }
        fs::remove_file(dir.join("again"))?;
        fs::write(dir.join("third"), pattern(5, 2_000))
    }),
    probe("names-that-come-back", other, |dir| {
        fs::rename(dir.join(BASE), dir.join("aside"))?;
        fs::rename(dir.join("other"), dir.join(BASE))?;
        fs::rename(dir.join("aside"), dir.join("other"))?;
        overwrite(&base(dir)?, 6, 500, 0)
    }),
];

fn descriptor(file: &File) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(file)
}

fn other(directory: &Path) -> io::Result<()> {
    fs::write(directory.join("other"), pattern(8, 7_000))
}

fn two_names(directory: &Path) -> io::Result<()> {
    fs::hard_link(directory.join(BASE), directory.join("second"))
}

fn directories(directory: &Path) -> io::Result<()> {
    fs::create_dir(directory.join("one"))?;
    fs::create_dir(directory.join("two"))?;
    fs::write(directory.join("one/file"), pattern(8, 7_000))
}

fn rename(directory: &Path, from: &str, to: &str, flags: RenameFlags) -> io::Result<()> {
    let (from, to) = (directory.join(from), directory.join(to));
    Ok(renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags)?)
}

fn unnamed(directory: &Path) -> io::Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
    let mode = Mode::from_bits_truncate(0o640);
    Ok(File::from(nix::fcntl::open(directory, flags, mode)?))
}

fn below(at: &File) -> io::Result<File> {
    let flags = rustix::fs::OFlags::DIRECTORY;
    let mode = rustix::fs::Mode::empty();
    Ok(File::from(rustix::fs::openat(at, "below", flags, mode)?))
}

fn deep(directory: &Path) -> io::Result<()> {
    let mut at = File::open(directory)?;
    for _ in 0..DEPTH {
        rustix::fs::mkdirat(&at, "below", rustix::fs::Mode::from_raw_mode(0o700))?;
        at = below(&at)?;
    }
    Ok(())
}
