//! Proof that the gate holds: an fsync by a process of its own must not be answered while the gate is
//! held, and must succeed once it is open.
//!
//! Only while no epoch is open: nothing but the probe may depend on where the gate stands. A volume
//! whose gate was not proven must not be called protected.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::gatekeeper::Gatekeeper;

/// Both halves of the proof take milliseconds on an idle host.
const LIMIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Longest wait for the end of a process that was killed.
const END_LIMIT: Duration = Duration::from_secs(2);
/// What the process ends with if it could not even write.
const WRITE_FAILED: i32 = 3;

/// What the probing process does: one write, and its fsync once its standard input has ended.
///
/// # Errors
/// The system's, of the fsync; a write that fails ends the process with another status.
pub fn write_and_fsync(path: &Path) -> std::io::Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(b"an fsync that waits at the gate\n")?;
        Ok(file)
    });
    let file = written.unwrap_or_else(|error| {
        tracing::error!("{}: {error}", path.display());
        std::process::exit(WRITE_FAILED);
    });
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    file.sync_all()
}

/// Proves the gate of a volume whose programs are attached and which has no open epoch.
///
/// # Errors
/// What was seen instead. The gate is open afterwards in either case.
pub fn prove(mount_point: &Path, keeper: &Gatekeeper) -> anyhow::Result<()> {
    let path = mount_point.join(".twinwrite").join("gate-probe");
    let mut probe = Probe::start(&path)?;
    // The gate is open again before the process is ended: whatever went wrong, it is not left stopped
    // with a file of the volume.
    keeper.shut_for(|| probe.fsync_and_stop())?;
    let status = probe.await_end()?;
    match status.code() {
        Some(0) => {}
        Some(WRITE_FAILED) => bail!("the write that an fsync was to follow failed"),
        _ => bail!("the fsync that waited at the gate failed: {status}"),
    }
    fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
}

/// The process; it ends with this.
struct Probe(Child);

impl Probe {
    /// It writes, and fsyncs once it is told to.
    fn start(path: &Path) -> anyhow::Result<Self> {
        // The running program, also if its file was replaced meanwhile.
        let child = Command::new("/proc/self/exe")
            .arg("gate-probe")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("starting a process that proves the gate")?;
        Ok(Self(child))
    }

    fn fsync_and_stop(&mut self) -> anyhow::Result<()> {
        drop(self.0.stdin.take());
        let deadline = Instant::now() + LIMIT;
        let stat = format!("/proc/{}/stat", self.0.id());
        loop {
            match self.0.try_wait()?.map(|status| (status.code(), status)) {
                None => {}
                Some((Some(0), _)) => bail!("an fsync was answered although the gate was held"),
                Some((Some(WRITE_FAILED), _)) => bail!("the write before the fsync failed"),
                Some((_, status)) => bail!("the process that was to fsync failed: {status}"),
            }
            let text = fs::read_to_string(&stat).unwrap_or_default();
            if text
                .rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('T'))
            {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "an fsync neither waited at the gate nor was answered within {} s",
                LIMIT.as_secs()
            );
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn await_end(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "an fsync still waited at the gate {} s after it was opened",
                LIMIT.as_secs()
            );
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // It has ended already, or must.
        self.0.kill().ok();
        let deadline = Instant::now() + END_LIMIT;
        while matches!(self.0.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                // In a disk that hangs; this agent must not hang with it.
                tracing::warn!(
                    pid = self.0.id(),
                    "the process that proves the gate does not end"
                );
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}
