//! The two machines with all volumes: what their agents say of them together.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::report::Checked;
use super::{CASES, POSTGRES};
use crate::lab::config::{mount_point, volume_device, volume_disk, volume_name};
use crate::lab::{AgentAction, Filesystem, Lab, NodeName};
use crate::progress;

const POLL: Duration = Duration::from_millis(300);
/// How an agent's reason begins that was told to go without the gate.
const GATE_IS_OFF: &str = "the gate is switched off";
const LOOK: Duration = Duration::from_millis(40);
/// A log may leave out what is waited for.
const ASK_AFTER: Duration = Duration::from_secs(4);
/// An empty database in the machines' image.
const TEMPLATE: &str = "/var/lib/postgresql/template";
const LIMIT: Duration = Duration::from_secs(300);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// It owns them, and every change is mirrored.
    Protected,
    /// It has taken them over.
    Serving,
}

impl Awaited {
    const fn what(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Serving => "served",
        }
    }

    fn holds(self, volume: &Value) -> bool {
        match self {
            Self::Protected => volume["role"] == "owner" && is_protected(volume),
            Self::Serving => volume["takeover"]["serving"] == true,
        }
    }
}

/// All is captured and mirrored, also where only the gate is missing, which an agent never calls
/// protected.
fn is_protected(volume: &Value) -> bool {
    let reason = volume["reason"].as_str().unwrap_or_default();
    volume["protection"] == "protected"
        || (volume["protection"] == "exposed" && reason.starts_with(GATE_IS_OFF))
}

/// The pair.
pub(super) struct Pair<'a> {
    pub(super) lab: &'a Lab,
    pub(super) owner: NodeName,
    pub(super) seed: u64,
    filesystem: Filesystem,
    gate_off: bool,
}

impl<'a> Pair<'a> {
    /// Starts the agents; A owns all volumes.
    pub(super) fn begin(
        lab: &'a Lab,
        filesystem: Filesystem,
        gate_off: bool,
        seed: u64,
    ) -> Result<Self> {
        let pair = Self {
            lab,
            owner: NodeName::A,
            seed,
            filesystem,
            gate_off,
        };
        pair.prepare_postgres()?;
        for node in NodeName::ALL {
            pair.start_agent(node)?;
        }
        pair.await_all(Awaited::Protected, 0)?;
        Ok(pair)
    }

    /// Lays an empty database onto its volume before anything is captured.
    fn prepare_postgres(&self) -> Result<()> {
        let Some(index) = CASES.iter().position(|case| *case == POSTGRES) else {
            return Ok(());
        };
        let (device, mount) = (volume_device(index), mount_point(index));
        let script = format!(
            "set -e; mkdir -p {mount}; mount {device} {mount}; mkdir {mount}/{POSTGRES}\n\
             cp -a {TEMPLATE} {mount}/{POSTGRES}/data; umount {mount}"
        );
        self.lab.run(self.owner, &script).map(drop)
    }

    pub(super) fn volumes(&self) -> std::ops::Range<usize> {
        0..CASES.len()
    }

    pub(super) fn start_agent(&self, node: NodeName) -> Result<()> {
        let gate = if self.gate_off {
            "TWINWRITE_TEST_GATE_OFF=1 "
        } else {
            ""
        };
        let start = format!("{gate}twinwrite-agent start");
        self.lab.run(node, &start).map(drop)
    }

    /// What the owner's agent says of all volumes, in their order.
    pub(super) fn status(&self) -> Result<Vec<Value>> {
        let status = self.lab.agent_status(self.owner)?;
        let all = status["volumes"].as_array().map(Vec::as_slice);
        let all = all.unwrap_or_default();
        self.volumes()
            .map(|index| {
                let name = volume_name(index);
                let found = all.iter().find(|volume| volume["name"] == name.as_str());
                let found = found.with_context(|| format!("nothing is said of {name}"))?;
                Ok(found.clone())
            })
            .collect()
    }

    /// Waits until the owner's agent says so of all volumes.
    pub(super) fn await_all(&self, awaited: Awaited, mark: usize) -> Result<Vec<Value>> {
        let what = awaited.what();
        let holds = |volume: &Value| awaited.holds(volume);
        let deadline = Instant::now() + LIMIT;
        let mut asked = Instant::now();
        loop {
            // Asking costs an emulated machine more than all it is waited for, reading its log nothing.
            while !self.is_logged(awaited, mark) && asked.elapsed() < ASK_AFTER {
                sleep(LOOK);
            }
            let status = self.status();
            asked = Instant::now();
            if let Ok(volumes) = &status
                && volumes.iter().all(&holds)
            {
                return status;
            }
            if self.lab.machine(self.owner)?.ended.is_some() {
                bail!("{} died before all volumes were {what}", self.owner);
            }
            if Instant::now() >= deadline {
                bail!(
                    "not all volumes of {} are {what} after {} s\n{}",
                    self.owner,
                    LIMIT.as_secs(),
                    self.lab.explain()
                );
            }
            sleep(POLL);
        }
    }

    /// Whether the owner's log has told it of all volumes behind `mark` bytes.
    fn is_logged(&self, awaited: Awaited, mark: usize) -> bool {
        let text = fs::read(self.lab.agent_log(self.owner)).unwrap_or_default();
        let text = String::from_utf8_lossy(text.get(mark..).unwrap_or_default()).into_owned();
        self.volumes().all(|index| {
            let name = volume_name(index);
            match awaited {
                Awaited::Serving => text.contains(&format!("volume {name}: served")),
                Awaited::Protected => text
                    .lines()
                    .rfind(|line| line.contains(&format!("protection changed volume={name} ")))
                    .is_some_and(|line| {
                        line.contains("role=Owner protection=Protected")
                            || line.contains(GATE_IS_OFF)
                    }),
            }
        })
    }

    /// How long the log of an agent is.
    pub(super) fn log_mark_of(&self, node: NodeName) -> usize {
        fs::metadata(self.lab.agent_log(node)).map_or(0, |file| file.len() as usize)
    }

    /// The volumes whose records are all in the mirror's memory, once that is so of all or `limit` is
    /// over.
    pub(super) fn mirrored(&self, limit: Duration) -> Result<Vec<bool>> {
        let deadline = Instant::now() + limit;
        loop {
            let all: Vec<bool> = self
                .status()?
                .iter()
                .map(|volume| {
                    is_protected(volume)
                        && volume["lag_records"] == 0
                        && volume["captured_seq"] == volume["mirrored_seq"]
                })
                .collect();
            if all.iter().all(|mirrored| *mirrored) || Instant::now() >= deadline {
                return Ok(all);
            }
            sleep(POLL);
        }
    }

    /// Ends the agents and checks every file system on the host without changing it.
    pub(super) fn check_filesystems(&self) -> Result<Checked> {
        progress::step("Checking the file systems themselves", || {
            for node in [self.owner, self.owner.peer()] {
                self.lab.agent(node, AgentAction::Stop)?;
            }
            let mut checked = Checked::default();
            for index in self.volumes() {
                let mount = mount_point(index);
                // A database's server goes on serving after its judgement.
                let unmount = format!(
                    "pid=$(head -n 1 {mount}/{POSTGRES}/data/postmaster.pid 2>/dev/null)\n\
                     if [ -n \"$pid\" ]; then kill -INT $pid; fi\n\
                     while [ -n \"$pid\" ] && [ -d /proc/$pid ] && ! grep -q '^State:.[ZX]' /proc/$pid/status; do sleep 0.1; done\n\
                     if mountpoint -q {mount}; then umount {mount}; fi"
                );
                self.lab.run(self.owner, &unmount)?;
            }
            for index in self.volumes() {
                let disk = self.lab.shared_disk(&volume_disk(index));
                let mut command = self.filesystem.check();
                let output = command.arg(disk).output();
                let output = output.with_context(|| format!("cannot start {command:?}"))?;
                checked.volumes += 1;
                if !output.status.success() {
                    let [out, err] = [&output.stdout, &output.stderr]
                        .map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned());
                    let name = volume_name(index);
                    checked.unclean.push(format!("{name}: {out} {err}"));
                }
            }
            ensure!(checked.volumes > 0, "no file system was checked");
            Ok(checked)
        })
    }
}
