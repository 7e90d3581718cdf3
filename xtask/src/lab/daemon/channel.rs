//! Carries commands into a machine over its virtio port. A port has one opener on each side, so
//! all commands of all clients go through here, many at a time.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// The machine enforces a command's limit itself; this much longer, and it is not answering.
const GRACE: Duration = Duration::from_secs(10);

/// The port's host side.
#[derive(Default)]
pub(super) struct Channel {
    state: Mutex<State>,
    opened: Condvar,
}

#[derive(Default)]
struct State {
    port: Option<UnixStream>,
    closed: bool,
    waiting: HashMap<String, Sender<i32>>,
}

impl Channel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads answers until the machine ends.
    pub(super) fn serve(&self, port: &UnixStream) {
        let Ok(writer) = port.try_clone() else { return };
        self.state().port = Some(writer);
        self.opened.notify_all();
        for line in BufReader::new(port).lines() {
            let Ok(line) = line else { break };
            let Some((id, status)) = line.split_once(' ') else {
                continue;
            };
            let Ok(status) = status.trim().parse() else {
                continue;
            };
            if let Some(waiting) = self.state().waiting.remove(id) {
                // Whoever asked may have given up.
                let _ = waiting.send(status);
            }
        }
    }

    /// No answer comes any more: everybody who waits is told.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.port = None;
        state.waiting.clear();
        drop(state);
        self.opened.notify_all();
    }

    /// Runs the script `id` and gives its exit status.
    pub(super) fn exec(&self, id: &str, timeout_s: u64) -> Result<i32> {
        let (sender, answer) = mpsc::channel();
        let mut state = self
            .opened
            .wait_timeout_while(self.state(), GRACE, |state| {
                state.port.is_none() && !state.closed
            })
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        let Some(port) = &mut state.port else {
            bail!("the machine is not running");
        };
        port.write_all(format!("{id} {timeout_s}\n").as_bytes())
            .context("the machine's command port does not take the command")?;
        state.waiting.insert(id.to_owned(), sender);
        drop(state);
        let limit = Duration::from_secs(timeout_s) + GRACE;
        match answer.recv_timeout(limit) {
            Ok(status) => Ok(status),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine died during the command"),
            Err(RecvTimeoutError::Timeout) => {
                self.state().waiting.remove(id);
                bail!("the machine did not answer within {} s", limit.as_secs())
            }
        }
    }
}
