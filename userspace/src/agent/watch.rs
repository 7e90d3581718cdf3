//! What may be taken away from under a running agent: the mount, its being writable, the pinned
//! programs; and how the kernel's NFS server answers. Looked at every few seconds, whatever flows.
//!
//! It must never block on the volume's disk: it asks the kernel only for what it has in memory.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::statvfs::{FsFlags, statvfs};

use super::pump::Ended;
use crate::capture::{Capture, to_kernel_device};
use crate::config::Volume;

/// How often.
pub const EVERY: Duration = Duration::from_secs(4);

/// When was last looked.
#[derive(Debug)]
pub struct Watch {
    looked_at: Instant,
}

impl Watch {
    /// The first look is due after [`EVERY`].
    pub fn start() -> Self {
        Self {
            looked_at: Instant::now(),
        }
    }

    /// Looks, if it is time.
    ///
    /// # Errors
    /// [`Ended::Volume`], [`Ended::CaptureLost`].
    pub fn look(&mut self, volume: &Volume, capture: &Capture) -> Result<(), Ended> {
        if self.looked_at.elapsed() < EVERY {
            return Ok(());
        }
        self.looked_at = Instant::now();
        capture.watch_server();
        look_at_mount(&volume.mount_point, capture.options().device).map_err(Ended::Volume)?;
        match capture.missing_pin() {
            Some(path) => Err(Ended::CaptureLost(format!(
                "{} was removed",
                path.display()
            ))),
            None => Ok(()),
        }
    }
}

/// Whether the captured file system is at its mount point, and can be written; if not, why, with the
/// remedy.
///
/// # Errors
/// The reason.
pub fn look_at_mount(mount_point: &Path, device: u32) -> Result<(), String> {
    let shown = mount_point.display();
    let there = std::fs::metadata(mount_point)
        .map_err(|error| format!("{shown} cannot be looked at: {error}"))?;
    if to_kernel_device(there.dev()) != device {
        return Err(format!(
            "the volume is no longer mounted at {shown}, so what is written there passes it by: mount \
             it again"
        ));
    }
    let flags = statvfs(mount_point)
        .map_err(|error| format!("{shown} cannot be looked at: {error}"))?
        .flags();
    if flags.contains(FsFlags::ST_RDONLY) {
        return Err(format!(
            "the volume at {shown} has become read-only: look at the kernel log for errors of its \
             disk, then mount it writable again"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_system_at_the_mount_point_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let device = to_kernel_device(std::fs::metadata(directory.path()).unwrap().dev());
        look_at_mount(directory.path(), device).unwrap();
        let error = look_at_mount(directory.path(), device + 1).unwrap_err();
        assert!(error.contains("no longer mounted"), "{error}");
        let error = look_at_mount(&directory.path().join("gone"), device).unwrap_err();
        assert!(error.contains("cannot be looked at"), "{error}");
    }

    #[test]
    fn what_cannot_be_written_is_told() {
        let device = to_kernel_device(std::fs::metadata("/sys").unwrap().dev());
        let read_only = statvfs("/sys")
            .unwrap()
            .flags()
            .contains(FsFlags::ST_RDONLY);
        let told = look_at_mount(Path::new("/sys"), device);
        assert_eq!(told.is_err(), read_only, "{told:?}");
    }
}
