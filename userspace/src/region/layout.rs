//! The bytes of a region.
//!
//! ```text
//! 0      RegionHeader   one page, written by the mirror's agent when an epoch begins
//! 4096   status page    64-byte lines, written by the owner: Mirrored | Head slot 0 | Head slot 1
//! 8192   log            circular, `log_bytes` long (a multiple of 4096): frames
//!
//! frame (64-byte aligned, never wraps; stride = 64 + round_up(body_len, 64))
//!  0 magic u32 | 4 version u8 | 5 kind u8 | 6 flags u16 |  8 epoch u64
//! 16 lsn u64                                            | 24 first_seq u64
//! 32 ring_pos (RUN) or needs_seq (FILL) u64             | 40 count u32 | 44 body_len u32
//! 48 body_crc32c u32 | 52 previous_crc32c u32           | 56 fill_offset u32 | 60 header_crc32c u32
//! ```
//!
//! All integers are little-endian. A header is trusted only after its own checksum; a body only
//! after the header's `body_crc32c`. Frames are chained by `previous_crc32c`: the header checksum
//! of the frame before, so that remains of an earlier lap are never taken for the log's end.

#[cfg(test)]
mod tests;

use twinwrite_abi::RECORD_ALIGN;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of the region format.
pub const REGION_VERSION: u32 = 1;
/// Offset of the status page.
pub const STATUS_OFFSET: u64 = 4096;
/// Offset of [`Mirrored`] in the region.
pub const MIRRORED_OFFSET: u64 = STATUS_OFFSET;
/// Offsets of the two [`HeadSlot`]s in the region.
pub const HEAD_OFFSETS: [u64; 2] = [STATUS_OFFSET + 64, STATUS_OFFSET + 128];
/// Offset of the log.
pub const LOG_OFFSET: u64 = 8192;
/// Most bytes of a frame's body: a torn tail costs no more than this.
pub const FRAME_BODY_BYTES_MAX: u32 = 256 * 1024;
/// Smallest log: the largest record must fit several times.
pub const LOG_BYTES_MIN: u64 = 4 * 1024 * 1024;
/// Largest log a reader accepts.
pub const LOG_BYTES_MAX: u64 = 1 << 40;
/// Bytes of a frame header.
pub const FRAME_HEADER_BYTES: u64 = 64;

/// `RegionHeader::magic`.
pub const REGION_MAGIC: [u8; 8] = *b"TWREGION";
/// `FrameHeader::magic`.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"TWFR");
/// `Mirrored::magic`.
pub const MIRRORED_MAGIC: u32 = u32::from_le_bytes(*b"TWMI");
/// `HeadSlot::magic`.
pub const HEAD_MAGIC: u32 = u32::from_le_bytes(*b"TWHE");
/// `Heartbeat::magic`.
pub const HEARTBEAT_MAGIC: u32 = u32::from_le_bytes(*b"TWHB");

/// What a frame's body is (`FrameHeader::kind`).
pub mod kind {
    /// A raw run of ring records; `count` of them, the first is `first_seq`.
    pub const RUN: u8 = 1;
    /// Bytes of the record `first_seq`, at `fill_offset` within its data.
    pub const FILL: u8 = 2;
    /// A durability mark: a [`super::CheckpointMark`]. `first_seq` is the next record's number.
    pub const MARK: u8 = 3;
    /// Nothing: fills the end of the log; its stride is `64 + body_len`, and the body is not written.
    pub const PAD: u8 = 4;
}

/// `FrameHeader::flags` of a FILL: it completes its record.
pub const FILL_LAST: u16 = 1;
/// `FrameHeader::flags` of a FILL: the page cache no longer held (all of) the bytes because the file
/// was removed or truncated meanwhile; what is missing has no effect in the final state.
pub const FILL_GONE: u16 = 2;

/// The first bytes of a region.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct RegionHeader {
    /// [`REGION_MAGIC`].
    pub magic: [u8; 8],
    /// [`REGION_VERSION`].
    pub version: u32,
    /// One of [`region_state`].
    pub state: u32,
    /// The epoch whose records the log holds.
    pub epoch: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Cluster name, zero-padded.
    pub cluster: [u8; 64],
    /// Volume name, zero-padded.
    pub volume: [u8; 64],
    /// Owner's node name, zero-padded.
    pub owner: [u8; 64],
    /// Mirror's node name, zero-padded.
    pub mirror: [u8; 64],
    /// UUID of the protected file system, as bytes (from its super block).
    pub filesystem_uuid: [u8; 16],
    /// Zero.
    pub reserved: u32,
    /// CRC-32C of everything before this field.
    pub crc32c: u32,
}

/// `RegionHeader::state`.
pub mod region_state {
    /// Allocated, holds nothing.
    pub const EMPTY: u32 = 0;
    /// The epoch runs: the log is to be replayed if the owner dies.
    pub const OPEN: u32 = 1;
    /// The epoch ended on purpose: the log must never be replayed.
    pub const CLOSED: u32 = 2;
}

/// How far the log is known to have come, published by the owner; a scan that ends before it has
/// met damage, not the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Mirrored {
    /// [`MIRRORED_MAGIC`].
    pub magic: u32,
    /// Zero.
    pub reserved: u32,
    /// Epoch it speaks of.
    pub epoch: u64,
    /// End of the last frame known complete.
    pub lsn: u64,
    /// Last record known complete.
    pub seq: u64,
    /// Time of the owner's clock when it was written, nanoseconds since 1970.
    pub time_ns: i64,
    /// Records captured and not yet mirrored when it was written.
    pub lag_records: u64,
    /// Zero.
    pub reserved2: [u32; 3],
    /// CRC-32C of everything before this field.
    pub crc32c: u32,
}

/// Where the log begins. Two slots, written in turn; the valid one with the larger `lsn` counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct HeadSlot {
    /// [`HEAD_MAGIC`].
    pub magic: u32,
    /// `previous_crc32c` the frame at `lsn` must carry.
    pub previous_crc32c: u32,
    /// Epoch it speaks of.
    pub epoch: u64,
    /// Start of the first frame that is kept.
    pub lsn: u64,
    /// `first_seq` of that frame.
    pub seq: u64,
    /// Ring position of the first record from there on, so that a sender can go on after a purge
    /// that left no RUN in the log.
    pub ring_pos: u64,
    /// Zero.
    pub reserved: [u64; 2],
    /// Zero.
    pub reserved2: u32,
    /// CRC-32C of everything before this field.
    pub crc32c: u32,
}

/// A node's sign of life in a peer's node page (offset 0) by RDMA.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Heartbeat {
    /// [`HEARTBEAT_MAGIC`].
    pub magic: u32,
    /// Not 0: the sender's agent restarts, and will be silent for no longer than this.
    pub restart_ms: u32,
    /// Identifies one boot of one agent's machine; changes after a reboot.
    pub boot_id: [u8; 16],
    /// Grows with every heartbeat.
    pub counter: u64,
    /// Time of the sender's clock, nanoseconds since 1970.
    pub time_ns: i64,
    /// 1 + how long ago the volumes that the sender serves last answered; 0: it does not tell.
    pub volume_io_ms: u32,
    /// Zero.
    pub reserved: [u32; 4],
    /// CRC-32C of everything before this field.
    pub crc32c: u32,
}

/// The header of a frame; see the module's drawing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct FrameHeader {
    /// [`FRAME_MAGIC`].
    pub magic: u32,
    /// [`REGION_VERSION`].
    pub version: u8,
    /// One of [`kind`].
    pub kind: u8,
    /// [`FILL_LAST`], [`FILL_GONE`].
    pub flags: u16,
    /// Epoch.
    pub epoch: u64,
    /// Start of this frame in the endless log.
    pub lsn: u64,
    /// See [`kind`].
    pub first_seq: u64,
    /// RUN: ring position of its first record. FILL: `safe_at`, the captured mark after the read.
    pub ring_pos: u64,
    /// RUN: records in the body. Else 0.
    pub count: u32,
    /// Bytes of the body.
    pub body_len: u32,
    /// CRC-32C of the body (PAD: 0).
    pub body_crc32c: u32,
    /// `header_crc32c` of the frame before; of an epoch's first frame: [`chain_start`].
    pub previous_crc32c: u32,
    /// FILL: offset of the body within the record's data.
    pub fill_offset: u32,
    /// CRC-32C of the 60 bytes before this field.
    pub header_crc32c: u32,
}

/// Body of a MARK frame: everything up to `seq` was proven durable by a checkpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct CheckpointMark {
    /// The sentinel's S.
    pub seq: u64,
    /// Time of the proof, nanoseconds since 1970.
    pub time_ns: i64,
}

const _: () = assert!(size_of::<RegionHeader>() == 312);
const _: () = assert!(size_of::<Mirrored>() == 64);
const _: () = assert!(size_of::<HeadSlot>() == 64);
const _: () = assert!(size_of::<Heartbeat>() == 64);
const _: () = assert!(size_of::<FrameHeader>() == 64);
const _: () = assert!(size_of::<CheckpointMark>() == 16);

/// A structure that ends in the CRC-32C of what is before it.
pub trait Sealed: FromBytes + IntoBytes + KnownLayout + Immutable + Copy {
    /// The magic's bytes at the start.
    const MAGIC: &'static [u8];

    /// Writes the checksum into the last four bytes.
    #[must_use]
    fn seal(mut self) -> Self {
        let bytes = self.as_mut_bytes();
        let at = bytes.len() - 4;
        let crc = crc32c::crc32c(&bytes[..at]);
        bytes[at..].copy_from_slice(&crc.to_le_bytes());
        self
    }

    /// Reads one from the start of `bytes`; `None` unless magic and checksum are right.
    #[must_use]
    fn open(bytes: &[u8]) -> Option<Self> {
        let (value, _) = Self::read_from_prefix(bytes).ok()?;
        let raw = value.as_bytes();
        let at = raw.len() - 4;
        let crc = u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        (raw.starts_with(Self::MAGIC) && crc32c::crc32c(&raw[..at]) == crc).then_some(value)
    }
}

impl Sealed for RegionHeader {
    const MAGIC: &'static [u8] = &REGION_MAGIC;
}
impl Sealed for Mirrored {
    const MAGIC: &'static [u8] = b"TWMI";
}
impl Sealed for HeadSlot {
    const MAGIC: &'static [u8] = b"TWHE";
}
impl Sealed for Heartbeat {
    const MAGIC: &'static [u8] = b"TWHB";
}
impl Sealed for FrameHeader {
    const MAGIC: &'static [u8] = b"TWFR";
}

impl FrameHeader {
    /// Bytes the frame takes in the log.
    #[must_use]
    pub const fn stride(&self) -> u64 {
        FRAME_HEADER_BYTES + (self.body_len as u64).next_multiple_of(RECORD_ALIGN as u64)
    }
}

/// The name in a zero-padded field.
#[must_use]
pub fn unpadded(field: &[u8; 64]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

/// What the first frame of an epoch carries as `previous_crc32c`.
#[must_use]
pub fn chain_start(epoch: u64) -> u32 {
    crc32c::crc32c(&epoch.to_le_bytes())
}
