//! What commands and a lab's daemon say to each other: one JSON line each way per connection on a
//! Unix socket.

use serde::{Deserialize, Serialize};

use super::config::NodeName;
use super::process::ProcessId;

/// A question to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Start a machine.
    Boot {
        /// Which.
        node: NodeName,
    },
    /// Run `/host/cmd/ID` in a machine and wait for its end.
    Exec {
        /// Where.
        node: NodeName,
        /// The script's name.
        id: String,
        /// Its limit.
        timeout_s: u64,
    },
    /// Cut a machine's power and wait until its process is gone.
    Kill {
        /// Which.
        node: NodeName,
    },
    /// Wait until a machine has ended by itself.
    WaitDead {
        /// Which.
        node: NodeName,
        /// How long.
        timeout_s: u64,
    },
    /// Say something to QEMU's monitor.
    Monitor {
        /// Whose.
        node: NodeName,
        /// What.
        command: String,
    },
    /// From now on a flush of the served disks takes at least this long.
    FlushTakes {
        /// Microseconds.
        flush_us: u64,
    },
    /// How the machines are.
    Status,
    /// End all machines and the daemon.
    Shutdown,
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done {
        /// When, milliseconds since 1970.
        at_ms: i64,
    },
    /// A script ended.
    Ended {
        /// Its exit status; 124 if its limit ended it.
        status: i32,
    },
    /// What QEMU's monitor answered.
    Said {
        /// Its words.
        text: String,
    },
    /// How the machines are.
    Machines {
        /// All that were ever started in this lab.
        machines: Vec<MachineStatus>,
    },
    /// It could not be done.
    Failed {
        /// Why.
        reason: String,
    },
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Which.
    pub node: NodeName,
    /// Its QEMU process.
    pub process: ProcessId,
    /// How often it was started, this time included.
    pub boots: u32,
    /// When it was started, milliseconds since 1970.
    pub started_at_ms: i64,
    /// How it ended; none while it lives.
    pub ended: Option<MachineEnd>,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEnd {
    /// When, milliseconds since 1970.
    pub at_ms: i64,
    /// The status of QEMU, in words.
    pub how: String,
    /// Whether the daemon killed it: a command, or the fence.
    pub killed: bool,
}
