//! The lab: two virtual machines, `a` and `b`, with one shared disk, a mailbox disk, a wire between
//! them and a host that can cut their power. People try twinwrite in it and all tests run in it.
//!
//! Each lab has a daemon of its own that owns the machines; a [`Lab`] is a handle that any number
//! of processes may hold. It never counts a machine as alive because a zombie answers to its number.

mod accel;
mod agent;
mod client;
mod command;
pub mod config;
mod create;
pub mod daemon;
mod disks;
mod emulator;
mod image;
mod lock;
mod power;
pub mod process;
pub mod protocol;
mod qemu;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::paths;

pub use agent::{AgentAction, AwaitedState};
pub use command::{Output, Stream, shell_quoted};
pub use config::{
    DiskKind, Filesystem, KernelRelease, Lifetime, LinkKind, NodeName, Options, Programs, Service,
};
pub use power::CrashKind;

/// Wall clock.
pub mod clock {
    use std::time::{SystemTime, UNIX_EPOCH};

    /// Milliseconds since 1970.
    #[must_use]
    pub fn now_ms() -> i64 {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }
}

/// Names in a lab's directory.
pub(crate) mod files {
    /// The daemon's control socket.
    pub(crate) const CONTROL: &str = "control.sock";
    /// The daemon's and the machines' processes.
    pub(crate) const REGISTRATION: &str = "daemon.json";
    /// What happened to the machines, with the host's time.
    pub(crate) const EVENTS: &str = "events.jsonl";
}

/// A handle to a lab.
#[derive(Clone, Debug)]
pub struct Lab {
    name: String,
    directory: PathBuf,
}

impl Lab {
    /// The lab of that name, whether it is up or not.
    ///
    /// # Errors
    /// If the name cannot be a directory's.
    pub fn named(name: &str) -> Result<Self> {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 40 || !name.chars().all(fits) {
            bail!("`{name}` is no name for a lab: up to 40 letters, digits, - and _");
        }
        Ok(Self {
            name: name.to_owned(),
            directory: paths::labs().join(name),
        })
    }

    /// The lab of that name, which must be up.
    ///
    /// # Errors
    /// If it is not up. What a daemon that died left is cleaned up first.
    pub fn open(name: &str) -> Result<Self> {
        let lab = Self::named(name)?;
        if !lab.is_up()? {
            bail!("lab {name} is not up: cargo xtask vm --lab {name} up");
        }
        Ok(lab)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory: disks, logs, sockets.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory that the machine sees as `/host`.
    #[must_use]
    pub fn share(&self, node: NodeName) -> PathBuf {
        self.directory.join(node.name()).join("share")
    }

    /// The shared disk that holds the volume.
    #[must_use]
    pub fn volume_disk(&self) -> PathBuf {
        self.shared_disk(config::VOLUME_DISK)
    }

    /// A shared disk by its name in the machines.
    #[must_use]
    pub fn shared_disk(&self, name: &str) -> PathBuf {
        self.directory.join(qemu::disk_file(name))
    }

    /// What the agent of `node` wrote, over all its starts.
    #[must_use]
    pub fn agent_log(&self, node: NodeName) -> PathBuf {
        self.share(node).join("agent.log")
    }

    /// What the present or last run of the machine wrote to its console.
    #[must_use]
    pub fn console_log(&self, node: NodeName) -> PathBuf {
        self.directory.join(node.name()).join("console.log")
    }

    /// What QEMU itself said in the present or last run of the machine.
    #[must_use]
    pub fn qemu_log(&self, node: NodeName) -> PathBuf {
        self.directory.join(node.name()).join("qemu.log")
    }

    /// What happened to the machines, oldest first.
    ///
    /// # Errors
    /// If the event log cannot be read.
    pub fn events(&self) -> Result<Vec<serde_json::Value>> {
        let path = self.directory.join(files::EVENTS);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        text.lines()
            .map(|line| Ok(serde_json::from_str(line)?))
            .collect()
    }

    /// Its options.
    ///
    /// # Errors
    /// If the lab was never made.
    pub fn options(&self) -> Result<Options> {
        Ok(config::LabConfig::load(&self.directory)?.options)
    }
}
