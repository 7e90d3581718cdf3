//! Offsets and enum values of the running kernel, from its BTF.
//!
//! Each global of the eBPF side is looked up under the names the member had over time. It must
//! never guess: a member that is missing under all its names is an error.

use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use btf_rs::{Btf, BtfType, Struct, Type};

use super::{CaptureError, Filesystem};

/// Where the kernel shows its types.
pub(super) const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// `I_LINKABLE` of kernels where it is a macro (include/linux/fs.h, 6.1 to 6.16).
const I_LINKABLE_MACRO: u64 = 1 << 10;

/// A global of the eBPF side that is a member's offset: its name, the structure, and the member's
/// names, newest first.
type Member = (&'static str, &'static str, &'static [&'static str]);

const MEMBERS: &[Member] = &[
    ("KIOCB_FILP", "kiocb", &["ki_filp"]),
    ("KIOCB_POS", "kiocb", &["ki_pos"]),
    ("FILE_INODE", "file", &["f_inode"]),
    ("INODE_SB", "inode", &["i_sb"]),
    ("INODE_INO", "inode", &["i_ino"]),
    ("INODE_GENERATION", "inode", &["i_generation"]),
    ("INODE_MODE", "inode", &["i_mode"]),
    ("INODE_SIZE", "inode", &["i_size"]),
    ("INODE_UID", "inode", &["i_uid"]),
    ("INODE_GID", "inode", &["i_gid"]),
    ("INODE_RDEV", "inode", &["i_rdev"]),
    ("INODE_NLINK", "inode", &["i_nlink"]),
    ("INODE_STATE", "inode", &["i_state"]),
    (
        "INODE_MTIME_SEC",
        "inode",
        &["i_mtime_sec", "__i_mtime.tv_sec", "i_mtime.tv_sec"],
    ),
    (
        "INODE_MTIME_NSEC",
        "inode",
        &["i_mtime_nsec", "__i_mtime.tv_nsec", "i_mtime.tv_nsec"],
    ),
    (
        "INODE_ATIME_SEC",
        "inode",
        &["i_atime_sec", "__i_atime.tv_sec", "i_atime.tv_sec"],
    ),
    (
        "INODE_ATIME_NSEC",
        "inode",
        &["i_atime_nsec", "__i_atime.tv_nsec", "i_atime.tv_nsec"],
    ),
    ("SB_DEV", "super_block", &["s_dev"]),
    ("DENTRY_PARENT", "dentry", &["d_parent"]),
    ("DENTRY_INODE", "dentry", &["d_inode"]),
    ("DENTRY_NAME", "dentry", &["d_name.name", "__d_name.name"]),
    ("DENTRY_NAME_LEN", "dentry", &["d_name.len", "__d_name.len"]),
    ("ITER_TYPE", "iov_iter", &["iter_type"]),
    ("ITER_OFFSET", "iov_iter", &["iov_offset"]),
    ("ITER_COUNT", "iov_iter", &["count"]),
    ("ITER_IOV", "iov_iter", &["__iov", "iov"]),
    ("ITER_UBUF_ADDRESS", "iov_iter", &["ubuf"]),
    ("IATTR_VALID", "iattr", &["ia_valid"]),
    ("RENAME_OLD_DENTRY", "renamedata", &["old_dentry"]),
    ("RENAME_FLAGS", "renamedata", &["flags"]),
    ("MAPPING_HOST", "address_space", &["host"]),
    ("FAULT_VMA", "vm_fault", &["vma"]),
    ("FAULT_PAGE", "vm_fault", &["pgoff"]),
    ("FAULT_PAGE_STRUCT", "vm_fault", &["page"]),
    ("PAGE_COMPOUND", "page", &["compound_head", "compound_info"]),
    ("FOLIO_FLAGS", "folio", &["flags.f", "flags"]),
    ("FOLIO_INDEX", "folio", &["index"]),
    // Since Linux 6.6 the lowest byte of the second page's flags.
    ("FOLIO_ORDER", "folio", &["_folio_order", "_flags_1"]),
    ("VMA_FILE", "vm_area_struct", &["vm_file"]),
    ("VMA_FLAGS", "vm_area_struct", &["vm_flags"]),
    ("DIO_IOCB", "iomap_dio", &["iocb"]),
    ("DIO_FLAGS", "iomap_dio", &["flags"]),
    ("DIO_ERROR", "iomap_dio", &["error"]),
    ("DIO_BYTES", "iomap_dio", &["size"]),
    ("KIOCB_COMPLETION", "kiocb", &["ki_complete"]),
    ("FILE_FLAGS", "file", &["f_flags"]),
    ("FILE_DENTRY", "file", &["f_path.dentry", "__f_path.dentry"]),
    ("SB_MAGIC", "super_block", &["s_magic"]),
    ("SB_FLAGS", "super_block", &["s_flags"]),
    ("INODE_LOCK", "inode", &["i_rwsem.count.counter"]),
    ("INODE_DIRECT_WRITERS", "inode", &["i_dio_count.counter"]),
    ("TASK_FLAGS", "task_struct", &["flags"]),
    ("TASK_TGID", "task_struct", &["tgid"]),
    ("TASK_LEADER", "task_struct", &["group_leader"]),
    ("TASK_STARTED", "task_struct", &["start_boottime"]),
    ("TASK_FILES", "task_struct", &["files"]),
    ("TASK_SIGNAL", "task_struct", &["signal"]),
    ("TASK_JOB_CONTROL", "task_struct", &["jobctl"]),
    ("TASK_THREAD_NUMBER", "task_struct", &["pid"]),
    ("TASK_STATE", "task_struct", &["__state"]),
    ("TASK_ON_PROCESSOR", "task_struct", &["on_cpu"]),
    ("TASK_STACK", "task_struct", &["stack"]),
    ("TASK_IN_GROUP", "task_struct", &["thread_node"]),
    ("TASK_PENDING", "task_struct", &["pending.signal.sig"]),
    (
        "SIGNAL_PENDING",
        "signal_struct",
        &["shared_pending.signal.sig"],
    ),
    ("SIGNAL_THREADS", "signal_struct", &["thread_head"]),
    ("TASK_STATUS", "task_struct", &["thread_info.status"]),
    ("SIGNAL_STOP_COUNT", "signal_struct", &["group_stop_count"]),
    ("SOCKET_SOCK", "socket", &["sk"]),
    ("SOCK_FAMILY", "sock", &["__sk_common.skc_family"]),
    ("FILES_TABLE", "files_struct", &["fdt"]),
    ("TABLE_MAX", "fdtable", &["max_fds"]),
    ("TABLE_FILES", "fdtable", &["fd"]),
    ("REGS_NUMBER", "pt_regs", &["orig_ax"]),
    ("REGS_RESULT", "pt_regs", &["ax"]),
    ("REGS_FIRST", "pt_regs", &["di"]),
    ("REGS_FOURTH", "pt_regs", &["r10"]),
    ("REGS_COMPAT_FIRST", "pt_regs", &["bx"]),
    ("REGS_COMPAT_SIXTH", "pt_regs", &["bp"]),
];

/// As [`MEMBERS`], but a kernel may be built without them: their programs are then refused.
const OPTIONAL_MEMBERS: &[Member] = &[
    ("INODE_DEFAULT_ACL", "inode", &["i_default_acl"]),
    ("URING_FILE", "io_uring_cmd", &["file"]),
];

/// As [`OPTIONAL_MEMBERS`]: without any of these no directory of a volume can be protected by itself.
const SUBTREE_MEMBERS: &[Member] = &[
    ("INODE_DENTRIES", "inode", &["i_dentry.first"]),
    ("DENTRY_ALIAS", "dentry", &["d_u.d_alias", "d_alias"]),
    ("DENTRY_HASHED_BY", "dentry", &["d_hash.pprev"]),
    ("SB_ROOT", "super_block", &["s_root"]),
];

/// The first of the members by which programs tell on which side of a border something lies that the running
/// kernel does not have.
///
/// # Errors
/// As [`running_globals`].
pub(super) fn missing_for_subtree() -> Result<Option<&'static str>, CaptureError> {
    let globals = running_globals()?;
    let is_there = |name: &str| globals.iter().any(|(global, _)| *global == name);
    let mut names = SUBTREE_MEMBERS.iter().map(|(global, _, _)| *global);
    Ok(names.find(|name| !is_there(name)))
}

/// Where a directory's inode has the flags that it hands on, which programs reach from its VFS inode: structure,
/// its VFS inode, the flags, and which of them are handed on.
struct HandedOn {
    module: &'static str,
    structure: &'static str,
    inode: &'static str,
    flags: &'static str,
    mask: u64,
}

fn handed_on(filesystem: Filesystem) -> HandedOn {
    match filesystem {
        Filesystem::Ext4 => HandedOn {
            module: "ext4",
            structure: "ext4_inode_info",
            inode: "vfs_inode",
            flags: "i_flags",
            // `EXT4_FL_INHERITED` (fs/ext4/ext4.h).
            mask: 0x6201_c4cf,
        },
        Filesystem::Xfs => HandedOn {
            module: "xfs",
            structure: "xfs_inode",
            inode: "i_vnode",
            flags: "i_diflags",
            // All of `xfs_inode_inherit_flags` (fs/xfs), 16 bits.
            mask: 0xffff,
        },
        Filesystem::Btrfs => HandedOn {
            module: "btrfs",
            structure: "btrfs_inode",
            inode: "vfs_inode",
            flags: "flags",
            // NODATASUM, NODATACOW, NOCOMPRESS and COMPRESS, of which a directory with properties to hand on
            // has one, too (`btrfs_inherit_iflags`, `btrfs_inherit_props`).
            mask: 0x80b,
        },
    }
}

/// Globals that are enum values: name, enum, value's name.
const VALUES: &[(&str, &str, &str)] = &[
    ("ITER_UBUF", "iter_type", "ITER_UBUF"),
    ("ITER_IOVEC", "iter_type", "ITER_IOVEC"),
    ("PAGE_IS_HEAD", "pageflags", "PG_head"),
];

/// A global of the eBPF side, and its value.
pub(super) type Setting = (&'static str, u64);

/// Found once: reading the types takes longer than all the rest of attaching.
static RUNNING: OnceLock<Vec<Setting>> = OnceLock::new();

/// [`KernelTypes::globals`] of the running kernel.
///
/// # Errors
/// [`CaptureError::NoBtf`], [`CaptureError::NoMember`].
pub(super) fn running_globals() -> Result<&'static [Setting], CaptureError> {
    if let Some(globals) = RUNNING.get() {
        return Ok(globals);
    }
    let globals = KernelTypes::read()?.globals()?;
    Ok(RUNNING.get_or_init(|| globals))
}

/// Where a directory has the flags that it hands on, and which these are; on a btrfs also where an inode has its
/// tree.
type InodeGlobals = Vec<Setting>;

/// Found once for each file system, as [`RUNNING`] is. What is not found is looked for again: a module may be
/// loaded later.
static IN_INODE: Mutex<Vec<(Filesystem, InodeGlobals)>> = Mutex::new(Vec::new());

/// The globals that tell where a directory has the flags that it hands on, from the types of the file system's
/// module; `None` if the kernel does not show them.
pub(super) fn inode_globals(filesystem: Filesystem) -> Option<InodeGlobals> {
    let mut found = IN_INODE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, globals)) = found.iter().find(|(of, _)| *of == filesystem) {
        return Some(globals.clone());
    }
    let globals = find_in_inode(filesystem)?;
    found.push((filesystem, globals.clone()));
    Some(globals)
}

fn find_in_inode(filesystem: Filesystem) -> Option<InodeGlobals> {
    let HandedOn {
        module,
        structure,
        inode,
        flags,
        mask,
    } = handed_on(filesystem);
    let kernel = KernelTypes::read().ok()?;
    let types = match std::fs::read(Path::new("/sys/kernel/btf").join(module)) {
        Ok(bytes) => KernelTypes {
            btf: Btf::from_split_bytes(&bytes, &kernel.btf).ok()?,
        },
        // Built into the kernel.
        Err(_) => kernel,
    };
    let inode = types.offset(structure, inode)?;
    let from_inode = |member| Some(types.offset(structure, member)?.wrapping_sub(inode));
    let mut globals = vec![
        ("FLAGS_FROM_INODE", from_inode(flags)?),
        ("FLAGS_HANDED_ON", mask),
    ];
    if filesystem == Filesystem::Btrfs {
        globals.push(("ROOT_FROM_INODE", from_inode("root")?));
        globals.push(("ROOT_NUMBER", types.offset("btrfs_root", "root_key")?));
    }
    Some(globals)
}

/// Keeps what [`running_globals`] would find.
pub(super) fn remember(globals: &[Setting]) {
    RUNNING.get_or_init(|| globals.to_vec());
}

/// The running kernel's types.
pub(super) struct KernelTypes {
    btf: Btf,
}

impl KernelTypes {
    /// Reads the running kernel's BTF.
    ///
    /// # Errors
    /// [`CaptureError::NoBtf`].
    pub(super) fn read() -> Result<Self, CaptureError> {
        Self::read_from(Path::new(KERNEL_BTF))
    }

    /// Reads a file of raw BTF.
    ///
    /// # Errors
    /// [`CaptureError::NoBtf`].
    pub(super) fn read_from(path: &Path) -> Result<Self, CaptureError> {
        let failed = |reason: String| CaptureError::NoBtf {
            path: path.to_owned(),
            reason,
        };
        // Read whole: sysfs files cannot be mapped before Linux 6.16.
        let bytes = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let btf = Btf::from_bytes(&bytes).map_err(|error| failed(error.to_string()))?;
        Ok(Self { btf })
    }

    /// Every global of the eBPF side but the volume's device, with its value for this kernel.
    ///
    /// # Errors
    /// [`CaptureError::NoMember`].
    pub(super) fn globals(&self) -> Result<Vec<Setting>, CaptureError> {
        let mut globals = Vec::with_capacity(MEMBERS.len() + VALUES.len() + 1);
        for (global, structure, members) in MEMBERS {
            let offset = members
                .iter()
                .find_map(|member| self.offset(structure, member));
            let offset = offset.ok_or_else(|| {
                CaptureError::NoMember(format!("member {structure}.{}", members.join(" or .")))
            })?;
            globals.push((*global, offset));
        }
        for (global, structure, members) in OPTIONAL_MEMBERS.iter().chain(SUBTREE_MEMBERS) {
            if let Some(offset) = members
                .iter()
                .find_map(|member| self.offset(structure, member))
            {
                globals.push((*global, offset));
            }
        }
        for (global, enumeration, value) in VALUES {
            let found = self.enum_value(enumeration, value).ok_or_else(|| {
                CaptureError::NoMember(format!("value {value} of enum {enumeration}"))
            })?;
            globals.push((*global, found));
        }
        let linkable = self.enum_value("inode_state_flags_enum", "I_LINKABLE");
        globals.push(("I_LINKABLE", linkable.unwrap_or(I_LINKABLE_MACRO)));
        let by_dentry = self.takes("set_posix_acl", 1, "dentry");
        globals.push(("ACL_BY_DENTRY", u64::from(by_dentry)));
        Ok(globals)
    }

    /// Whether the kernel has a function of this name that programs can name.
    #[must_use]
    pub(super) fn has_function(&self, name: &str) -> bool {
        self.btf
            .resolve_types_by_name(name)
            .is_ok_and(|types| types.iter().any(|t| matches!(t, Type::Func(_))))
    }

    /// Whether an argument of a function is a pointer to this structure.
    fn takes(&self, function: &str, argument: usize, structure: &str) -> bool {
        let types = self.btf.resolve_types_by_name(function).unwrap_or_default();
        let prototypes = types.iter().filter_map(|found| match found {
            Type::Func(function) => self.btf.resolve_chained_type(function).ok(),
            _ => None,
        });
        prototypes
            .filter_map(|prototype| match prototype {
                Type::FuncProto(prototype) => prototype.parameters.get(argument).cloned(),
                _ => None,
            })
            .any(|parameter| {
                let pointed = self.btf.chained_type_iter(&parameter).last();
                matches!(pointed, Some(Type::Struct(found))
                    if self.btf.resolve_name(&found).is_ok_and(|name| name == structure))
            })
    }

    /// Whether the kernel has a type name of this name, as each tracepoint has one.
    #[must_use]
    pub(super) fn has_typedef(&self, name: &str) -> bool {
        self.btf
            .resolve_types_by_name(name)
            .is_ok_and(|types| types.iter().any(|t| matches!(t, Type::Typedef(_))))
    }

    /// Byte offset of `path` (`d_name.len`) in a structure, through anonymous members.
    #[must_use]
    pub(super) fn offset(&self, structure: &str, path: &str) -> Option<u64> {
        let types = self.btf.resolve_types_by_name(structure).ok()?;
        let mut current = types.into_iter().find_map(|t| match t {
            Type::Struct(s) => Some(s),
            _ => None,
        })?;
        let mut bits = 0;
        let mut parts = path.split('.').peekable();
        while let Some(part) = parts.next() {
            let (at, inner) = self.member(&current, part)?;
            bits += at;
            if parts.peek().is_some() {
                current = inner?;
            }
        }
        (bits % 8 == 0).then_some(u64::from(bits / 8))
    }

    /// Bit offset of a member, and its structure if it is one.
    fn member(&self, structure: &Struct, want: &str) -> Option<(u32, Option<Struct>)> {
        for member in &structure.members {
            let name = self.btf.resolve_name(member).unwrap_or_default();
            if name == want {
                if member.bitfield_size().is_some_and(|bits| bits != 0) {
                    return None;
                }
                return Some((member.bit_offset(), self.structure(member)));
            }
            if name.is_empty()
                && let Some(inner) = self.structure(member)
                && let Some((at, found)) = self.member(&inner, want)
            {
                return Some((member.bit_offset() + at, found));
            }
        }
        None
    }

    /// The structure or union a member is of, behind typedefs and qualifiers.
    fn structure(&self, member: &dyn BtfType) -> Option<Struct> {
        for found in self.btf.chained_type_iter(member) {
            match found {
                Type::Struct(s) | Type::Union(s) => return Some(s),
                Type::Typedef(_) | Type::Const(_) | Type::Volatile(_) | Type::TypeTag(_) => {}
                _ => return None,
            }
        }
        None
    }

    fn enum_value(&self, enumeration: &str, value: &str) -> Option<u64> {
        for found in self.btf.resolve_types_by_name(enumeration).ok()? {
            let Type::Enum(found) = found else { continue };
            for member in &found.members {
                if self
                    .btf
                    .resolve_name(member)
                    .is_ok_and(|name| name == value)
                {
                    return Some(member.val().into());
                }
            }
        }
        None
    }
}
