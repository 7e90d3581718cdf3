//! Runs an administrator's command: a limit on its time, and on what is kept of its output.
//!
//! The command gets its own process group, so that a shell's children end with it. It is run
//! without a shell: this module must never build a command line out of text.

use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::events::Event;

/// Most bytes kept of each of standard output and standard error: the last ones.
pub const OUTPUT_BYTES_MAX: usize = 2048;

/// A command that ran.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The command with its arguments.
    pub command: Vec<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// The end of what it printed, standard output first.
    pub output: String,
    /// How long it took.
    pub took: Duration,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Exit status 0.
    Succeeded,
    /// Another exit status, or a signal.
    Failed(ExitStatus),
    /// It did not end in time and was killed with all its children.
    TimedOut,
}

/// Why a command could not be run.
#[derive(Debug, Error)]
pub enum CommandError {
    /// There is none.
    #[error("the command is empty: give a program, or remove the key")]
    Empty,
    /// It could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// The system's error.
        source: std::io::Error,
    },
}

impl Ran {
    /// As an event; `purpose` is `fence` or `serve`.
    #[must_use]
    pub fn event(&self, purpose: &str) -> Event {
        Event::CommandRan {
            purpose: purpose.to_owned(),
            command: self.command.clone(),
            outcome: self.told(),
            output: self.output.clone(),
            took_ms: u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// How it ended, in words.
    #[must_use]
    pub fn told(&self) -> String {
        match &self.outcome {
            Outcome::Succeeded => "succeeded".to_owned(),
            Outcome::Failed(status) => format!("failed ({status})"),
            Outcome::TimedOut => "did not end in time and was killed".to_owned(),
        }
    }
}

/// Runs `command` with each `{name}` in its words replaced.
///
/// # Errors
/// If it could not be started; how it ended is in the answer.
pub async fn run(
    command: &[String],
    replace: &[(&str, &str)],
    limit: Duration,
) -> Result<Ran, CommandError> {
    let command: Vec<String> = command.iter().map(|word| replaced(word, replace)).collect();
    let (program, arguments) = command.split_first().ok_or(CommandError::Empty)?;
    let started = Instant::now();
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| CommandError::Start {
            program: program.clone(),
            source,
        })?;
    let (outcome, output) = watch(&mut child, limit).await;
    Ok(Ran {
        outcome,
        output,
        took: started.elapsed(),
        command,
    })
}

fn replaced(word: &str, replace: &[(&str, &str)]) -> String {
    replace.iter().fold(word.to_owned(), |word, (name, value)| {
        word.replace(&format!("{{{name}}}"), value)
    })
}

async fn watch(child: &mut Child, limit: Duration) -> (Outcome, String) {
    let group = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .map(Pid::from_raw);
    let (mut printed, mut complained) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = tokio::time::timeout(limit, async {
        // The pipes may outlive the command in a daemon that it leaves behind: the exit decides.
        let exit = child.wait();
        tokio::pin!(exit);
        let pipes = async {
            tokio::join!(
                keep_end(stdout, &mut printed),
                keep_end(stderr, &mut complained)
            );
        };
        tokio::pin!(pipes);
        tokio::select! {
            status = &mut exit => {
                let _ = tokio::time::timeout(Duration::from_millis(200), pipes).await;
                status
            }
            () = &mut pipes => exit.await,
        }
    })
    .await;
    let outcome = match ended {
        Ok(Ok(status)) if status.success() => Outcome::Succeeded,
        Ok(Ok(status)) => Outcome::Failed(status),
        Ok(Err(_)) | Err(_) => {
            if let Some(group) = group {
                let _ = killpg(group, Signal::SIGKILL);
            }
            let _ = child.wait().await;
            Outcome::TimedOut
        }
    };
    printed.extend_from_slice(&complained);
    (
        outcome,
        String::from_utf8_lossy(&printed).trim_end().to_owned(),
    )
}

/// Reads to the end and keeps the last bytes.
async fn keep_end(pipe: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        kept.extend_from_slice(buffer.get(..count).unwrap_or_default());
        let surplus = kept.len().saturating_sub(OUTPUT_BYTES_MAX);
        kept.drain(..surplus);
    }
}
