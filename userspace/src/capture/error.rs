//! Why capture does not work.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::ids::Identity;
use crate::record::extended::ExtendedError;

/// Why capture does not work; each text names the thing and, where there is one, the remedy.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The library was built without its eBPF object.
    #[error("built without its eBPF programs; run `cargo xtask build`")]
    NoObject,
    /// The kernel's BTF cannot be read.
    #[error(
        "the kernel's type information {path} cannot be read: {reason}; twinwrite needs a kernel with CONFIG_DEBUG_INFO_BTF"
    )]
    NoBtf {
        /// File that was read.
        path: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
    /// A structure member or enum value is missing.
    #[error("this kernel's BTF has no {0}; this kernel is not supported yet, please report it")]
    NoMember(String),
    /// A hook that capture cannot do without does not work on this kernel.
    #[error(
        "capture needs the hook {hook} (program {program}), which this kernel refuses: {reason}"
    )]
    Hook {
        /// Program.
        program: &'static str,
        /// Kernel function.
        hook: &'static str,
        /// The kernel's words.
        reason: String,
    },
    /// The object could not be loaded.
    #[error("the eBPF object cannot be loaded: {0}")]
    Load(String),
    /// A file or descriptor of bpffs failed.
    #[error("{what} {path}: {source}")]
    Pin {
        /// What was tried, in words.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried, in words.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// The extended state of an inode cannot be mirrored.
    #[error("inode {identity}: {source}; a checkpoint covers it")]
    Extended {
        /// The inode.
        identity: Identity,
        /// Why.
        source: ExtendedError,
    },
    /// The configuration asks for something impossible.
    #[error("{0}")]
    Options(String),
    /// Programs that hold somebody cannot be taken away.
    #[error(
        "processes wait for the answer to an fsync on volume {0}, which was promised to nobody yet: start the \
         agent, which mirrors it or closes the epoch, and stop it again"
    )]
    Held(String),
    /// The pinned programs hold threads in maps that this build does not know.
    #[error(
        "the gate of the programs that are attached to volume {volume} cannot be opened ({reason}), so whom \
         they hold is not known here: start the build that attached them and end it with `twinwrite stop`, \
         which lets everybody go on, then start this one"
    )]
    OtherGate {
        /// The volume.
        volume: String,
        /// What was found.
        reason: String,
    },
    /// Replies of the kernel's NFS server wait at the gate, and would leave without the programs.
    #[error(
        "the kernel's NFS server waits with the answer to what it made durable on volume {0}: start the agent, \
         which mirrors it or closes the epoch; where the volume is lost, stop the server (rpc.nfsd 0)"
    )]
    RepliesHeld(String),
    /// The ring holds something that no program writes.
    #[error(
        "the capture ring is damaged at position {position}: {reason}; detach and begin again with a checkpoint"
    )]
    Ring {
        /// Position in the endless stream.
        position: u64,
        /// What was found.
        reason: String,
    },
    /// A hook did not show what a known operation must show.
    #[error("calibration of {hook} failed: {operation}: expected {expected}, saw {seen}")]
    Calibration {
        /// Kernel function.
        hook: &'static str,
        /// The known operation.
        operation: String,
        /// What its record must be.
        expected: String,
        /// What there was.
        seen: String,
    },
}

impl CaptureError {
    /// The last error of the system, with what was tried.
    #[must_use]
    pub fn last(what: impl Into<String>) -> Self {
        Self::System {
            what: what.into(),
            source: io::Error::last_os_error(),
        }
    }

    /// A system error, with what was tried.
    #[must_use]
    pub fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            what: what.into(),
            source: source.into(),
        }
    }
}
