//! The root image: a small Debian with the tools the lab needs, and the modules of all kernels.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::kernel::Tree;
use crate::progress::run_logged;

pub(super) const SUITE: &str = "bookworm";

/// `perl`, `python3` and `tzdata` also serve as thousands of real files to copy.
pub(super) const PACKAGES: &[&str] = &[
    "attr",
    "acl",
    "bpftool",
    "busybox-static",
    "curl",
    "dmsetup",
    "e2fsprogs",
    "fio",
    "gdbserver",
    "ibverbs-providers",
    "ibverbs-utils",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libibverbs1",
    "librdmacm1",
    "mount",
    "nfs-common",
    "nfs-kernel-server",
    "perl",
    "postgresql-15",
    "procps",
    "python3",
    "rdma-core",
    "rdmacm-utils",
    "socat",
    "sqlite3",
    "strace",
    "tzdata",
    "util-linux",
    "xfsprogs",
];

pub(super) const MODULES: &[&str] = &[
    "virtio_net",
    "virtio_console",
    "virtio_blk",
    "virtio_rng",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
    "rdma_cm",
    "ib_umad",
    "ext4",
    "xfs",
    "btrfs",
    "sch_netem",
    "sch_ingress",
    "sch_prio",
    "cls_u32",
    "cls_bpf",
    "act_bpf",
    "veth",
    "dummy",
    "9pnet_virtio",
    "9p",
    "overlay",
    "loop",
    "dm-mod",
    "dm-log-writes",
    "dm-flakey",
    "dm-delay",
    "dm-thin-pool",
    "null_blk",
    "brd",
    "nfsd",
    "nfsv3",
    "nfsv4",
    "fuse",
    "crc32c-intel",
    "crc32-pclmul",
];

/// No cluster is made where the package is unpacked; an empty one is kept for those who want it. What
/// compiles queries is left out: it is larger than all the rest.
pub(super) const POSTGRESQL: [&str; 5] = [
    "--dpkgopt=path-exclude=/usr/lib/*/libLLVM*",
    "--dpkgopt=path-exclude=/usr/lib/llvm-*",
    "--dpkgopt=force-confold",
    "--setup-hook=mkdir -p \"$1/etc/postgresql-common\" && \
     echo 'create_main_cluster = false' >\"$1/etc/postgresql-common/createcluster.conf\"",
    "--customize-hook=chroot \"$1\" setpriv --reuid=postgres --regid=postgres --init-groups -- \
     /usr/lib/postgresql/15/bin/initdb -D /var/lib/postgresql/template -A trust -E UTF8 \
     --locale=C --no-sync --no-instructions --wal-segsize=1",
];

const SOURCES: &[&str] = &[
    "/etc/apt/sources.list.d/debian.sources",
    "/etc/apt/sources.list",
];

/// Makes the image at `to`.
pub(super) fn make(work: &Path, kernels: &[Tree], to: &Path, log: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("making the virtual machines' root needs root: run this once with sudo");
    }
    let root = work.join("root");
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=essential", "--mode=root"])
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(POSTGRESQL)
        .arg(SUITE)
        .arg(&root);
    // The host's own sources, so that a mirror chosen there is used here.
    command.args(SOURCES.iter().find(|path| Path::new(path).exists()));
    run_logged(&mut command, log)?;
    for kernel in kernels {
        kernel.install_modules(MODULES, &root)?;
    }
    for directory in ["host", "mnt", "srv", "var/cache/apt/archives"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let _ = fs::remove_dir_all(root.join("var/lib/apt/lists"));
    run_logged(
        Command::new("mkfs.erofs").arg("-zlz4").arg(to).arg(&root),
        log,
    )
}
