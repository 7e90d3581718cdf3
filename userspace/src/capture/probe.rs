//! What this kernel offers, for `twinwrite doctor`.

use std::fs;
use std::path::Path;

use super::btf::KernelTypes;
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
            "boot with `bpf` in the lsm= list; without it, ioctls of the file system go unnoticed",
        ),
    ];
    match KernelTypes::read() {
        Err(error) => list.push(Feature::new("kernel BTF", false, true, error.to_string())),
        Ok(types) => {
            list.push(Feature::new("kernel BTF", true, true, ""));
            let members = types.globals();
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
            Kind::Entry => (hook.function.to_owned(), "fentry"),
            Kind::Exit => (hook.function.to_owned(), "fexit"),
        };
        let (required, remedy) = match hook.need {
            Need::Always => (true, "this kernel cannot be protected".to_owned()),
            Need::On(filesystem) => (
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
            Need::Covered => (false, "not needed: another hook sees the same".to_owned()),
        };
        Feature::new(
            format!("hook {kind} {}", hook.function),
            types.has_function(&function),
            required,
            remedy,
        )
    };
    HOOKS.iter().map(feature).collect()
}

/// Whether BPF is among the security modules in use.
pub(super) fn bpf_lsm_active() -> bool {
    fs::read_to_string("/sys/kernel/security/lsm")
        .is_ok_and(|text| text.trim().split(',').any(|lsm| lsm == "bpf"))
}

fn is_bpffs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|info| info.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

fn has_ring_buffer() -> bool {
    aya::sys::is_map_supported(aya::maps::MapType::RingBuf).unwrap_or(false)
}
