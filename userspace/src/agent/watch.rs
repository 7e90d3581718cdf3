//! What may be taken away from under a running agent: the mount, its being writable, a file system that
//! works, the pinned programs; and how the kernel's NFS server answers. Looked at every few seconds, whatever
//! flows.
//!
//! What is written to a volume that has gone passes the programs by, so that the epoch ends. One that is
//! read-only or broken is exposed and no more: what was mirrored may not be on its disk, and must stay there
//! to be merged.
//!
//! It must never block on the volume's disk: it asks the kernel only for what it has in memory.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::statvfs::{FsFlags, statvfs};
use thiserror::Error;

use super::filesystem_health::FilesystemHealth;
use super::pump::{Ended, Standing};
use crate::board::VolumeBoard;
use crate::capture::{Capture, CaptureError, Subtree, kernel_device};
use crate::config::Volume;
use crate::replay::sentinel;

/// How often.
pub const EVERY: Duration = Duration::from_secs(4);

/// What is wrong with a mount, with the remedy.
#[derive(Debug, Error)]
pub enum MountFault {
    /// What is written there passes the volume by.
    #[error("{0}")]
    Gone(String),
    /// It is there and cannot be changed.
    #[error("{0}")]
    Broken(String),
}

/// When was last looked, and what was found then.
#[derive(Debug)]
pub struct Watch {
    looked_at: Instant,
    health: FilesystemHealth,
    weakness: Option<String>,
}

impl Watch {
    /// The first look is due after [`EVERY`].
    pub fn start(volume: &Volume, capture: &Capture) -> Self {
        let mount = &volume.mount_point;
        let device = capture.options().device;
        Self {
            looked_at: Instant::now(),
            health: FilesystemHealth::of(mount, device, &sentinel::path_on(mount)),
            weakness: None,
        }
    }

    /// Looks, if it is time. Whether a checkpoint is wanted, which tells whether the file system works.
    ///
    /// # Errors
    /// [`Ended::Volume`], [`Ended::CaptureLost`].
    pub fn look(
        &mut self,
        volume: &Volume,
        capture: &Capture,
        board: &VolumeBoard,
    ) -> Result<bool, Ended> {
        if self.looked_at.elapsed() < EVERY {
            return Ok(false);
        }
        self.looked_at = Instant::now();
        capture.watch_server();
        let broken = match look_at_mount(&volume.mount_point, capture.options().device) {
            Ok(()) => None,
            Err(MountFault::Gone(reason)) => return Err(Ended::Volume(reason)),
            Err(MountFault::Broken(reason)) => Some(reason),
        };
        if let Some(reason) = lost_subtree(volume, capture) {
            return Err(Ended::CaptureLost(reason));
        }
        let unwell = self.health.look(board.checkpoints.get());
        board.filesystem_errors.set(self.health.errors());
        let wants_checkpoint = unwell.is_some();
        self.weakness = unwell.or(broken);
        match capture.missing_pin() {
            Some(path) => Err(Ended::CaptureLost(format!(
                "{} was removed",
                path.display()
            ))),
            None => Ok(wants_checkpoint),
        }
    }

    /// What the volume's standing is, given what was found.
    pub fn weaken(&self, standing: Standing) -> Standing {
        match (&self.weakness, standing) {
            (None, standing) => standing,
            (Some(reason), Standing::Exposed(other)) => {
                Standing::Exposed(format!("{reason}; {other}"))
            }
            (Some(reason), _) => Standing::Exposed(reason.clone()),
        }
    }
}

/// Why the protected directory is no longer where the configuration says, if so.
pub fn lost_subtree(volume: &Volume, capture: &Capture) -> Option<String> {
    let directory = volume.directory.as_deref()?;
    let known = capture.options().subtree.as_ref();
    match Subtree::find_cached(&volume.mount_point, directory) {
        Ok(None) => None,
        Ok(found) if found.as_ref() == known => None,
        Ok(_) => Some(format!(
            "another directory than the protected one is at {} now (`directory`)",
            volume.mount_point.join(directory).display()
        )),
        Err(error) => Some(error.to_string()),
    }
}

/// Whether the captured file system is at its mount point, and can be written.
///
/// # Errors
/// [`MountFault`].
pub fn look_at_mount(mount_point: &Path, device: u32) -> Result<(), MountFault> {
    let shown = mount_point.display();
    let cannot = |error: &dyn std::error::Error, source: Option<&io::Error>| {
        let reason = format!("{shown} cannot be looked at: {error}");
        // So answers an XFS that has shut itself down.
        if source.and_then(io::Error::raw_os_error) == Some(libc::EIO) {
            MountFault::Broken(reason)
        } else {
            MountFault::Gone(reason)
        }
    };
    let there = kernel_device(mount_point).map_err(|error| match &error {
        CaptureError::System { source, .. } => cannot(source, Some(source)),
        _ => cannot(&error, None),
    })?;
    if there != device {
        return Err(MountFault::Gone(format!(
            "the volume is no longer mounted at {shown}, so what is written there passes it by: mount \
             it again"
        )));
    }
    let flags = statvfs(mount_point)
        .map_err(io::Error::from)
        .map_err(|error| cannot(&error, Some(&error)))?
        .flags();
    if flags.contains(FsFlags::ST_RDONLY) {
        return Err(MountFault::Broken(format!(
            "the volume at {shown} has become read-only: look at the kernel log for errors of its disk. \
             What was not flushed before may be in the mirror's region only: if there were errors, power \
             this node off, so that the mirror takes over; else mount it writable again"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_system_at_the_mount_point_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let device = kernel_device(directory.path()).unwrap();
        look_at_mount(directory.path(), device).unwrap();
        let error = look_at_mount(directory.path(), device + 1).unwrap_err();
        assert!(matches!(error, MountFault::Gone(_)));
        let error = error.to_string();
        assert!(error.contains("no longer mounted"), "{error}");
        let error = look_at_mount(&directory.path().join("gone"), device).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("cannot be looked at"), "{error}");
    }

    #[test]
    fn what_cannot_be_written_is_told() {
        let device = kernel_device(Path::new("/sys")).unwrap();
        let read_only = statvfs("/sys")
            .unwrap()
            .flags()
            .contains(FsFlags::ST_RDONLY);
        let told = look_at_mount(Path::new("/sys"), device);
        assert_eq!(told.is_err(), read_only, "{told:?}");
        assert!(!matches!(told, Err(MountFault::Gone(_))));
    }

    #[test]
    fn a_weakness_exposes_and_keeps_what_else_is_told() {
        let mut watch = Watch {
            looked_at: Instant::now(),
            health: FilesystemHealth::of(Path::new("/"), 0, Path::new("/nonexistent")),
            weakness: None,
        };
        assert_eq!(watch.weaken(Standing::Protected), Standing::Protected);
        watch.weakness = Some("read-only".into());
        let exposed = |text: &str| Standing::Exposed(text.into());
        assert_eq!(watch.weaken(Standing::Protected), exposed("read-only"));
        let both = watch.weaken(exposed("a gap"));
        assert_eq!(both, exposed("read-only; a gap"));
    }
}
