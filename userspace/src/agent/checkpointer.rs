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

use super::mending::{ErrorCount, Mending};
use super::reserve::Reserve;
use crate::capture::{Redirtied, redirty};
use crate::ids::{Epoch, Identity, Seq};
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
    /// Bytes whose write-back failed cannot be written again.
    #[error("inode {identity} cannot be written again, at byte {at}: {source}")]
    Rewrite {
        /// The inode.
        identity: Identity,
        /// Where.
        at: u64,
        /// The system's error.
        source: std::io::Error,
    },
    /// The same: only the mirror has them.
    #[error(
        "a write-back of inode {identity} failed, and its page at byte {at} has left the cache: its \
         bytes are only in the mirror's region; power this node off, so that the mirror takes over"
    )]
    NotCached {
        /// The inode.
        identity: Identity,
        /// Where.
        at: u64,
    },
    /// The same, and nobody here knows which.
    #[error(
        "a write-back failed while an earlier agent ran, and what is in doubt is only in the mirror's \
         region; power this node off, so that the mirror takes over"
    )]
    Unknown,
    /// A write-back failed while the checkpoint ran.
    #[error("a write-back failed: what was synced is not all on the disk; look at the kernel log")]
    WriteBack,
    /// The sentinel could not be written or flushed.
    #[error(transparent)]
    Sentinel(#[from] SentinelError),
    /// The thread is gone.
    #[error("the checkpoint thread ended")]
    Gone,
}

/// The outcome of one checkpoint.
pub type Outcome = (Checkpoint, Result<(), CheckpointError>);

/// The time is the sentinel's.
type Asked = (Checkpoint, i64, Mending);

/// The thread, and the way to it. One checkpoint at a time.
#[derive(Debug)]
pub struct Checkpointer {
    requests: Option<SyncSender<Asked>>,
    outcomes: Receiver<Outcome>,
    errors: ErrorCount,
    busy: bool,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Holds a descriptor of the volume and its sentinel, and starts the thread.
    ///
    /// # Errors
    /// [`CheckpointError`] when the volume or its sentinel cannot be opened.
    pub fn start(
        cluster: &str,
        volume: &str,
        mount_point: &Path,
        reserve: Reserve,
    ) -> Result<Self, CheckpointError> {
        let volume_fd = OwnedFd::from(File::open(mount_point).map_err(CheckpointError::Open)?);
        let sentinel = SentinelFile::open(mount_point)?;
        let (requests, incoming) = sync_channel::<Asked>(1);
        let (outgoing, outcomes) = channel();
        let names = (cluster.to_owned(), volume.to_owned());
        let errors = ErrorCount::default();
        let worker = Worker {
            errors: errors.clone(),
            volume_fd,
            sentinel,
            reserve,
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
            errors,
            busy: false,
            thread: Some(thread),
        })
    }

    /// Whether one is under way.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.busy
    }

    /// Where failed write-backs are counted.
    #[must_use]
    pub fn errors(&self) -> &ErrorCount {
        &self.errors
    }

    /// Starts one, after what must be written again; `false` if one is under way already.
    pub fn begin(&mut self, checkpoint: Checkpoint, time_ns: i64, mending: Mending) -> bool {
        let Some(requests) = self.requests.as_ref().filter(|_| !self.busy) else {
            return false;
        };
        self.busy = requests.try_send((checkpoint, time_ns, mending)).is_ok();
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
    errors: ErrorCount,
    volume_fd: OwnedFd,
    sentinel: SentinelFile,
    reserve: Reserve,
    names: (String, String),
    outgoing: Sender<Outcome>,
}

impl Worker {
    fn work(mut self, incoming: &Receiver<Asked>) {
        while let Ok((checkpoint, time_ns, mending)) = incoming.recv() {
            let result = self.carry_out(checkpoint, time_ns, &mending);
            // Everybody waits for the end of an epoch, and nothing is merged after it.
            let keeps_reserve = result.is_ok() && !checkpoint.closed;
            if self.outgoing.send((checkpoint, result)).is_err() {
                return;
            }
            if keeps_reserve {
                self.reserve.keep();
            }
        }
    }

    /// Makes dirty again what is in doubt.
    fn write_again(&self, mending: &Mending) -> Result<(), CheckpointError> {
        if mending.unknown {
            return Err(CheckpointError::Unknown);
        }
        for (identity, ranges) in &mending.bytes {
            let (identity, at) = (*identity, ranges.first().map_or(0, |range| range.start));
            match redirty(&self.volume_fd, identity, ranges) {
                Ok(Redirtied::All | Redirtied::Gone) => {}
                Ok(Redirtied::NotCached { at }) => {
                    return Err(CheckpointError::NotCached { identity, at });
                }
                Err(source) => {
                    return Err(CheckpointError::Rewrite {
                        identity,
                        at,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        checkpoint: Checkpoint,
        time_ns: i64,
        mending: &Mending,
    ) -> Result<(), CheckpointError> {
        self.write_again(mending)?;
        nix::unistd::syncfs(self.volume_fd.as_fd()).map_err(|e| CheckpointError::Sync(e.into()))?;
        // A sync that succeeds says nothing of pages whose write-back failed before or meanwhile.
        if self.errors.now().is_some_and(|now| now != mending.errors) {
            return Err(CheckpointError::WriteBack);
        }
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
