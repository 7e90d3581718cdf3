//! The directory of a volume below which it is protected.
//!
//! Programs know it by its identity; so somebody must look whether its path still leads there.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};
use thiserror::Error;
use twinwrite_abi::control;

use super::btf::Setting;
use super::handle::identity_of;
use crate::ids::Identity;

/// The agent's own directory, below the mount point.
const OWN_DIRECTORY: &str = ".twinwrite";

/// A protected directory, and the agent's own on the same volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subtree {
    /// The directory below which files are protected, and those above it up to the volume's root, without that.
    path: Vec<Identity>,
    /// The agent's own, whose files the programs must see to be calibrated.
    own: Identity,
}

/// Why there is none, with the remedy.
#[derive(Debug, Error)]
pub enum NoSubtree {
    /// It cannot be opened as a directory.
    #[error(
        "`directory`: {path} cannot be opened: make it, or correct the key; until then nothing of the volume is \
         protected"
    )]
    Missing {
        /// The whole path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Something else is mounted there, or a symlink leads there.
    #[error(
        "`directory`: {0} is reached through a symlink or another mount: name a directory of the volume itself"
    )]
    Elsewhere(String),
}

impl Subtree {
    /// Looks for `directory`, a path below the mount point of a volume.
    ///
    /// # Errors
    /// [`NoSubtree`].
    pub fn find(mount: &Path, directory: &Path) -> Result<Self, NoSubtree> {
        Self::find_by(mount, directory, ResolveFlags::NO_XDEV)
    }

    /// As [`Self::find`], without asking a disk; `None` if the kernel does not have it all in memory.
    ///
    /// # Errors
    /// [`NoSubtree`].
    pub fn find_cached(mount: &Path, directory: &Path) -> Result<Option<Self>, NoSubtree> {
        // With NO_XDEV the kernel answers EAGAIN where something is mounted, too (`__follow_mount_rcu`).
        match Self::find_by(mount, directory, ResolveFlags::CACHED) {
            Err(NoSubtree::Missing { source, .. })
                if source.kind() == io::ErrorKind::WouldBlock =>
            {
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    fn find_by(mount: &Path, directory: &Path, how: ResolveFlags) -> Result<Self, NoSubtree> {
        let above = directory.ancestors().filter(|path| *path != Path::new(""));
        Ok(Self {
            path: (above.take(control::SUBTREE_PATH_MAX))
                .map(|path| find(mount, path, how))
                .collect::<Result<_, _>>()?,
            own: find(mount, Path::new(OWN_DIRECTORY), how)?,
        })
    }

    /// The protected directory.
    pub(super) fn top(&self) -> Identity {
        self.path.first().copied().unwrap_or(self.own)
    }

    /// All directories below which programs capture.
    pub(super) fn tops(&self) -> Vec<Identity> {
        vec![self.top(), self.own]
    }

    /// The globals by which programs know it.
    pub(super) fn globals(&self) -> [Setting; 4] {
        let top = self.top();
        [
            ("SUBTREE_INO", top.ino),
            ("SUBTREE_GENERATION", top.generation.into()),
            ("OWN_INO", self.own.ino),
            ("OWN_GENERATION", self.own.generation.into()),
        ]
    }
}

/// What the control map says of a protected directory, slot by slot.
pub(super) fn words(subtree: Option<&Subtree>) -> Vec<(usize, u64)> {
    let path = subtree.map_or(&[][..], |subtree| &subtree.path);
    let places = (0..control::SUBTREE_PATH_MAX).map(|index| {
        let identity = path.get(index).copied();
        (control::SUBTREE_PATH + 2 * index, identity)
    });
    let own = (control::SUBTREE_OWN, subtree.map(|subtree| subtree.own));
    let pair = |(slot, identity): (usize, Option<Identity>)| {
        let words = identity.map_or([0, 0], |identity| {
            [identity.ino, identity.generation.into()]
        });
        [(slot, words[0]), (slot + 1, words[1])]
    };
    places.chain([own]).flat_map(pair).collect()
}

fn find(mount: &Path, directory: &Path, how: ResolveFlags) -> Result<Identity, NoSubtree> {
    let path = mount.join(directory).display().to_string();
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(libc::EXDEV | libc::ELOOP) => NoSubtree::Elsewhere(path.clone()),
        _ => NoSubtree::Missing {
            path: path.clone(),
            source: error,
        },
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | how;
    let mounted = File::open(mount).map_err(failed)?;
    let opened = openat2(&mounted, directory, flags, Mode::empty(), within);
    let opened = opened.map_err(|error| failed(error.into()))?;
    let device = |fd: &dyn AsFd| fstat(fd.as_fd()).map(|found| found.st_dev);
    let is_of_volume = device(&mounted).and_then(|volume| Ok(device(&opened)? == volume));
    if !is_of_volume.map_err(|error| failed(error.into()))? {
        return Err(NoSubtree::Elsewhere(path));
    }
    identity_of(&opened).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_directory_of_the_volume_is_told() {
        let mount = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(mount.path().join("a/kept")).unwrap();
        std::fs::write(mount.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("a", mount.path().join("link")).unwrap();
        let told = |path: &str| match find(mount.path(), Path::new(path), ResolveFlags::NO_XDEV) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(told("missing").contains("make it"), "{}", told("missing"));
        assert!(told("file").contains("make it"), "{}", told("file"));
        assert!(told("link/kept").contains("symlink"));
        assert!(told("../").contains("another mount"));
    }
}
