//! The capture ring: reserved in order, committed in any order, released by the agent.

use std::collections::VecDeque;

use twinwrite::ids::RingPos;

/// Where every ring begins: the stream is older than the volume's protection.
const START: u64 = 1 << 20;

/// One kernel's ring.
#[derive(Clone, Debug)]
pub struct Ring {
    bytes: Vec<u8>,
    /// Reserved and not yet committed, with their ends.
    busy: VecDeque<(u64, u64)>,
    /// Starts of the records, for reading.
    consumer: u64,
    cursor: u64,
    capacity: u64,
    /// Records that found no room.
    pub drops: u64,
}

impl Ring {
    /// An empty ring.
    pub fn new(capacity: u64) -> Self {
        Self {
            bytes: Vec::with_capacity(16 * 1024),
            busy: VecDeque::new(),
            consumer: START,
            cursor: START,
            capacity,
            drops: 0,
        }
    }

    /// Where the next record will begin.
    pub fn producer(&self) -> u64 {
        START + self.bytes.len() as u64
    }

    /// Reserves room for a record and copies it in; `None`: there is none.
    pub fn reserve(&mut self, record: &[u8]) -> Option<u64> {
        let at = self.producer();
        if at + record.len() as u64 - self.consumer > self.capacity {
            self.drops += 1;
            return None;
        }
        self.bytes.extend_from_slice(record);
        self.busy.push_back((at, self.producer()));
        Some(at)
    }

    /// Commits what was reserved at `at`.
    pub fn commit(&mut self, at: u64) {
        self.busy.retain(|(start, _)| *start != at);
    }

    /// Committed records behind the reader's place.
    pub fn peek(&self) -> Option<(RingPos, &[u8])> {
        let end = self.busy.iter().map(|(start, _)| *start).min();
        let end = end.unwrap_or_else(|| self.producer());
        (end > self.cursor).then(|| {
            let (from, to) = ((self.cursor - START) as usize, (end - START) as usize);
            (RingPos(self.cursor), &self.bytes[from..to])
        })
    }

    /// The reader has taken everything before this.
    pub fn advance_to(&mut self, at: RingPos) {
        self.cursor = at.0;
    }

    /// Where the reader is.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// What is kept begins here.
    pub fn consumer(&self) -> u64 {
        self.consumer
    }

    /// A new reader begins at what is kept.
    pub fn rewind(&mut self) {
        self.cursor = self.consumer;
    }

    /// The room before this may be used again; the kernel does so at once.
    pub fn release_to(&mut self, at: RingPos) {
        let to = at.0.clamp(self.consumer, self.producer());
        let (from, end) = ((self.consumer - START) as usize, (to - START) as usize);
        self.bytes[from..end].fill(0xee);
        self.consumer = to;
    }

    /// A stretch, as the link reads it.
    pub fn bytes(&self, at: RingPos, len: u32) -> &[u8] {
        let from = at.0.saturating_sub(START) as usize;
        self.bytes.get(from..from + len as usize).unwrap_or(&[])
    }
}
