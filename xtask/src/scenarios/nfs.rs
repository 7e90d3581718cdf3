//! The kernel's NFS server on one machine, and its client on the other.

use std::fmt;

use anyhow::{Context as _, Result};

use crate::lab::config::MOUNT_POINT;
use crate::lab::{Lab, NodeName};

/// When a server answers.
#[derive(Clone, Copy)]
pub(super) enum Replies {
    /// `sync`: when what it answers is on the disk.
    WhenDurable,
    /// `async`: at once.
    AtOnce,
}

impl fmt::Display for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WhenDurable => "sync",
            Self::AtOnce => "async",
        })
    }
}

/// Which protocol a client speaks.
#[derive(Clone, Copy)]
pub(super) enum Version {
    V3,
    V4_2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V3 => "3",
            Self::V4_2 => "4.2",
        })
    }
}

/// Exports the volume from `server`.
///
/// Without a grace period: nobody has anything to claim. Without delegations: see the guarantees.
pub(super) fn export(lab: &Lab, server: NodeName, replies: Replies) -> Result<()> {
    let command = format!(
        "echo 0 >/proc/sys/fs/leases-enable && modprobe nfsd && mount -t nfsd nfsd /proc/fs/nfsd && rpcbind -w && \
         exportfs -o rw,{replies},no_root_squash,no_subtree_check,insecure,fsid=0 '*:{MOUNT_POINT}' && \
         rpc.mountd && rpc.nfsd --grace-time 10 --lease-time 10 4 && \
         {{ echo Y >/proc/fs/nfsd/v4_end_grace || true; }}"
    );
    lab.run(server, &command)
        .map(drop)
        .context("starting the NFS server")
}

/// Mounts the export of `server` on its peer, at `place` and with `more` options, each behind a comma.
pub(super) fn mount(
    lab: &Lab,
    server: NodeName,
    version: Version,
    place: &str,
    more: &str,
) -> Result<()> {
    let (path, locks) = match version {
        Version::V3 => (MOUNT_POINT, ",nolock"),
        Version::V4_2 => ("/", ""),
    };
    let command = format!(
        "mkdir -p {place} && mount -t nfs -o hard,proto=tcp,vers={version}{locks}{more} {}:{path} {place}",
        server.address()
    );
    lab.run(server.peer(), &command)
        .map(drop)
        .with_context(|| format!("mounting NFS {version}"))
}

/// Unmounts what `client` has at `place`, although its server does not answer any more.
///
/// It is gone at once; what says goodbye to the server goes on for minutes.
pub(super) fn give_up(lab: &Lab, client: NodeName, place: &str) -> Result<()> {
    let command = format!(
        "setsid umount -i -f -l {place} </dev/null >/dev/null 2>&1 & \
         for _ in $(seq 100); do grep -q ' {place} nfs' /proc/mounts || exit 0; sleep 0.1; done; exit 1"
    );
    lab.run(client, &command)
        .map(drop)
        .with_context(|| format!("unmounting {place}"))
}
