//! Changing the copied tree in the ways of real applications, repeatably.
//!
//! Each method is one kind of change; it must leave `files` listing only paths that are there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{IoSlice, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, SpliceFFlags, renameat2, splice};
use nix::sys::sendfile::sendfile;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::sys::uio::pwritev;
use nix::unistd::{geteuid, linkat, mkfifo};

use super::copy::Copied;
use crate::error::{Error, Told};
use crate::random::Random;

/// Lengths of overwrites: single bytes, around a page, around the largest bytes a record carries,
/// and beyond.
const OVERWRITE_BYTES: [usize; 8] = [1, 7, 511, 4_095, 4_097, 65_537, 262_145, 1_048_576];
/// Long enough for several pages, short enough for a pipe.
const SPLICE_BYTES: usize = 20_001;

struct Changes {
    top: PathBuf,
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
    random: Random,
    privileged: bool,
    counts: BTreeMap<&'static str, u64>,
}

/// Makes all the changes below `top` and says how many of each.
pub(super) fn change(top: &Path, copied: Copied) -> Result<BTreeMap<&'static str, u64>, Error> {
    let mut changes = Changes {
        top: top.to_owned(),
        files: copied.files,
        directories: copied.directories,
        random: Random::new(0x7477_696e),
        privileged: geteuid().is_root(),
        counts: BTreeMap::new(),
    };
    changes.overwrite(64)?;
    changes.append(48)?;
    changes.write_vectors(24)?;
    changes.write_without_user_bytes(8)?;
    changes.truncate(48)?;
    changes.sparse(8)?;
    changes.hard_links(40)?;
    changes.rename_files(60)?;
    changes.rename_directories(4)?;
    changes.exchange(12)?;
    changes.names_that_come_back()?;
    changes.symlinks(&copied.symlinks)?;
    changes.odd_names()?;
    changes.special_files()?;
    changes.directories(12)?;
    changes.temporary_files(12)?;
    changes.delete(80)?;
    changes.attributes(60)?;
    changes.overwrite(16)?;
    changes.append(16)?;
    Ok(changes.counts)
}

impl Changes {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn pick(&mut self) -> Option<PathBuf> {
        self.random.pick(&self.files).cloned()
    }

    fn place(&mut self, name: &str) -> PathBuf {
        let directory = self.random.pick(&self.directories).unwrap_or(&self.top);
        directory.join(name)
    }

    /// Overwrites parts of files at odd offsets, also beyond their end.
    fn overwrite(&mut self, times: usize) -> Result<(), Error> {
        for len in OVERWRITE_BYTES.iter().copied().cycle().take(times) {
            let Some(path) = self.pick() else { break };
            let file = OpenOptions::new()
                .write(true)
                .open(&path)
                .told("open", &path)?;
            let size = file.metadata().told("look at", &path)?.len();
            let offset = self.random.below(size + 1) | 1;
            let bytes = self.random.bytes(len);
            file.write_all_at(&bytes, offset).told("overwrite", &path)?;
            self.count("overwrite");
        }
        Ok(())
    }

    fn append(&mut self, times: usize) -> Result<(), Error> {
        for _ in 0..times {
            let Some(path) = self.pick() else { break };
            let mut file = OpenOptions::new()
                .append(true)
                .open(&path)
                .told("open", &path)?;
            for _ in 0..=self.random.below(5) {
                let len = 1 + self.random.below(9_000) as usize;
                let bytes = self.random.bytes(len);
                file.write_all(&bytes).told("append to", &path)?;
                self.count("append");
            }
        }
        Ok(())
    }

    /// `writev` at the file's position and `pwritev` at an offset, several segments each.
    fn write_vectors(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let Some(path) = self.pick() else { break };
            let parts: Vec<Vec<u8>> = (0..2 + self.random.below(7))
                .map(|part| self.random.bytes(1 + 1_777 * part as usize))
                .collect();
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut file = OpenOptions::new()
                .write(true)
                .open(&path)
                .told("open", &path)?;
            let written = if round % 2 == 0 {
                file.write_vectored(&slices)
                    .told("write vectors to", &path)?
            } else {
                let offset = 1 + self.random.below(5_000) as i64;
                pwritev(&file, &slices, offset).told("write vectors to", &path)?
            };
            if written != parts.iter().map(Vec::len).sum::<usize>() {
                return Err(std::io::Error::from(std::io::ErrorKind::WriteZero))
                    .told("write whole vectors to", &path);
            }
            self.count("write-vector");
        }
        Ok(())
    }

    /// Bytes that come from the page cache or a pipe, never from a buffer of this process.
    fn write_without_user_bytes(&mut self, times: usize) -> Result<(), Error> {
        for _ in 0..times {
            let (Some(from), Some(path)) = (self.pick(), self.pick()) else {
                break;
            };
            if from == path {
                continue;
            }
            let source = File::open(&from).told("open", &from)?;
            let file = OpenOptions::new()
                .write(true)
                .open(&path)
                .told("open", &path)?;
            sendfile(&file, &source, None, SPLICE_BYTES).told("send a file to", &path)?;
            self.count("sendfile");
            let (reader, mut writer) = std::io::pipe().told("make a pipe for", &path)?;
            writer
                .write_all(&self.random.bytes(SPLICE_BYTES))
                .told("fill a pipe for", &path)?;
            let mut offset = 4_001;
            splice(
                &reader,
                None,
                &file,
                Some(&mut offset),
                SPLICE_BYTES,
                SpliceFFlags::empty(),
            )
            .told("splice into", &path)?;
            self.count("splice");
        }
        Ok(())
    }

    /// Down, up, to nothing, and to nothing by opening; some are written to afterwards.
    fn truncate(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let Some(path) = self.pick() else { break };
            let mut options = OpenOptions::new();
            let file = options.write(true).truncate(round % 6 == 3);
            let file = file.open(&path).told("open", &path)?;
            let size = file.metadata().told("look at", &path)?.len();
            let target = match round % 6 {
                0 | 1 => self.random.below(size + 1),
                2 => size + 1 + self.random.below(70_000),
                3 => size,
                4 => 0,
                _ => size | 0xfff,
            };
            file.set_len(target).told("truncate", &path)?;
            self.count("truncate");
            if round % 4 == 0 {
                let bytes = self.random.bytes(333);
                file.write_all_at(&bytes, target / 2).told("write", &path)?;
            }
        }
        Ok(())
    }

    /// New files with holes.
    fn sparse(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let path = self.place(&format!("sparse-{round}"));
            let file = create(&path)?;
            for part in [3_u64, 1, 2] {
                let bytes = self.random.bytes(5_000);
                let offset = part * 150_001 + self.random.below(9_999);
                file.write_all_at(&bytes, offset).told("write", &path)?;
            }
            self.files.push(path);
            self.count("sparse");
        }
        Ok(())
    }

    /// Further names in the same and in other directories; every third loses its first name.
    fn hard_links(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let Some(path) = self.random.take(&mut self.files) else {
                break;
            };
            let link = self.place(&format!("link-{round}"));
            fs::hard_link(&path, &link).told("link", &link)?;
            self.count("link");
            if round % 3 == 0 {
                fs::remove_file(&path).told("remove", &path)?;
                self.count("unlink");
            } else {
                self.files.push(path);
            }
            self.files.push(link);
        }
        Ok(())
    }

    /// Within a directory, across directories, and over another file.
    fn rename_files(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let Some(path) = self.random.take(&mut self.files) else {
                break;
            };
            let target = match round % 3 {
                0 => path.with_file_name(format!("renamed-{round}")),
                1 => self.place(&format!("moved-{round}")),
                _ => match self.random.take(&mut self.files) {
                    Some(victim) => victim,
                    None => break,
                },
            };
            fs::rename(&path, &target).told("rename", &path)?;
            self.files.push(target);
            self.count("rename");
        }
        Ok(())
    }

    /// Whole directories, with all that is below them.
    fn rename_directories(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let deep = |path: &&PathBuf| path.strip_prefix(&self.top).is_ok_and(below_second);
            let candidates: Vec<PathBuf> = self.directories.iter().filter(deep).cloned().collect();
            let Some(from) = self.random.pick(&candidates).cloned() else {
                break;
            };
            let to = self.top.join(format!("directory-{round}"));
            fs::rename(&from, &to).told("rename", &from)?;
            for path in self.files.iter_mut().chain(&mut self.directories) {
                if let Ok(rest) = path.strip_prefix(&from) {
                    *path = if rest == Path::new("") {
                        to.clone()
                    } else {
                        to.join(rest)
                    };
                }
            }
            self.count("rename-directory");
        }
        Ok(())
    }

    /// Two names exchanged at once; every fourth a file with a directory.
    fn exchange(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let (Some(first), Some(second)) = (self.pick(), self.pick()) else {
                break;
            };
            let second = if round % 4 == 3 {
                let directory = self.place(&format!("exchanged-{round}"));
                fs::create_dir(&directory).told("make directory", &directory)?;
                self.files.retain(|path| *path != first);
                self.files.push(directory.clone());
                directory
            } else {
                second
            };
            if first != second {
                renameat2(
                    AT_FDCWD,
                    &first,
                    AT_FDCWD,
                    &second,
                    RenameFlags::RENAME_EXCHANGE,
                )
                .told("exchange", &first)?;
                self.count("exchange");
            }
        }
        Ok(())
    }

    /// Names that go and come back for another file: what a re-execution of the log gets wrong.
    fn names_that_come_back(&mut self) -> Result<(), Error> {
        let [a, b] = [self.place("aba-a"), self.place("aba-b")];
        create(&a)?.write_all(b"first").told("write", &a)?;
        fs::rename(&a, &b).told("rename", &a)?;
        fs::rename(&b, &a).told("rename", &b)?;
        create(&b)?.write_all(b"second").told("write", &b)?;
        let [p, q] = [self.place("aba-p"), self.place("aba-q")];
        create(&p)?.write_all(b"third").told("write", &p)?;
        fs::hard_link(&p, &q).told("link", &q)?;
        fs::remove_file(&p).told("remove", &p)?;
        fs::hard_link(&q, &p).told("link", &p)?;
        fs::remove_file(&q).told("remove", &q)?;
        create(&q)?.write_all(b"fourth").told("write", &q)?;
        self.count("names-that-come-back");
        self.files.extend([a, b, p, q]);
        Ok(())
    }

    /// Targets up to almost the 1,024 bytes that xfs allows; some replace a copied symlink.
    fn symlinks(&mut self, copied: &[PathBuf]) -> Result<(), Error> {
        let long = "x".repeat(250) + &"/y".repeat(380);
        let targets = [
            "a",
            "does/not/exist",
            "/absolute",
            "exactly-sixty-bytes/",
            &long,
        ];
        for (round, target) in targets.iter().enumerate() {
            let path = self.place(&format!("symlink-{round}"));
            symlink(target, &path).told("make symlink", &path)?;
            let other = self.place(&format!("symlink-moved-{round}"));
            fs::rename(&path, &other).told("rename", &path)?;
            self.count("symlink");
        }
        for path in copied.iter().step_by(7) {
            if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink()) {
                fs::remove_file(path).told("remove", path)?;
                symlink("replaced", path).told("make symlink", path)?;
                self.count("symlink");
            }
        }
        Ok(())
    }

    /// Names that are not text, with a line end, and as long as a name can be.
    fn odd_names(&mut self) -> Result<(), Error> {
        let longest = [b'n'; 255];
        let names: [&[u8]; 5] = [
            b"\xff\xfe not text",
            b"two\nlines",
            b"%41",
            b"\"quoted\\",
            &longest,
        ];
        for name in names {
            let path = self.top.join(OsStr::from_bytes(name));
            let bytes = self.random.bytes(name.len());
            create(&path)?.write_all(&bytes).told("write", &path)?;
            self.files.push(path);
            self.count("odd-name");
        }
        Ok(())
    }

    fn special_files(&mut self) -> Result<(), Error> {
        for round in 0..4 {
            let path = self.place(&format!("fifo-{round}"));
            mkfifo(&path, Mode::from_bits_truncate(0o640)).told("make fifo", &path)?;
            self.count("fifo");
        }
        let mut kinds = vec![("socket", SFlag::S_IFSOCK)];
        if self.privileged {
            kinds.extend([("character", SFlag::S_IFCHR), ("block", SFlag::S_IFBLK)]);
        }
        for (name, kind) in kinds {
            let path = self.place(name);
            let mode = Mode::from_bits_truncate(0o600);
            mknod(&path, kind, mode, makedev(7, 300)).told("make node", &path)?;
            self.count("node");
        }
        Ok(())
    }

    /// Directories made, filled, emptied, removed and made again.
    fn directories(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let top = self.place(&format!("made-{round}"));
            let deep = top.join("one/two/three");
            fs::create_dir_all(&deep).told("make directory", &deep)?;
            self.count("mkdir");
            let file = deep.join("file");
            create(&file)?.write_all(b"deep").told("write", &file)?;
            if round % 2 == 0 {
                fs::remove_dir_all(&top).told("remove directory", &top)?;
                self.count("rmdir");
            } else {
                self.files.push(file);
            }
            if round % 4 == 0 {
                fs::create_dir(&top).told("make directory", &top)?;
                self.directories.push(top);
            }
        }
        Ok(())
    }

    /// Files without a name, written, then named; every third is never named.
    fn temporary_files(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let mut file = OpenOptions::new()
                .write(true)
                .mode(0o640)
                .custom_flags(OFlag::O_TMPFILE.bits())
                .open(&self.top)
                .told("make a file without a name in", &self.top)?;
            let bytes = self.random.bytes(10_001);
            file.write_all(&bytes).told("write", &self.top)?;
            self.count("tmpfile");
            if round % 3 == 2 {
                continue;
            }
            let path = self.place(&format!("named-{round}"));
            let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
            let handle = PathBuf::from(format!("/proc/self/fd/{descriptor}"));
            linkat(
                AT_FDCWD,
                &handle,
                AT_FDCWD,
                &path,
                AtFlags::AT_SYMLINK_FOLLOW,
            )
            .told("name", &path)?;
            self.files.push(path);
            self.count("tmpfile-named");
        }
        Ok(())
    }

    /// Removes files; every fifth is still open and written to afterwards.
    fn delete(&mut self, times: usize) -> Result<(), Error> {
        for round in 0..times {
            let Some(path) = self.random.take(&mut self.files) else {
                break;
            };
            let open = OpenOptions::new()
                .write(true)
                .open(&path)
                .told("open", &path)?;
            fs::remove_file(&path).told("remove", &path)?;
            if round % 5 == 0 {
                open.write_all_at(b"nobody will see this", 0)
                    .told("write", &path)?;
            }
            self.count("unlink");
        }
        Ok(())
    }

    fn attributes(&mut self, times: usize) -> Result<(), Error> {
        let modes = [0o600, 0o644, 0o4755, 0o2755, 0o444, 0o1777, 0o000];
        for (round, mode) in modes.iter().copied().cycle().take(times).enumerate() {
            let Some(path) = self.pick() else { break };
            if self.privileged {
                let (uid, gid) = (1_000 + round as u32, 4_000_000_000 - round as u32);
                chown(&path, Some(uid), Some(gid)).told("change the owner of", &path)?;
                self.count("chown");
            }
            fs::set_permissions(&path, Permissions::from_mode(mode))
                .told("change the mode of", &path)?;
            self.count("chmod");
            if self.privileged && round % 2 == 0 {
                self.times(&path, round as u64)?;
            }
        }
        let link = self.place("symlink-attributes");
        symlink("target", &link).told("make symlink", &link)?;
        if self.privileged {
            lchown(&link, Some(77), Some(78)).told("change the owner of", &link)?;
        }
        let time = TimeSpec::new(86_400, 123_456_789);
        utimensat(
            AT_FDCWD,
            &link,
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .told("set the times of", &link)?;
        if let Some(directory) = self.random.pick(&self.directories).cloned() {
            fs::set_permissions(&directory, Permissions::from_mode(0o3775))
                .told("change the mode of", &directory)?;
            self.times(&directory, 3)?;
        }
        Ok(())
    }

    /// Times with nanoseconds, some before 1970.
    fn times(&mut self, path: &Path, round: u64) -> Result<(), Error> {
        let span = Duration::new(self.random.below(1_000_000_000), 987_654_321);
        let time = if round.is_multiple_of(4) {
            UNIX_EPOCH - span
        } else {
            UNIX_EPOCH + span
        };
        let file = File::open(path).told("open", path)?;
        file.set_times(FileTimes::new().set_accessed(time).set_modified(time))
            .told("set the times of", path)?;
        self.count("utimes");
        Ok(())
    }
}

/// At least two components: not the copy's own top directory.
fn below_second(path: &Path) -> bool {
    path.components().count() >= 3
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(path)
        .told("create", path)
}
