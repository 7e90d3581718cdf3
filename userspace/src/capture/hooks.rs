//! The table of hooks: which program hangs on which kernel function, and what is lost without it.
//!
//! A row's index is a bit in a pinned word, so rows are only appended between releases. Rows are attached in
//! their order: where two hooks note begin and end of a call, the end comes first, or a call that began
//! between the two would be under way for ever.

use twinwrite_abi::gap;

use super::{CaptureOptions, Filesystem};

/// What a volume loses without a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Capture cannot do without.
    Always,
    /// Capture of these file systems cannot do without.
    On(&'static [Filesystem]),
    /// Capture of this file system cannot do without, and no other has it attached.
    Only(Filesystem),
    /// No other file system has it attached; another hook sees the same on kernels that lack it.
    OnlyCovered(Filesystem),
    /// Changes of this gap reason go unnoticed without it.
    Notices(usize),
    /// Another hook sees the same on kernels that lack this one.
    Covered,
    /// Without it others can continue a thread group that is held before the gate.
    KeepsHeld,
    /// Without it the kernel's NFS server answers too early.
    HoldsReplies,
    /// Without it the policy that refuses shared writable mappings cannot be carried out.
    RefusesMappings,
    /// Only a volume of which one directory is protected has it attached, and cannot do without.
    KeepsBorder,
    /// Without it a thread that polls an io_uring in user mode may see an answer before the gate has let
    /// it pass; each is noted as a gap.
    StopsPolling,
}

/// How a program hangs on a kernel function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// At the function's entry.
    Entry,
    /// At its exit.
    Exit,
    /// On a security hook.
    Lsm,
    /// On a tracepoint.
    Tracepoint,
    /// On a tracepoint that belongs to a module, whose types programs do not know.
    ModuleTracepoint,
}

/// One program and the kernel function it hangs on.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// Program's name in the object.
    pub program: &'static str,
    /// How it hangs.
    pub kind: Kind,
    /// Kernel function or security hook.
    pub function: &'static str,
    /// What is lost without it.
    pub need: Need,
}

const fn hook(program: &'static str, kind: Kind, function: &'static str, need: Need) -> Hook {
    Hook {
        program,
        kind,
        function,
        need,
    }
}

const EXT4: &[Filesystem] = &[Filesystem::Ext4];
const XFS: &[Filesystem] = &[Filesystem::Xfs];
const MAKES_NEW: &[Filesystem] = &[Filesystem::Ext4, Filesystem::Btrfs];
const BTRFS: Filesystem = Filesystem::Btrfs;

impl Need {
    /// Whether such a volume has the hook attached.
    #[must_use]
    pub fn is_wanted_on(self, options: &CaptureOptions) -> bool {
        match self {
            Self::Only(only) | Self::OnlyCovered(only) => only == options.filesystem,
            Self::KeepsBorder => options.subtree.is_some(),
            _ => true,
        }
    }
}

const _: () = assert!(HOOKS.len() <= 64, "a hook is a bit of a word");

/// All hooks. The index of a hook is its bit in the control slot `DISABLED`.
#[rustfmt::skip]
pub const HOOKS: &[Hook] = &[
    hook("write_generic", Kind::Exit, "generic_perform_write", Need::On(EXT4)),
    hook("write_iomap", Kind::Exit, "iomap_file_buffered_write", Need::On(XFS)),
    hook("name_instantiate", Kind::Exit, "d_instantiate", Need::Always),
    hook("name_instantiate_new", Kind::Exit, "d_instantiate_new", Need::On(MAKES_NEW)),
    hook("name_tmpfile", Kind::Exit, "d_tmpfile", Need::Always),
    hook("name_symlink", Kind::Exit, "vfs_symlink", Need::Always),
    hook("name_delete", Kind::Entry, "d_delete", Need::Always),
    hook("name_move", Kind::Entry, "d_move", Need::Always),
    hook("name_exchange", Kind::Entry, "d_exchange", Need::Always),
    hook("attributes_change", Kind::Exit, "notify_change", Need::Always),
    hook("sync_range_enter", Kind::Entry, "vfs_fsync_range", Need::Always),
    hook("sync_range_exit", Kind::Exit, "vfs_fsync_range", Need::Always),
    hook("sync_whole_enter", Kind::Entry, "vfs_fsync", Need::Covered),
    hook("sync_whole_exit", Kind::Exit, "vfs_fsync", Need::Covered),
    hook("sync_file", Kind::Exit, "file_write_and_wait_range", Need::Always),
    hook("sync_fsync_enter", Kind::Entry, "__x64_sys_fsync", Need::Covered),
    hook("sync_fsync_exit", Kind::Exit, "__x64_sys_fsync", Need::Covered),
    hook("sync_fdatasync_enter", Kind::Entry, "__x64_sys_fdatasync", Need::Covered),
    hook("sync_fdatasync_exit", Kind::Exit, "__x64_sys_fdatasync", Need::Covered),
    hook("sync_fsync32_enter", Kind::Entry, "__ia32_sys_fsync", Need::Covered),
    hook("sync_fsync32_exit", Kind::Exit, "__ia32_sys_fsync", Need::Covered),
    hook("sync_fdatasync32_enter", Kind::Entry, "__ia32_sys_fdatasync", Need::Covered),
    hook("sync_fdatasync32_exit", Kind::Exit, "__ia32_sys_fdatasync", Need::Covered),
    hook("space_fallocate", Kind::Exit, "vfs_fallocate", Need::Notices(gap::FALLOCATE)),
    hook("space_fallocate_begin", Kind::Entry, "vfs_fallocate", Need::Notices(gap::FALLOCATE)),
    hook("space_remap_clone", Kind::Exit, "vfs_clone_file_range", Need::Notices(gap::REMAP)),
    hook("space_remap_copy", Kind::Exit, "vfs_copy_file_range", Need::Notices(gap::REMAP)),
    hook("space_remap_copy_up", Kind::Exit, "do_clone_file_range", Need::Covered),
    hook("space_remap_begin", Kind::Exit, "generic_remap_file_range_prep", Need::Notices(gap::REMAP)),
    hook("mapping_writable", Kind::Exit, "do_page_mkwrite", Need::Notices(gap::MAPPING)),
    hook("direct_end", Kind::Exit, "iomap_dio_complete", Need::Notices(gap::DIRECT_IO)),
    hook("direct_end_begin", Kind::Entry, "iomap_dio_complete", Need::Notices(gap::DIRECT_IO)),
    hook("extended_set", Kind::Exit, "__vfs_setxattr_noperm", Need::Notices(gap::XATTR)),
    hook("extended_remove", Kind::Exit, "__vfs_removexattr_locked", Need::Notices(gap::XATTR)),
    hook("extended_drop", Kind::Exit, "__vfs_removexattr", Need::Notices(gap::XATTR)),
    hook("extended_acl", Kind::Exit, "set_posix_acl", Need::Notices(gap::XATTR)),
    hook("extended_acl_set", Kind::Exit, "vfs_set_acl", Need::Covered),
    hook("extended_acl_set_begin", Kind::Entry, "vfs_set_acl", Need::Covered),
    hook("extended_acl_remove", Kind::Exit, "vfs_remove_acl", Need::Covered),
    hook("extended_acl_remove_begin", Kind::Entry, "vfs_remove_acl", Need::Covered),
    hook("extended_flags", Kind::Exit, "vfs_fileattr_set", Need::Notices(gap::IOCTL)),
    hook("extended_flags_begin", Kind::Entry, "vfs_fileattr_set", Need::Notices(gap::IOCTL)),
    hook("gap_whiteout", Kind::Exit, "vfs_rename", Need::Notices(gap::WHITEOUT)),
    hook("gap_ioctl", Kind::Lsm, "file_ioctl", Need::Notices(gap::IOCTL)),
    hook("gap_ioctl_compat", Kind::Lsm, "file_ioctl_compat", Need::Covered),
    hook("writeback_error", Kind::Tracepoint, "filemap_set_wb_err", Need::Always),
    hook("gate_exit", Kind::Tracepoint, "sys_exit", Need::Always),
    hook("gate_kill", Kind::Lsm, "task_kill", Need::KeepsHeld),
    hook("gate_continued", Kind::Tracepoint, "signal_generate", Need::Always),
    hook("gate_reply", Kind::Lsm, "socket_sendmsg", Need::HoldsReplies),
    hook("gate_server_metadata", Kind::ModuleTracepoint, "ext4_nfs_commit_metadata", Need::HoldsReplies),
    hook("gate_tick", Kind::Tracepoint, "hrtimer_expire_exit", Need::StopsPolling),
    hook("mapping_refuse", Kind::Lsm, "mmap_file", Need::RefusesMappings),
    hook("mapping_refuse_upgrade", Kind::Lsm, "file_mprotect", Need::RefusesMappings),
    hook("direct_submit", Kind::Entry, "invalidate_inode_pages2_range", Need::Covered),
    hook("border_link", Kind::Lsm, "inode_link", Need::KeepsBorder),
    hook("border_rename", Kind::Lsm, "inode_rename", Need::KeepsBorder),
    hook("border_remove", Kind::Lsm, "inode_rmdir", Need::KeepsBorder),
    hook("write_btrfs_begin", Kind::Exit, "generic_write_checks", Need::Only(BTRFS)),
    hook("write_btrfs", Kind::Entry, "pagecache_isize_extended", Need::Only(BTRFS)),
    hook("sync_btrfs", Kind::Entry, "file_check_and_advance_wb_err", Need::Only(BTRFS)),
    hook("refuse_uring", Kind::Lsm, "uring_cmd", Need::OnlyCovered(BTRFS)),
];

const _: () = assert!(HOOKS.len() <= 64);
