//! What a file's bytes must be, as the log tells: an interval map, later over earlier.
//!
//! Pure; holds slices of the region, never copies of payload.

use std::collections::BTreeMap;

use crate::ids::RingPos;

/// One past the largest offset a file can have.
pub const END: u64 = i64::MAX as u64;

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// These bytes of the region.
    Bytes(&'a [u8]),
    /// Zeros: a truncation went over them.
    Zero,
}

/// A run of bytes told by one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// One past its last byte.
    pub end: u64,
    /// Its bytes.
    pub source: Source<'a>,
    /// Ring position of the record.
    pub at: RingPos,
    /// A mark proved it durable: it is only needed to make the file anew.
    pub confirmed: bool,
}

impl<'a> Segment<'a> {
    /// The part of a segment that begins at `start` between `from` and `to`.
    fn part(&self, start: u64, from: u64, to: u64) -> Self {
        let source = match self.source {
            Source::Zero => Source::Zero,
            Source::Bytes(bytes) => {
                let cut = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
                Source::Bytes(bytes.get(cut(from)..cut(to)).unwrap_or(&[]))
            }
        };
        Segment {
            end: to,
            source,
            ..*self
        }
    }
}

/// The interval map of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents<'a> {
    map: BTreeMap<u64, Segment<'a>>,
}

impl<'a> Extents<'a> {
    /// Lays `source` over `start..end`.
    pub fn insert(&mut self, start: u64, end: u64, source: Source<'a>, at: RingPos) {
        if start >= end {
            return;
        }
        self.split(start);
        self.split(end);
        self.take_range(start, end);
        self.map.insert(
            start,
            Segment {
                end,
                source,
                at,
                confirmed: false,
            },
        );
    }

    /// Takes what records before `before` told of `start..end` as proven durable; it is kept, marked
    /// so, if `keep`, else forgotten.
    pub fn confirm(&mut self, start: u64, end: u64, before: RingPos, keep: bool) {
        if start >= end {
            return;
        }
        self.split(start);
        self.split(end);
        let covered: Vec<u64> = self
            .map
            .range(start..end)
            .filter(|(_, segment)| segment.at < before)
            .map(|(start, _)| *start)
            .collect();
        for start in covered {
            if keep {
                if let Some(segment) = self.map.get_mut(&start) {
                    segment.confirmed = true;
                }
            } else {
                self.map.remove(&start);
            }
        }
    }

    /// The segments, in order: start and segment.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Segment<'a>)> {
        self.map.iter().map(|(start, segment)| (*start, segment))
    }

    /// Whether nothing is told.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    fn split(&mut self, at: u64) {
        let Some((&start, segment)) = self.map.range(..at).next_back() else {
            return;
        };
        if segment.end <= at {
            return;
        }
        let left = segment.part(start, start, at);
        let right = segment.part(start, at, segment.end);
        self.map.insert(start, left);
        self.map.insert(at, right);
    }

    fn take_range(&mut self, start: u64, end: u64) {
        let covered: Vec<u64> = self
            .map
            .range(start..end)
            .map(|(start, _)| *start)
            .collect();
        for start in covered {
            self.map.remove(&start);
        }
    }
}
