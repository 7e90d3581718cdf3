//! The reader of the capture ring.
//!
//! The ring's memory is mapped here as the kernel lays it out: the consumer's page, the producer's
//! page, and the data twice in a row, so that a run that wraps is still contiguous, for the reader
//! and for the NIC alike. Reading and releasing are apart: a record stays in the ring until its
//! bytes are on the peer. It must never touch memory beyond the producer's position, nor rely on
//! bytes that were released.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use twinwrite_abi::{RECORD_ALIGN, RING_BUSY_BIT, RING_DISCARD_BIT, control};

use super::CaptureError;
use super::control::Control;
use super::sys::{Mapping, page_bytes};
use crate::ids::RingPos;
use crate::link::RingSource;
use crate::record::span_bytes;

/// Longest sleep without a look at the ring, against a lost wake-up that should not exist.
const SAFETY_TIMEOUT: Duration = Duration::from_millis(500);

const RING_EVENT: u64 = 0;
const EXTRA_EVENT: u64 = 1;

/// Committed records, side by side.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Position of the first.
    pub start: RingPos,
    /// Their bytes.
    pub bytes: &'a [u8],
    /// How many there are.
    pub records: u32,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// There are records, or one is being written.
    Records,
    /// The extra descriptor is readable.
    Extra,
    /// Nothing happened in time.
    Timeout,
}

/// The one reader of a volume's ring.
#[derive(Debug)]
pub struct RingConsumer {
    consumer_page: Mapping,
    producer_page: Mapping,
    data: Arc<Mapping>,
    size: u64,
    /// Next record to read.
    cursor: u64,
    /// Everything before is given back to the kernel.
    released: u64,
    control: Control,
    epoll: Epoll,
    ring: OwnedFd,
    extra: Option<RawFd>,
    missed_wakeups: u64,
    /// How many proofs were wanted when it woke up last.
    proofs_wanted: u64,
}

impl RingConsumer {
    /// Opens the ring where the consumer before left it.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub(super) fn open(
        ring: BorrowedFd<'_>,
        ring_bytes: u32,
        control: Control,
    ) -> Result<Self, CaptureError> {
        let page = page_bytes();
        let size = ring_bytes as usize;
        let consumer_page = Mapping::new(ring, 0, page, true, "the ring's consumer page")?;
        let producer_page = Mapping::new(ring, page, page, false, "the ring's producer page")?;
        let data = Mapping::new(ring, 2 * page, 2 * size, false, "the ring's data")?;
        let ring = ring
            .try_clone_to_owned()
            .map_err(|source| CaptureError::system("duplicating the ring's descriptor", source))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|source| CaptureError::system("creating an epoll descriptor", source))?;
        // Edge-triggered: as long as records are unreleased the ring is always readable.
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, RING_EVENT);
        epoll
            .add(&ring, event)
            .map_err(|source| CaptureError::system("watching the ring", source))?;
        let mut consumer = Self {
            consumer_page,
            producer_page,
            data: Arc::new(data),
            size: u64::from(ring_bytes),
            cursor: 0,
            released: 0,
            control,
            epoll,
            ring,
            extra: None,
            missed_wakeups: 0,
            proofs_wanted: 0,
        };
        consumer.released = consumer.consumer_word().load(Ordering::Acquire);
        consumer.cursor = consumer.released;
        // A consumer that was killed in its sleep left the word set.
        consumer.control.set(control::ASLEEP, 0);
        Ok(consumer)
    }

    fn consumer_word(&self) -> &AtomicU64 {
        // SAFETY: the mapping is one page and lives as long as `self`; the kernel reads the word.
        unsafe { self.consumer_page.start().cast::<AtomicU64>().as_ref() }
    }

    /// Where the kernel will reserve next.
    #[must_use]
    pub fn producer(&self) -> RingPos {
        // SAFETY: the mapping is one page and lives as long as `self`; the kernel writes the word.
        let word = unsafe { self.producer_page.start().cast::<AtomicU64>().as_ref() };
        RingPos(word.load(Ordering::Acquire))
    }

    /// Everything before this is given back to the kernel.
    #[must_use]
    pub fn consumer(&self) -> RingPos {
        RingPos(self.released)
    }

    /// The next record to read.
    #[must_use]
    pub fn cursor(&self) -> RingPos {
        RingPos(self.cursor)
    }

    /// Bytes of the ring.
    #[must_use]
    pub fn ring_bytes(&self) -> u64 {
        self.size
    }

    /// The data, for a link to send from and to register with a NIC.
    #[must_use]
    pub fn source(&self) -> RingSource {
        source_of(&self.data, self.size as usize)
    }

    /// Sleeps that ended by the safety timeout and found records: must stay 0.
    #[must_use]
    pub fn missed_wakeups(&self) -> u64 {
        self.missed_wakeups
    }

    /// The length word of the record at `position`, which is before the producer's position.
    fn length_word(&self, position: u64) -> u32 {
        let at = (position % self.size) as usize;
        // SAFETY: `at` is a record's start inside the first copy of the data, 8-byte aligned; the
        // kernel writes the word, so it is read as an atomic.
        let word = unsafe { self.data.start().add(at).cast::<AtomicU32>().as_ref() };
        word.load(Ordering::Acquire)
    }

    /// Committed records from the cursor on: at most `max_bytes`, but at least one if there is one.
    /// A record that is still being written ends the run. `None`: there is none.
    ///
    /// # Errors
    /// [`CaptureError::Ring`] for something that no program writes.
    pub fn peek(&self, max_bytes: usize) -> Result<Option<Run<'_>>, CaptureError> {
        let producer = self.producer().0;
        let mut end = self.cursor;
        let mut records = 0;
        while end < producer {
            let word = self.length_word(end);
            if word & RING_BUSY_BIT != 0 {
                break;
            }
            let span = span_bytes(word) as u64;
            let damaged = |reason: &str| CaptureError::Ring {
                position: end,
                reason: format!("{reason} (length word {word:#x}, producer at {producer})"),
            };
            if word & RING_DISCARD_BIT != 0 {
                return Err(damaged("a discarded record"));
            }
            if span == 0 || !span.is_multiple_of(u64::from(RECORD_ALIGN)) || end + span > producer {
                return Err(damaged("an impossible length"));
            }
            if records != 0 && end + span - self.cursor > max_bytes as u64 {
                break;
            }
            end += span;
            records += 1;
        }
        if records == 0 {
            return Ok(None);
        }
        let bytes = self.committed(self.cursor, (end - self.cursor) as usize);
        Ok(Some(Run {
            start: RingPos(self.cursor),
            bytes,
            records,
        }))
    }

    /// Bytes that were peeked and not yet released; `None` for any other.
    #[must_use]
    pub fn bytes(&self, start: RingPos, len: usize) -> Option<&[u8]> {
        let end = start.0.checked_add(len as u64)?;
        (start.0 >= self.released && end <= self.cursor).then(|| self.committed(start.0, len))
    }

    fn committed(&self, start: u64, len: usize) -> &[u8] {
        let at = (start % self.size) as usize;
        // SAFETY: callers pass a span of committed records between the released and the producer's
        // position, at most the ring's size, which the second copy makes contiguous. The kernel
        // does not write committed records before they are released, which takes `&mut self`.
        unsafe { std::slice::from_raw_parts(self.data.start().add(at).as_ptr(), len) }
    }

    /// Moves the cursor over what was peeked.
    ///
    /// # Errors
    /// [`CaptureError::Ring`] when `position` is not between the cursor and the producer.
    pub fn advance_to(&mut self, position: RingPos) -> Result<(), CaptureError> {
        if position.0 < self.cursor || position > self.producer() {
            let reason = format!("advance from {} refused", self.cursor);
            return Err(CaptureError::Ring {
                position: position.0,
                reason,
            });
        }
        self.cursor = position.0;
        Ok(())
    }

    /// Moves the cursor back to what is not yet released, for a sender that begins again.
    pub fn rewind(&mut self) {
        self.cursor = self.released;
    }

    /// Gives everything before `position` back to the kernel.
    ///
    /// # Errors
    /// [`CaptureError::Ring`] when `position` is not between the released one and the cursor.
    pub fn release_to(&mut self, position: RingPos) -> Result<(), CaptureError> {
        if position.0 < self.released || position.0 > self.cursor {
            let reason = format!("release from {} refused", self.released);
            return Err(CaptureError::Ring {
                position: position.0,
                reason,
            });
        }
        self.released = position.0;
        self.consumer_word().store(position.0, Ordering::Release);
        Ok(())
    }

    /// Also wakes [`Self::sleep`] when this descriptor becomes readable (replaces the one before).
    /// The caller keeps it open until it is replaced.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn watch(&mut self, extra: Option<BorrowedFd<'_>>) -> Result<(), CaptureError> {
        if let Some(old) = self.extra.take() {
            // SAFETY: the caller keeps the descriptor open until it is replaced.
            let old = unsafe { BorrowedFd::borrow_raw(old) };
            // A closed descriptor has left the set by itself.
            let _ = self.epoll.delete(old);
        }
        if let Some(fd) = extra {
            self.epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, EXTRA_EVENT))
                .map_err(|source| CaptureError::system("watching a descriptor", source))?;
            self.extra = Some(fd.as_raw_fd());
        }
        Ok(())
    }

    /// Sleeps until there is a record, the extra descriptor is readable, or `timeout` is over.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn sleep(&mut self, timeout: Duration) -> Result<Woken, CaptureError> {
        self.control.set(control::ASLEEP, 1);
        // Programs count a record (a full barrier) and then read ASLEEP: either they see it, or the
        // look below sees their reservation. A record still being written counts as one.
        fence(Ordering::SeqCst);
        let unhurried = self.control.get(control::UNHURRIED);
        // One that was wanted since may have seen this agent awake, and written no record.
        let woken = if self.has_news() || self.control.proofs_wanted() != self.proofs_wanted {
            Ok(Woken::Records)
        } else {
            self.wait(timeout, unhurried)
        };
        self.control.set(control::ASLEEP, 0);
        self.proofs_wanted = self.control.proofs_wanted();
        woken
    }

    fn has_news(&self) -> bool {
        self.producer().0 != self.cursor
    }

    /// `unhurried`: how many records had come for which nobody is woken.
    fn wait(&mut self, timeout: Duration, unhurried: u64) -> Result<Woken, CaptureError> {
        let limit = timeout.min(SAFETY_TIMEOUT);
        // Rounded up: a sleep of 0 ms would spin.
        let millis = limit.as_micros().div_ceil(1000);
        let wait = EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::ZERO);
        let mut events = [EpollEvent::empty(); 2];
        let count = match self.epoll.wait(&mut events, wait) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => return Ok(Woken::Timeout),
            Err(source) => return Err(CaptureError::system("waiting for the ring", source)),
        };
        if events
            .iter()
            .take(count)
            .any(|event| event.data() == EXTRA_EVENT)
        {
            return Ok(Woken::Extra);
        }
        if self.has_news() {
            let is_due = self.control.get(control::UNHURRIED) == unhurried;
            if count == 0 && limit == SAFETY_TIMEOUT && is_due {
                self.missed_wakeups += 1;
            }
            return Ok(Woken::Records);
        }
        Ok(Woken::Timeout)
    }

    /// The ring's descriptor.
    #[must_use]
    pub fn ring_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.ring.as_fd()
    }
}

fn source_of(data: &Arc<Mapping>, ring_bytes: usize) -> RingSource {
    let keep: Arc<dyn Send + Sync> = Arc::clone(data) as _;
    // SAFETY: the kernel maps a ring buffer's data pages twice in a row (bpf_ringbuf_area_alloc and
    // ringbuf_map_mmap_user, kernel/bpf/ringbuf.c), and `keep` owns the mapping.
    unsafe { RingSource::new(data.start().as_ptr(), ring_bytes, keep) }
}
