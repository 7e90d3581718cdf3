//! One background process per lab: it owns the machines, carries commands to them, and is the
//! fence's helper on the host.
//!
//! It ends, and its machines with it, on request, when the lab's directory disappears, or with the
//! process the lab was made for. The kernel ends the machines if the daemon itself is killed. It
//! never leaves a machine behind.

mod channel;
mod control;
mod fence;
mod machine;
mod monitor;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::config::{DiskKind, LabConfig, NodeName};
use super::disks::Disks;
use super::process::ProcessId;
use super::{clock, files};
use machine::Machine;

/// How soon a vanished directory or owner is noticed.
const WATCH_INTERVAL: Duration = Duration::from_millis(300);

/// What a daemon leaves in its lab's directory for those who look for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registration {
    /// The daemon.
    pub(super) daemon: Option<ProcessId>,
    /// Its machines' QEMU processes.
    pub(super) machines: Vec<ProcessId>,
}

impl Registration {
    pub(super) fn load(lab: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(lab.join(files::REGISTRATION)).ok()?).ok()
    }

    fn save(&self, lab: &Path) -> Result<()> {
        let new = lab.join("daemon.json.new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, lab.join(files::REGISTRATION)).context("cannot register the daemon")
    }
}

/// Starts a daemon for `lab` that is nobody's child, and waits until it answers.
pub(super) fn start(lab: &Path, owner: Option<ProcessId>) -> Result<()> {
    let log = fs::File::create(lab.join("daemon.log"))?;
    let mut command = Command::new(own_program()?);
    command.arg("lab-daemon").arg("--launch").arg(lab);
    if let Some(owner) = owner {
        command.arg("--owner").arg(serde_json::to_string(&owner)?);
    }
    let status = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .context("cannot start the lab's daemon")?;
    if !status.success() {
        let said = crate::progress::tail(&lab.join("daemon.log"), 10);
        bail!("the lab's daemon did not start: {said}");
    }
    Ok(())
}

/// The `xtask` program: also found from a test binary that uses this library.
fn own_program() -> Result<std::path::PathBuf> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    if own.file_name().is_some_and(|name| name == "xtask") {
        return Ok(own);
    }
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join("xtask"));
    beside
        .into_iter()
        .find(|path| path.is_file())
        .context("the xtask program is not beside this one: cargo build -p xtask")
}

/// First half of the start: makes the daemon a child of process 1, and waits for its registration.
///
/// # Errors
/// If it does not come up.
pub fn launch(lab: &Path, owner: Option<&str>) -> Result<()> {
    let mut command = Command::new(own_program()?);
    command.arg("lab-daemon").arg(lab);
    if let Some(owner) = owner {
        command.arg("--owner").arg(owner);
    }
    let mut child = command
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the daemon")?;
    for _ in 0..1000 {
        if Registration::load(lab).is_some_and(|r| r.daemon.is_some_and(ProcessId::is_alive)) {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("the daemon ended at once with {status}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    bail!("the daemon did not register within 10 s")
}

/// The daemon's whole life.
///
/// # Errors
/// If it cannot be set up; later failures are answers to requests.
pub fn run(lab: &Path, owner: Option<&str>) -> Result<()> {
    nix::unistd::setsid().context("cannot leave the terminal's session")?;
    let owner: Option<ProcessId> = owner.map(serde_json::from_str).transpose()?;
    std::env::set_current_dir(lab).context("cannot enter the lab's directory")?;
    let _ = fs::remove_file(files::CONTROL);
    let listener = UnixListener::bind(files::CONTROL).context("cannot make the control socket")?;
    // Machines end with the thread that started them, so this thread, which lives as long as the
    // process, starts them all.
    let (starts, start_requests) = mpsc::channel();
    let options = LabConfig::load(".".as_ref())?.options;
    let disks = match options.disks {
        DiskKind::Plain => None,
        DiskKind::Volatile => Some(Disks::serve(&options.shared_disks(), options.disk_seed)?),
    };
    let daemon = Arc::new(Daemon {
        machines: Mutex::default(),
        starts: Mutex::new(starts),
        shutdown: AtomicBool::new(false),
        disks,
    });
    daemon.register()?;
    daemon.event("daemon_started", None, serde_json::json!({}));
    let serving = Arc::clone(&daemon);
    thread::spawn(move || control::serve(&serving, &listener));
    let watch = Watch::new(lab, owner)?;
    loop {
        match start_requests.recv_timeout(WATCH_INTERVAL) {
            Ok(start) => machine::start(&daemon, start),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if daemon.shutdown.load(Ordering::SeqCst) || watch.is_over() {
            break;
        }
    }
    daemon.end_machines();
    let _ = fs::remove_file(files::CONTROL);
    let _ = fs::remove_file(files::REGISTRATION);
    Ok(())
}

/// When a lab is over without anyone having said so.
struct Watch {
    lab: std::path::PathBuf,
    identity: (u64, u64),
    owner: Option<ProcessId>,
}

impl Watch {
    fn new(lab: &Path, owner: Option<ProcessId>) -> Result<Self> {
        let identity = Self::identity(lab).context("the lab's directory is gone")?;
        Ok(Self {
            lab: lab.to_path_buf(),
            identity,
            owner,
        })
    }

    fn identity(lab: &Path) -> Option<(u64, u64)> {
        fs::metadata(lab)
            .ok()
            .map(|found| (found.dev(), found.ino()))
    }

    fn is_over(&self) -> bool {
        Self::identity(&self.lab) != Some(self.identity)
            || self.owner.is_some_and(|owner| !owner.is_alive())
    }
}

/// What the daemon's threads share.
pub(super) struct Daemon {
    machines: Mutex<BTreeMap<NodeName, Arc<Machine>>>,
    starts: Mutex<mpsc::Sender<machine::Start>>,
    shutdown: AtomicBool,
    /// The shared disks, if they are volatile.
    disks: Option<Arc<Disks>>,
}

impl Daemon {
    fn machines(&self) -> MutexGuard<'_, BTreeMap<NodeName, Arc<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self, node: NodeName) -> Option<Arc<Machine>> {
        self.machines().get(&node).cloned()
    }

    /// Notes the processes, so that whoever finds this daemon dead can clean up after it.
    fn register(&self) -> Result<()> {
        let machines = self
            .machines()
            .values()
            .map(|machine| machine.process)
            .collect();
        Registration {
            daemon: ProcessId::own(),
            machines,
        }
        .save(Path::new("."))
    }

    /// Appends to `events.jsonl`.
    fn event(&self, event: &str, node: Option<NodeName>, details: serde_json::Value) {
        let mut line = serde_json::json!({ "at_ms": clock::now_ms(), "event": event });
        if let Some(node) = node {
            line["node"] = node.name().into();
        }
        if let Some(details) = details.as_object() {
            for (name, value) in details {
                line[name] = value.clone();
            }
        }
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(files::EVENTS);
        if let Ok(mut file) = file {
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// Cuts a machine's power. True if it lived.
    fn kill(&self, node: NodeName) -> Result<bool> {
        self.machine(node)
            .map_or(Ok(false), |machine| machine.kill())
    }

    /// A machine's process is gone: so is what its disks had not made durable.
    fn power_lost(&self, node: NodeName) {
        let Some(disks) = &self.disks else { return };
        match disks.power_cut(node) {
            Ok(losses) => {
                let details = serde_json::json!({
                    "unflushed_kept": losses.kept, "unflushed_lost": losses.lost,
                });
                self.event("power_lost", Some(node), details);
            }
            Err(error) => eprintln!("the power cut of {node}: {error:#}"),
        }
    }

    fn end_machines(&self) {
        for node in NodeName::ALL {
            if let Err(error) = self.kill(node) {
                eprintln!("machine {node}: {error:#}");
            }
        }
    }
}
