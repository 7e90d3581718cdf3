//! The applications on A, and the check of what they were told on B. The same with and without
//! mirroring.
//!
//! Their notes lie on the host, never on the volume.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::lab::config::MOUNT_POINT;
use crate::lab::{Lab, NodeName};
use crate::progress;

const SETTLED: &str = "settled.jsonl";
const SQLITE: &str = "sqlite.jsonl";
const STREAM: &str = "stream.jsonl";
const CHECKED: &str = "check.json";
/// A real tree: programs, libraries, Python's modules, thousands of small files.
const SOURCE: &str = "/usr";
const SQLITE_ROWS: u32 = 1000;
const LIMIT: Duration = Duration::from_secs(300);
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);

/// The part of the check's report that counts here.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Checked {
    pub(super) pass: bool,
    pub(super) files_expected: u64,
    pub(super) files_missing: u64,
    pub(super) files_different: u64,
    pub(super) names_extra: u64,
    pub(super) differences: Vec<String>,
    pub(super) bytes_lost: u64,
    pub(super) sqlite_rows_expected: u64,
    pub(super) sqlite_rows_found: u64,
    pub(super) sqlite_rows_match: bool,
    pub(super) sqlite_integrity: String,
    pub(super) stream_operations_acknowledged: u64,
    pub(super) stream_prefix: u64,
    pub(super) tail_operations_lost: u64,
    pub(super) stream_damage: Vec<String>,
}

impl Checked {
    /// Files, directories and the like that are not as the applications left them.
    pub(super) const fn files_lost(&self) -> u64 {
        self.files_missing.saturating_add(self.files_different)
    }
}

/// Runs the applications that finish before the crash.
pub(super) fn settle(lab: &Lab) -> Result<()> {
    let copy = format!(
        "twinwrite-workload settled --root {MOUNT_POINT} --source {SOURCE} --manifest /host/{SETTLED}"
    );
    let commit = format!(
        "twinwrite-workload sqlite --root {MOUNT_POINT} --rows {SQLITE_ROWS} --manifest /host/{SQLITE}"
    );
    progress::step(
        "On A: copying more than 2,000 files to the volume, then changing, renaming, deleting; no fsync",
        || lab.run_within(NodeName::A, &copy, LIMIT),
    )?;
    progress::step(
        "On A: committing to an SQLite database, synchronous=OFF",
        || lab.run_within(NodeName::A, &commit, LIMIT),
    )?;
    Ok(())
}

/// The writer that the crash cuts off.
pub(super) struct Stream<'a> {
    lab: &'a Lab,
    pid: u32,
}

impl<'a> Stream<'a> {
    pub(super) fn start(lab: &'a Lab) -> Result<Self> {
        let command = format!(
            "setsid twinwrite-workload stream --root {MOUNT_POINT} --log /host/{STREAM} \
             </dev/null >/host/stream.out 2>&1 & echo $!"
        );
        let said = lab.run(NodeName::A, &command)?;
        let pid = said
            .parse()
            .with_context(|| format!("the stream's process is `{said}`"))?;
        Ok(Self { lab, pid })
    }

    /// Lets it run for a while, and looks at A with `look` on the way, for the last time right
    /// before it returns. It runs on.
    pub(super) fn run_on<T>(
        &self,
        run_for: Duration,
        mut look: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let what = format!(
            "On A: a second application goes on writing, for {} s",
            run_for.as_secs()
        );
        progress::step(&what, || {
            let began = Instant::now();
            loop {
                let seen = look()?;
                self.must_live()?;
                if began.elapsed() >= run_for {
                    return Ok(seen);
                }
                std::thread::sleep(SAMPLE_INTERVAL);
            }
        })
    }

    fn must_live(&self) -> Result<()> {
        let alive = format!("kill -0 {}", self.pid);
        if self.lab.run(NodeName::A, &alive).is_err() {
            let out = self.lab.share(NodeName::A).join("stream.out");
            bail!("the stream ended by itself: {}", progress::tail(&out, 5));
        }
        Ok(())
    }
}

/// Compares B's volume with what A's applications noted. `last_operation`: the stream up to it must
/// be there.
pub(super) fn check(lab: &Lab, last_operation: Option<u64>) -> Result<Checked> {
    let (from, to) = (lab.share(NodeName::A), lab.share(NodeName::B));
    for name in [SETTLED, SQLITE, STREAM] {
        fs::copy(from.join(name), to.join(name))
            .with_context(|| format!("the note {name} of A's application is missing"))?;
    }
    let mut command = format!(
        "twinwrite-workload check --root {MOUNT_POINT} --manifest /host/{SETTLED} /host/{SQLITE} \
         --stream /host/{STREAM} --report /host/{CHECKED}"
    );
    if let Some(last) = last_operation {
        command += &format!(" --expect-last-operation {last}");
    }
    progress::step(
        "On B: comparing the volume with what A's applications were told",
        || {
            let output = lab.exec(NodeName::B, &command, LIMIT)?;
            ensure!(
                matches!(output.status, 0 | 1),
                "the check could not be carried out: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
            let text = fs::read(to.join(CHECKED)).context("the check left no report")?;
            serde_json::from_slice(&text).context("the check's report is damaged")
        },
    )
}
