//! What user space sets before it loads the programs: the volume, and the running kernel's
//! structure offsets and enum values (`capture::btf` in user space).
//!
//! The globals lie in `.rodata`, which the loader freezes: the verifier takes them as constants,
//! removes the branches of members this kernel does not have, and keeps the type of a pointer that
//! is loaded through one. Nothing here may change while the programs run.

use aya_ebpf::Global;

/// Value of an offset whose member the running kernel does not have.
pub const ABSENT: u64 = u64::MAX;

macro_rules! globals {
    ($($(#[$m:meta])* $name:ident),* $(,)?) => { $(
        $(#[$m])*
        #[unsafe(no_mangle)]
        pub static $name: Global<u64> = Global::new(ABSENT);
    )* };
}

globals! {
    /// `s_dev` of the protected volume.
    TARGET_DEV,
    KIOCB_FILP, KIOCB_POS, KIOCB_COMPLETION,
    FILE_INODE,
    INODE_SB, INODE_INO, INODE_GENERATION, INODE_MODE, INODE_SIZE, INODE_UID, INODE_GID,
    INODE_RDEV, INODE_NLINK, INODE_STATE,
    /// Absent on kernels without ACLs.
    INODE_DEFAULT_ACL,
    /// 1 if the extended state of whatever is made is told: it may have a security label.
    STATE_OF_NEW,
    /// Where a directory has the flags that it hands on, counted from its VFS inode (wrapping), and which are.
    FLAGS_FROM_INODE, FLAGS_HANDED_ON,
    /// The directory below which the volume is protected; absent if it is as a whole.
    SUBTREE_INO, SUBTREE_GENERATION,
    /// The agent's own directory, which counts as protected then.
    OWN_INO, OWN_GENERATION,
    INODE_DENTRIES, DENTRY_ALIAS, DENTRY_HASHED_BY, SB_ROOT,
    /// On a btrfs, where an inode has the address of its tree's root, counted from its VFS inode (wrapping), and
    /// where that has the tree's number.
    ROOT_FROM_INODE, ROOT_NUMBER,
    INODE_MTIME_SEC, INODE_MTIME_NSEC, INODE_ATIME_SEC, INODE_ATIME_NSEC,
    /// Value of `I_LINKABLE` in `i_state`.
    I_LINKABLE,
    SB_DEV,
    DENTRY_PARENT, DENTRY_INODE, DENTRY_NAME, DENTRY_NAME_LEN,
    ITER_TYPE, ITER_OFFSET, ITER_COUNT, ITER_IOV, ITER_UBUF_ADDRESS,
    /// Enum values of `enum iter_type`.
    ITER_UBUF, ITER_IOVEC,
    IATTR_VALID,
    RENAME_OLD_DENTRY, RENAME_FLAGS,
    FAULT_VMA, FAULT_PAGE, FAULT_PAGE_STRUCT, VMA_FILE, VMA_FLAGS,
    PAGE_COMPOUND, FOLIO_FLAGS, FOLIO_INDEX, FOLIO_ORDER,
    /// Number of the bit of `FOLIO_FLAGS` that a folio of more than one page has (`PG_head`).
    PAGE_IS_HEAD,
    /// 1 if `set_posix_acl` is told the dentry, 0 if the inode.
    ACL_BY_DENTRY,
    MAPPING_HOST,
    /// Absent on kernels without io_uring.
    URING_FILE,
    DIO_IOCB, DIO_FLAGS, DIO_ERROR, DIO_BYTES,
    FILE_FLAGS, FILE_DENTRY, SB_MAGIC, SB_FLAGS,
    /// The count of the inode's lock; how many direct writes are under way.
    INODE_LOCK, INODE_DIRECT_WRITERS,
    TASK_FLAGS, TASK_TGID, TASK_LEADER, TASK_STARTED, TASK_FILES, TASK_SIGNAL, TASK_JOB_CONTROL,
    TASK_THREAD_NUMBER, TASK_STATE, TASK_ON_PROCESSOR, TASK_STACK, TASK_IN_GROUP,
    /// The signals that a thread, or any of its group, has not taken yet.
    TASK_PENDING, SIGNAL_PENDING,
    /// `TS_COMPAT` is a bit of it.
    TASK_STATUS,
    /// Head of the list that `TASK_IN_GROUP` is a link of.
    SIGNAL_THREADS,
    SIGNAL_STOP_COUNT,
    SOCKET_SOCK, SOCK_FAMILY,
    FILES_TABLE, TABLE_MAX, TABLE_FILES,
    /// System call number and arguments at its exit.
    REGS_NUMBER, REGS_RESULT, REGS_FIRST, REGS_FOURTH, REGS_COMPAT_FIRST, REGS_COMPAT_SIXTH,
}

/// Reads a member through a pointer whose type the verifier knows: a plain load.
///
/// # Safety
/// `base` must come from the hook's arguments or from such a load, and `offset` be a member of `T`.
#[inline(always)]
pub unsafe fn member<T: Copy>(base: *const u8, offset: &Global<u64>) -> T {
    // SAFETY: the caller's; a fault in such a load reads as zero.
    unsafe { core::ptr::read_volatile(base.wrapping_add(offset.load() as usize).cast()) }
}
