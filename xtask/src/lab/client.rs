//! Finding a lab's daemon and talking to it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use super::config::NodeName;
use super::daemon::Registration;
use super::process::ProcessId;
use super::protocol::{MachineStatus, Reply, Request};
use super::qemu::Files;
use super::{Lab, files};

const DAEMON_END_LIMIT: Duration = Duration::from_secs(70);

impl Lab {
    /// Whether its daemon runs. If one died, what it left is cleaned up.
    ///
    /// # Errors
    /// If a left-over machine cannot be ended.
    pub fn is_up(&self) -> Result<bool> {
        let Some(registration) = Registration::load(&self.directory) else {
            return Ok(false);
        };
        if registration.daemon.is_some_and(ProcessId::is_alive) {
            return Ok(true);
        }
        for machine in registration.machines {
            if machine.is_alive() {
                crate::progress::note(&format!(
                    "lab {}: its daemon died; ending the machine it left (process {})",
                    self.name, machine.pid
                ));
                machine.signal(Signal::SIGKILL)?;
            }
            if !machine.wait_gone(DAEMON_END_LIMIT) {
                bail!("process {} of lab {} does not end", machine.pid, self.name);
            }
        }
        let _ = fs::remove_file(self.directory.join(files::REGISTRATION));
        let _ = fs::remove_file(self.directory.join(files::CONTROL));
        Ok(false)
    }

    /// How the machines are.
    ///
    /// # Errors
    /// If the lab is not up.
    pub fn machines(&self) -> Result<Vec<MachineStatus>> {
        match self.request(&Request::Status)? {
            Reply::Machines { machines } => Ok(machines),
            other => bail!("the daemon answered {other:?}"),
        }
    }

    /// How one machine is.
    ///
    /// # Errors
    /// If the lab is not up or the machine was never started.
    pub fn machine(&self, node: NodeName) -> Result<MachineStatus> {
        let mut machines = self.machines()?.into_iter();
        machines
            .find(|machine| machine.node == node)
            .with_context(|| format!("machine {node} was never started in lab {}", self.name))
    }

    /// Ends the machines and the daemon, and drops the disks. Logs stay. Nothing happens if the lab
    /// is not up.
    ///
    /// # Errors
    /// If something does not end.
    pub fn down(&self) -> Result<()> {
        if self.is_up()? {
            let registration = Registration::load(&self.directory).unwrap_or_default();
            // The daemon may end before its answer arrives.
            let _ = self.request(&Request::Shutdown);
            if let Some(daemon) = registration.daemon
                && !daemon.wait_gone(DAEMON_END_LIMIT)
            {
                bail!(
                    "the daemon of lab {} (process {}) does not end",
                    self.name,
                    daemon.pid
                );
            }
            for machine in registration.machines {
                if machine.is_alive() {
                    bail!(
                        "process {} of lab {} is still there",
                        machine.pid,
                        self.name
                    );
                }
            }
        }
        let shared = self
            .options()
            .map_or_else(|_| Vec::new(), |o| o.shared_disks());
        for disk in shared {
            let _ = fs::remove_file(self.shared_disk(&disk));
        }
        for node in NodeName::ALL {
            let _ = fs::remove_file(self.directory.join(Files::of(node).local_disk()));
        }
        Ok(())
    }

    pub(super) fn done(&self, request: &Request) -> Result<i64> {
        match self.request(request)? {
            Reply::Done { at_ms } => Ok(at_ms),
            other => bail!("the daemon answered {other:?}"),
        }
    }

    pub(super) fn request(&self, request: &Request) -> Result<Reply> {
        let mut stream = self.connect()?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream
            .write_all(&line)
            .context("the lab's daemon does not listen")?;
        let mut answer = String::new();
        BufReader::new(stream)
            .read_line(&mut answer)
            .context("the lab's daemon went away")?;
        match serde_json::from_str(&answer) {
            Ok(Reply::Failed { reason }) => bail!("{reason}"),
            Ok(reply) => Ok(reply),
            Err(_) => bail!("the daemon of lab {} ended", self.name),
        }
    }

    /// A socket's name has a length limit that a checkout deep in a tree exceeds; through the
    /// directory's descriptor it is always short.
    fn connect(&self) -> Result<UnixStream> {
        let missing = || {
            format!(
                "lab {} is not up: cargo xtask vm --lab {} up",
                self.name, self.name
            )
        };
        let directory = File::open(&self.directory).with_context(missing)?;
        let path = format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), files::CONTROL);
        UnixStream::connect(path).with_context(missing)
    }
}
