//! The event log: what happened to the cluster and to protection, one JSON object a line, kept in
//! `state_dir/events.jsonl` beside the log lines that people read.
//!
//! It is bounded: at 8 MiB the file is put aside, and two old ones are kept. A log that cannot be
//! written is told as an error and must never stop what it tells of.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::cluster::ownership::Decision;
use crate::ids::{Epoch, NodeId, Seq};
use crate::status::{PeerState, Protection};

/// Size at which the log is put aside.
pub const LOG_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Old logs that are kept.
pub const OLD_LOGS: u32 = 2;

const FILE_NAME: &str = "events.jsonl";

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The agent began to run.
    AgentStarted {
        /// This node.
        node: NodeId,
        /// Version of the agent.
        version: String,
        /// This boot.
        boot_id: String,
    },
    /// The agent ended on purpose.
    AgentStopped {
        /// Why.
        reason: String,
    },
    /// A peer looks different.
    PeerChanged {
        /// The peer.
        node: NodeId,
        /// How it looked.
        from: PeerState,
        /// How it looks.
        to: PeerState,
    },
    /// A peer has another boot id: what ran there before is dead.
    PeerRebooted {
        /// The peer.
        node: NodeId,
        /// The boot that is heard.
        boot_id: String,
    },
    /// A peer, or one that claims to be, was refused.
    PeerRefused {
        /// Where it connected from, or was connected to.
        address: String,
        /// Why.
        reason: String,
    },
    /// This agent did not run for so long that silence over that time does not count.
    OwnStall {
        /// How long.
        gap_ms: u64,
    },
    /// The mailbox could not be read or written, or works again.
    Mailbox {
        /// What failed; `None`: it works again.
        error: Option<String>,
    },
    /// The device of a volume does not answer, or answers again.
    VolumeDevice {
        /// The volume.
        volume: String,
        /// What failed; `None`: it works again.
        error: Option<String>,
    },
    /// A volume has no reserve for a merge, or has one again.
    Reserve {
        /// The volume.
        volume: String,
        /// What is set aside.
        bytes: u64,
        /// Why there is none; `None`: there is one again.
        error: Option<String>,
    },
    /// What this node is to a volume was decided.
    OwnershipDecided {
        /// The volume.
        volume: String,
        /// The decision.
        decision: Decision,
        /// Why, with the remedy; empty if there is nothing to do.
        reason: String,
    },
    /// A volume's protection changed.
    ProtectionChanged {
        /// The volume.
        volume: String,
        /// What it is now.
        to: Protection,
        /// Why, with the remedy; empty if it is `protected`.
        reason: String,
    },
    /// An epoch began.
    EpochOpened {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
    },
    /// An epoch ended; its region is void.
    EpochClosed {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
        /// Last record in the region.
        last_mirrored: Seq,
        /// Why.
        reason: String,
    },
    /// An administrator's command ran.
    CommandRan {
        /// What for: `fence`, `serve`.
        purpose: String,
        /// The command with its arguments.
        command: Vec<String>,
        /// How it ended, in words.
        outcome: String,
        /// What it printed, shortened.
        output: String,
        /// How long it took.
        took_ms: u64,
    },
    /// A takeover began.
    TakeoverBegan {
        /// The volume.
        volume: String,
        /// The owner until now.
        from: NodeId,
        /// Why.
        reason: String,
    },
    /// A step of a takeover ended.
    TakeoverStep {
        /// The volume.
        volume: String,
        /// The step, as in the status.
        step: String,
        /// How long it took.
        took_ms: u64,
        /// What stopped it; `None`: it is done.
        error: Option<String>,
    },
    /// A takeover waits for a person.
    TakeoverWaits {
        /// The volume.
        volume: String,
        /// What it waits for, in words.
        reason: String,
    },
    /// A takeover was given up because the owner lives.
    TakeoverWithdrawn {
        /// The volume.
        volume: String,
    },
    /// This node serves a volume.
    Serving {
        /// The volume.
        volume: String,
        /// Records merged from the region, if a takeover preceded.
        records_replayed: u64,
        /// Last record of the region.
        cut_seq: Seq,
        /// There was no region to merge: what was unflushed is lost, and nobody knows how much.
        loss_unknown: bool,
        /// What was merged is not whole, in words.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// A person decided what no node can.
    PersonSaid {
        /// Which word: `confirm-dead NODE`, `discard-region VOLUME`.
        word: String,
        /// The volumes that had waited for it.
        volumes: Vec<String>,
    },
}

impl Event {
    /// How loud it is.
    #[must_use]
    pub fn level(&self) -> tracing::Level {
        match self {
            Self::AgentStarted { .. }
            | Self::AgentStopped { .. }
            | Self::EpochOpened { .. }
            | Self::Mailbox { error: None }
            | Self::VolumeDevice { error: None, .. }
            | Self::Reserve { error: None, .. }
            | Self::ProtectionChanged {
                to: Protection::Protected,
                ..
            }
            | Self::PeerChanged {
                to: PeerState::Alive,
                ..
            }
            | Self::CommandRan { .. }
            | Self::TakeoverStep { error: None, .. } => tracing::Level::INFO,
            Self::Serving {
                loss_unknown: false,
                warnings,
                ..
            } if warnings.is_empty() => tracing::Level::INFO,
            Self::OwnershipDecided { decision, .. } => match decision {
                Decision::Suspended(_) => tracing::Level::ERROR,
                Decision::TakenOver | Decision::WaitForMerge => tracing::Level::WARN,
                _ => tracing::Level::INFO,
            },
            Self::TakeoverStep { error: Some(_), .. }
            | Self::TakeoverWaits { .. }
            | Self::Mailbox { error: Some(_) }
            | Self::VolumeDevice { error: Some(_), .. }
            | Self::Serving {
                loss_unknown: true, ..
            }
            | Self::PeerChanged {
                to: PeerState::Dead,
                ..
            } => tracing::Level::ERROR,
            _ => tracing::Level::WARN,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AgentStarted { node, version, .. } => {
                write!(f, "twinwrite {version} runs as node {node}")
            }
            Self::AgentStopped { reason } => write!(f, "the agent stops: {reason}"),
            Self::PeerChanged { node, from, to } => write!(f, "peer {node}: {from:?} -> {to:?}"),
            Self::PeerRebooted { node, .. } => {
                write!(f, "peer {node} rebooted; what ran there before is dead")
            }
            Self::PeerRefused { address, reason } => write!(f, "{address} refused: {reason}"),
            Self::OwnStall { gap_ms } => {
                write!(
                    f,
                    "this agent did not run for {gap_ms} ms; silence over it does not count"
                )
            }
            Self::Mailbox { error: Some(error) } => error.fmt(f),
            Self::Mailbox { error: None } => f.write_str("the mailbox works again"),
            Self::VolumeDevice { volume, error } => match error {
                Some(error) => write!(
                    f,
                    "volume {volume}: its device does not answer: {error}; what is written can only \
                     be saved from the mirror"
                ),
                None => write!(f, "volume {volume}: its device answers again"),
            },
            Self::Reserve {
                volume,
                bytes,
                error,
            } => match error {
                Some(error) => write!(
                    f,
                    "volume {volume}: nothing is set aside for a takeover, which may have to wait until \
                     somebody makes room: {error}"
                ),
                None => write!(
                    f,
                    "volume {volume}: {bytes} bytes are set aside for a takeover"
                ),
            },
            Self::OwnershipDecided {
                volume,
                decision,
                reason,
            } => {
                write!(f, "volume {volume}: {decision:?}{}", because(reason))
            }
            Self::ProtectionChanged { volume, to, reason } => {
                write!(f, "volume {volume}: {to:?}{}", because(reason))
            }
            Self::EpochOpened { volume, epoch } => {
                write!(f, "volume {volume}: epoch {epoch} is open")
            }
            Self::EpochClosed {
                volume,
                epoch,
                last_mirrored,
                reason,
            } => write!(
                f,
                "volume {volume}: epoch {epoch} is closed at record {last_mirrored}{}",
                because(reason)
            ),
            Self::CommandRan {
                purpose,
                command,
                outcome,
                took_ms,
                ..
            } => {
                write!(
                    f,
                    "{purpose} command {}: {outcome} after {took_ms} ms",
                    command.join(" ")
                )
            }
            Self::TakeoverBegan {
                volume,
                from,
                reason,
            } => {
                write!(
                    f,
                    "volume {volume}: takeover from {from}{}",
                    because(reason)
                )
            }
            Self::TakeoverStep {
                volume,
                step,
                took_ms,
                error: None,
            } => {
                write!(f, "volume {volume}: takeover: {step} done in {took_ms} ms")
            }
            Self::TakeoverStep {
                volume,
                step,
                error: Some(error),
                ..
            } => {
                write!(f, "volume {volume}: takeover stopped at {step}: {error}")
            }
            Self::TakeoverWaits { volume, reason } => {
                write!(f, "volume {volume}: takeover waits{}", because(reason))
            }
            Self::TakeoverWithdrawn { volume } => {
                write!(f, "volume {volume}: takeover withdrawn, the owner lives")
            }
            Self::Serving {
                volume,
                loss_unknown: true,
                warnings,
                ..
            } => {
                write!(f, "volume {volume}: served; the loss is unknown")?;
                warnings.iter().try_for_each(|told| write!(f, "; {told}"))
            }
            Self::Serving {
                volume,
                records_replayed,
                cut_seq,
                warnings,
                ..
            } => {
                write!(
                    f,
                    "volume {volume}: served; {records_replayed} records merged, cut at {cut_seq}"
                )?;
                warnings.iter().try_for_each(|told| write!(f, "; {told}"))
            }
            Self::PersonSaid { word, volumes } => {
                write!(f, "a person said: {word} ({})", volumes.join(", "))
            }
        }
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() {
        String::new()
    } else {
        format!(": {reason}")
    }
}

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When, on this node's wall clock.
    pub time: jiff::Timestamp,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// The open log; shared by all that happens in an agent.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    bytes_max: u64,
    open: Mutex<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    bytes: u64,
}

impl EventLog {
    /// Opens or creates the log of `state_dir`.
    ///
    /// # Errors
    /// If the directory or the file cannot be created or opened.
    pub fn open(state_dir: &Path) -> std::io::Result<Self> {
        Self::open_limited(state_dir, LOG_BYTES_MAX)
    }

    fn open_limited(state_dir: &Path, bytes_max: u64) -> std::io::Result<Self> {
        std::fs::create_dir_all(state_dir)?;
        let path = state_dir.join(FILE_NAME);
        let open = Mutex::new(Open::new(&path)?);
        Ok(Self {
            path,
            bytes_max,
            open,
        })
    }

    /// Writes the event to the log and as a log line for people.
    pub fn record(&self, event: Event) {
        match event.level() {
            tracing::Level::ERROR => tracing::error!("{event}"),
            tracing::Level::WARN => tracing::warn!("{event}"),
            _ => tracing::info!("{event}"),
        }
        self.note(event);
    }

    /// Writes to the event log an event that was told to people already.
    pub fn note(&self, event: Event) {
        let entry = Entry {
            time: jiff::Timestamp::now(),
            event,
        };
        if let Err(error) = self.append(&entry) {
            tracing::error!(
                "cannot write the event log {}: {error}",
                self.path.display()
            );
        }
    }

    fn append(&self, entry: &Entry) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let mut open: MutexGuard<'_, Open> =
            self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.bytes > 0 && open.bytes + line.len() as u64 > self.bytes_max {
            self.put_aside()?;
            *open = Open::new(&self.path)?;
        }
        open.file.write_all(&line)?;
        open.bytes += line.len() as u64;
        Ok(())
    }

    fn put_aside(&self) -> std::io::Result<()> {
        for number in (1..OLD_LOGS).rev() {
            let (from, to) = (self.old(number), self.old(number + 1));
            if from.exists() {
                std::fs::rename(from, to)?;
            }
        }
        std::fs::rename(&self.path, self.old(1))
    }

    fn old(&self, number: u32) -> PathBuf {
        self.path.with_extension(format!("jsonl.{number}"))
    }
}

impl Open {
    fn new(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(path: &Path) -> Vec<Entry> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn stall(gap_ms: u64) -> Event {
        Event::OwnStall { gap_ms }
    }

    #[test]
    fn events_are_appended_as_lines_that_can_be_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("new");
        let ran = Event::CommandRan {
            purpose: "fence".into(),
            command: vec!["/bin/false".into(), "a\nb".into()],
            outcome: "exit status 1".into(),
            output: "line\n\"quoted\"".into(),
            took_ms: 3,
        };
        let changed = Event::PeerChanged {
            node: NodeId("b".into()),
            from: PeerState::Alive,
            to: PeerState::Dead,
        };
        EventLog::open(&state_dir).unwrap().record(ran.clone());
        EventLog::open(&state_dir).unwrap().record(changed.clone());
        let path = state_dir.join(FILE_NAME);
        let read: Vec<Event> = entries(&path)
            .into_iter()
            .map(|entry| entry.event)
            .collect();
        assert_eq!(read, [ran, changed]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"event\":\"peer_changed\""), "{text}");
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open_limited(dir.path(), 1000).unwrap();
        for gap_ms in 0..100 {
            log.record(stall(gap_ms));
        }
        let mut files: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|file| file.unwrap())
            .map(|file| {
                (
                    file.file_name().into_string().unwrap(),
                    file.metadata().unwrap().len(),
                )
            })
            .collect();
        files.sort();
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["events.jsonl", "events.jsonl.1", "events.jsonl.2"]);
        assert!(
            files.iter().all(|(_, bytes)| (1..=1000).contains(bytes)),
            "{files:?}"
        );
        let kept: Vec<Event> = ["events.jsonl.2", "events.jsonl.1", "events.jsonl"]
            .iter()
            .flat_map(|name| entries(&dir.path().join(name)))
            .map(|entry| entry.event)
            .collect();
        let newest: Vec<Event> = (100 - kept.len() as u64..100).map(stall).collect();
        assert_eq!(kept, newest);
    }

    #[test]
    fn what_needs_a_person_is_an_error_with_its_reason() {
        let waits = Event::TakeoverWaits {
            volume: "data".into(),
            reason: "no fence".into(),
        };
        assert_eq!(waits.level(), tracing::Level::ERROR);
        assert_eq!(waits.to_string(), "volume data: takeover waits: no fence");
        assert_eq!(stall(5).level(), tracing::Level::WARN);
    }
}
