//! What this kernel offers, for `twinwrite doctor`.

use std::fs;
use std::path::Path;

use super::Filesystem;
use super::btf::{self, KernelTypes};
use super::hooks::{HOOKS, Hook, Kind, Need};
use super::object::object;

/// One thing capture wants of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is.
    pub name: String,
    /// Whether it is there.
    pub ok: bool,
    /// Whether capture cannot do without it.
    pub required: bool,
    /// What to do if it is not, or what is lost without it.
    pub remedy: String,
}

impl Feature {
    fn new(name: impl Into<String>, ok: bool, required: bool, remedy: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ok,
            required,
            remedy: remedy.into(),
        }
    }
}

/// Everything capture wants, without loading anything but a small map.
#[must_use]
pub fn features() -> Vec<Feature> {
    let mut list = vec![
        Feature::new(
            "eBPF programs",
            object().is_ok(),
            true,
            "this binary was built without them: run `cargo xtask build`",
        ),
        Feature::new(
            "bpffs",
            is_bpffs(Path::new("/sys/fs/bpf")),
            true,
            "mount it: mount -t bpf bpf /sys/fs/bpf",
        ),
        Feature::new(
            "ring buffer",
            has_ring_buffer(),
            true,
            "needs Linux 6.1 and CAP_BPF",
        ),
        Feature::new(
            "BPF LSM",
            bpf_lsm_active(),
            false,
            "boot with `bpf` in the lsm= list; without it, ioctls of the file system go unnoticed, and \
             the kernel's NFS server answers before the gate",
        ),
    ];
    match KernelTypes::read() {
        Err(error) => list.push(Feature::new("kernel BTF", false, true, error.to_string())),
        Ok(types) => {
            list.push(Feature::new("kernel BTF", true, true, ""));
            let members = types.globals();
            if let Ok(globals) = &members {
                btf::remember(globals);
            }
            let words = members
                .as_ref()
                .map_or_else(ToString::to_string, |_| String::new());
            list.push(Feature::new(
                "kernel structures",
                members.is_ok(),
                true,
                words,
            ));
            list.extend(hook_features(&types));
        }
    }
    list
}

fn hook_features(types: &KernelTypes) -> Vec<Feature> {
    let feature = |hook: &Hook| {
        let (function, kind) = match hook.kind {
            Kind::Lsm => (format!("bpf_lsm_{}", hook.function), "lsm"),
            Kind::Tracepoint => (format!("btf_trace_{}", hook.function), "tracepoint"),
            Kind::ModuleTracepoint => (
                format!("__tracepoint_{}", hook.function),
                "module tracepoint",
            ),
            Kind::Entry => (hook.function.to_owned(), "fentry"),
            Kind::Exit => (hook.function.to_owned(), "fexit"),
        };
        let (required, remedy) = match hook.need {
            Need::Always => (true, "this kernel cannot be protected".to_owned()),
            Need::On(filesystems) => (
                false,
                format!("{filesystems:?} volumes cannot be protected on this kernel"),
            ),
            Need::Only(filesystem) => (
                false,
                format!("{filesystem:?} volumes cannot be protected on this kernel"),
            ),
            Need::Notices(reason) => {
                let name = twinwrite_abi::gap::NAMES
                    .get(reason)
                    .copied()
                    .unwrap_or("other");
                (false, format!("{name} changes go unnoticed on this kernel"))
            }
            Need::Covered | Need::OnlyCovered(_) => (false, "not needed: another hook sees the same".to_owned()),
            Need::KeepsHeld => (
                false,
                "others can continue what is held before the gate on this kernel".to_owned(),
            ),
            Need::HoldsReplies => (
                false,
                "the kernel's NFS server answers before the gate on this kernel".to_owned(),
            ),
            Need::KeepsBorder => (
                false,
                "`directory` cannot be used on this kernel: a volume is protected as a whole".to_owned(),
            ),
            Need::RefusesMappings => (
                false,
                "`mappings = \"refuse\"` cannot be carried out on this kernel".to_owned(),
            ),
            Need::StopsPolling => (
                false,
                "who polls an io_uring in user mode may see an answer too early; each ends the epoch"
                    .to_owned(),
            ),
        };
        let ok = match hook.kind {
            Kind::ModuleTracepoint => has_symbol(&function),
            _ => types.has_function(&function) || types.has_typedef(&function),
        };
        Feature::new(
            format!("hook {kind} {}", hook.function),
            ok,
            required,
            remedy,
        )
    };
    HOOKS.iter().map(feature).collect()
}

/// Whether this kernel can skip a program because another task was preempted in the middle of it: unless
/// it says that it does not preempt itself.
#[must_use]
pub fn may_skip_hooks() -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let shown = read("/sys/kernel/debug/sched/preempt");
    let mode = if shown.is_empty() {
        preemption_unmounted().unwrap_or_default()
    } else {
        shown
    };
    preempts(&mode, &read("/proc/cmdline"), &read("/proc/version"))
}

/// The mode in force where debugfs is not mounted: from a mount of it that nobody else sees.
fn preemption_unmounted() -> Option<String> {
    use rustix::fs::{Mode, OFlags, openat};
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen,
    };
    let opened = fsopen("debugfs", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
    fsconfig_create(&opened).ok()?;
    let mount = fsmount(
        &opened,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .ok()?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(&mount, "sched/preempt", flags, Mode::empty()).ok()?;
    std::io::read_to_string(fs::File::from(file)).ok()
}

/// From the mode in force, as debugfs shows it, or else from the boot parameter, or the build.
fn preempts(mode: &str, parameters: &str, version: &str) -> bool {
    if !mode.trim().is_empty() {
        return !["(none)", "(voluntary)"]
            .iter()
            .any(|calm| mode.contains(calm));
    }
    let chosen = parameters
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("preempt="))
        .next_back();
    match chosen {
        Some(mode) => !matches!(mode, "none" | "voluntary"),
        None => version.contains("PREEMPT"),
    }
}

/// Whether the kernel, with the modules that are loaded, has a symbol of this name.
fn has_symbol(name: &str) -> bool {
    fs::read_to_string("/proc/kallsyms").is_ok_and(|symbols| {
        symbols
            .lines()
            .any(|line| line.split_whitespace().nth(2) == Some(name))
    })
}

/// Whether BPF is among the security modules in use. Which these are is settled when the kernel boots, and
/// looked at once.
#[must_use]
pub fn bpf_lsm_active() -> bool {
    static ACTIVE: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| is_any_in_lsm_list(&["bpf"]) == Some(true));
    *ACTIVE
}

/// Whether the extended state of all that is made is told, because it may have something that nobody gave it:
/// also where nobody knows what a directory hands on.
pub(super) fn is_state_of_new_told(filesystem: Filesystem) -> bool {
    labels_what_is_made() || btf::inode_globals(filesystem).is_none()
}

/// Whether a security module gives what is made a label, kept in an extended attribute
/// (`inode_init_security`).
fn labels_what_is_made() -> bool {
    static LABELS: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        // A list that cannot be read may have them.
        let has_labels = is_any_in_lsm_list(&["selinux", "smack"]).unwrap_or(true);
        // EVM is in every list since Linux 6.9, and writes nothing before it has a key.
        let evm = fs::read_to_string("/sys/kernel/security/evm").unwrap_or_default();
        has_labels || !matches!(evm.trim(), "" | "0")
    });
    *LABELS
}

/// `None` if the list cannot be read.
fn is_any_in_lsm_list(names: &[&str]) -> Option<bool> {
    let list = fs::read_to_string("/sys/kernel/security/lsm").ok()?;
    Some(list.trim().split(',').any(|lsm| names.contains(&lsm)))
}

fn is_bpffs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|info| info.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

fn has_ring_buffer() -> bool {
    aya::sys::is_map_supported(aya::maps::MapType::RingBuf).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::preempts;

    #[test]
    fn a_kernel_is_believed_only_when_it_says_that_it_does_not_preempt_itself() {
        let dynamic = "Linux version 6.12 #1 SMP PREEMPT_DYNAMIC Debian";
        assert!(!preempts(
            "none (voluntary) full\n",
            "preempt=full",
            dynamic
        ));
        assert!(preempts("none voluntary (full)\n", "", dynamic));
        assert!(preempts("none voluntary full (lazy)\n", "", dynamic));
        assert!(!preempts("", "quiet preempt=voluntary", dynamic));
        assert!(preempts("", "quiet preempt=full", dynamic));
        assert!(preempts("", "quiet", dynamic));
        assert!(!preempts("", "quiet", "Linux version 6.1 #1 SMP Debian"));
    }
}
