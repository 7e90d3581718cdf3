//! Fencing: making sure that a dead node is dead.
//!
//! The administrator's command powers the node off or cuts it from the storage; only its exit
//! status 0 counts. Anything else is an error: this module must never take a doubt for a success.

use std::time::Duration;

use thiserror::Error;

use super::command::{self, CommandError, Outcome, Ran};
use crate::events::EventLog;
use crate::ids::NodeId;

/// Why a node is not fenced.
#[derive(Debug, Error)]
pub enum FenceError {
    /// The command could not be started.
    #[error("node {node} is not fenced: {source}; correct `cluster.fence_command`")]
    NotRun {
        /// The node.
        node: NodeId,
        /// Why.
        source: CommandError,
    },
    /// It ran and did not promise anything.
    #[error(
        "node {node} is not fenced: {command} {outcome}; it printed: {output}; the takeover goes \
         on once it succeeds, or after `twinwrite takeover --confirm-dead {node}`"
    )]
    Failed {
        /// The node.
        node: NodeId,
        /// The program.
        command: String,
        /// How it ended.
        outcome: String,
        /// What it printed.
        output: String,
    },
}

/// Runs the fence command for `node` and tells the event log what it did.
///
/// # Errors
/// Unless the command ended with exit status 0 within the limit.
pub async fn fence(
    fence_command: &[String],
    node: &NodeId,
    limit: Duration,
    events: &EventLog,
) -> Result<Ran, FenceError> {
    let ran = command::run(fence_command, &[("node", &node.0)], limit)
        .await
        .map_err(|source| FenceError::NotRun {
            node: node.clone(),
            source,
        })?;
    events.record(ran.event("fence"));
    match ran.outcome {
        Outcome::Succeeded => Ok(ran),
        Outcome::Failed(_) | Outcome::TimedOut => Err(FenceError::Failed {
            node: node.clone(),
            command: ran.command.first().cloned().unwrap_or_default(),
            outcome: ran.told(),
            output: ran.output,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    async fn fence_by(script: &str, limit_ms: u64) -> (Result<Ran, FenceError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let events = EventLog::open(dir.path()).unwrap();
        let command: Vec<String> = ["/bin/sh", "-c", script, "fence", "--off", "{node}"]
            .map(str::to_owned)
            .into();
        let limit = Duration::from_millis(limit_ms);
        let result = fence(&command, &NodeId("fs2".into()), limit, &events).await;
        let log = std::fs::read_to_string(dir.path().join("events.jsonl")).unwrap_or_default();
        (result, log)
    }

    #[tokio::test]
    async fn exit_status_0_fences_and_the_node_is_named() {
        let (result, log) = fence_by("echo $1 $2; echo done >&2", 5000).await;
        assert_eq!(result.unwrap().output, "--off fs2\ndone");
        assert!(
            log.contains("command_ran") && log.contains("--off fs2\\ndone"),
            "{log}"
        );
    }

    #[tokio::test]
    async fn any_other_end_does_not() {
        let (result, log) = fence_by("echo no power switch >&2; exit 3", 5000).await;
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("fs2") && error.contains("no power switch"),
            "{error}"
        );
        assert!(log.contains("no power switch"), "{log}");
        let (result, _) = fence_by("kill -9 $$", 5000).await;
        assert!(result.unwrap_err().to_string().contains("signal"));
        let events = EventLog::open(tempfile::tempdir().unwrap().path()).unwrap();
        for command in [vec![], vec!["/nonexistent/fence".to_owned()]] {
            let limit = Duration::from_secs(1);
            let result = fence(&command, &NodeId("a".into()), limit, &events).await;
            assert!(matches!(result, Err(FenceError::NotRun { .. })));
        }
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let late = dir.path().join("late");
        let started = Instant::now();
        let script = format!("(sleep 1; touch {}) & sleep 100", late.display());
        let (result, _) = fence_by(&script, 200).await;
        assert!(
            result
                .unwrap_err()
                .to_string()
                .contains("did not end in time")
        );
        assert!(started.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!late.exists());
    }

    #[tokio::test]
    async fn a_command_that_prints_for_ever_is_bounded() {
        let (result, log) = fence_by("yes | head -c 1000000; echo end", 20_000).await;
        let output = result.unwrap().output;
        assert!(output.len() <= 2 * command::OUTPUT_BYTES_MAX && output.ends_with("end"));
        assert!(log.len() < 10_000);
    }

    #[tokio::test]
    async fn a_daemon_left_behind_with_the_pipes_open_does_not_hold_the_takeover() {
        let started = Instant::now();
        let (result, _) = fence_by("sleep 5 & echo fenced", 4000).await;
        assert_eq!(result.unwrap().output, "fenced");
        assert!(started.elapsed() < Duration::from_secs(4));
    }
}
