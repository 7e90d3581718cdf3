//! Snapshots of pages that are changed through shared mappings, on a thread of its own.
//!
//! It looks at the pages that `durability::mapped` knows, and asks the programs for a record of each run that
//! differs from what the log holds; the record comes through the ring like any other, and is filled like any
//! other. It must never be waited for: a read may wait for a writer.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher as _};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use twinwrite_abi::MAPPED_PAGE_BYTES;

use crate::capture::{CacheRead, CaptureError, PageCache};
use crate::durability::mapped::{MappedPages, Run};
use crate::ids::{Identity, Seq};

/// What the thread is told.
enum Told {
    /// Another epoch: everything before is covered by its first checkpoint.
    Begun,
    /// Pages have become writable.
    Pages {
        identity: Identity,
        pos: u64,
        bytes: u64,
        seq: Seq,
    },
    /// A record changes what the log holds of a range.
    Rewritten {
        identity: Identity,
        pos: u64,
        bytes: u64,
        seq: Seq,
    },
    /// A record was filled with these bytes.
    Logged {
        identity: Identity,
        pos: u64,
        bytes: Vec<u8>,
        seq: Seq,
    },
    /// A checkpoint of everything up to here is proven.
    Proven(Seq),
    /// A look is due now.
    Look,
}

/// What both sides look at.
#[derive(Debug, Default)]
struct Shared {
    /// Inodes that have pages here. Whoever notes another one tells the thread while this is locked.
    identities: Mutex<HashSet<Identity>>,
    /// How many these are.
    inodes: AtomicUsize,
    /// Pages that may be changed unseen.
    pages: AtomicU64,
    /// When the last look that has ended began, or there was nothing to look at, microseconds since the thread
    /// began.
    looked_us: AtomicU64,
}

/// The thread, and the way to it.
#[derive(Debug)]
pub struct Mapper {
    told: Sender<Told>,
    failures: Receiver<CaptureError>,
    shared: Arc<Shared>,
    began: Instant,
    interval: Duration,
}

impl Mapper {
    /// Starts the thread, which ends with this value; it looks every `interval`.
    ///
    /// # Errors
    /// When the mount point cannot be opened or the thread not be started.
    pub fn start(mount_point: &Path, interval: Duration) -> Result<Self, CaptureError> {
        let cache = PageCache::open(mount_point)?;
        let (told, incoming) = channel();
        let (outgoing, failures) = channel();
        let shared = Arc::new(Shared::default());
        let began = Instant::now();
        let mut thread = Thread {
            cache,
            mapped: MappedPages::default(),
            shared: Arc::clone(&shared),
            incoming,
            began,
        };
        std::thread::Builder::new()
            .name("mapped".to_owned())
            .spawn(move || thread.run(&outgoing, interval))
            .map_err(|source| CaptureError::system("starting the mapping thread", source))?;
        Ok(Self {
            told,
            failures,
            shared,
            began,
            interval,
        })
    }

    fn tell(&self, told: Told) {
        // A thread that has ended has told why.
        let _ = self.told.send(told);
    }

    /// Another epoch begins.
    pub fn begun(&self) {
        self.tell(Told::Begun);
    }

    /// A record tells that the pages of a range have become writable.
    pub fn note(&self, identity: Identity, pos: u64, bytes: u64, seq: Seq) {
        let mut identities = self.shared.identities();
        identities.insert(identity);
        self.shared.inodes.store(identities.len(), Relaxed);
        self.tell(Told::Pages {
            identity,
            pos,
            bytes,
            seq,
        });
    }

    /// Whether an inode may have pages here.
    fn knows(&self, identity: Identity) -> bool {
        self.shared.inodes.load(Relaxed) != 0 && self.shared.identities().contains(&identity)
    }

    /// A record changes what the log holds of a range.
    pub fn rewritten(&self, identity: Identity, pos: u64, bytes: u64, seq: Seq) {
        if self.knows(identity) {
            self.tell(Told::Rewritten {
                identity,
                pos,
                bytes,
                seq,
            });
        }
    }

    /// A record was filled with these bytes.
    pub fn logged(&self, identity: Identity, pos: u64, bytes: &[u8], seq: Seq) {
        if pos.is_multiple_of(MAPPED_PAGE_BYTES) && self.knows(identity) {
            self.tell(Told::Logged {
                identity,
                pos,
                bytes: bytes.to_vec(),
                seq,
            });
        }
    }

    /// A checkpoint of everything up to `seq` is proven.
    pub fn proven(&self, seq: Seq) {
        self.tell(Told::Proven(seq));
    }

    /// The pages shall be looked at now, not only when it is time.
    pub fn look(&self) {
        self.tell(Told::Look);
    }

    /// Pages that may be changed unseen, as of the last look.
    pub fn pages(&self) -> u64 {
        self.shared.pages.load(Relaxed)
    }

    /// How long ago what is stored now was looked at, or there was nothing to look at.
    pub fn age(&self) -> Duration {
        if self.pages() == 0 {
            return Duration::ZERO;
        }
        let looked = Duration::from_micros(self.shared.looked_us.load(Relaxed));
        self.began.elapsed().saturating_sub(looked)
    }

    /// How much later than it should be the next look is, if it is late.
    pub fn late(&self) -> Duration {
        self.age().saturating_sub(self.interval)
    }

    /// Why a page could not be looked at, if one could not.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<(), CaptureError> {
        match self.failures.try_recv() {
            Ok(error) => Err(error),
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => Err(CaptureError::system(
                "looking at mapped pages",
                io::Error::other("its thread has ended"),
            )),
        }
    }
}

impl Shared {
    fn identities(&self) -> std::sync::MutexGuard<'_, HashSet<Identity>> {
        self.identities
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

struct Thread {
    cache: PageCache,
    mapped: MappedPages,
    shared: Arc<Shared>,
    incoming: Receiver<Told>,
    began: Instant,
}

impl Thread {
    fn run(&mut self, failures: &Sender<CaptureError>, interval: Duration) {
        let mut look_at = Instant::now() + interval;
        loop {
            let left = look_at.saturating_duration_since(Instant::now());
            let told = if self.mapped.is_empty() {
                let told = self.incoming.recv();
                self.looked(Instant::now());
                look_at = Instant::now() + interval;
                told.map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.incoming.recv_timeout(left)
            };
            match told {
                Ok(Told::Look) => look_at = Instant::now(),
                Ok(told) => self.take(told),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            if now >= look_at {
                for run in self.mapped.runs() {
                    if let Err(error) = self.look(run)
                        && failures.send(error).is_err()
                    {
                        return;
                    }
                    // A file held open would keep the space of a removed one.
                    self.cache.forget();
                }
                self.looked(now);
                self.publish();
                look_at = Instant::now() + interval;
            }
            self.shared.pages.store(self.mapped.len() as u64, Relaxed);
        }
    }

    fn looked(&self, at: Instant) {
        let since = at.saturating_duration_since(self.began);
        let at_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        self.shared.looked_us.store(at_us, Relaxed);
    }

    /// Shows whose pages there are, once all are known that were noted.
    fn publish(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut identities = shared.identities();
        while let Ok(told) = self.incoming.try_recv() {
            self.take(told);
        }
        *identities = self.mapped.identities();
        shared.inodes.store(identities.len(), Relaxed);
    }

    fn take(&mut self, told: Told) {
        match told {
            Told::Begun => self.mapped.clear(),
            Told::Pages {
                identity,
                pos,
                bytes,
                seq,
            } => self.mapped.note(identity, pos, bytes, seq),
            Told::Rewritten {
                identity,
                pos,
                bytes,
                seq,
            } => self.mapped.rewritten(identity, pos, bytes, seq),
            Told::Logged {
                identity,
                pos,
                bytes,
                seq,
            } => {
                for (at, hash) in hashes(pos, &bytes) {
                    self.mapped.logged(identity, at, hash, seq);
                }
            }
            Told::Proven(seq) => self.mapped.proven(seq),
            Told::Look => {}
        }
    }

    /// Asks for a snapshot of the pages of a run that are not what the log holds.
    fn look(&mut self, run: Run) -> Result<(), CaptureError> {
        let mut bytes = vec![0; run.bytes as usize];
        let len = match self.cache.read(run.identity, run.pos, &mut bytes)? {
            CacheRead::Bytes(len) => len,
            CacheRead::Gone => 0,
        };
        bytes.truncate(len);
        let mut found = hashes(run.pos, &bytes);
        let mut asked: Option<(u64, u64)> = None;
        for number in 0..u64::from(run.bytes) / MAPPED_PAGE_BYTES {
            let pos = run.pos + number * MAPPED_PAGE_BYTES;
            let hash = found.next().map(|(_, hash)| hash);
            if self.mapped.seen(run.identity, pos, hash) {
                let (first, pages) = asked.unwrap_or((pos / MAPPED_PAGE_BYTES, 0));
                asked = Some((first, pages + 1));
            } else if let Some((first, pages)) = asked.take() {
                self.cache.ask_for_snapshot(run.identity, first, pages)?;
            }
        }
        match asked {
            Some((first, pages)) => self.cache.ask_for_snapshot(run.identity, first, pages),
            None => Ok(()),
        }
    }
}

/// Offset and hash of each page, also of the file's last one, which may be shorter.
fn hashes(pos: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let pages = bytes.chunks(MAPPED_PAGE_BYTES as usize);
    pages.enumerate().map(move |(index, page)| {
        let mut hasher = DefaultHasher::new();
        hasher.write(page);
        (pos + index as u64 * MAPPED_PAGE_BYTES, hasher.finish())
    })
}
