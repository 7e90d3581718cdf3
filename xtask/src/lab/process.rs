//! Processes by number and start time, so that a number used again is not mistaken.
//!
//! It never signals a process whose start time differs from the one noted.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// Clock ticks between the host's boot and its start.
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has this number now; none if it is gone or a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_ticks) = parse_stat(&stat)?;
        (!matches!(state, 'Z' | 'X')).then_some(Self { pid, start_ticks })
    }

    /// This process.
    #[must_use]
    pub fn own() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// Whether it still runs. A zombie does not.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal if it still runs.
    ///
    /// # Errors
    /// If it runs and cannot be signalled.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => bail!("cannot send {signal} to process {}: {error}", self.pid),
        }
    }

    /// Waits until it is gone; false if it still runs after `limit`.
    #[must_use]
    pub fn wait_gone(self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// Processes whose working directory is `directory` or below it, zombies left out.
///
/// # Errors
/// If the processes cannot be listed.
pub fn working_below(directory: &Path) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list the processes")? {
        let Ok(name) = entry?.file_name().into_string() else {
            continue;
        };
        let Ok(pid) = name.parse() else { continue };
        // A directory that was removed shows as its old name with a remark behind it.
        let Ok(link) = fs::read_link(format!("/proc/{pid}/cwd")) else {
            continue;
        };
        let shown = link.to_string_lossy();
        let path = Path::new(shown.strip_suffix(" (deleted)").unwrap_or(&shown));
        if path.starts_with(directory) && ProcessId::of(pid).is_some() {
            found.push(pid);
        }
    }
    Ok(found)
}

/// State and start time. The command's name, in parentheses, may itself hold spaces and
/// parentheses: fields are counted from the last one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{ProcessId, parse_stat};

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "77 (a b) c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_stat(stat), Some(('S', 4711)));
    }

    #[test]
    fn another_process_of_the_same_number_is_not_alive() {
        let own = ProcessId::own().expect("this process runs");
        assert!(own.is_alive());
        assert!(
            !ProcessId {
                start_ticks: own.start_ticks + 1,
                ..own
            }
            .is_alive()
        );
    }

    #[test]
    fn a_zombie_is_dead() {
        let mut child = std::process::Command::new("true")
            .spawn()
            .expect("true can be started");
        let pid = i32::try_from(child.id()).expect("a pid fits");
        let began = std::time::Instant::now();
        while ProcessId::of(pid).is_some() {
            assert!(began.elapsed().as_secs() < 10, "the child does not end");
            std::thread::yield_now();
        }
        assert!(
            std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "it was reaped already"
        );
        child.wait().expect("the child can be waited for");
    }
}
