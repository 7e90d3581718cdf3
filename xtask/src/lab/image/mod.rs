//! Kernels and the root image of the virtual machines, all from Debian packages, made once and
//! cached under a hash of what they are made from.
//!
//! It never installs a package on the host and never changes a finished image.

mod kernel;
mod root;

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::config::KernelRelease;
use super::lock;
use crate::setup::{self, Purpose};
use crate::{paths, progress};

/// Raised when the same packages and modules are to be made into another image.
const RECIPE: u32 = 1;

/// A finished image.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    directory: PathBuf,
}

impl Image {
    /// The read-only root, shared by all machines.
    #[must_use]
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.join("root.erofs")
    }

    /// The uncompressed kernel: it boots faster under emulation.
    #[must_use]
    pub(crate) fn kernel(&self, release: KernelRelease) -> PathBuf {
        self.directory.join(format!("vmlinux-{release}"))
    }

    /// The initial ramdisk.
    #[must_use]
    pub(crate) fn initrd(&self, release: KernelRelease) -> PathBuf {
        self.directory.join(format!("initrd-{release}"))
    }
}

/// The image, made first if the cache does not have it.
///
/// # Errors
/// If the host lacks something, or a package cannot be downloaded or unpacked.
pub(crate) fn ensure() -> Result<Image> {
    setup::ensure(Purpose::Lab)?;
    let cache = paths::lab_cache();
    let directory = cache.join(format!("image-{:016x}", inputs_hash()));
    let image = Image {
        directory: directory.clone(),
    };
    if directory.is_dir() {
        return Ok(image);
    }
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let _lock = lock::exclusive(&cache.join("lock"))?;
    if directory.is_dir() {
        return Ok(image);
    }
    // Finished under another name first: a directory of the right name is always whole.
    let work = tempfile::Builder::new()
        .prefix("making-")
        .tempdir_in(&cache)?;
    make(work.path())?;
    fs::rename(work.path().join("image"), &directory)
        .with_context(|| format!("cannot move the image to {}", directory.display()))?;
    Ok(image)
}

fn make(work: &Path) -> Result<()> {
    let image = work.join("image");
    fs::create_dir(&image)?;
    let log = work.with_extension("log");
    let mut trees = Vec::new();
    for release in KernelRelease::ALL {
        let tree = progress::step(&format!("Downloading kernel {release}"), || {
            kernel::download(release, work, &log)
        })?;
        progress::step(&format!("Unpacking kernel {release}"), || {
            kernel::extract_vmlinux(&tree, &image.join(format!("vmlinux-{release}")))?;
            kernel::make_initrd(
                &tree,
                &work.join(format!("initrd-{release}")),
                &image.join(format!("initrd-{release}")),
            )
        })?;
        trees.push(tree);
    }
    progress::step(
        "Making the virtual machines' root from Debian packages",
        || root::make(work, &trees, &image.join("root.erofs"), &log),
    )?;
    let _ = fs::remove_file(log);
    Ok(())
}

/// Everything that decides the image's content; the programs and scripts of a lab are not in it.
fn inputs_hash() -> u64 {
    let mut hasher = DefaultHasher::new();
    RECIPE.hash(&mut hasher);
    (
        root::SUITE,
        root::PACKAGES,
        root::POSTGRESQL,
        root::MODULES,
        kernel::INITRD_MODULES,
    )
        .hash(&mut hasher);
    include_str!("../../../guest/initrd-init").hash(&mut hasher);
    hasher.finish()
}
