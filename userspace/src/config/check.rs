//! Checking what the file says: each rule in one place, every finding with its key and remedy.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use jiff::SignedDuration;
use twinwrite_abi::control;

use super::load::quoted;
use super::{Cluster, Config, ConfigError, Node, Volume};
use crate::ids::NodeId;
use crate::region::layout::{LOG_BYTES_MAX, LOG_BYTES_MIN};

/// Longest name of a node or a volume: the mailbox keeps 32 bytes for each.
pub const NAME_BYTES_MAX: usize = 32;
/// Longest name of a cluster.
pub const CLUSTER_NAME_BYTES_MAX: usize = 64;
/// Most volumes: a mailbox slot has room for so many.
pub const VOLUMES_MAX: usize = 8;

const NODES: usize = 2;
const DEAD_AFTER_MIN: SignedDuration = SignedDuration::from_secs(3);
const VOLUME_IO_LIMIT_MIN: SignedDuration = SignedDuration::from_secs(10);
const DEAD_AFTER_HEARTBEATS: i32 = 4;
const RING_BYTES_MIN: u64 = 1 << 20;
const RING_BYTES_MAX: u64 = 1 << 30;
const PAGE_BYTES: u64 = 4096;

/// Collects findings.
#[derive(Default)]
struct Findings {
    errors: Vec<String>,
    warnings: Vec<String>,
}

impl Findings {
    fn require(&mut self, holds: bool, told: impl FnOnce() -> String) {
        if !holds {
            self.errors.push(told());
        }
    }

    fn warn_if(&mut self, doubtful: bool, told: impl FnOnce() -> String) {
        if doubtful {
            self.warnings.push(told());
        }
    }

    fn name(&mut self, key: &str, name: &str, bytes_max: usize) {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let well_formed = name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.len() <= bytes_max
            && name.bytes().all(plain);
        self.require(well_formed, || {
            format!(
                "{key} = \"{name}\": use 1 to {bytes_max} letters, digits, `-`, `_` and `.`, \
                 beginning with a letter or digit"
            )
        });
    }

    fn absolute(&mut self, key: &str, path: &Path) {
        self.require(path.is_absolute(), || {
            format!("{key} = \"{}\": use an absolute path", path.display())
        });
    }

    fn positive(&mut self, key: &str, duration: SignedDuration) {
        self.require(duration > SignedDuration::ZERO, || {
            format!("{key} = \"{duration:#}\": use a duration above zero, as in \"2s\"")
        });
    }

    fn unique<'a>(&mut self, key: &str, values: impl Iterator<Item = &'a str>) {
        let mut seen = BTreeSet::new();
        for value in values {
            self.require(seen.insert(value), || {
                format!("{key} = \"{value}\" occurs twice: give each its own")
            });
        }
    }
}

impl Config {
    /// Checks the values, and returns warnings: what can be used and weakens the protection.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with every finding, [`ConfigError::NotANode`] if `this_node` is
    /// none of the nodes.
    pub fn validate(&self, this_node: &NodeId) -> Result<Vec<String>, ConfigError> {
        self.this_node(Some(&this_node.0), "")?;
        let mut findings = Findings::default();
        check_cluster(&mut findings, &self.cluster);
        check_nodes(&mut findings, &self.nodes);
        check_volumes(&mut findings, self);
        if findings.errors.is_empty() {
            Ok(findings.warnings)
        } else {
            Err(ConfigError::Invalid(findings.errors))
        }
    }
}

fn check_cluster(findings: &mut Findings, cluster: &Cluster) {
    findings.name("cluster.name", &cluster.name, CLUSTER_NAME_BYTES_MAX);
    findings.absolute("cluster.mailbox", &cluster.mailbox);
    findings.absolute("cluster.state_dir", &cluster.state_dir);
    findings.absolute("cluster.run_dir", &cluster.run_dir);
    findings.positive("cluster.heartbeat_interval", cluster.heartbeat_interval);
    findings.positive("cluster.fence_timeout", cluster.fence_timeout);
    if let Some(limit) = cluster.volume_io_limit {
        findings.require(limit >= VOLUME_IO_LIMIT_MIN, || {
            format!(
                "cluster.volume_io_limit = \"{limit:#}\": use at least {VOLUME_IO_LIMIT_MIN:#}; a disk that \
                 stalls for a moment is no reason to power a node off"
            )
        });
    }
    findings.require(cluster.dead_after >= DEAD_AFTER_MIN, || {
        format!(
            "cluster.dead_after = \"{:#}\": use at least {DEAD_AFTER_MIN:#}; a shorter silence \
             is often no death",
            cluster.dead_after
        )
    });
    let least = cluster
        .heartbeat_interval
        .saturating_mul(DEAD_AFTER_HEARTBEATS);
    findings.require(cluster.dead_after >= least, || {
        format!(
            "cluster.dead_after = \"{:#}\": use at least {DEAD_AFTER_HEARTBEATS} times \
             cluster.heartbeat_interval, which is {least:#}",
            cluster.dead_after
        )
    });
    check_command(
        findings,
        "cluster.fence_command",
        cluster.fence_command.as_deref(),
    );
    findings.warn_if(cluster.fence_command.is_none(), || {
        "cluster.fence_command is not set: a takeover waits for a person \
         (`twinwrite takeover --confirm-dead NODE`)"
            .to_owned()
    });
    let names_node = |command: &Vec<String>| command.iter().any(|word| word.contains("{node}"));
    findings.warn_if(
        cluster
            .fence_command
            .as_ref()
            .is_some_and(|c| !names_node(c)),
        || {
            "cluster.fence_command has no {node}: it must know by itself which node to power off"
                .to_owned()
        },
    );
    findings.warn_if(!cluster.metrics_listen.ip().is_loopback(), || {
        format!(
            "cluster.metrics_listen = \"{}\": anyone who reaches this address reads the metrics",
            cluster.metrics_listen
        )
    });
}

fn check_command(findings: &mut Findings, key: &str, command: Option<&[String]>) {
    let Some(command) = command else { return };
    findings.require(
        command
            .first()
            .is_some_and(|program| program.starts_with('/')),
        || format!("{key}: begin the list with the absolute path of a program, or remove the key"),
    );
}

fn check_nodes(findings: &mut Findings, nodes: &[Node]) {
    findings.require(nodes.len() == NODES, || {
        format!(
            "[[node]]: there are {}, and a cluster has exactly {NODES} for now",
            nodes.len()
        )
    });
    for node in nodes {
        findings.name("node.name", &node.name.0, NAME_BYTES_MAX);
        let reachable = !node.address.ip().is_unspecified() && node.address.port() != 0;
        findings.require(reachable, || {
            format!(
                "node.address = \"{}\" of `{}`: use the address and port at which its peer \
                 reaches it",
                node.address, node.name
            )
        });
    }
    findings.unique("node.name", nodes.iter().map(|node| node.name.0.as_str()));
    let addresses: Vec<String> = nodes.iter().map(|node| node.address.to_string()).collect();
    findings.unique("node.address", addresses.iter().map(String::as_str));
}

fn check_volumes(findings: &mut Findings, config: &Config) {
    let volumes = &config.volumes;
    findings.require((1..=VOLUMES_MAX).contains(&volumes.len()), || {
        format!(
            "[[volume]]: there are {}, use 1 to {VOLUMES_MAX}",
            volumes.len()
        )
    });
    for volume in volumes {
        check_volume(findings, volume, &config.nodes);
        findings.require(volume.device != config.cluster.mailbox, || {
            format!(
                "volume.device = \"{}\" of `{}` is also cluster.mailbox: the mailbox needs a \
                 device of its own",
                volume.device.display(),
                volume.name
            )
        });
    }
    findings.unique(
        "volume.name",
        volumes.iter().map(|volume| volume.name.as_str()),
    );
    let texts = |of: fn(&Volume) -> &Path| -> Vec<String> {
        volumes
            .iter()
            .map(|volume| of(volume).display().to_string())
            .collect()
    };
    for (key, values) in [
        ("volume.device", texts(|volume| &volume.device)),
        ("volume.mount_point", texts(|volume| &volume.mount_point)),
    ] {
        findings.unique(key, values.iter().map(String::as_str));
    }
}

fn check_volume(findings: &mut Findings, volume: &Volume, nodes: &[Node]) {
    let name = &volume.name;
    let key = |key: &str| format!("volume.{key} of `{name}`");
    findings.name("volume.name", name, NAME_BYTES_MAX);
    findings.absolute(&key("device"), &volume.device);
    findings.absolute(&key("mount_point"), &volume.mount_point);
    findings.absolute(&key("region_dir"), &volume.region_dir);
    findings.require(volume.mount_point != Path::new("/"), || {
        format!(
            "{} is \"/\": the root file system cannot move to a peer",
            key("mount_point")
        )
    });
    if let Some(directory) = &volume.directory {
        let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        let is_below = directory.components().all(is_plain)
            && (1..=control::SUBTREE_PATH_MAX).contains(&directory.components().count())
            && !directory.starts_with(".twinwrite");
        findings.require(is_below, || {
            format!(
                "{} = \"{}\": use a path below the mount point, as in \"projects\", of at most {} parts and \
                 without `..`; leave the key out to protect all of the volume",
                key("directory"),
                directory.display(),
                control::SUBTREE_PATH_MAX
            )
        });
    }
    findings.positive(&key("checkpoint_age"), volume.checkpoint_age);
    findings.positive(&key("lag_limit"), volume.lag_limit);
    findings.positive(
        &key("mapping_snapshot_interval"),
        volume.mapping_snapshot_interval,
    );
    check_command(
        findings,
        &key("serve_command"),
        volume.serve_command.as_deref(),
    );
    check_roles(findings, volume, nodes);
    check_sizes(findings, volume);
    check_filesystem(findings, volume);
}

fn check_roles(findings: &mut Findings, volume: &Volume, nodes: &[Node]) {
    let name = &volume.name;
    let known = || quoted(nodes.iter().map(|node| node.name.0.as_str()));
    for (key, node) in [("owner", &volume.owner), ("mirror", &volume.mirror)] {
        findings.require(nodes.iter().any(|n| n.name == *node), || {
            format!(
                "volume.{key} = \"{node}\" of `{name}` is no node: use one of {}",
                known()
            )
        });
    }
    findings.require(volume.owner != volume.mirror, || {
        format!(
            "volume.mirror = \"{}\" of `{name}` is also its owner: a twin must be in another \
             machine, use one of {}",
            volume.mirror,
            known()
        )
    });
}

fn check_sizes(findings: &mut Findings, volume: &Volume) {
    let name = &volume.name;
    let region_bytes = volume.region_bytes.as_u64();
    findings.require(
        (LOG_BYTES_MIN..=LOG_BYTES_MAX).contains(&region_bytes),
        || {
            format!(
                "volume.region_bytes = \"{}\" of `{name}`: use at least {} and at most {}",
                volume.region_bytes.display().iec(),
                bytesize::ByteSize::b(LOG_BYTES_MIN).display().iec(),
                bytesize::ByteSize::b(LOG_BYTES_MAX).display().iec()
            )
        },
    );
    findings.require(region_bytes.is_multiple_of(PAGE_BYTES), || {
        format!(
            "volume.region_bytes = {region_bytes} of `{name}`: use a multiple of {PAGE_BYTES}, \
             such as {}",
            region_bytes
                .checked_next_multiple_of(PAGE_BYTES)
                .unwrap_or(LOG_BYTES_MIN)
        )
    });
    let ring_bytes = volume.ring_bytes.as_u64();
    let fits = (RING_BYTES_MIN..=RING_BYTES_MAX).contains(&ring_bytes);
    findings.require(fits && ring_bytes.is_power_of_two(), || {
        format!(
            "volume.ring_bytes = \"{}\" of `{name}`: use a power of two from 1 MiB to 1 GiB, \
             as in \"16MiB\" (\"16MB\" is none)",
            volume.ring_bytes.display().iec()
        )
    });
}

fn check_filesystem(findings: &mut Findings, volume: &Volume) {
    let name = &volume.name;
    let is_known = matches!(volume.filesystem.as_str(), "ext4" | "xfs" | "btrfs");
    findings.require(is_known, || {
        format!(
            "volume.filesystem = \"{}\" of `{name}`: use ext4, xfs or btrfs",
            volume.filesystem
        )
    });
    for option in volume.mount_options.split(',') {
        let word = option.split('=').next().unwrap_or(option);
        let refused = matches!(
            word,
            "ro" | "noload" | "norecovery" | "nologreplay" | "rescue" | "rtdev" | "dax"
        ) && option != "dax=never";
        let is_part = matches!(word, "subvol" | "subvolid")
            && !matches!(option, "subvol=/" | "subvolid=5" | "subvolid=0");
        findings.require(!is_part, || {
            format!(
                "volume.mount_options of `{name}`: `{option}` mounts a part of a btrfs, and only the \
                 whole of one can be protected: remove it, or use `subvolid=5`"
            )
        });
        findings.require(!refused, || {
            format!(
                "volume.mount_options of `{name}`: `{option}` cannot be protected (read-only, \
                 without journal recovery, realtime or DAX): remove it"
            )
        });
        let no_barriers = matches!(option, "nobarrier" | "barrier=0");
        findings.require(!no_barriers || volume.allow_no_barriers, || {
            format!(
                "volume.mount_options of `{name}`: with `{option}` an fsync proves nothing unless the \
                 device has no volatile cache: remove it, or say so with `allow_no_barriers = true`"
            )
        });
    }
}
