//! Reading what eBPF could not copy, from the page cache or from inodes, on a thread of its own.
//!
//! A read waits for the inode's lock, which a throttled writer may hold for seconds; meanwhile the
//! records of all other files must go on. It must never be waited for.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::capture::{CacheRead, CaptureError, PageCache};
use crate::ids::{Epoch, Identity, Seq};
use crate::record::op;

/// Bytes of a record that are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The epoch the record is of.
    pub epoch: Epoch,
    /// The record.
    pub seq: Seq,
    /// WRITE: bytes of the file. EXTENDED: its extended state.
    pub op: u8,
    /// Its inode.
    pub identity: Identity,
    /// Offset in the file.
    pub pos: u64,
    /// Bytes.
    pub len: u32,
    /// Where they belong in the record's data.
    pub fill_offset: u32,
}

/// What was read: fewer bytes than wanted if the file no longer has them.
pub type Found = (Wanted, Result<Vec<u8>, CaptureError>);

/// The thread, and the way to it.
#[derive(Debug)]
pub struct Filler {
    requests: Sender<Wanted>,
    found: Receiver<Found>,
    waiting: usize,
}

impl Filler {
    /// Starts the thread, which ends with this value.
    ///
    /// # Errors
    /// When the mount point cannot be opened or the thread not be started.
    pub fn start(mount_point: &Path) -> Result<Self, CaptureError> {
        let mut cache = PageCache::open(mount_point)?;
        let (requests, incoming) = channel::<Wanted>();
        let (outgoing, found) = channel();
        std::thread::Builder::new()
            .name("fill".to_owned())
            .spawn(move || {
                while let Ok(wanted) = incoming.recv() {
                    let read = read(&mut cache, &wanted);
                    // A file held open would keep the space of a removed one.
                    cache.forget();
                    if outgoing.send((wanted, read)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|source| CaptureError::system("starting the fill thread", source))?;
        Ok(Self {
            requests,
            found,
            waiting: 0,
        })
    }

    /// Asks for bytes.
    pub fn ask(&mut self, wanted: Wanted) {
        if self.requests.send(wanted).is_ok() {
            self.waiting += 1;
        }
    }

    /// What has been read, if anything has.
    pub fn take(&mut self) -> Option<Found> {
        let found = self.found.try_recv().ok()?;
        self.waiting = self.waiting.saturating_sub(1);
        Some(found)
    }

    /// Whether something is being read.
    pub fn is_busy(&self) -> bool {
        self.waiting > 0
    }
}

fn read(cache: &mut PageCache, wanted: &Wanted) -> Result<Vec<u8>, CaptureError> {
    if wanted.op == op::EXTENDED {
        return cache.extended(wanted.identity);
    }
    let mut bytes = vec![0; wanted.len as usize];
    let got = match cache.read(wanted.identity, wanted.pos, &mut bytes)? {
        CacheRead::Bytes(got) => got,
        CacheRead::Gone => 0,
    };
    bytes.truncate(got);
    Ok(bytes)
}
