//! `twinwrite status` and `twinwrite takeover`: asking the running agent.

use std::path::Path;
use std::process::ExitCode;

use comfy_table::{Table, presets};

use crate::admin::{self, Answer, Request};
use crate::ids::NodeId;
use crate::status::{AgentStatus, PeerState, Protection, Role, VolumeStatus};

/// A peer's volumes that have not answered for longer than this are told.
const VOLUME_IO_AGE_MS: u64 = 5_000;

/// How all is, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Health {
    /// Every owned volume is protected, every peer alive.
    Healthy,
    /// Something weakens protection.
    Degraded,
    /// A volume is not served, or the agent does not answer.
    Down,
}

fn ask(run_dir: &Path, request: &Request) -> anyhow::Result<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(admin::ask(run_dir, request))?)
}

pub(super) fn status(run_dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let status = match ask(run_dir, &Request::Status) {
        Ok(Answer::Status { status }) => *status,
        Ok(other) => anyhow::bail!("the agent answered {other:?} to a request for its status"),
        Err(error) => {
            eprintln!("down: {error}");
            return Ok(ExitCode::from(2));
        }
    };
    let (health, why) = health(&status);
    if json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", render(&status, health, &why));
    }
    Ok(ExitCode::from(match health {
        Health::Healthy => 0,
        Health::Degraded => 1,
        Health::Down => 2,
    }))
}

pub(super) fn confirm_dead(run_dir: &Path, node: NodeId) -> anyhow::Result<ExitCode> {
    let taken = format!("taken: {node} is treated as fenced; watch `twinwrite status`");
    give(run_dir, &Request::ConfirmDead { node }, &taken)
}

pub(super) fn discard_region(run_dir: &Path, volume: String) -> anyhow::Result<ExitCode> {
    let taken = format!(
        "taken: {volume} is served as it is on the disk; its region is kept in saved/ of the state_dir"
    );
    give(run_dir, &Request::DiscardRegion { volume }, &taken)
}

pub(super) fn stop(
    run_dir: &Path,
    restart_within: Option<jiff::SignedDuration>,
) -> anyhow::Result<ExitCode> {
    let restart_within_ms = restart_within
        .map(|within| u32::try_from(within.as_millis()))
        .transpose()?;
    let taken = match restart_within {
        Some(within) => {
            format!("the agent ends and leaves what runs; start the next one within {within:#}")
        }
        None => "the agent ends: it closes its epochs first".to_owned(),
    };
    give(run_dir, &Request::Stop { restart_within_ms }, &taken)
}

fn give(run_dir: &Path, word: &Request, taken: &str) -> anyhow::Result<ExitCode> {
    match ask(run_dir, word)? {
        Answer::Done => {
            println!("{taken}");
            Ok(ExitCode::SUCCESS)
        }
        Answer::Refused { reason } => anyhow::bail!("refused: {reason}"),
        Answer::Status { .. } => anyhow::bail!("the agent answered with its status"),
    }
}

pub(super) fn health(status: &AgentStatus) -> (Health, Vec<String>) {
    let mut health = Health::Healthy;
    let mut why = Vec::new();
    for volume in &status.volumes {
        let weight = match (volume.role, volume.protection) {
            (_, Protection::Suspended) => Health::Down,
            (Role::Owner, Protection::Exposed | Protection::Alone) => Health::Degraded,
            _ => Health::Healthy,
        };
        if weight > Health::Healthy {
            let (name, protection) = (&volume.name, word(volume.protection));
            why.push(format!("{name} is {protection}: {}", volume.reason));
        }
        health = health.max(weight);
        if let (Role::Owner, Some(error)) = (volume.role, &volume.reserve_missing) {
            why.push(format!("{} has no reserve: {error}", volume.name));
            health = health.max(Health::Degraded);
        }
    }
    for peer in &status.peers {
        if peer.restarting {
            why.push(format!("the agent on peer {} restarts", peer.node));
        }
        if peer.volume_io_age_ms > VOLUME_IO_AGE_MS {
            let ago = age(peer.volume_io_age_ms.saturating_mul(1000));
            why.push(format!(
                "the disks of the volumes on peer {} have not answered for {ago}",
                peer.node
            ));
            health = health.max(Health::Degraded);
        }
        if peer.state != PeerState::Alive {
            why.push(format!("peer {} is {}", peer.node, word(peer.state)));
            health = health.max(Health::Degraded);
        }
    }
    (health, why)
}

/// The word a value has in JSON, so that both outputs and the metrics agree.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|v| v.as_str().map(|s| s.replace('_', " ")))
        .unwrap_or_default()
}

fn age(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

fn proof(volume: &VolumeStatus) -> String {
    match volume.checkpoint_age_ms {
        u64::MAX => "never".to_owned(),
        ms => format!("{} ago", age(ms.saturating_mul(1000))),
    }
}

pub(super) fn render(status: &AgentStatus, health: Health, why: &[String]) -> String {
    let headline = match health {
        Health::Healthy => "healthy",
        Health::Degraded => "degraded",
        Health::Down => "down",
    };
    let mut text = format!("{headline}: {}", status.node);
    if !why.is_empty() {
        text += &format!(": {}", why.join("; "));
    }
    text.push('\n');
    let mut volumes = Table::new();
    volumes.load_style(presets::NOTHING);
    volumes.set_header([
        "VOLUME",
        "ROLE",
        "PROTECTION",
        "EPOCH",
        "CAPTURED",
        "MIRRORED",
        "PURGED",
        "LAG",
        "UNPURGED",
        "LAST PROOF",
        "LINK",
    ]);
    for volume in &status.volumes {
        volumes.add_row([
            volume.name.clone(),
            word(volume.role),
            word(volume.protection),
            volume.epoch.to_string(),
            volume.captured_seq.to_string(),
            volume.mirrored_seq.to_string(),
            volume.purged_seq.to_string(),
            format!("{} records, {}", volume.lag_records, age(volume.lag_us)),
            bytesize::ByteSize(volume.unpurged_bytes).to_string(),
            proof(volume),
            format!(
                "{}{}",
                volume.link,
                if volume.zero_copy { ", zero copy" } else { "" }
            ),
        ]);
    }
    text += &format!("{}\n", volumes.trim_fmt());
    for volume in &status.volumes {
        if let Some(directory) = &volume.directory {
            text += &format!(
                "{}: only what is below {directory} is protected\n",
                volume.name
            );
        }
    }
    for peer in &status.peers {
        text += &format!(
            "peer {}: {}, heard {} ago on the link, {} ago in the mailbox\n",
            peer.node,
            word(peer.state),
            age(peer.heartbeat_age_ms.saturating_mul(1000)),
            age(peer.mailbox_age_ms.saturating_mul(1000)),
        );
    }
    for volume in &status.volumes {
        let Some(takeover) = &volume.takeover else {
            continue;
        };
        let steps: Vec<String> = takeover
            .steps
            .iter()
            .map(|s| format!("{} {} ms", s.name, s.took_ms))
            .collect();
        text += &format!("takeover of {}: {}", volume.name, steps.join(", "));
        if takeover.serving {
            text += &format!("; serving, {} records merged", takeover.records_replayed);
            for warning in &takeover.warnings {
                text += &format!("; {warning}");
            }
        }
        if let Some(error) = &takeover.error {
            text += &format!("; stopped: {error}");
        }
        text.push('\n');
    }
    text
}
