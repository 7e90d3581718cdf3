//! One run of one machine: its QEMU process from start to end.
//!
//! It never signals a process it has already waited for.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::channel::Channel;
use super::{Daemon, fence};
use crate::lab::clock;
use crate::lab::config::{LabConfig, NodeName};
use crate::lab::process::ProcessId;
use crate::lab::protocol::{MachineEnd, MachineStatus};
use crate::lab::qemu::{self, Files};

/// A SIGKILL takes effect at once; a host that swaps may need a while to free the memory.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// A request to the daemon's first thread.
pub(super) struct Start {
    pub(super) node: NodeName,
    pub(super) answer: Sender<Result<()>>,
}

/// One run of a machine.
pub(super) struct Machine {
    pub(super) node: NodeName,
    pub(super) process: ProcessId,
    pub(super) channel: Channel,
    boots: u32,
    started_at_ms: i64,
    life: Mutex<Life>,
    ended: Condvar,
}

#[derive(Default)]
struct Life {
    end: Option<MachineEnd>,
    kill_sent: bool,
}

/// Starts a machine in the calling thread and answers.
pub(super) fn start(daemon: &Arc<Daemon>, start: Start) {
    let result = spawn(daemon, start.node);
    // Whoever asked may have gone; the machine is up all the same.
    let _ = start.answer.send(result);
}

fn spawn(daemon: &Arc<Daemon>, node: NodeName) -> Result<()> {
    let before = daemon.machine(node);
    if before.as_ref().is_some_and(|machine| machine.is_alive()) {
        bail!("machine {node} is running already");
    }
    let boots = before.map_or(0, |machine| machine.boots) + 1;
    let config = LabConfig::load(".".as_ref())?;
    let node_files = Files::of(node);
    for stale in node_files.stale_at_boot() {
        let _ = fs::remove_file(stale);
    }
    for (now, name) in [
        (node_files.console(), "console"),
        (node_files.qemu_log(), "qemu"),
    ] {
        let _ = fs::rename(now, format!("{node}/{name}.{}.log", boots - 1));
    }
    let line = qemu::command_line(&config, node);
    let (program, arguments) = line.split_first().context("QEMU's command line is empty")?;
    let log = fs::File::create(node_files.qemu_log())?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let pid = i32::try_from(child.id()).context("a process number does not fit")?;
    let process = ProcessId::of(pid).unwrap_or(ProcessId {
        pid,
        start_ticks: 0,
    });
    let machine = Arc::new(Machine {
        node,
        process,
        channel: Channel::default(),
        boots,
        started_at_ms: clock::now_ms(),
        life: Mutex::default(),
        ended: Condvar::new(),
    });
    daemon.machines().insert(node, Arc::clone(&machine));
    daemon.register()?;
    daemon.event(
        "booted",
        Some(node),
        serde_json::json!({ "pid": pid, "boots": boots }),
    );
    let (waiting, told) = (Arc::clone(&machine), Arc::clone(daemon));
    thread::spawn(move || waiting.wait(&told, child));
    let (reading, fencing) = (Arc::clone(&machine), Arc::clone(daemon));
    thread::spawn(move || {
        if let Some(port) = reading.connect(&Files::of(node).command_port()) {
            reading.channel.serve(&port);
        }
        reading.channel.close();
    });
    thread::spawn(move || {
        if let Some(port) = machine.connect(&Files::of(node).fence_port()) {
            fence::serve(&fencing, node, &port);
        }
    });
    Ok(())
}

impl Machine {
    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_alive(&self) -> bool {
        self.life().end.is_none()
    }

    pub(super) fn status(&self) -> MachineStatus {
        MachineStatus {
            node: self.node,
            process: self.process,
            boots: self.boots,
            started_at_ms: self.started_at_ms,
            ended: self.life().end.clone(),
        }
    }

    /// Connects to a socket that QEMU makes soon after its start; none if it ends before.
    fn connect(&self, socket: &str) -> Option<std::os::unix::net::UnixStream> {
        while self.is_alive() {
            if let Ok(stream) = std::os::unix::net::UnixStream::connect(socket) {
                return Some(stream);
            }
            thread::sleep(Duration::from_millis(10));
        }
        None
    }

    /// Waits for the process's end, and reaps it only under the lock, so that nobody who holds the
    /// lock signals a number that is used again.
    fn wait(&self, daemon: &Daemon, mut child: Child) {
        let pid = Pid::from_raw(self.process.pid);
        while let Err(nix::errno::Errno::EINTR) =
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
        {}
        let mut life = self.life();
        let how = child.wait().map_or_else(|error| error.to_string(), words);
        let end = MachineEnd {
            at_ms: clock::now_ms(),
            how,
            killed: life.kill_sent,
        };
        let details = serde_json::json!({ "how": end.how, "killed": end.killed });
        // Before anybody is told of the end, and so before the survivor reads a disk.
        daemon.power_lost(self.node);
        // Logged first: whoever waits for the end logs what it did after it.
        daemon.event("ended", Some(self.node), details);
        life.end = Some(end);
        drop(life);
        self.channel.close();
        self.ended.notify_all();
    }

    /// SIGKILL, and the wait until the process is gone. True if it lived.
    pub(super) fn kill(&self) -> Result<bool> {
        let mut life = self.life();
        if life.end.is_some() {
            return Ok(false);
        }
        life.kill_sent = true;
        kill(Pid::from_raw(self.process.pid), Signal::SIGKILL)
            .with_context(|| format!("cannot kill machine {}", self.node))?;
        drop(life);
        if !self.wait_dead(KILL_LIMIT) {
            bail!("machine {} does not die", self.node);
        }
        Ok(true)
    }

    /// Whether it is dead, at the latest after `limit`.
    pub(super) fn wait_dead(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut life = self.life();
        while life.end.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            life = self
                .ended
                .wait_timeout(life, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

fn words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}
