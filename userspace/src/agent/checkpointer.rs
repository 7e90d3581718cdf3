//! Carrying out checkpoints: making everything up to a record durable, and proving it.
//!
//! A thread of its own, because `syncfs` takes as long as the disk. Order is the proof: `syncfs` on
//! a descriptor held since the volume was taken on, then the sentinel with (epoch, S), and only its
//! successful fsync counts, since xfs may answer a syncfs without a flush and a shut-down ext4
//! answers it with success (measured). It must never report a checkpoint that the sentinel's fsync
//! did not confirm.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

use thiserror::Error;

use crate::ids::{Epoch, Seq};
use crate::replay::sentinel::{Sentinel, SentinelError, SentinelFile};

/// What is to be proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The epoch the sentinel shall bear.
    pub epoch: Epoch,
    /// Everything up to here has left its hook, and shall be durable.
    pub seq: Seq,
    /// The epoch ends with it: the region is void from then on.
    pub closed: bool,
}

/// Why nothing was proven.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The volume cannot be opened.
    #[error("cannot open the volume at its mount point: {0}")]
    Open(std::io::Error),
    /// Data could not be written back.
    #[error("syncfs of the volume failed: {0}; check the disk and the kernel log")]
    Sync(std::io::Error),
    /// The sentinel could not be written or flushed.
    #[error(transparent)]
    Sentinel(#[from] SentinelError),
    /// The thread is gone.
    #[error("the checkpoint thread ended")]
    Gone,
}

/// The outcome of one checkpoint.
pub type Outcome = (Checkpoint, Result<(), CheckpointError>);

/// The thread, and the way to it. One checkpoint at a time.
#[derive(Debug)]
pub struct Checkpointer {
    requests: Option<SyncSender<(Checkpoint, i64)>>,
    outcomes: Receiver<Outcome>,
    busy: bool,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Holds a descriptor of the volume and its sentinel, and starts the thread.
    ///
    /// # Errors
    /// [`CheckpointError`] when the volume or its sentinel cannot be opened.
    pub fn start(cluster: &str, volume: &str, mount_point: &Path) -> Result<Self, CheckpointError> {
        let volume_fd = OwnedFd::from(File::open(mount_point).map_err(CheckpointError::Open)?);
        let sentinel = SentinelFile::open(mount_point)?;
        let (requests, incoming) = sync_channel::<(Checkpoint, i64)>(1);
        let (outgoing, outcomes) = channel();
        let names = (cluster.to_owned(), volume.to_owned());
        let worker = Worker {
            volume_fd,
            sentinel,
            names,
            outgoing,
        };
        let thread = std::thread::Builder::new()
            .name(format!("checkpoint-{volume}"))
            .spawn(move || worker.work(&incoming))
            .map_err(CheckpointError::Open)?;
        Ok(Self {
            requests: Some(requests),
            outcomes,
            busy: false,
            thread: Some(thread),
        })
    }

    /// Whether one is under way.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.busy
    }

    /// Starts one; `false` if one is under way already.
    pub fn begin(&mut self, checkpoint: Checkpoint, time_ns: i64) -> bool {
        let Some(requests) = self.requests.as_ref().filter(|_| !self.busy) else {
            return false;
        };
        self.busy = requests.try_send((checkpoint, time_ns)).is_ok();
        self.busy
    }

    /// The outcome of the one under way, once it is there.
    pub fn outcome(&mut self) -> Option<Outcome> {
        match self.outcomes.try_recv() {
            Ok(outcome) => {
                self.busy = false;
                Some(outcome)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                // So that the next one is refused instead of being waited for.
                self.busy = false;
                None
            }
        }
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

struct Worker {
    volume_fd: OwnedFd,
    sentinel: SentinelFile,
    names: (String, String),
    outgoing: Sender<Outcome>,
}

impl Worker {
    fn work(mut self, incoming: &Receiver<(Checkpoint, i64)>) {
        while let Ok((checkpoint, time_ns)) = incoming.recv() {
            let result = self.carry_out(checkpoint, time_ns);
            if self.outgoing.send((checkpoint, result)).is_err() {
                return;
            }
        }
    }

    fn carry_out(&mut self, checkpoint: Checkpoint, time_ns: i64) -> Result<(), CheckpointError> {
        nix::unistd::syncfs(self.volume_fd.as_fd()).map_err(|e| CheckpointError::Sync(e.into()))?;
        let (cluster, volume) = self.names.clone();
        let Checkpoint { epoch, seq, closed } = checkpoint;
        self.sentinel.write(&Sentinel {
            cluster,
            volume,
            epoch,
            seq,
            closed,
            time_ns,
        })?;
        Ok(())
    }
}
