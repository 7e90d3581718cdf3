//! Answers the requests that come in on the control socket, each in its own thread.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Daemon, machine, monitor};
use crate::lab::clock;
use crate::lab::config::NodeName;
use crate::lab::protocol::{Reply, Request};
use crate::lab::qemu::Files;

/// Accepts until the process ends.
pub(super) fn serve(daemon: &Arc<Daemon>, listener: &UnixListener) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let daemon = Arc::clone(daemon);
        thread::spawn(move || {
            if let Err(error) = converse(&daemon, &stream) {
                eprintln!("control: {error:#}");
            }
        });
    }
}

fn converse(daemon: &Daemon, stream: &UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => answer(daemon, request).unwrap_or_else(|error| Reply::Failed {
            reason: format!("{error:#}"),
        }),
        Err(error) => Reply::Failed {
            reason: format!("the daemon does not understand: {error}"),
        },
    };
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    let mut writer = stream;
    writer.write_all(&text).context("the client has gone")
}

fn answer(daemon: &Daemon, request: Request) -> Result<Reply> {
    match request {
        Request::Boot { node } => {
            let (answer, answered) = mpsc::channel();
            let start = machine::Start { node, answer };
            daemon
                .starts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .send(start)?;
            answered.recv()??;
            Ok(done())
        }
        Request::Exec {
            node,
            id,
            timeout_s,
        } => {
            let status = alive(daemon, node)?.channel.exec(&id, timeout_s)?;
            Ok(Reply::Ended { status })
        }
        Request::Kill { node } => {
            if !daemon.kill(node)? {
                bail!("machine {node} was dead already");
            }
            Ok(done())
        }
        Request::WaitDead { node, timeout_s } => {
            let Some(machine) = daemon.machine(node) else {
                bail!("{node} was never started")
            };
            if !machine.wait_dead(Duration::from_secs(timeout_s)) {
                bail!("machine {node} still runs after {timeout_s} s");
            }
            Ok(done())
        }
        Request::Monitor { node, command } => {
            alive(daemon, node)?;
            let text = monitor::say(&Files::of(node).monitor(), &command)?;
            daemon.event(
                "monitor",
                Some(node),
                serde_json::json!({ "command": command }),
            );
            Ok(Reply::Said { text })
        }
        Request::FlushTakes { flush_us } => {
            let Some(disks) = &daemon.disks else {
                bail!(
                    "this lab's disks are not served: only those of `--disks volatile` can be slowed down"
                );
            };
            disks.flush_takes(Duration::from_micros(flush_us));
            Ok(done())
        }
        Request::Status => {
            let machines = daemon
                .machines()
                .values()
                .map(|machine| machine.status())
                .collect();
            Ok(Reply::Machines { machines })
        }
        Request::Shutdown => {
            daemon.end_machines();
            daemon.shutdown.store(true, Ordering::SeqCst);
            Ok(done())
        }
    }
}

fn done() -> Reply {
    Reply::Done {
        at_ms: clock::now_ms(),
    }
}

fn alive(daemon: &Daemon, node: NodeName) -> Result<Arc<machine::Machine>> {
    match daemon.machine(node) {
        Some(machine) if machine.is_alive() => Ok(machine),
        Some(_) => bail!("machine {node} is dead: cargo xtask vm boot {node}"),
        None => bail!("machine {node} was never started in this lab"),
    }
}
