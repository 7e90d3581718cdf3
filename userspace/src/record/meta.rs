//! What the cores need to know of a record without its bytes.

use super::RecordView;
use super::decode::needs_fill;
use crate::ids::{Identity, RingPos};

/// A record's description, taken from its header once it is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordMeta {
    /// Where it begins in the ring's endless stream.
    pub ring_pos: RingPos,
    /// Bytes it spans there.
    pub span: u32,
    /// One of [`super::op`].
    pub op: u8,
    /// Bits of [`super::flag`].
    pub flags: u8,
    /// The inode it is about.
    pub identity: Identity,
    /// WRITE: offset. FSYNC: first byte of the range. Name operations: inode of the parent.
    pub pos: u64,
    /// WRITE: bytes written.
    pub data_len: u32,
    /// Size of the inode after it. FSYNC: last byte of the range.
    pub size_after: u64,
    /// FSYNC: ring position at the call's entry. SETATTR: `ia_valid`. GAP: the reason.
    pub arg: u64,
}

impl RecordMeta {
    /// Describes a record that begins at `ring_pos`.
    #[must_use]
    pub fn of(view: &RecordView<'_>, ring_pos: RingPos) -> Self {
        let h = &view.header;
        Self {
            ring_pos,
            span: u32::try_from(view.span()).unwrap_or(u32::MAX),
            op: h.op,
            flags: h.flags,
            identity: view.identity(),
            pos: h.pos,
            data_len: h.data_len,
            size_after: h.size_after,
            arg: h.arg,
        }
    }

    /// Whether its bytes must be read by the agent and follow in FILL frames.
    #[must_use]
    pub fn needs_fill(&self) -> bool {
        needs_fill(self.op, self.flags)
    }

    /// Where the next record begins.
    #[must_use]
    pub fn ring_end(&self) -> RingPos {
        RingPos(self.ring_pos.0 + u64::from(self.span))
    }
}
