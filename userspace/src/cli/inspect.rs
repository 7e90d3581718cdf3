//! `check-config`, `doctor`, `detach`: looking at this host without running anything.

use std::path::Path;
use std::process::ExitCode;

use super::NodeArguments;
use crate::agent;
use crate::agent::exclusive::VolumeLock;
use crate::capture::{self, Capture};
use crate::config::{Config, TransportKind};
use crate::link::rdma::RdmaTransport;
use crate::link::rdma::probe_ring::ProbeRing;

/// Bytes of the ring that is registered to find out.
const PROBE_RING_BYTES: usize = 64 * 1024;

pub(super) fn check_config(arguments: &NodeArguments) -> anyhow::Result<ExitCode> {
    let config = Config::load(&arguments.config)?;
    let node = config.this_node(arguments.node.as_deref(), &agent::host_name())?;
    let warnings = config.validate(&node)?;
    for warning in &warnings {
        println!("warning: {warning}");
    }
    let (nodes, volumes) = (config.nodes.len(), config.volumes.len());
    println!(
        "{}: fine, as node {node}: {nodes} nodes, {volumes} volumes",
        arguments.config.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// One line: the verdict, what was looked at, and the remedy if there is one.
fn tell(ok: bool, name: &str, remedy: &str) -> bool {
    let verdict = if ok { "ok     " } else { "missing" };
    if remedy.is_empty() {
        println!("{verdict}  {name}");
    } else {
        println!("{verdict}  {name}: {remedy}");
    }
    ok
}

pub(super) fn doctor(config: Option<&Path>) -> anyhow::Result<ExitCode> {
    let mut healthy = true;
    for feature in capture::features() {
        healthy &= tell(
            feature.ok,
            &feature.name,
            if feature.ok { "" } else { &feature.remedy },
        );
    }
    let config = config.map(Config::load).transpose()?;
    let transport = config
        .as_ref()
        .map_or(TransportKind::Rdma, |c| c.cluster.transport);
    let device = config.as_ref().and_then(|c| c.cluster.rdma_device.clone());
    match transport {
        TransportKind::Rdma => healthy &= rdma(device.as_deref()),
        TransportKind::Tcp => {
            tell(
                true,
                "transport tcp: every write is copied once into the socket",
                "",
            );
        }
    }
    if let Some(config) = config {
        match config
            .this_node(None, &agent::host_name())
            .and_then(|own| config.validate(&own))
        {
            Ok(warnings) => warnings.iter().for_each(|w| println!("warning  {w}")),
            Err(error) => healthy &= tell(false, "configuration", &error.to_string()),
        }
    }
    println!(
        "{}",
        if healthy {
            "healthy: this host can run twinwrite"
        } else {
            "not healthy: see above"
        }
    );
    Ok(if healthy {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn rdma(device: Option<&str>) -> bool {
    match RdmaTransport::new(device) {
        Ok(_) => {
            tell(true, "RDMA device", "");
            zero_copy(device)
        }
        Err(error) => tell(false, "RDMA device", &error.to_string()),
    }
}

/// Whether the NIC can send from a ring's own memory; not having it costs one copy, no more.
fn zero_copy(device: Option<&str>) -> bool {
    let tried = (|| -> anyhow::Result<bool> {
        let ring = ProbeRing::of_kernel_pages(PROBE_RING_BYTES)?;
        Ok(RdmaTransport::new(device)?.can_register(&ring.source())?)
    })();
    match tried {
        Ok(true) => tell(true, "zero copy: ring memory goes to the wire as it is", ""),
        Ok(false) => tell(
            true,
            "one staging copy: this kernel does not let the NIC read a ring's memory",
            "",
        ),
        Err(error) => tell(false, "registering ring memory", &format!("{error:#}")),
    }
}

pub(super) fn detach(volume: &str) -> anyhow::Result<ExitCode> {
    let _lock = VolumeLock::take(volume)?;
    // Without its programs a volume changes unseen, and a merge of the open epoch's region would lay
    // older bytes over what was flushed since.
    if let Some(epoch) = Capture::pinned_epoch(volume) {
        anyhow::bail!(
            "volume {volume}: epoch {epoch} is open, and the programs belong to it; start the agent and \
             end it with `twinwrite stop`, which closes the epoch, then detach"
        );
    }
    Capture::detach(volume)?;
    println!("volume {volume}: no capture programs are attached; its changes are not mirrored");
    Ok(ExitCode::SUCCESS)
}
