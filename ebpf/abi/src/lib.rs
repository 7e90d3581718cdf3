//! Types that the eBPF programs and user space share byte for byte.
//!
//! ```text
//! ring record (little-endian, 64-byte aligned in the ring and in the region alike)
//!  0 len_word u32 | 4 page_offset u32 |  8 op u8 | 9 flags u8 | 10 name_len u16 | 12 data_len u32
//! 16 ino u64                          | 24 generation u32                      | 28 mode u32
//! 32 pos u64                          | 40 size_after u64
//! 48 time_ns i64                      | 56 arg u64
//! 64 body: WRITE: the bytes; name operations: NameBody, names, symlink target; SETATTR: AttrBody
//! ```
//!
//! The first eight bytes are the kernel's own ring buffer header (`struct bpf_ringbuf_hdr`,
//! kernel/bpf/ringbuf.c): a record is reserved as `round_up(64 + n, 64) - 8` bytes, so that the
//! kernel's header and ours make one 64-byte line.
//!
//! This crate must never need the standard library, an allocator, or a dependency on the eBPF side.
#![no_std]

/// Version of the record format; a pinned set of programs with another version is not taken over.
pub const ABI_VERSION: u32 = 1;
/// Records start and end on multiples of this many bytes.
pub const RECORD_ALIGN: u32 = 64;
/// Bytes of the kernel's ring header in front of what a program reserves.
pub const RING_HEADER_BYTES: u32 = 8;
/// The kernel's "still being written" bit in `len_word` (`BPF_RINGBUF_BUSY_BIT`).
pub const RING_BUSY_BIT: u32 = 1 << 31;
/// The kernel's "discarded" bit in `len_word` (`BPF_RINGBUF_DISCARD_BIT`).
pub const RING_DISCARD_BIT: u32 = 1 << 30;
/// The largest write whose bytes are copied into the ring; a larger one is a record without bytes.
/// With its header it just fills a frame of the region (256 KiB).
pub const INLINE_BYTES_MAX: u32 = 256 * 1024 - 64;
/// Longest file name (`NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;
/// Longest symlink target (`PATH_MAX - 1`).
pub const TARGET_BYTES_MAX: usize = 4095;

/// What a record tells. Values are part of the region format and never reused.
pub mod op {
    /// Bytes written: `pos` offset, `data_len` length, `size_after`, `time_ns` the mtime, `mode`.
    pub const WRITE: u8 = 1;
    /// A fresh inode (file, directory, device, fifo, socket) bound to a name: [`super::NameBody`].
    pub const CREATE: u8 = 2;
    /// A further name of an existing inode, or the first name of an `O_TMPFILE` inode.
    pub const LINK: u8 = 3;
    /// A name removed (unlink and rmdir); `NameBody::nlink` is the count left.
    pub const UNLINK: u8 = 4;
    /// A rename: `pos`/`arg` the old parent, `NameBody` the new parent and the victim, two names.
    pub const RENAME: u8 = 5;
    /// Two names exchanged (`RENAME_EXCHANGE`): `victim_*` is the other inode, two names.
    pub const EXCHANGE: u8 = 6;
    /// Attributes changed: [`super::AttrBody`]; with `ATTR_SIZE` the size was set to `size_after`.
    pub const SETATTR: u8 = 7;
    /// A fresh inode without a name (`O_TMPFILE`): [`super::NameBody`] with the parent unset.
    pub const TMPFILE: u8 = 8;
    /// A symlink: [`super::NameBody`], the name, then `data_len` bytes of target.
    pub const SYMLINK: u8 = 9;
    /// An fsync-class call succeeded: range `pos..=size_after`, `arg` = ring position at its entry.
    pub const FSYNC: u8 = 10;
    /// A change that was noticed and not captured: `arg` is a [`super::gap`] reason.
    pub const GAP: u8 = 11;
}

/// Nanoseconds of one clock tick as the kernel tells it to user space (`USER_HZ` is 100 on all
/// architectures that matter here; `nsec_to_clock_t`, kernel/time/time.c).
pub const TICK_NS: u64 = 10_000_000;

/// Bits of [`RecordHeader::flags`].
pub mod flag {
    /// The bytes are not in the record; the agent fills them from the page cache.
    pub const NO_BYTES: u8 = 1 << 0;
    /// FSYNC: `fdatasync` semantics (attributes other than the size are not proven).
    pub const DATASYNC: u8 = 1 << 1;
    /// The inode has no link (FSYNC: its records must not be purged by this mark).
    pub const UNLINKED: u8 = 1 << 2;
    /// LINK: first name of an `O_TMPFILE` inode.
    pub const FROM_TMPFILE: u8 = 1 << 3;
    /// FSYNC: an earlier write-back of the inode failed, and its pages are clean all the same: the
    /// call's success proves nothing.
    pub const TAINTED: u8 = 1 << 4;
}

/// Why a change could not be captured (`arg` of a GAP record, index of the gap counters).
pub mod gap {
    /// `fallocate` in any mode.
    pub const FALLOCATE: usize = 0;
    /// Reflink, deduplication or `copy_file_range` by remapping.
    pub const REMAP: usize = 1;
    /// A store through a shared writable mapping dirtied a page.
    pub const MAPPING: usize = 2;
    /// Direct I/O wrote.
    pub const DIRECT_IO: usize = 3;
    /// An extended attribute or ACL changed.
    pub const XATTR: usize = 4;
    /// Inode flags changed, or another ioctl of the file system ran.
    pub const IOCTL: usize = 5;
    /// The ring had no room.
    pub const RING_FULL: usize = 6;
    /// A rename with `RENAME_WHITEOUT`.
    pub const WHITEOUT: usize = 7;
    /// A name or a structure could not be read.
    pub const UNREADABLE: usize = 8;
    /// How many reasons there are room for.
    pub const COUNT: usize = 16;
    /// The words for each reason, for logs and metrics.
    pub const NAMES: [&str; 9] = [
        "fallocate",
        "remap",
        "mapping",
        "direct-io",
        "xattr",
        "ioctl",
        "ring-full",
        "whiteout",
        "unreadable",
    ];
}

/// Slots of the pinned control map (`CONTROL`, one array element of [`CONTROL_SLOTS`] u64).
///
/// One writer each: "programs" slots are written by eBPF only, "agent" slots by user space only.
pub mod control {
    /// Programs: records submitted.
    pub const RECORDS: usize = 0;
    /// Programs: records whose bytes could not be copied at exit (they carry `NO_BYTES`).
    pub const FAULTS: usize = 1;
    /// Programs: events lost because the ring was full.
    pub const DROPS: usize = 2;
    /// Agent: 1 while the consumer sleeps in epoll; a submit then wakes it.
    pub const ASLEEP: usize = 8;
    /// Agent: thread group whose own work is not captured.
    pub const AGENT_TGID: usize = 9;
    /// Agent: when that thread group began, in clock ticks since boot (`/proc/PID/stat`, field 22):
    /// a dead agent's number may become another process's.
    pub const AGENT_START_TICKS: usize = 12;
    /// Agent: 1 when `ki_pos` at the exit of the inner write function is the end of the write
    /// (calibrated: 6.1 xfs leaves it at the start).
    pub const POS_IS_END: usize = 10;
    /// Agent: 1 while the agent's own operations are to be captured, for calibration.
    pub const CALIBRATING: usize = 11;
    /// Agent: [`super::ABI_VERSION`] of the pinned set.
    pub const ABI: usize = 16;
    /// Agent: names the object the pinned programs came from.
    pub const OBJECT: usize = 17;
    /// Agent: `s_dev` the pinned programs capture.
    pub const DEVICE: usize = 18;
    /// Agent: [`ATTACHED`] and [`CALIBRATED`] bits; written last, so that a half-made set is not
    /// taken over.
    pub const STATE: usize = 19;
    /// Agent: bit i set = the i-th hook of the loader's table is not attached on this kernel.
    pub const DISABLED: usize = 20;
    /// Agent: the file system the pinned programs were calibrated on.
    pub const FILESYSTEM: usize = 21;
    /// Bit of [`STATE`]: all programs are attached and pinned.
    pub const ATTACHED: u64 = 1 << 0;
    /// Bit of [`STATE`]: the hooks were verified by known operations.
    pub const CALIBRATED: u64 = 1 << 1;
    /// Programs: how often each [`super::gap`] reason occurred.
    pub const GAPS: usize = 32;
    /// Agent: how many of each reason it has acknowledged; the first one after an acknowledgement
    /// also writes a GAP record.
    pub const GAPS_SEEN: usize = 48;
    /// Agent: words that outlive the agent (epoch, ring position of its start ...), see
    /// `capture::continuity`.
    pub const CONTINUITY: usize = 64;
}

/// Elements of the control map's one value.
pub const CONTROL_SLOTS: usize = 512;

#[cfg(feature = "user")]
macro_rules! layout {
    ($(#[$m:meta])* pub struct $name:ident { $($body:tt)* }) => {
        $(#[$m])*
        #[repr(C)]
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable,
        )]
        pub struct $name { $($body)* }
    };
}
#[cfg(not(feature = "user"))]
macro_rules! layout {
    ($(#[$m:meta])* pub struct $name:ident { $($body:tt)* }) => {
        $(#[$m])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name { $($body)* }
    };
}

layout! {
    /// The 64-byte line every record starts with; see the module's drawing.
    pub struct RecordHeader {
        /// The kernel's length and BUSY/DISCARD bits; the record spans `round_up(len + 8, 8)`.
        pub len_word: u32,
        /// The kernel's; ignored.
        pub page_offset: u32,
        /// One of [`op`].
        pub op: u8,
        /// Bits of [`flag`].
        pub flags: u8,
        /// Bytes of the first name.
        pub name_len: u16,
        /// Bytes written, or bytes of a symlink target.
        pub data_len: u32,
        /// Inode number the record is about (the child of a name operation).
        pub ino: u64,
        /// `i_generation` of that inode.
        pub generation: u32,
        /// `i_mode` after the operation.
        pub mode: u32,
        /// WRITE: offset. Name operations: inode number of the (old) parent. FSYNC: start.
        pub pos: u64,
        /// `i_size` after the operation. FSYNC: last byte of the range, inclusive.
        pub size_after: u64,
        /// `i_mtime` of the inode after the operation, nanoseconds since 1970.
        pub time_ns: i64,
        /// Name operations: generation of the (old) parent. SETATTR: `ia_valid`. See [`op`].
        pub arg: u64,
    }
}

layout! {
    /// Follows the header of CREATE, LINK, UNLINK, RENAME, EXCHANGE, TMPFILE and SYMLINK.
    /// Behind it: the first name, the second name (RENAME, EXCHANGE), the symlink target.
    pub struct NameBody {
        /// RENAME, EXCHANGE: inode number of the new parent.
        pub new_parent_ino: u64,
        /// RENAME, EXCHANGE: the replaced or exchanged inode; 0 if there was none.
        pub victim_ino: u64,
        /// Generation of the new parent.
        pub new_parent_generation: u32,
        /// Generation of the victim.
        pub victim_generation: u32,
        /// Owner of the child.
        pub uid: u32,
        /// Group of the child.
        pub gid: u32,
        /// Device number of a device node, as `i_rdev` (major << 20 | minor).
        pub rdev: u32,
        /// Link count of the child after the operation.
        pub nlink: u32,
        /// Link count of the victim after the operation.
        pub victim_nlink: u32,
        /// Bytes of the second name.
        pub name2_len: u32,
        /// `i_mtime` of the (old) parent after the operation, nanoseconds.
        pub parent_time_ns: i64,
        /// `i_mtime` of the new parent after the operation, nanoseconds.
        pub new_parent_time_ns: i64,
    }
}

layout! {
    /// Follows the header of SETATTR: the inode's attributes after the change.
    pub struct AttrBody {
        /// `i_atime`, nanoseconds since 1970.
        pub atime_ns: i64,
        /// Owner.
        pub uid: u32,
        /// Group.
        pub gid: u32,
        /// Link count.
        pub nlink: u32,
        /// Zero.
        pub reserved: [u32; 11],
    }
}

const _: () = assert!(size_of::<RecordHeader>() == 64);
const _: () = assert!(size_of::<NameBody>() == 64);
const _: () = assert!(size_of::<AttrBody>() == 64);

/// `ATTR_SIZE` of `struct iattr::ia_valid` (include/linux/fs.h, same in 6.1 to 6.18).
pub const ATTR_SIZE: u64 = 1 << 3;
