//! Configurations and hosts on which nothing can be protected.

use anyhow::{Context as _, Result, ensure};

use super::{CONFIG, each, refused};
use crate::lab::config::{MOUNT_POINT, VOLUME_DEVICE};
use crate::lab::{Lab, NodeName};
use crate::progress;

use NodeName::A;

/// Name, what a sed script makes of the configuration, what must be said.
const CONFIGURATIONS: &[(&str, &str, &[&str])] = &[
    (
        "unknown key",
        "s/^mailbox/mailbux/",
        &["mailbux", "mailbox"],
    ),
    (
        "unknown key of a volume",
        "s/^checkpoint_age/checkpoint_aged/",
        &["checkpoint_aged"],
    ),
    (
        "region too small",
        "s/^region_bytes.*/region_bytes = \"4KiB\"/",
        &["region_bytes", "4.0 MiB"],
    ),
    ("not TOML", "s/^name = .*/name = /", &["twinwrite.toml"]),
    (
        "unknown node",
        "s/^owner = .*/owner = \"z\"/",
        &["owner", "`z`|\"z\""],
    ),
];

/// `check-config` and the agent refuse them alike.
pub(super) fn configurations(lab: &Lab) -> Result<()> {
    lab.run(A, "twinwrite check-config")
        .context("the right configuration")?;
    each(CONFIGURATIONS, |script, words| {
        lab.run(
            A,
            &format!("mkdir -p /tmp/bad && sed '{script}' {CONFIG} >/tmp/bad/twinwrite.toml"),
        )?;
        for command in ["check-config", "run"] {
            let command = format!("twinwrite {command} --config /tmp/bad/twinwrite.toml");
            let said = refused(lab, A, &command, &[])?;
            for word in words {
                ensure!(
                    word.split('|').any(|word| said.contains(word)),
                    "`{command}` does not say `{word}`: {said}"
                );
            }
        }
        Ok(())
    })?;
    refused(
        lab,
        A,
        "twinwrite run --config /no/such/file",
        &["/no/such/file"],
    )
    .map(drop)
}

/// A host that lacks something, how it is taken away and given back, what must be said.
struct Lack {
    what: &'static str,
    take: &'static str,
    give: &'static str,
    words: &'static [&'static str],
}

const LACKS: &[Lack] = &[
    Lack {
        what: "no RDMA device",
        take: "rdma link del rxe0",
        give: "rdma link add rxe0 type rxe netdev eth0",
        words: &["RDMA device", "rdma link add"],
    },
    Lack {
        what: "no mailbox device",
        take: "mv /dev/disk/by-id/virtio-mailbox /tmp/mailbox-link",
        give: "mv /tmp/mailbox-link /dev/disk/by-id/virtio-mailbox",
        words: &["virtio-mailbox", "cluster.mailbox"],
    },
    Lack {
        what: "a mailbox device of something else",
        take: "dd if=/dev/urandom of=/dev/disk/by-id/virtio-mailbox bs=4096 count=2 status=none",
        give: "dd if=/dev/zero of=/dev/disk/by-id/virtio-mailbox bs=4096 count=2 status=none",
        words: &["virtio-mailbox", "cluster.mailbox"],
    },
    Lack {
        what: "a volume that somebody else should have mounted",
        take: "sed -i '$ a mount_by = \"external\"' /etc/twinwrite/twinwrite.toml",
        give: "sed -i '/^mount_by/d' /etc/twinwrite/twinwrite.toml",
        words: &["vol0", "not mounted", "mount_by"],
    },
    Lack {
        what: "a volume that is mounted elsewhere",
        take: "mount /dev/disk/by-id/virtio-volume /mnt",
        give: "umount /mnt",
        words: &["vol0", "/mnt", "unmount"],
    },
    Lack {
        what: "a volume that is mounted twice",
        take: "mount /dev/disk/by-id/virtio-volume /srv/vol0; mount /dev/disk/by-id/virtio-volume /mnt",
        give: "umount /mnt; umount /srv/vol0",
        words: &["vol0", "more than once", "unmount"],
    },
    Lack {
        what: "a kernel without BTF",
        take: "touch /tmp/none; mount --bind /tmp/none /sys/kernel/btf/vmlinux",
        give: "umount /sys/kernel/btf/vmlinux",
        words: &["BTF"],
    },
];

/// The agent ends by itself and names what is missing; afterwards the volume is as it was.
pub(super) fn hosts(lab: &Lab) -> Result<()> {
    for lack in LACKS {
        let before = superblock(lab)?;
        lab.run(A, lack.take)
            .with_context(|| format!("making {}", lack.what))?;
        let said = refused(
            lab,
            A,
            &format!("twinwrite run --config {CONFIG}"),
            lack.words,
        );
        lab.run(A, lack.give)
            .with_context(|| format!("ending {}", lack.what))?;
        forget(lab)?;
        said.with_context(|| lack.what.to_owned())?;
        let mounted_by_case = lack.take.contains("mount /dev");
        ensure!(
            mounted_by_case || superblock(lab)? == before,
            "{}: the agent was refused and changed the volume",
            lack.what
        );
    }
    without_lsm(lab)
}

/// What an agent writes that believes that it is the first.
fn forget(lab: &Lab) -> Result<()> {
    lab.run(
        A,
        &format!(
            "twinwrite detach vol0 || rm -rf /sys/fs/bpf/twinwrite; rm -rf /var/lib/twinwrite/*; umount {MOUNT_POINT} 2>/dev/null; \
             dd if=/dev/zero of=/dev/disk/by-id/virtio-mailbox bs=4096 count=2 status=none"
        ),
    )
    .map(drop)
}

/// The start of the volume, where a mount leaves its traces.
fn superblock(lab: &Lab) -> Result<String> {
    lab.run(
        A,
        &format!("dd if={VOLUME_DEVICE} bs=1M count=8 status=none iflag=direct | sha256sum"),
    )
}

/// The lab cannot boot a kernel without it; what the kernel says of itself can be covered.
fn without_lsm(lab: &Lab) -> Result<()> {
    progress::note(
        "bad_input: a kernel without BPF LSM is only feigned: the lab's kernels have it",
    );
    lab.run(
        A,
        "echo landlock,lockdown,yama >/tmp/lsm; mount --bind /tmp/lsm /sys/kernel/security/lsm",
    )?;
    let doctor = lab.exec(A, "twinwrite doctor", super::LIMIT)?;
    lab.run(A, "umount /sys/kernel/security/lsm")?;
    let text = doctor.text();
    let line = text
        .lines()
        .find(|line| line.contains("BPF LSM"))
        .unwrap_or_default();
    ensure!(
        line.starts_with("missing") && line.contains("lsm="),
        "doctor does not miss BPF LSM, with the remedy: {text}"
    );
    Ok(())
}
