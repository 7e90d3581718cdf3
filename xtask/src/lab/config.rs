//! What a lab is made of: its options, kept in `lab.json` so that a machine can be booted again,
//! and the agents' configuration.
//!
//! It never talks to a machine.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::accel::Accelerator;
use super::emulator::Emulator;

/// One of the two machines.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum NodeName {
    /// The owner while nothing has failed.
    A,
    /// Its mirror.
    B,
}

impl NodeName {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// As in file names and configurations.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// Its address on the wire between them.
    #[must_use]
    pub const fn address(self) -> &'static str {
        match self {
            Self::A => "10.77.0.1",
            Self::B => "10.77.0.2",
        }
    }

    /// The node of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|node| node.name() == name)
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The volume's file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filesystem {
    /// ext4
    #[default]
    Ext4,
    /// XFS
    Xfs,
    /// btrfs
    Btrfs,
}

impl Filesystem {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// What checks one that is not mounted, on the host, and changes nothing.
    #[must_use]
    pub fn check(self) -> Command {
        let (program, arguments): (_, &[&str]) = match self {
            Self::Ext4 => ("/usr/sbin/e2fsck", &["-f", "-n"]),
            Self::Xfs => ("/usr/sbin/xfs_repair", &["-n", "-f"]),
            Self::Btrfs => ("/usr/bin/btrfs", &["check", "--readonly"]),
        };
        let mut command = Command::new(program);
        command.args(arguments);
        command
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        })
    }
}

/// Which of Debian 12's kernels the machines run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum KernelRelease {
    /// The stable release's own.
    #[value(name = "6.1")]
    #[serde(rename = "6.1")]
    V6_1,
    /// The newer one it also offers.
    #[default]
    #[value(name = "6.12")]
    #[serde(rename = "6.12")]
    V6_12,
}

impl KernelRelease {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// The meta package that depends on the kernel.
    #[must_use]
    pub const fn debian_package(self) -> &'static str {
        match self {
            Self::V6_1 => "linux-image-amd64",
            Self::V6_12 => "linux-image-6.12-amd64",
        }
    }
}

impl fmt::Display for KernelRelease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

/// How bytes reach the mirror.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkKind {
    /// One-sided RDMA writes over soft-RoCE.
    #[default]
    Rdma,
    /// TCP.
    Tcp,
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        })
    }
}

/// What the shared disks do at a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskKind {
    /// They keep what the machine wrote, flushed or not: the host's page cache outlives a machine.
    #[default]
    Plain,
    /// They lose what the machine had not flushed, but for a part that a seed decides.
    Volatile,
}

/// What runs on the machines once they are up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Service {
    /// The agents; the volume is protected.
    #[default]
    Agents,
    /// No agent; A has the volume mounted plainly: the negative control.
    PlainMount,
    /// No agent and nothing mounted.
    Nothing,
}

/// Which programs go into the machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Programs {
    /// Build them first.
    #[default]
    Build,
    /// What an earlier build left, if anything.
    AsBuilt,
}

/// When a lab ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// Never: `vm down` ends it.
    #[default]
    UntilDown,
    /// With the process that made it.
    ThisProcess,
}

/// What `up` makes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The volume's file system.
    pub filesystem: Filesystem,
    /// The machines' kernel.
    pub kernel: KernelRelease,
    /// The agents' link.
    pub link: LinkKind,
    /// What runs on the machines.
    pub service: Service,
    /// Which programs go in.
    pub programs: Programs,
    /// When the lab ends by itself.
    pub lifetime: Lifetime,
    /// Lines for the configuration's `[cluster]`.
    pub cluster_settings: Vec<String>,
    /// Lines for its `[[volume]]`.
    pub volume_settings: Vec<String>,
    /// More words for the kernels' command line.
    #[serde(default)]
    pub kernel_parameters: Vec<String>,
    /// What the shared disks do at a power cut.
    pub disks: DiskKind,
    /// Decides what a volatile disk keeps.
    pub disk_seed: u64,
    /// Volumes besides the first one, with the same settings.
    pub more_volumes: usize,
    /// Size of each volume's disk, if not the usual.
    pub volume_bytes: Option<u64>,
    /// An empty shared disk that no volume is on.
    pub spare_disk: bool,
}

impl Options {
    /// Names of the volumes' disks, the first volume's first.
    pub(super) fn volume_disks(&self) -> impl Iterator<Item = String> {
        (0..=self.more_volumes).map(volume_disk)
    }

    /// Names of all disks that both machines see.
    pub(super) fn shared_disks(&self) -> Vec<String> {
        let mut names: Vec<String> = self.volume_disks().collect();
        names.push(MAILBOX_DISK.to_owned());
        names.extend(self.spare_disk.then(|| SPARE_DISK.to_owned()));
        names
    }
}

/// Everything a daemon needs to boot a machine of the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabConfig {
    /// What was asked for.
    pub options: Options,
    /// How the processor is had.
    pub accelerator: Accelerator,
    /// What runs the machines.
    pub emulator: Emulator,
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Initial ramdisk.
    pub initrd: PathBuf,
    /// Shared read-only root.
    pub root: PathBuf,
}

impl LabConfig {
    const FILE: &'static str = "lab.json";

    /// Reads it from a lab's directory.
    ///
    /// # Errors
    /// If there is none or it cannot be understood.
    pub fn load(lab: &Path) -> Result<Self> {
        let path = lab.join(Self::FILE);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes it to a lab's directory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, lab: &Path) -> Result<()> {
        let path = lab.join(Self::FILE);
        fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The volume's name in the lab.
pub const VOLUME: &str = "vol0";
/// Where the owner mounts it.
pub const MOUNT_POINT: &str = "/srv/vol0";
/// The shared disk in a machine.
pub const VOLUME_DEVICE: &str = "/dev/disk/by-id/virtio-volume";
/// The first volume's shared disk.
pub const VOLUME_DISK: &str = "volume";
/// The small shared disk for heartbeats.
pub const MAILBOX_DISK: &str = "mailbox";
/// The shared disk that holds nothing.
pub const SPARE_DISK: &str = "spare";
/// The small shared disk for heartbeats, in a machine.
pub const MAILBOX_DEVICE: &str = "/dev/disk/by-id/virtio-mailbox";

/// Name of the disk of the volume of that number.
#[must_use]
pub fn volume_disk(index: usize) -> String {
    match index {
        0 => VOLUME_DISK.to_owned(),
        _ => format!("{VOLUME_DISK}{index}"),
    }
}

/// That disk in a machine.
#[must_use]
pub fn volume_device(index: usize) -> String {
    format!("/dev/disk/by-id/virtio-{}", volume_disk(index))
}

/// Name of the volume of that number; the first one is 0.
#[must_use]
pub fn volume_name(index: usize) -> String {
    format!("vol{index}")
}

/// Where its owner mounts it.
#[must_use]
pub fn mount_point(index: usize) -> String {
    format!("/srv/vol{index}")
}

/// The agents' configuration, the same on both nodes.
#[must_use]
pub fn twinwrite_toml(options: &Options) -> String {
    let Options {
        filesystem,
        link,
        cluster_settings,
        volume_settings,
        ..
    } = options;
    let mut text = format!(
        "[cluster]\nname = \"lab\"\ntransport = \"{link}\"\nmailbox = \"{MAILBOX_DEVICE}\"\n\
         fence_command = [\"/usr/local/sbin/twinwrite-fence\", \"{{node}}\"]\n\
         metrics_listen = \"127.0.0.1:9477\"\n"
    );
    push_lines(&mut text, cluster_settings);
    for node in NodeName::ALL {
        text += &format!(
            "\n[[node]]\nname = \"{node}\"\naddress = \"{}:7477\"\n",
            node.address()
        );
    }
    for index in 0..=options.more_volumes {
        text += &format!(
            "\n[[volume]]\nname = \"{}\"\ndevice = \"{}\"\n\
             mount_point = \"{}\"\nfilesystem = \"{filesystem}\"\n\
             owner = \"{}\"\nmirror = \"{}\"\n",
            volume_name(index),
            volume_device(index),
            mount_point(index),
            NodeName::A,
            NodeName::B
        );
        push_lines(&mut text, volume_settings);
    }
    text
}

fn push_lines(text: &mut String, lines: &[String]) {
    for line in lines {
        text.push_str(line);
        text.push('\n');
    }
}
