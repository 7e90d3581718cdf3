//! Debian packages: which are needed, which are missing, how they are installed.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::{Purpose, toolchain};
use crate::progress;

/// One thing the host must have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Debian package.
    package: &'static str,
    /// A file or, without a slash, a command that shows it is there on other systems.
    probe: &'static str,
    /// What it is for, in words.
    purpose: &'static str,
}

const fn need(package: &'static str, probe: &'static str, purpose: &'static str) -> Need {
    Need {
        package,
        probe,
        purpose,
    }
}

const BUILD: &[Need] = &[
    need("gcc", "gcc", "the linker and the C parts of dependencies"),
    need(
        "libc6-dev",
        "/usr/include/stdio.h",
        "the C library's headers",
    ),
    need("pkg-config", "pkg-config", "finding libibverbs"),
    need(
        "libibverbs-dev",
        "/usr/include/infiniband/verbs.h",
        "RDMA verbs",
    ),
    need(
        "librdmacm-dev",
        "/usr/include/rdma/rdma_cma.h",
        "the RDMA connection manager's headers",
    ),
    need(
        "libclang-14-dev",
        "/usr/lib/llvm-14/lib/libclang.so",
        "bindgen for rdma-sys",
    ),
    need("clang-14", "clang-14", "bindgen's own headers"),
    need(
        "llvm-22-dev",
        "/usr/lib/llvm-22/bin/llvm-config",
        "bpf-linker",
    ),
];

/// Only where no rustup toolchain can build the eBPF programs.
const RUSTC: &[Need] = &[
    need("rustc-web", "/usr/bin/rustc", "compiling eBPF programs"),
    need(
        "rust-web-src",
        "/usr/lib/rustlib/src/rust/library/core/src/lib.rs",
        "building `core` for eBPF",
    ),
];

const LAB: &[Need] = &[
    need("qemu-system-x86", "qemu-system-x86_64", "virtual machines"),
    need("qemu-utils", "qemu-img", "virtual machines' disks"),
    need("mmdebstrap", "mmdebstrap", "the virtual machines' root"),
    need(
        "busybox-static",
        "/bin/busybox",
        "the virtual machines' first process",
    ),
    need(
        "erofs-utils",
        "mkfs.erofs",
        "the virtual machines' root image",
    ),
    need("cpio", "cpio", "initial ramdisks"),
    need("zstd", "zstd", "unpacking kernels"),
    need("xz-utils", "xz", "unpacking kernels and modules"),
    need("kmod", "depmod", "kernel modules"),
    need("binutils", "strip", "making modules and programs small"),
    need("e2fsprogs", "mkfs.ext4", "ext4 volumes"),
    need("xfsprogs", "mkfs.xfs", "XFS volumes"),
    need("btrfs-progs", "mkfs.btrfs", "btrfs volumes"),
    need(
        "util-linux",
        "setpriv",
        "ending virtual machines with their lab",
    ),
];

const TEST: &[Need] = &[need(
    "prometheus",
    "promtool",
    "checking the metrics endpoint's text",
)];

/// What `purpose` asks of the host.
pub(super) fn needs(purpose: Purpose) -> Vec<Need> {
    match purpose {
        Purpose::Build => {
            let mut needs = BUILD.to_vec();
            if !toolchain::rustup_has_source() {
                needs.extend_from_slice(RUSTC);
            }
            needs
        }
        Purpose::Lab => LAB.to_vec(),
        Purpose::Test => TEST.to_vec(),
    }
}

/// Those that are not there.
pub(super) fn missing(needs: &[Need]) -> Result<Vec<Need>> {
    let present: Box<dyn Fn(&Need) -> bool> = if on_path("dpkg-query") {
        let installed = installed(needs)?;
        Box::new(move |need| installed.contains(need.package))
    } else {
        Box::new(|need| {
            if need.probe.contains('/') {
                Path::new(need.probe).exists()
            } else {
                on_path(need.probe)
            }
        })
    };
    Ok(needs
        .iter()
        .copied()
        .filter(|need| !present(need))
        .collect())
}

/// Installs them, or names them with the command that does.
pub(super) fn install(missing: &[Need]) -> Result<()> {
    if !is_debian_12() || !nix::unistd::geteuid().is_root() {
        bail!("{}", remedy(missing));
    }
    let log = std::env::temp_dir().join(format!("twinwrite-apt-{}.log", std::process::id()));
    progress::step("Updating the package lists", || {
        progress::run_logged(apt_get().arg("update"), &log)
    })?;
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    progress::step(&format!("Installing {}", names.join(" ")), || {
        let mut command = apt_get();
        command.args([
            "install",
            "--yes",
            "--no-install-recommends",
            "--allow-downgrades",
        ]);
        command.args(names.iter().filter(|name| **name != "qemu-utils"));
        // A newer qemu-utils from backports would be removed instead of replaced.
        if names.iter().any(|name| name.starts_with("qemu")) {
            command.arg("qemu-utils=1:7.2*");
        }
        progress::run_logged(&mut command, &log)
    })?;
    let _ = fs::remove_file(&log);
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

/// Whether the package lists are there; without them nothing can be downloaded.
pub(crate) fn update_lists_if_absent(probe_package: &str, log: &Path) -> Result<()> {
    let known = Command::new("apt-cache")
        .args(["show", probe_package])
        .output();
    if known.is_ok_and(|known| known.status.success() && !known.stdout.is_empty()) {
        return Ok(());
    }
    progress::step("Updating the package lists", || {
        progress::run_logged(apt_get().arg("update"), log)
    })
}

fn remedy(missing: &[Need]) -> String {
    let mut text = String::from("missing on this host:\n");
    for need in missing {
        text += &format!(
            "  {} ({}), for {}\n",
            need.package, need.probe, need.purpose
        );
    }
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if is_debian_12() {
        text += "install them, or run this command as root:\n  sudo apt-get install ";
    } else {
        text += "this is not Debian 12, so nothing was installed; there it would be:\n  \
                 apt-get install ";
    }
    text + &names.join(" ")
}

/// Whether this is the system whose packages are known.
pub(crate) fn is_debian_12() -> bool {
    let Ok(text) = fs::read_to_string("/etc/os-release") else {
        return false;
    };
    let has = |line: &str| text.lines().any(|each| each.replace('"', "") == line);
    has("ID=debian") && has("VERSION_ID=12")
}

fn installed(needs: &[Need]) -> Result<HashSet<String>> {
    // dpkg-query fails if it does not know one of the names, and prints the others all the same.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Status} ${Package}\n"])
        .args(needs.iter().map(|need| need.package))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .map(str::to_owned)
        .collect())
}

/// Whether a command can be found.
pub(crate) fn on_path(command: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(Into::into);
    std::env::split_paths(&path)
        .chain(sbin)
        .any(|dir| dir.join(command).is_file())
}
