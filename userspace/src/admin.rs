//! The agent's local socket: `status`, and what only a person may decide.
//!
//! One JSON line in, one JSON line out, then the connection ends. The socket lives in the
//! configuration's `run_dir` with mode 0660; who may open it may ask. It must never block the agent.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Duration, timeout};

use crate::ids::NodeId;
use crate::status::AgentStatus;

/// Longest request accepted.
const REQUEST_BYTES_MAX: u64 = 4096;
/// Longest answer accepted.
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;
const PATIENCE: Duration = Duration::from_secs(5);

/// What may be asked of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Everything it knows of itself.
    Status,
    /// A person's word that this node is powered off and stays off until it was taken over.
    ConfirmDead {
        /// The dead node.
        node: NodeId,
    },
    /// End. With a time: leave what runs to the next agent, which is there within that time.
    Stop {
        /// Milliseconds.
        restart_within_ms: Option<u32>,
    },
    /// A person's word that a volume whose takeover waits is to be served as it is on the disk, although
    /// its region may hold what was not flushed.
    DiscardRegion {
        /// The volume.
        volume: String,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To `Status`.
    Status {
        /// The status.
        status: Box<AgentStatus>,
    },
    /// Accepted.
    Done,
    /// Not done, and why.
    Refused {
        /// In words, with the remedy.
        reason: String,
    },
}

/// Why the socket cannot be served or asked.
#[derive(Debug, Error)]
pub enum AdminError {
    /// Nobody listens.
    #[error("no agent answers at {path}: {source}; start it with `twinwrite run --config FILE`")]
    NoAgent {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Another agent has the socket.
    #[error("another agent already answers at {path}; stop it first, or set another `run_dir`")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot make the socket {path}: {source}")]
    Make {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The other side sent something else, or nothing in time.
    #[error("the agent at {path} did not answer properly: {what}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What happened.
        what: String,
    },
}

/// The socket's path in this run directory.
#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// Who answers.
pub trait Responder: Send + Sync + 'static {
    /// Answers one request, quickly.
    fn respond(&self, request: Request) -> Answer;
}

/// Makes the socket and answers until the process ends.
///
/// # Errors
/// [`AdminError::InUse`] when another agent answers there, [`AdminError::Make`] otherwise.
pub async fn serve(run_dir: &Path, responder: Arc<dyn Responder>) -> Result<(), AdminError> {
    let path = socket_path(run_dir);
    let make = |source| AdminError::Make {
        path: path.clone(),
        source,
    };
    std::fs::create_dir_all(run_dir).map_err(make)?;
    if UnixStream::connect(&path).await.is_ok() {
        return Err(AdminError::InUse { path });
    }
    // Nobody answers: what is left there belongs to an agent that died.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(make(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(make)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).map_err(make)?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let responder = Arc::clone(&responder);
                    tokio::spawn(async move {
                        if let Ok(Err(error)) = timeout(PATIENCE, talk(stream, &*responder)).await {
                            tracing::debug!(%error, "a local request failed");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the local socket cannot accept");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    });
    Ok(())
}

async fn talk(stream: UnixStream, responder: &dyn Responder) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(REQUEST_BYTES_MAX))
        .read_line(&mut line)
        .await?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => responder.respond(request),
        Err(error) => Answer::Refused {
            reason: format!("not a request: {error}"),
        },
    };
    let mut text = serde_json::to_string(&answer).map_err(io::Error::other)?;
    text.push('\n');
    write.write_all(text.as_bytes()).await
}

/// Asks the agent of this run directory.
///
/// # Errors
/// [`AdminError::NoAgent`] when nobody listens, [`AdminError::Answer`] for a bad or late answer.
pub async fn ask(run_dir: &Path, request: &Request) -> Result<Answer, AdminError> {
    let path = socket_path(run_dir);
    let stream = UnixStream::connect(&path)
        .await
        .map_err(|source| AdminError::NoAgent {
            path: path.clone(),
            source,
        })?;
    let bad = |what: String| AdminError::Answer {
        path: path.clone(),
        what,
    };
    let exchange = async {
        let (read, mut write) = stream.into_split();
        let mut text = serde_json::to_string(request).map_err(io::Error::other)?;
        text.push('\n');
        write.write_all(text.as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(read.take(ANSWER_BYTES_MAX))
            .read_line(&mut line)
            .await?;
        Ok::<_, io::Error>(line)
    };
    let line = timeout(PATIENCE, exchange)
        .await
        .map_err(|_| bad(format!("nothing within {} s", PATIENCE.as_secs())))?
        .map_err(|error| bad(error.to_string()))?;
    serde_json::from_str(&line).map_err(|error| bad(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Responder for Echo {
        fn respond(&self, request: Request) -> Answer {
            match request {
                Request::Status => Answer::Done,
                Request::ConfirmDead { node } => Answer::Refused { reason: node.0 },
                Request::Stop { .. } => Answer::Done,
                Request::DiscardRegion { volume } => Answer::Refused { reason: volume },
            }
        }
    }

    #[tokio::test]
    async fn asks_and_is_answered_and_a_second_agent_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        serve(dir.path(), Arc::new(Echo)).await.expect("serves");
        assert_eq!(
            ask(dir.path(), &Request::Status).await.expect("answered"),
            Answer::Done
        );
        let node = NodeId("b".into());
        let answer = ask(dir.path(), &Request::ConfirmDead { node })
            .await
            .expect("answered");
        assert_eq!(answer, Answer::Refused { reason: "b".into() });
        let second = serve(dir.path(), Arc::new(Echo)).await;
        assert!(matches!(second, Err(AdminError::InUse { .. })));
    }

    #[tokio::test]
    async fn nobody_there_is_said_with_the_remedy() {
        let dir = tempfile::tempdir().expect("tempdir");
        let error = ask(dir.path(), &Request::Status).await.expect_err("nobody");
        assert!(error.to_string().contains("twinwrite run"), "{error}");
    }

    #[tokio::test]
    async fn junk_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        serve(dir.path(), Arc::new(Echo)).await.expect("serves");
        let mut stream = UnixStream::connect(socket_path(dir.path()))
            .await
            .expect("connects");
        stream
            .write_all(b"{\"request\":\"format_disk\"}\n")
            .await
            .expect("writes");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("reads");
        assert!(text.contains("refused"), "{text}");
    }
}
