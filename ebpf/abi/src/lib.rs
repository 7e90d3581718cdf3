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
pub const ABI_VERSION: u32 = 2;
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
/// The largest range whose bytes the agent reads for one record; a larger one is a gap.
pub const FILLED_BYTES_MAX: u64 = 64 << 20;
/// The largest extended state of an inode, as the agent tells it: a frame of the region.
pub const EXTENDED_BYTES_MAX: u32 = 256 * 1024;
/// Bytes of a page of a mapping (x86-64).
pub const MAPPED_PAGE_BYTES: u64 = 4096;
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
    /// An fsync-class call succeeded: range `pos..=size_after`, `arg` = ring position at its entry. One of
    /// inode 0 proves nothing: a program has woken the agent with it.
    pub const FSYNC: u8 = 10;
    /// A change that was noticed and not captured: `arg` is a [`super::gap`] reason.
    pub const GAP: u8 = 11;
    /// Extended attributes, ACLs, inode flags or the project changed. Without bytes: the agent fills in what
    /// they have become, see `record::extended` in user space.
    pub const EXTENDED: u8 = 12;
}

/// Failed write-backs that get a record of their own, with their inode, before the agent has looked.
pub const WRITEBACK_NAMED_MAX: u64 = 64;

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
    /// WRITE without data: the page at `pos`, `arg` bytes long, became writable through a shared mapping, so
    /// that it can be changed without a record from here on. WRITE with data: what stands in such pages now.
    pub const MAPPED: u8 = 1 << 5;
    /// WRITE of an inode whose lock was not held: the file was at least `size_after` long. How long exactly
    /// another record tells.
    pub const SIZE_RAISES: u8 = 1 << 6;
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
    /// An fsync-class call was answered although its mark was not mirrored yet: who asked for it
    /// cannot be stopped.
    pub const UNGATED: usize = 9;
    /// A write-back failed: nothing is missing in the log, but what it tells may be on no disk. Not in
    /// the gap counters: see [`super::control::WRITEBACK_ERRORS`].
    pub const WRITEBACK: usize = 10;
    /// A file of another subvolume changed, in which the identities of the volume's files mean others.
    pub const OTHER_TREE: usize = 11;
    /// A change of attributes or of the size failed, and may have done a part.
    pub const ATTRIBUTES: usize = 12;
    /// A file changed of which nobody could tell on which side of the protected directory's border it is.
    pub const BORDER: usize = 13;
    /// How many reasons there are room for.
    pub const COUNT: usize = 16;
    /// The words for each reason, for logs and metrics.
    pub const NAMES: [&str; 14] = [
        "fallocate",
        "remap",
        "mapping",
        "direct-io",
        "xattr",
        "ioctl",
        "ring-full",
        "whiteout",
        "unreadable",
        "ungated",
        "write-back",
        "other-subvolume",
        "attributes",
        "border",
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
    /// Agent: where the gate stands: whoever waits for a ring position up to this one has passed it.
    /// [`GATE_OPEN`] while no epoch is open. Stays as it is when the agent dies, so that the gate holds.
    pub const GATE_OPEN_TO: usize = 24;
    /// Agent: grows whenever an epoch was closed or begins: what waited before then need not wait.
    pub const GATE_GENERATION: usize = 25;
    /// Agent: longest time that a waiting thread looks at the gate before it is stopped,
    /// nanoseconds.
    pub const GATE_POLL_NS: usize = 26;
    /// Agent: as [`GATE_OPEN_TO`], for whoever waits until a checkpoint of what was captured up to a
    /// ring position is proven.
    pub const GATE_PROVEN_TO: usize = 27;
    /// Agent: 1 switches the gate off, for tests that show what happens without it.
    pub const GATE_OFF: usize = 28;
    /// Agent: 1 refuses new shared writable mappings of the volume's files.
    pub const MAPPINGS_REFUSED: usize = 29;
    /// Value of [`GATE_OPEN_TO`]: nothing waits.
    pub const GATE_OPEN: u64 = u64::MAX;
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
    /// Programs: threads that have noted a gap that is about to happen, and not again.
    pub const EARLY_NOTES: usize = 108;
    /// Records for which a sleeping agent was not woken, because nobody waits for them.
    pub const UNHURRIED: usize = 111;
    /// Programs: write-backs of the volume that failed.
    pub const WRITEBACK_ERRORS: usize = 104;
    /// Agent: how many of them it has seen.
    pub const WRITEBACK_LOOKED: usize = 105;
    /// Agent: how many of them are mended: what they left in doubt was written again and proven. A
    /// mark is TAINTED while there are others.
    pub const WRITEBACK_MENDED: usize = 106;
    /// Programs: threads that have something to wait for and have not come to the gate yet.
    pub const GATE_PENDING: usize = 96;
    /// Programs: how many found the gate open.
    pub const GATE_PASSED: usize = 97;
    /// Programs: how many saw it open while they looked at it.
    pub const GATE_POLLED: usize = 98;
    /// Programs: how many were stopped before it.
    pub const GATE_HOLDS: usize = 99;
    /// Programs: nanoseconds that those of [`GATE_POLLED`] looked at it.
    pub const GATE_POLLED_NS: usize = 100;
    /// Programs: calls whose change others can see before it is noticed as a gap, and which are under
    /// way.
    pub const UNNOTICED: usize = 101;
    /// Programs: calls that waited for their mark, and not only for what was captured before them.
    pub const GATE_FOR_MARK: usize = 102;
    /// Programs: calls that wait for a checkpoint, see [`GATE_PROVEN_TO`].
    pub const PROOFS_WANTED: usize = 103;
    /// Programs: how many thread groups were marked, so that their threads meet the gate although none of
    /// them made the call; see [`super::held::MARKED_BY`].
    pub const MARKS: usize = 109;
    /// Agent: value of [`MARKS`] up to which all marks are over: as long as both are equal, no thread
    /// has to look whether its group is marked.
    pub const MARKS_SETTLED: usize = 110;
    /// Agent, before an epoch: not 0 where the kernel can skip a program without a trace in the ring, so
    /// that only a mark, or a proof, tells that nothing before it was missed.
    pub const MAY_SKIP: usize = 107;
    /// Agent: how many of each gap reason no call has to wait for any more: whatever they changed is
    /// on the disk, and no record that is older than such a change is left in the log.
    pub const GAPS_SETTLED: usize = 112;
    /// Value of the words of [`GAPS_SETTLED`] that no counter has: nothing is settled.
    pub const UNSETTLED: u64 = u64::MAX;
    /// Agent, every few seconds: 1 if the programs can refuse all replies of the kernel's NFS server.
    pub const SERVER_HELD: usize = 144;
    /// Programs: the largest ring position that the NFS server was told to wait for. What every replay
    /// of the region must contain before a reply may leave.
    pub const SERVER_MIRRORED: usize = 145;
    /// Programs: [`GATE_GENERATION`] when [`SERVER_MIRRORED`] was raised last.
    pub const SERVER_MIRRORED_GENERATION: usize = 146;
    /// Programs: as [`SERVER_MIRRORED`], for what a checkpoint must have proven, see [`GATE_PROVEN_TO`].
    pub const SERVER_PROVEN: usize = 147;
    /// Programs: [`GATE_GENERATION`] when [`SERVER_PROVEN`] was raised last.
    pub const SERVER_PROVEN_GENERATION: usize = 148;
    /// Programs: 1 more than the largest [`GATE_GENERATION`] whose end a reply must wait for; 0 for none.
    pub const SERVER_CLOSED: usize = 149;
    /// Programs: where the gate stood when a reply was refused last. Until it moves nobody looks longer.
    pub const SERVER_STALLED_AT: usize = 150;
    /// Programs: replies of the NFS server that were refused.
    pub const SERVER_REFUSED: usize = 151;
    /// Agent, of a volume of which one directory is protected: inode number and generation of that directory and
    /// of those above it, [`SUBTREE_PATH_MAX`] pairs, 0 for none. The first is the protected one.
    pub const SUBTREE_PATH: usize = 160;
    /// Most of them.
    pub const SUBTREE_PATH_MAX: usize = 8;
    /// Agent: inode number and generation of its own directory.
    pub const SUBTREE_OWN: usize = 176;
    /// Agent: number of its last proof that no file has names on both sides of the border.
    pub const SUBTREE_PROVEN: usize = 178;
    /// Programs: renames, and further names, of directories inside and of files there with several names.
    pub const SUBTREE_MOVES: usize = 179;
    /// Programs: names that were given or moved across the border all the same.
    pub const SUBTREE_CROSSINGS: usize = 180;
    /// Agent: how many of them there were before the proof; [`UNSETTLED`] if it does not hold.
    pub const SUBTREE_CROSSINGS_SEEN: usize = 181;
    /// Agent: how often a program had been skipped when it was proven.
    pub const SUBTREE_MISSES: usize = 182;
}

/// What calls of the fsync class wait for, and the host's one map of threads that are stopped before
/// a gate. A key of that map is the thread (`thread group << 32 | thread`), the volume's device, and
/// when the wait began in nanoseconds of the monotonic clock: no key comes twice.
pub mod held {
    /// Version of the host's maps, part of their names. A build finds those that the programs of another
    /// build hold threads in only if the version is the same, so what is added gets a map of its own.
    pub const VERSION: u32 = 1;
    /// Words of a key.
    pub const KEY_WORDS: usize = 3;
    /// Key: the thread.
    pub const THREAD: usize = 0;
    /// Key: the kernel's number of the volume's device.
    pub const DEVICE: usize = 1;
    /// Key: when the wait began; [`BY_TICK`].
    pub const SINCE_NS: usize = 2;
    /// Value of [`SINCE_NS`]: the thread waits for nothing itself, and the timer's tick has stopped it for
    /// the others of its group.
    pub const BY_TICK: u64 = 0;

    /// Value: the ring position that must be passed; [`UNTIL_CLOSED`] if only the end of the epoch
    /// helps.
    pub const POSITION: usize = 0;
    /// Value: which word of the control map tells how far the gate is open, for this one.
    pub const OPEN_WORD: usize = 1;
    /// Value: [`super::control::GATE_GENERATION`] when the thread began to wait.
    pub const GENERATION: usize = 2;
    /// Value: when the thread group began, in clock ticks since boot.
    pub const STARTED_TICKS: usize = 3;
    /// Value: [`STOPPING`], [`STOPPED`] or [`PASSED`].
    pub const STATE: usize = 4;
    /// Words of a value.
    pub const WORDS: usize = 5;

    /// The programs may still send the stop signal: the group must not be continued.
    pub const STOPPING: u64 = 0;
    /// The stop signal is sent, or others of the group send it.
    pub const STOPPED: u64 = 1;
    /// Agent: as far as this volume is concerned the thread may go on.
    pub const PASSED: u64 = 2;
    /// A position that no record has.
    pub const UNTIL_CLOSED: u64 = u64::MAX - 1;

    /// Value of the map of held thread groups: the signal by which somebody else has stopped the
    /// group meanwhile; 0 if nobody has.
    pub const GROUP_SIGNAL: usize = 0;
    /// Value of the map of held thread groups: when it began, in clock ticks since boot.
    pub const GROUP_STARTED_TICKS: usize = 1;
    /// Words of a value of the map of held thread groups.
    pub const GROUP_WORDS: usize = 2;

    /// Value of the map of marked thread groups: when the group began, in clock ticks since boot.
    pub const MARKED_STARTED_TICKS: usize = 0;
    /// Value of the map of marked thread groups: by [`mark_of`] the volumes whose answers a thread of the
    /// kernel is about to hand to the group. Whatever thread of it is about to run is stopped.
    pub const MARKED_BY: usize = 1;
    /// Words of a value of the map of marked thread groups.
    pub const MARKED_WORDS: usize = 2;

    /// The bit of [`MARKED_BY`] for a volume's device. Two volumes may share one: then a group may be
    /// stopped for the wrong one as well, which does no harm.
    #[must_use]
    pub const fn mark_of(device: u64) -> u64 {
        1 << (device & 63)
    }

    /// Word of the host: the thread group that continues others, while it does.
    pub const CONTINUER: usize = 0;
    /// Word of the host: when that group began, in clock ticks since boot.
    pub const CONTINUER_TICKS: usize = 1;
    /// Word of the host: which of [`TURNS`] was made odd, plus 1; 0 if none is.
    pub const TURN_UNDER_WAY: usize = 2;
    /// Words of the host, by thread group modulo their number: odd while a group is being continued.
    pub const TURNS: usize = 64;
    /// How many there are: a power of two.
    pub const TURN_COUNT: usize = 256;
    /// Words of the host.
    pub const HOST_WORDS: usize = 512;

    /// The ring position that an fsync-class call on one file must wait for.
    ///
    /// - `seen_before`: where the ring stood after the call had begun, if everything that anybody could
    ///   see of the file by then had its record before that position; `None` if that is not known
    ///   (somebody was changing the file just then).
    /// - `mark_end`: where the call's own mark ends in the ring; `None` if there was no room for it.
    /// - `is_log_whole`: no change is unaccounted for that was noticed and not captured: all such gaps
    ///   are settled, see [`super::control::GAPS_SETTLED`].
    ///
    /// The log is a prefix of what happened. If it is whole, a replay that contains everything before
    /// `seen_before` shows what the call confirms, or what came later. Only what the log does not hold
    /// needs the mark, which keeps older records off it.
    #[must_use]
    pub const fn position_to_wait_for(
        seen_before: Option<u64>,
        mark_end: Option<u64>,
        is_log_whole: bool,
    ) -> u64 {
        match (seen_before, mark_end) {
            // A mark that is lost is itself a change that the log lacks.
            (_, None) => UNTIL_CLOSED,
            (Some(position), Some(_)) if is_log_whole => position,
            (_, Some(end)) => end,
        }
    }
}

/// How the agent asks the programs for a record of bytes that were stored through a mapping: by an ioctl
/// that no file system knows, on the file.
pub mod snapshot {
    use super::MAPPED_PAGE_BYTES;

    /// Its command.
    pub const COMMAND: u32 = 0x0000_7457;
    /// Most pages of one call.
    pub const PAGES_MAX: u64 = PAGES_MASK;
    const PAGES_BITS: u64 = 10;
    const PAGES_MASK: u64 = (1 << PAGES_BITS) - 1;

    /// Its argument, for `pages` of the file from `page` on.
    #[must_use]
    pub const fn argument(page: u64, pages: u64) -> u64 {
        page << PAGES_BITS | pages & PAGES_MASK
    }

    /// Offset and bytes that an argument means.
    #[must_use]
    pub const fn range(argument: u64) -> (u64, u64) {
        (
            (argument >> PAGES_BITS) * MAPPED_PAGE_BYTES,
            (argument & PAGES_MASK) * MAPPED_PAGE_BYTES,
        )
    }
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

#[cfg(test)]
mod tests {
    use super::held::{UNTIL_CLOSED, position_to_wait_for};

    #[test]
    fn a_whole_log_is_waited_for_up_to_where_the_call_began() {
        assert_eq!(position_to_wait_for(Some(64), Some(256), true), 64);
    }

    #[test]
    fn what_the_log_may_lack_waits_for_the_mark() {
        assert_eq!(position_to_wait_for(None, Some(256), true), 256);
        assert_eq!(position_to_wait_for(Some(64), Some(256), false), 256);
        assert_eq!(position_to_wait_for(None, Some(256), false), 256);
    }

    #[test]
    fn without_a_mark_only_the_end_of_the_epoch_helps() {
        for (before, is_whole) in [(Some(64), true), (Some(64), false), (None, true)] {
            assert_eq!(position_to_wait_for(before, None, is_whole), UNTIL_CLOSED);
        }
    }
}
