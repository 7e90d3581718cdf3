//! What the scenarios have in common: a stream of writes that is told what it wrote, what the agents
//! say, and the disk as it was at a power cut.
//!
//! It shares no code with twinwrite and never asks the volume for durability.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::lab::config::{MOUNT_POINT, VOLUME};
use crate::lab::{
    AgentAction, AwaitedState, CrashKind, Lab, NodeName, Options, Programs, shell_quoted,
};
use crate::progress;

use NodeName::{A, B};

/// Longest wait for what takes seconds on an idle host.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(200);

/// Nothing but a takeover may save what these scenarios write: no checkpoint by age.
pub(crate) const NO_CHECKPOINT: &str = "checkpoint_age = \"30m\"";

/// A lab with these lines in the configuration's `[cluster]` and `[[volume]]`.
pub(crate) fn options(cluster: &[&str], volume: &[&str]) -> Options {
    let owned = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
    Options {
        programs: Programs::AsBuilt,
        cluster_settings: owned(cluster),
        volume_settings: owned(volume),
        ..Options::default()
    }
}

/// What the agent of `node` says of the volume.
pub(crate) fn volume(lab: &Lab, node: NodeName) -> Result<Value> {
    let status = lab.agent_status(node)?;
    let volumes = status["volumes"].as_array();
    let found = volumes.and_then(|all| all.iter().find(|each| each["name"] == VOLUME));
    found
        .cloned()
        .with_context(|| format!("{node} says nothing of {VOLUME}: {status}"))
}

/// A number of a status or a report.
pub(crate) fn number(value: &Value, field: &str) -> Result<u64> {
    let found = value[field].as_u64();
    found.with_context(|| format!("`{field}` is no number in {value}"))
}

/// How `node` sees its peer.
pub(crate) fn peer_state(lab: &Lab, node: NodeName) -> Result<String> {
    let status = lab.agent_status(node)?;
    let state = status["peers"][0]["state"].as_str();
    Ok(state
        .with_context(|| format!("{node} says nothing of its peer: {status}"))?
        .to_owned())
}

/// Waits until `holds`; the error says what was waited for and what both nodes say.
pub(crate) fn until(
    lab: &Lab,
    what: &str,
    limit: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        if holds().unwrap_or(false) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let last = holds()
                .err()
                .map(|error| format!("{error:#}\n"))
                .unwrap_or_default();
            bail!(
                "not after {} s: {what}\n{last}{}",
                limit.as_secs(),
                lab.explain()
            );
        }
        sleep(POLL);
    }
}

/// That `holds` all the time for so long.
pub(crate) fn throughout(
    lab: &Lab,
    what: &str,
    time: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        ensure!(holds()?, "no longer: {what}\n{}", lab.explain());
        sleep(POLL);
    }
    Ok(())
}

/// Waits until everything captured on `node` is in the peer's region, and gives the last record.
pub(crate) fn all_mirrored(lab: &Lab, node: NodeName) -> Result<u64> {
    let mut last = None;
    until(lab, "all that was captured is mirrored", LIMIT, || {
        let volume = volume(lab, node)?;
        let captured = number(&volume, "captured_seq")?;
        let settled = number(&volume, "mirrored_seq")? == captured
            && number(&volume, "lag_records")? == 0
            && volume["protection"] == "protected"
            && last == Some(captured);
        last = Some(captured);
        Ok(settled)
    })?;
    last.context("no record was seen")
}

/// The sum of a metric's samples whose labels hold `label`.
pub(crate) fn metric(lab: &Lab, node: NodeName, name: &str, label: &str) -> Result<f64> {
    let text = metrics_text(lab, node)?;
    let mut sum = None;
    for line in text.lines() {
        let rest = line
            .strip_prefix(name)
            .filter(|rest| rest.starts_with(['{', ' ']));
        if let Some(rest) = rest.filter(|rest| rest.contains(label)) {
            let value: f64 = rest.rsplit(' ').next().unwrap_or_default().parse()?;
            sum = Some(sum.unwrap_or(0.0) + value);
        }
    }
    sum.with_context(|| format!("{node} exports no {name} with {label}"))
}

/// What the endpoint of `node` says.
pub(crate) fn metrics_text(lab: &Lab, node: NodeName) -> Result<String> {
    let command = "curl --silent --show-error --fail http://127.0.0.1:9477/metrics";
    let output = lab.exec(node, command, LIMIT)?;
    ensure!(
        output.status == 0,
        "{node} serves no metrics: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// What was lost or not seen since the agent's programs were attached: drops, skipped hooks, gaps.
pub(crate) fn losses(lab: &Lab, node: NodeName) -> Result<[u64; 3]> {
    let names = [
        "twinwrite_drops_total",
        "twinwrite_recursion_misses_total",
        "twinwrite_gaps_total",
    ];
    let mut found = [0; 3];
    for (loss, name) in found.iter_mut().zip(names) {
        *loss = metric(lab, node, name, "")? as u64;
    }
    Ok(found)
}

/// A line that an agent's log got after `mark` bytes and that holds all of `words`.
pub(crate) fn logged(lab: &Lab, node: NodeName, mark: usize, words: &[&str]) -> Result<bool> {
    let text = fs::read(lab.agent_log(node))?;
    let text = String::from_utf8_lossy(text.get(mark..).unwrap_or_default()).into_owned();
    Ok(text
        .lines()
        .any(|line| words.iter().all(|word| line.contains(word))))
}

/// How long an agent's log is now.
pub(crate) fn log_mark(lab: &Lab, node: NodeName) -> usize {
    fs::metadata(lab.agent_log(node)).map_or(0, |file| file.len() as usize)
}

/// SIGKILL to the agent of `node`; it is gone when this returns.
pub(crate) fn kill_agent(lab: &Lab, node: NodeName) -> Result<()> {
    lab.agent(node, AgentAction::Kill)?;
    ensure!(
        !lab.agent_is_alive(node)?,
        "the agent of {node} survived SIGKILL"
    );
    Ok(())
}

/// Whether the volume is mounted on `node`.
pub(crate) fn is_mounted(lab: &Lab, node: NodeName) -> Result<bool> {
    let command = format!("mountpoint --quiet {MOUNT_POINT}");
    Ok(lab.exec(node, &command, LIMIT)?.status == 0)
}

/// A running `twinwrite-workload stream`: each operation is one record.
pub(crate) struct Stream<'a> {
    lab: &'a Lab,
    node: NodeName,
    operations: u64,
}

impl<'a> Stream<'a> {
    /// Starts one of so many operations on `node`.
    pub(crate) fn start(
        lab: &'a Lab,
        node: NodeName,
        operations: u64,
        per_second: u64,
    ) -> Result<Self> {
        for file in ["stream.log", "stream.out"] {
            let _ = fs::remove_file(lab.share(node).join(file));
        }
        // An earlier stream's remains on the disk must never look like this one's.
        static SEED: AtomicU64 = AtomicU64::new(1);
        let seed = SEED.fetch_add(1, Ordering::Relaxed);
        lab.run(
            node,
            &format!(
                "setsid twinwrite-workload stream --root {MOUNT_POINT} --log /host/stream.log \
                 --seed {seed} --operations {operations} --operations-per-second {per_second} \
                 </dev/null >/host/stream.out 2>&1 &"
            ),
        )?;
        Ok(Self {
            lab,
            node,
            operations,
        })
    }

    /// Operations that its log says have returned.
    pub(crate) fn acknowledged(&self) -> u64 {
        let log = fs::read(self.lab.share(self.node).join("stream.log")).unwrap_or_default();
        // The first line is the header.
        log.iter()
            .filter(|byte| **byte == b'\n')
            .count()
            .saturating_sub(1) as u64
    }

    /// Waits until so many have returned, which must happen before the last one has.
    pub(crate) fn reach(&self, operations: u64) -> Result<()> {
        until(
            self.lab,
            &format!("{operations} operations of the stream"),
            LIMIT,
            || Ok(self.acknowledged() >= operations),
        )?;
        ensure!(
            self.acknowledged() < self.operations,
            "the stream has ended too early to matter"
        );
        Ok(())
    }

    /// Waits until all have returned.
    pub(crate) fn finish(&self) -> Result<()> {
        let out = self.lab.share(self.node).join("stream.out");
        until(self.lab, "the end of the stream", LIMIT, || {
            let said = fs::read_to_string(&out)?;
            Ok(said.contains("\"operations\""))
        })
        .with_context(|| fs::read_to_string(&out).unwrap_or_default())
    }

    /// What the oracle says of the volume at `root` on `judge`.
    pub(crate) fn judge(&self, judge: NodeName, root: &str) -> Result<Value> {
        let (from, to) = (self.lab.share(self.node), self.lab.share(judge));
        if from != to {
            fs::copy(from.join("stream.log"), to.join("stream.log"))?;
        }
        let last = self.operations;
        let against = format!("--stream /host/stream.log --expect-last-operation {last}");
        oracle(self.lab, judge, root, &against)
    }

    /// That all of it is on the served volume, down to the last operation.
    pub(crate) fn require_all(&self, node: NodeName) -> Result<()> {
        let report = self.judge(node, MOUNT_POINT)?;
        ensure!(
            report["pass"] == true
                && number(&report, "stream_prefix")? == self.operations
                && number(&report, "stream_operations_acknowledged")? == self.operations,
            "of {} operations not all are there: {report}\n{}",
            self.operations,
            self.lab.explain()
        );
        Ok(())
    }

    /// The negative control: the disk as it was at the power cut, with its journal replayed by the
    /// kernel and nothing else, lacks some of it.
    pub(crate) fn require_loss(&self, disk: &CrashedDisk) -> Result<()> {
        disk.mount(self.lab)?;
        let report = self.judge(disk.node, CrashedDisk::MOUNT_POINT);
        disk.unmount(self.lab)?;
        let report = report.context("the oracle on the disk of the crash")?;
        ensure!(
            report["pass"] == false && number(&report, "stream_prefix")? < self.operations,
            "the disk lost nothing in the crash, so this proves nothing: {report}"
        );
        Ok(())
    }
}

/// What the oracle on `node` says of the tree at `root`, held against what these arguments name.
pub(crate) fn oracle(lab: &Lab, node: NodeName, root: &str, against: &str) -> Result<Value> {
    let command = format!("twinwrite-workload check --root {root} {against}");
    let output = lab.exec(node, &command, LIMIT)?;
    ensure!(
        output.status < 2,
        "the oracle failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        report["pass"] == (output.status == 0),
        "the oracle's status {} contradicts {report}",
        output.status
    );
    Ok(report)
}

/// A copy of the shared disk as it was when its owner's power was cut.
pub(crate) struct CrashedDisk {
    node: NodeName,
}

impl CrashedDisk {
    /// On the host's share; there, a loop device cannot be made over it.
    const ARCHIVE: &'static str = "crashed.tar";
    const DISK: &'static str = "/var/lib/twinwrite/volume.raw";
    /// Where it is mounted in the survivor.
    pub(crate) const MOUNT_POINT: &'static str = "/mnt";
    /// Gives the copy of a btrfs another identity, for the kernel mounts one of a kind: the one in its trees
    /// becomes the identity of its metadata (`METADATA_UUID`).
    const RENAME_BTRFS: &'static str = r#"
import struct, sys
AT, SIZE, FSID, FEATURES, METADATA = 0x10000, 4096, 0x20, 0xbc, 0x23b
disk = open(sys.argv[1], "r+b")
disk.seek(AT)
block = bytearray(disk.read(SIZE))
if block[0x40:0x48] == b"_BHRfS_M":
    block[METADATA:METADATA + 16] = block[FSID:FSID + 16]
    block[FSID] ^= 0xff
    features = struct.unpack_from("<Q", block, FEATURES)[0]
    struct.pack_into("<Q", block, FEATURES, features | 1 << 10)
    crc = 0xffffffff
    for byte in block[32:]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82f63b78 * (crc & 1)
    struct.pack_into("<I", block, 0, crc ^ 0xffffffff)
    disk.seek(AT)
    disk.write(block)
"#;

    /// Mounts a fresh copy of it in the survivor: the kernel replays the journal and nothing else.
    pub(crate) fn mount(&self, lab: &Lab) -> Result<()> {
        let (archive, disk, root) = (Self::ARCHIVE, Self::DISK, Self::MOUNT_POINT);
        let rename = shell_quoted(Self::RENAME_BTRFS);
        // The survivor has a file system of this identity mounted, which XFS and btrfs mind.
        let command = format!(
            "modprobe loop; tar --sparse -xf /host/{archive} -C /var/lib/twinwrite && \
             python3 -c {rename} {disk} && \
             options=loop; test $(blkid -o value -s TYPE {disk}) != xfs || options=loop,nouuid; \
             mount -o $options {disk} {root} || {{ dmesg | tail -n 5 >&2; false; }}"
        );
        // A hundred megabytes come over the share.
        lab.run_within(self.node, &command, Duration::from_secs(600))
            .map(drop)
    }

    /// Unmounts it and throws the copy away.
    pub(crate) fn unmount(&self, lab: &Lab) -> Result<()> {
        let (disk, root) = (Self::DISK, Self::MOUNT_POINT);
        lab.run(self.node, &format!("umount {root} && rm {disk}"))
            .map(drop)
    }
}

/// Cuts the power of `node` and copies the shared disk while its peer stands still, so that nobody
/// can have mounted it yet.
pub(crate) fn crash_and_copy(lab: &Lab, node: NodeName) -> Result<CrashedDisk> {
    let survivor = node.peer();
    lab.crash(node, CrashKind::Kill)?;
    lab.monitor(survivor, "stop")?;
    let copied = archive(&lab.directory().join("volume.raw"), &lab.share(survivor));
    lab.monitor(survivor, "cont")?;
    copied?;
    Ok(CrashedDisk { node: survivor })
}

/// Without its holes, which would take minutes to carry into an emulated machine.
fn archive(disk: &Path, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--sparse", "-cf"])
        .arg(to.join(CrashedDisk::ARCHIVE));
    tar.arg("-C")
        .arg(disk.parent().context("the disk has no directory")?);
    tar.arg(disk.file_name().context("the disk has no name")?);
    progress::output(&mut tar).map(drop)
}

/// Waits until `node` has taken the volume over and serves it.
pub(crate) fn await_takeover(lab: &Lab, node: NodeName) -> Result<Value> {
    lab.wait(node, AwaitedState::Serving, LIMIT)?;
    let volume = volume(lab, node)?;
    ensure!(
        volume["role"] == "owner",
        "{node} serves and is no owner: {volume}"
    );
    Ok(volume["takeover"].clone())
}

/// That A owns the protected volume and B mirrors it: where every scenario begins.
pub(crate) fn require_start(lab: &Lab) -> Result<()> {
    lab.wait(A, AwaitedState::Protected, LIMIT)?;
    lab.wait(B, AwaitedState::Mirror, LIMIT)?;
    ensure!(
        is_mounted(lab, A)? && !is_mounted(lab, B)?,
        "the volume is not mounted on A alone"
    );
    Ok(())
}
