//! Reading records out of a run of ring bytes.

use thiserror::Error;
use twinwrite_abi::{
    AttrBody, EXTENDED_BYTES_MAX, NAME_BYTES_MAX, NameBody, RECORD_ALIGN, RING_BUSY_BIT,
    RING_DISCARD_BIT, RING_HEADER_BYTES, RecordHeader, TARGET_BYTES_MAX, flag, op,
};
use zerocopy::FromBytes;

use crate::ids::Identity;

/// Why bytes are not a record.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    /// Fewer bytes than the record says it has.
    #[error("record at byte {at}: needs {need} bytes, {have} are left")]
    Short {
        /// Offset of the record in the run.
        at: usize,
        /// Bytes the record claims.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// A field has a value that no program writes.
    #[error("record at byte {at}: {field} is {value}, which no record has")]
    Field {
        /// Offset of the record in the run.
        at: usize,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// One record, borrowed from a run of bytes and checked.
#[derive(Clone, Copy, Debug)]
pub struct RecordView<'a> {
    /// The header, by value.
    pub header: RecordHeader,
    /// Everything behind the header up to the record's end, padding included.
    body: &'a [u8],
}

/// Bytes a record spans in the ring, from its header's length word.
#[must_use]
pub fn span_bytes(len_word: u32) -> usize {
    let len = len_word & !(RING_BUSY_BIT | RING_DISCARD_BIT);
    (len as usize + RING_HEADER_BYTES as usize).next_multiple_of(8)
}

impl<'a> RecordView<'a> {
    /// Reads the record at the start of `run`; `at` is only for the error text.
    ///
    /// # Errors
    /// [`RecordError`] when the bytes are too few or a field is impossible.
    pub fn parse(run: &'a [u8], at: usize) -> Result<Self, RecordError> {
        let field = |field, value| RecordError::Field { at, field, value };
        let Ok((header, _)) = RecordHeader::read_from_prefix(run) else {
            return Err(RecordError::Short {
                at,
                need: 64,
                have: run.len(),
            });
        };
        if header.len_word & (RING_BUSY_BIT | RING_DISCARD_BIT) != 0 {
            return Err(field("len_word", header.len_word.into()));
        }
        let span = span_bytes(header.len_word);
        if !span.is_multiple_of(RECORD_ALIGN as usize) || span < size_of::<RecordHeader>() {
            return Err(field("len_word", header.len_word.into()));
        }
        if span > run.len() {
            return Err(RecordError::Short {
                at,
                need: span,
                have: run.len(),
            });
        }
        let view = Self {
            header,
            body: &run[size_of::<RecordHeader>()..span],
        };
        view.check(at)?;
        Ok(view)
    }

    fn check(&self, at: usize) -> Result<(), RecordError> {
        let h = &self.header;
        let field = |field, value| Err(RecordError::Field { at, field, value });
        let mut need = 0usize;
        match h.op {
            op::WRITE => {
                if h.flags & flag::NO_BYTES == 0 {
                    need = h.data_len as usize;
                }
                if h.pos
                    .checked_add(h.data_len.into())
                    .is_none_or(|end| end > i64::MAX as u64)
                {
                    return field("pos", h.pos);
                }
            }
            _ if self.has_names() => {
                need = size_of::<NameBody>();
                if self.body.len() < need {
                    return Err(RecordError::Short {
                        at,
                        need: 64 + need,
                        have: 64 + self.body.len(),
                    });
                }
                let name2_len = self.names().name2_len as usize;
                if h.name_len as usize > NAME_BYTES_MAX {
                    return field("name_len", h.name_len.into());
                }
                if name2_len > NAME_BYTES_MAX {
                    return field("name2_len", name2_len as u64);
                }
                need += h.name_len as usize + name2_len;
                if h.op == op::SYMLINK {
                    if h.data_len as usize > TARGET_BYTES_MAX {
                        return field("data_len", h.data_len.into());
                    }
                    need += h.data_len as usize;
                }
            }
            op::SETATTR => need = size_of::<AttrBody>(),
            op::EXTENDED => {
                if h.flags & flag::NO_BYTES == 0 {
                    return field("flags", h.flags.into());
                }
                if h.data_len != EXTENDED_BYTES_MAX {
                    return field("data_len", h.data_len.into());
                }
            }
            op::FSYNC | op::GAP => {}
            other => return field("op", other.into()),
        }
        if need > self.body.len() {
            return Err(RecordError::Short {
                at,
                need: 64 + need,
                have: 64 + self.body.len(),
            });
        }
        if self.has_names() && h.op != op::TMPFILE {
            let two = matches!(h.op, op::RENAME | op::EXCHANGE);
            let bad = |n: &[u8]| {
                n.is_empty() || n == b"." || n == b".." || n.contains(&b'/') || n.contains(&0)
            };
            if bad(self.name()) || (two && bad(self.name2())) {
                return field("name", h.name_len.into());
            }
        }
        Ok(())
    }

    /// Bytes the record spans.
    #[must_use]
    pub fn span(&self) -> usize {
        size_of::<RecordHeader>() + self.body.len()
    }

    /// The inode the record is about.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity {
            ino: self.header.ino,
            generation: self.header.generation,
        }
    }

    /// Whether the bytes must come from a FILL frame.
    #[must_use]
    pub fn needs_fill(&self) -> bool {
        needs_fill(self.header.op, self.header.flags)
    }

    /// Whether it is of a name operation, and so has a name block.
    #[must_use]
    pub fn has_names(&self) -> bool {
        matches!(
            self.header.op,
            op::CREATE
                | op::LINK
                | op::UNLINK
                | op::RENAME
                | op::EXCHANGE
                | op::TMPFILE
                | op::SYMLINK
        )
    }

    /// The bytes of a WRITE that carries them; empty for one that does not.
    #[must_use]
    pub fn data(&self) -> &'a [u8] {
        if self.header.op == op::WRITE && !self.needs_fill() {
            &self.body[..self.header.data_len as usize]
        } else {
            &[]
        }
    }

    /// The name block of a name operation; zeros for other operations.
    #[must_use]
    pub fn names(&self) -> NameBody {
        NameBody::read_from_prefix(self.body).map_or_else(|_| NameBody::default(), |(n, _)| n)
    }

    /// The attribute block of a SETATTR; zeros for other operations.
    #[must_use]
    pub fn attributes(&self) -> AttrBody {
        AttrBody::read_from_prefix(self.body).map_or_else(|_| AttrBody::default(), |(a, _)| a)
    }

    /// The (old) parent directory of a name operation.
    #[must_use]
    pub fn parent(&self) -> Identity {
        Identity {
            ino: self.header.pos,
            generation: self.header.arg as u32,
        }
    }

    /// The new parent directory of a RENAME or EXCHANGE.
    #[must_use]
    pub fn new_parent(&self) -> Identity {
        let n = self.names();
        Identity {
            ino: n.new_parent_ino,
            generation: n.new_parent_generation,
        }
    }

    /// The inode a RENAME replaced or an EXCHANGE swapped with.
    #[must_use]
    pub fn victim(&self) -> Option<Identity> {
        let n = self.names();
        (n.victim_ino != 0).then_some(Identity {
            ino: n.victim_ino,
            generation: n.victim_generation,
        })
    }

    fn after_names(&self, skip: usize, len: usize) -> &'a [u8] {
        self.body
            .get(size_of::<NameBody>() + skip..)
            .and_then(|b| b.get(..len))
            .unwrap_or(&[])
    }

    /// The first name of a name operation.
    #[must_use]
    pub fn name(&self) -> &'a [u8] {
        self.after_names(0, self.header.name_len.into())
    }

    /// The second name of a RENAME or EXCHANGE.
    #[must_use]
    pub fn name2(&self) -> &'a [u8] {
        self.after_names(self.header.name_len.into(), self.names().name2_len as usize)
    }

    /// The target of a SYMLINK.
    #[must_use]
    pub fn target(&self) -> &'a [u8] {
        if self.header.op != op::SYMLINK {
            return &[];
        }
        let skip = usize::from(self.header.name_len) + self.names().name2_len as usize;
        self.after_names(skip, self.header.data_len as usize)
    }
}

/// Whether a record of this operation with these flags needs the bytes of FILL frames.
pub(super) fn needs_fill(op: u8, flags: u8) -> bool {
    matches!(op, op::WRITE | op::EXTENDED) && flags & flag::NO_BYTES != 0
}

/// The records of a run, in order; ends after the first damaged one.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    run: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    /// Reads the records of `run` from its start.
    #[must_use]
    pub fn new(run: &'a [u8]) -> Self {
        Self { run, at: 0 }
    }
}

impl<'a> Iterator for Records<'a> {
    /// Offset in the run, and the record.
    type Item = Result<(usize, RecordView<'a>), RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.at;
        if at >= self.run.len() {
            return None;
        }
        match RecordView::parse(&self.run[at..], at) {
            Ok(view) => {
                self.at += view.span();
                Some(Ok((at, view)))
            }
            Err(error) => {
                self.at = self.run.len();
                Some(Err(error))
            }
        }
    }
}
