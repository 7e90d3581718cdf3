//! Where a volume is mounted, by the kernel's word (mountinfo), and mounting it.
//!
//! A volume is recognised by its device number, not by the text of a path; a btrfs, which bears the number of
//! no device, by that of the device it names as its source. These functions block:
//! call them where that is allowed. This module must never mount a device that is already mounted
//! on this node, and knows nothing of the other one: who may mount is decided elsewhere.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use procfs::process::{MountInfo, Process};
use thiserror::Error;

use crate::config::Volume;

#[cfg(test)]
mod tests;

/// The type of a file system whose mounts bear the number of no device.
const BTRFS: &str = "btrfs";

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelDev {
    /// Its driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

impl KernelDev {
    /// From `st_dev` or `st_rdev`.
    #[must_use]
    pub fn from_stat(dev: u64) -> Self {
        let part = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Self {
            major: part(nix::sys::stat::major(dev)),
            minor: part(nix::sys::stat::minor(dev)),
        }
    }

    /// As the kernel keeps it in `s_dev` (`MKDEV`, include/linux/kdev_t.h).
    #[must_use]
    pub const fn s_dev(self) -> u32 {
        self.major << 20 | self.minor
    }

    fn from_mountinfo(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

/// A volume's mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The subvolume, if it is not the top of a btrfs.
    pub part: Option<String>,
    /// File system type.
    pub filesystem: String,
    /// The super block or the mount is read-only.
    pub read_only: bool,
}

/// Where a volume is mounted in this mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountState {
    /// Nowhere.
    NotMounted,
    /// At its mount point, and nowhere else.
    Mounted(Mounted),
    /// Once, somewhere else.
    Elsewhere {
        /// Where.
        at: PathBuf,
    },
    /// At more than one place.
    Twice {
        /// Where.
        at: Vec<PathBuf>,
    },
    /// Something else is mounted at its mount point (or over it).
    Occupied {
        /// What, as mountinfo tells it.
        by: String,
    },
}

/// Why a volume is not mounted as it should be.
#[derive(Debug, Error)]
pub enum MountError {
    /// The device cannot be looked at.
    #[error(
        "volume {volume}: the device {device} is not there: {source}; attach it, or correct `volume.device`"
    )]
    NoDevice {
        /// The volume.
        volume: String,
        /// Its device.
        device: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is no block device.
    #[error("volume {volume}: {device} is no block device; correct `volume.device`")]
    NoBlockDevice {
        /// The volume.
        volume: String,
        /// Its device.
        device: PathBuf,
    },
    /// The kernel's list of mounts cannot be read.
    #[error("cannot read the list of mounts: {0}; is /proc mounted?")]
    NoList(#[from] procfs::ProcError),
    /// It is not mounted.
    #[error(
        "volume {volume} is not mounted at {mount_point}: mount it, or set `mount_by = \"agent\"`"
    )]
    NotMounted {
        /// The volume.
        volume: String,
        /// Where it should be.
        mount_point: PathBuf,
    },
    /// It is mounted somewhere else.
    #[error(
        "volume {volume} is mounted at {at}, and configured for {mount_point}: unmount it there, or correct `volume.mount_point`"
    )]
    Elsewhere {
        /// The volume.
        volume: String,
        /// Where it is.
        at: PathBuf,
        /// Where it should be.
        mount_point: PathBuf,
    },
    /// It is mounted more than once.
    #[error("volume {volume} is mounted more than once ({at}): unmount all but the configured one")]
    Twice {
        /// The volume.
        volume: String,
        /// Where.
        at: String,
    },
    /// Something else is there.
    #[error(
        "volume {volume}: {by} is mounted at {mount_point}: unmount it, or correct `volume.mount_point`"
    )]
    Occupied {
        /// The volume.
        volume: String,
        /// What.
        by: String,
        /// Where.
        mount_point: PathBuf,
    },
    /// It is mounted as another file system than configured.
    #[error(
        "volume {volume} is mounted as {found}, and configured as {wanted}: correct `volume.filesystem`"
    )]
    OtherFilesystem {
        /// The volume.
        volume: String,
        /// The type it has.
        found: String,
        /// The type it should have.
        wanted: String,
    },
    /// It is not the top of a btrfs.
    #[error(
        "volume {volume} is mounted by a subvolume of its btrfs ({part}), and only the whole of one can be protected: mount it with `subvolid=5`"
    )]
    Part {
        /// The volume.
        volume: String,
        /// The subvolume.
        part: String,
    },
    /// It is read-only.
    #[error(
        "volume {volume} is mounted read-only: look for errors of its device in the kernel's log, check the file system, mount it again"
    )]
    ReadOnly {
        /// The volume.
        volume: String,
    },
    /// The mount point is no directory.
    #[error(
        "volume {volume}: the mount point {mount_point} is no directory: create it on both nodes"
    )]
    NoMountPoint {
        /// The volume.
        volume: String,
        /// The mount point.
        mount_point: PathBuf,
    },
    /// The device or the mount point is in use.
    #[error(
        "volume {volume}: cannot {what} {device}, it is busy: {said}; end what uses it (see `lsblk {device}` and `fuser -vm {device}`)"
    )]
    Busy {
        /// The volume.
        volume: String,
        /// `mount` or `unmount`.
        what: &'static str,
        /// Its device.
        device: PathBuf,
        /// What the command said.
        said: String,
    },
    /// mount(8) or umount(8) failed.
    #[error("volume {volume}: cannot {what} {device}: {said}")]
    Failed {
        /// The volume.
        volume: String,
        /// `mount` or `unmount`.
        what: &'static str,
        /// Its device.
        device: PathBuf,
        /// What the command said.
        said: String,
    },
}

/// Where the volume is mounted now.
///
/// # Errors
/// If its device or the list of mounts cannot be looked at.
pub fn find(volume: &Volume) -> Result<MountState, MountError> {
    let metadata = std::fs::metadata(&volume.device).map_err(|source| MountError::NoDevice {
        volume: volume.name.clone(),
        device: volume.device.clone(),
        source,
    })?;
    if !metadata.file_type().is_block_device() {
        let (volume, device) = (volume.name.clone(), volume.device.clone());
        return Err(MountError::NoBlockDevice { volume, device });
    }
    let mounts = Process::myself()?.mountinfo()?.0;
    let mount_point =
        std::fs::canonicalize(&volume.mount_point).unwrap_or_else(|_| volume.mount_point.clone());
    Ok(classify(
        &mounts,
        KernelDev::from_stat(metadata.rdev()),
        &mount_point,
    ))
}

/// Whether `mount` is of the file system on `device`.
#[must_use]
pub fn is_of(mount: &MountInfo, device: KernelDev) -> bool {
    if mount.fs_type != BTRFS {
        return KernelDev::from_mountinfo(&mount.majmin) == Some(device);
    }
    let source = mount.mount_source.as_deref().map(Path::new);
    let source = source.and_then(|path| std::fs::metadata(unescaped(path)).ok());
    source.is_some_and(|found| {
        found.file_type().is_block_device() && KernelDev::from_stat(found.rdev()) == device
    })
}

/// As [`find`], from a list of mounts.
#[must_use]
pub fn classify(mounts: &[MountInfo], device: KernelDev, mount_point: &Path) -> MountState {
    let of_device = |mount: &&MountInfo| is_of(mount, device);
    let own: Vec<&MountInfo> = mounts.iter().filter(of_device).collect();
    // The last one at a place covers those before it.
    let there = mounts
        .iter()
        .rfind(|mount| unescaped(&mount.mount_point) == mount_point);
    if let Some(by) = there.filter(|mount| !of_device(mount)) {
        let source = by.mount_source.as_deref().unwrap_or("none");
        return MountState::Occupied {
            by: format!("{source} ({})", by.fs_type),
        };
    }
    match own.as_slice() {
        [] => MountState::NotMounted,
        [one] if unescaped(&one.mount_point) == mount_point => MountState::Mounted(Mounted {
            part: (one.fs_type == BTRFS && one.root != "/").then(|| one.root.clone()),
            filesystem: one.fs_type.clone(),
            read_only: one.super_options.contains_key("ro") || one.mount_options.contains_key("ro"),
        }),
        [one] => MountState::Elsewhere {
            at: unescaped(&one.mount_point),
        },
        more => MountState::Twice {
            at: more
                .iter()
                .map(|mount| unescaped(&mount.mount_point))
                .collect(),
        },
    }
}

/// mountinfo writes blanks and backslashes as `\` and three octal digits.
#[must_use]
pub fn unescaped(path: &Path) -> PathBuf {
    let mut bytes = path.as_os_str().to_owned().into_vec().into_iter();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        let digits: Vec<u8> = bytes.as_slice().iter().take(3).copied().collect();
        let octal = std::str::from_utf8(&digits)
            .ok()
            .filter(|text| text.len() == 3);
        match octal.and_then(|text| u8::from_str_radix(text, 8).ok()) {
            Some(value) if byte == b'\\' => {
                plain.push(value);
                bytes.nth(2);
            }
            _ => plain.push(byte),
        }
    }
    OsString::from_vec(plain).into()
}

/// The volume's mount, if it is the one that is configured.
///
/// # Errors
/// What is not as it should be, with the remedy.
pub fn require_mounted(volume: &Volume) -> Result<Mounted, MountError> {
    accept(volume, find(volume)?)
}

fn accept(volume: &Volume, state: MountState) -> Result<Mounted, MountError> {
    let (name, mount_point) = (volume.name.clone(), volume.mount_point.clone());
    let mounted = match state {
        MountState::Mounted(mounted) => mounted,
        MountState::NotMounted => {
            return Err(MountError::NotMounted {
                volume: name,
                mount_point,
            });
        }
        other => return Err(misplaced(volume, other)),
    };
    if mounted.filesystem != volume.filesystem {
        let (found, wanted) = (mounted.filesystem, volume.filesystem.clone());
        return Err(MountError::OtherFilesystem {
            volume: name,
            found,
            wanted,
        });
    }
    if let Some(part) = mounted.part {
        return Err(MountError::Part { volume: name, part });
    }
    if mounted.read_only {
        return Err(MountError::ReadOnly { volume: name });
    }
    Ok(mounted)
}

fn misplaced(volume: &Volume, state: MountState) -> MountError {
    let (name, mount_point) = (volume.name.clone(), volume.mount_point.clone());
    match state {
        MountState::Elsewhere { at } => MountError::Elsewhere {
            volume: name,
            at,
            mount_point,
        },
        MountState::Twice { at } => {
            let at: Vec<String> = at.iter().map(|path| path.display().to_string()).collect();
            MountError::Twice {
                volume: name,
                at: at.join(", "),
            }
        }
        MountState::Occupied { by } => MountError::Occupied {
            volume: name,
            by,
            mount_point,
        },
        MountState::NotMounted | MountState::Mounted(_) => MountError::NotMounted {
            volume: name,
            mount_point,
        },
    }
}

/// Mounts the volume at its mount point with its options; a volume that is already there is done.
///
/// # Errors
/// What is in the way, with the remedy.
pub fn mount(volume: &Volume) -> Result<Mounted, MountError> {
    match find(volume)? {
        MountState::NotMounted => {}
        state => return accept(volume, state),
    }
    if !volume.mount_point.is_dir() {
        let (name, mount_point) = (volume.name.clone(), volume.mount_point.clone());
        return Err(MountError::NoMountPoint {
            volume: name,
            mount_point,
        });
    }
    let mut command = Command::new("mount");
    command.args(["-t", &volume.filesystem]);
    if !volume.mount_options.is_empty() {
        command.args(["-o", &volume.mount_options]);
    }
    command
        .arg("--")
        .arg(&volume.device)
        .arg(&volume.mount_point);
    run(volume, "mount", command)?;
    require_mounted(volume)
}

/// Unmounts the volume; one that is not mounted is done.
///
/// # Errors
/// If something uses it, or it is not where it should be.
pub fn unmount(volume: &Volume) -> Result<(), MountError> {
    match find(volume)? {
        MountState::NotMounted => return Ok(()),
        MountState::Mounted(_) => {}
        state => return Err(misplaced(volume, state)),
    }
    let mut command = Command::new("umount");
    command.arg("--").arg(&volume.mount_point);
    run(volume, "unmount", command)
}

/// Nobody has the file system mounted, in another mount namespace either: whoever does keeps the device for
/// itself (`bd_prepare_to_claim`, block/bdev.c).
///
/// # Errors
/// [`MountError::Busy`], or if the device cannot be opened.
pub fn require_unused(volume: &Volume) -> Result<(), MountError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(&volume.device);
    let Err(error) = opened else {
        return Ok(());
    };
    let (name, device) = (volume.name.clone(), volume.device.clone());
    let what = "take for itself";
    Err(if error.kind() == std::io::ErrorKind::ResourceBusy {
        MountError::Busy {
            volume: name,
            what,
            device,
            said: "it is mounted in another mount namespace, or another device lies on it"
                .to_owned(),
        }
    } else {
        MountError::Failed {
            volume: name,
            what,
            device,
            said: error.to_string(),
        }
    })
}

fn run(volume: &Volume, what: &'static str, mut command: Command) -> Result<(), MountError> {
    let said = match command.env("LC_ALL", "C").output() {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => words(&output),
        Err(error) => error.to_string(),
    };
    let (name, device) = (volume.name.clone(), volume.device.clone());
    Err(if said.contains("busy") {
        MountError::Busy {
            volume: name,
            what,
            device,
            said,
        }
    } else {
        MountError::Failed {
            volume: name,
            what,
            device,
            said,
        }
    })
}

fn words(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() {
        output.status.to_string()
    } else {
        text
    }
}
