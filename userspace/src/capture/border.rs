//! Proof that no file has names on both sides of a protected directory's border.
//!
//! The programs take any name of a file for telling on which side it is, and refuse further names across the
//! border; what was there before them somebody must look for. So every directory below the protected one is read
//! once, after they are attached and before anything is called protected.
//!
//! Directories are opened by their identities: paths may be longer than the kernel takes, and change meanwhile. It
//! must never overlook a name: what has been moved while it looked makes it look again.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, openat, statx};
use rustix::mount::{OpenTreeFlags, open_tree};
use thiserror::Error;
use twinwrite_abi::control;

use super::CaptureError;
use super::control::Control;
use super::handle;
use super::subtree::Subtree;
use crate::ids::Identity;

/// How often it looks again.
const TRIES: u32 = 3;
/// Time between two looks whether it is still wanted.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Why there is no proof, with the remedy.
#[derive(Debug, Error)]
pub enum BorderError {
    /// A file is on both sides.
    #[error(
        "`directory`: {path} has {links} names, and {inside} of them below the protected directory: a change by \
         another one would pass unseen: remove the names outside (`find MOUNT_POINT -samefile PATH` lists them)"
    )]
    Crossed {
        /// One of its names inside, as far as it is known.
        path: String,
        /// All names.
        links: u64,
        /// Those inside.
        inside: u64,
    },
    /// Directories are moved all the time.
    #[error(
        "`directory`: files and directories with several names were moved each time while the protected directory \
         was searched for hard links that lead out of it: it is tried again"
    )]
    Moving,
    /// Nobody needs it any more.
    #[error("the search for hard links was broken off")]
    Left,
    /// The programs cannot be asked.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The kernel refused something.
    #[error("`directory`: searching for hard links that lead out of it: {what}")]
    System {
        /// What was done.
        what: String,
        /// Why.
        source: io::Error,
    },
}

fn failed(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> BorderError {
    let what = what.into();
    move |error| BorderError::System {
        what,
        source: error.into(),
    }
}

/// A file with several names.
#[derive(Debug)]
struct Several {
    links: u64,
    inside: u64,
    directory: Identity,
    name: CString,
}

/// How much was looked at so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Looked {
    /// Directories that were read.
    pub directories: u64,
    /// Names in them.
    pub names: u64,
}

/// What must stay as it is for a proof to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    /// Crossings that the programs saw.
    crossings: u64,
    /// Programs that were skipped: one may have been that refuses.
    misses: u64,
}

/// Looks until it knows, and leaves word of it with the programs. `misses`: how often programs were skipped;
/// `is_left`: whether to break off.
///
/// # Errors
/// [`BorderError`].
pub(super) fn prove(
    mount: &Path,
    subtree: &Subtree,
    control: &Control,
    misses: &dyn Fn() -> Result<u64, CaptureError>,
    is_left: &dyn Fn(Looked) -> bool,
) -> Result<(), BorderError> {
    let standing = || {
        misses().map(|misses| Standing {
            crossings: control.get(control::SUBTREE_CROSSINGS),
            misses,
        })
    };
    let proven = Standing {
        crossings: control.get(control::SUBTREE_CROSSINGS_SEEN),
        misses: control.get(control::SUBTREE_MISSES),
    };
    let number = control.get(control::SUBTREE_PROVEN);
    if number != 0 && standing()? == proven {
        return Ok(());
    }
    withdraw(control);
    let tree = bare_view(mount).map_err(failed(format!("a view of {}", mount.display())))?;
    let mut suspect = None;
    for _ in 0..TRIES {
        let (before, moves) = (standing()?, control.get(control::SUBTREE_MOVES));
        let found = search(&tree, subtree.tops(), is_left)?;
        if standing()? != before || control.get(control::SUBTREE_MOVES) != moves {
            continue;
        }
        let mut crossing = found.iter().filter(|(_, file)| file.inside != file.links);
        match crossing.next() {
            // A name that was given or removed meanwhile looks like one.
            Some((ino, file)) if suspect == Some(*ino) => return Err(crossed(&tree, file)),
            Some((ino, _)) => suspect = Some(*ino),
            None => {
                control.set(control::SUBTREE_MISSES, before.misses);
                control.set(control::SUBTREE_PROVEN, number + 1);
                control.set(control::SUBTREE_CROSSINGS_SEEN, before.crossings);
                return Ok(());
            }
        }
    }
    Err(BorderError::Moving)
}

/// What was proven before does not hold: nobody has watched since.
pub(super) fn withdraw(control: &Control) {
    control.set(control::SUBTREE_CROSSINGS_SEEN, control::UNSETTLED);
}

/// The top of a view of the volume in which nothing that is mounted below hides anything.
fn bare_view(mount: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let view = open_tree(CWD, mount, flags)?;
    // By that descriptor itself no handle can be opened.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(&view, ".", flags, Mode::empty())
}

fn crossed(tree: &OwnedFd, several: &Several) -> BorderError {
    let directory = handle::open(tree, several.directory, libc::O_PATH);
    let directory = directory.ok().flatten();
    let link = directory.and_then(|fd| std::fs::read_link(handle::magic_path(&fd)).ok());
    // A path in a mount that has no place itself begins at the volume's root.
    let path = link.unwrap_or_default();
    let path = path.join(OsStr::from_bytes(several.name.to_bytes()));
    BorderError::Crossed {
        path: path.as_os_str().as_bytes().escape_ascii().to_string(),
        links: several.links,
        inside: several.inside,
    }
}

/// A search under way.
struct Search<'a> {
    tree: &'a OwnedFd,
    open: Vec<Identity>,
    found: BTreeMap<u64, Several>,
    looked: Looked,
    asked_at: Instant,
    is_left: &'a dyn Fn(Looked) -> bool,
}

/// All files below these directories with several names, by their numbers.
fn search(
    tree: &OwnedFd,
    tops: Vec<Identity>,
    is_left: &dyn Fn(Looked) -> bool,
) -> Result<BTreeMap<u64, Several>, BorderError> {
    let mut search = Search {
        tree,
        open: tops,
        found: BTreeMap::new(),
        looked: Looked::default(),
        asked_at: Instant::now(),
        is_left,
    };
    while let Some(directory) = search.open.pop() {
        search.read(directory)?;
        search.looked.directories += 1;
    }
    Ok(search.found)
}

impl Search<'_> {
    fn read(&mut self, directory: Identity) -> Result<(), BorderError> {
        let what = || format!("directory {directory}");
        let system = |source| BorderError::System {
            what: what(),
            source,
        };
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOATIME | libc::O_CLOEXEC;
        let Some(fd) = handle::open(self.tree, directory, flags).map_err(system)? else {
            return Ok(());
        };
        for entry in Dir::read_from(&fd).map_err(failed(what()))? {
            let entry = entry.map_err(failed(what()))?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.ask()?;
            let is_directory = match entry.file_type() {
                FileType::Directory => true,
                _ => match looked_at(&fd, name)? {
                    Some((FileType::Directory, _, _)) => true,
                    Some((_, ino, links)) => {
                        if links > 1 {
                            count(&mut self.found, ino, links, directory, name);
                        }
                        false
                    }
                    None => false,
                },
            };
            if is_directory
                && let Some(identity) = handle::identity_at(&fd, name).map_err(system)?
            {
                self.open.push(identity);
            }
        }
        Ok(())
    }

    /// Whether it is still wanted.
    fn ask(&mut self) -> Result<(), BorderError> {
        self.looked.names += 1;
        if self.asked_at.elapsed() < ASK_EVERY {
            return Ok(());
        }
        self.asked_at = Instant::now();
        if (self.is_left)(self.looked) {
            return Err(BorderError::Left);
        }
        Ok(())
    }
}

fn count(
    found: &mut BTreeMap<u64, Several>,
    ino: u64,
    links: u64,
    directory: Identity,
    name: &CStr,
) {
    let several = found.entry(ino).or_insert_with(|| Several {
        links,
        inside: 0,
        directory,
        name: name.to_owned(),
    });
    several.inside += 1;
    // One that was removed after it was counted must not make up for one outside.
    several.links = several.links.max(links);
}

/// Kind, number and links of what has a name; `None` if nothing has it any more.
fn looked_at(
    directory: impl AsFd,
    name: &CStr,
) -> Result<Option<(FileType, u64, u64)>, BorderError> {
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::NLINK;
    match statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, wanted) {
        Ok(found) => Ok(Some((
            FileType::from_raw_mode(found.stx_mode.into()),
            found.stx_ino,
            found.stx_nlink.into(),
        ))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(failed(name.to_string_lossy())(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn crossed_below(top: &Path) -> Vec<(u64, u64)> {
        let tree = bare_view(top).expect("a view");
        let top = handle::identity_of(&tree).expect("who it is");
        let found = search(&tree, vec![top], &|_| false).expect("search");
        let crossed = found.values().filter(|file| file.inside != file.links);
        crossed.map(|file| (file.inside, file.links)).collect()
    }

    #[test]
    fn a_name_outside_is_found_however_deep_the_other_is() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let outside = directory.path().join("outside");
        let top = directory.path().join("kept");
        let deep = top.join("a/".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("one"), "").unwrap();
        fs::hard_link(deep.join("one"), top.join("two")).unwrap();
        fs::hard_link(deep.join("one"), top.join("three")).unwrap();
        assert_eq!(crossed_below(&top), Vec::new());
        fs::hard_link(deep.join("one"), &outside).unwrap();
        assert_eq!(crossed_below(&top), vec![(3, 4)]);
        fs::remove_file(&outside).unwrap();
        assert_eq!(crossed_below(&top), Vec::new());
    }
}
