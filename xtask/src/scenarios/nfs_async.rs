//! An export that is `async`: the kernel's NFS server answers WRITE, COMMIT and every change of a name before
//! anything of it is on a disk, and nobody else remembers what it answered.
//!
//! A exports the volume; B is its client twice, with NFS 4.2 and with NFS 3. When all calls have returned
//! and all is mirrored the power of A is cut. B must show everything that was answered; the disk of the
//! crash by itself must lack some of it, of every kind that counts.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::bench::{
    CrashedDisk, NO_CHECKPOINT, all_mirrored, await_takeover, crash_and_copy, losses, metric,
    number, options, oracle, require_start, volume,
};
use super::nfs::{self, Replies, Version};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{Lab, NodeName};
use crate::progress;

use NodeName::{A, B};

/// The kernel's own commits shall not save what the control must lose.
const NO_COMMIT: &str = "mount_options = \"commit=300\"";
const NO_WRITEBACK: &str = "echo 0 >/proc/sys/vm/dirty_writeback_centisecs";
/// A client forgets what it knows of the files, and must ask the server.
const FORGET: &str = "echo 3 >/proc/sys/vm/drop_caches";
const WORK_LIMIT: Duration = Duration::from_secs(400);

/// The streams of each client, and their operations.
const STREAMS: [&str; 2] = ["one", "two"];
const OPERATIONS: u64 = 300;
/// Of every one of these kinds something must be lost without mirroring.
const MUST_BE_LOST: [&str; 3] = ["write", "create", "rename"];

/// Operations that the streams have not.
const PROBES: &[&str] = &[
    "write",
    "pwrite-overwrite",
    "pwrite-beyond-the-end",
    "writev",
    "append-by-four-threads",
    "write-then-rename-over",
    "open-truncate-and-write",
    "truncate-shorter",
    "truncate-longer",
    "mkdir-and-create-in-it",
    "mkfifo",
    "mknod-device",
    "symlink-1000-bytes-long",
    "link",
    "rename-replace",
    "rename-across-directories",
    "rename-directory",
    "unlink",
    "unlink-one-of-two-names",
    "rmdir",
    "number-used-at-once-again",
    "names-that-come-back",
    "chmod",
    "chmod-directory",
    "chown",
    "set-id-bits-cleared-by-chown",
    "utimes",
    "utimes-directory",
];
/// What only the newer protocol has.
const PROBES_OF_4_2: &[&str] = &["fallocate", "punch-hole", "xattr-user", "xattr-replace"];

/// One of B's mounts.
struct Client {
    version: Version,
    /// Its directory on the volume, and the name of its logs.
    name: &'static str,
    /// Where B has it.
    place: &'static str,
    /// By these the server has answered before a workload notes that a write, or its close, returned.
    options: &'static str,
    more_probes: &'static [&'static str],
}

const CLIENTS: [Client; 2] = [
    Client {
        version: Version::V4_2,
        name: "nfs4",
        place: "/run/nfs4",
        // Each write is sent by itself.
        options: ",sync",
        more_probes: PROBES_OF_4_2,
    },
    Client {
        version: Version::V3,
        name: "nfs3",
        place: "/run/nfs3",
        // Close sends what was written: what does not fit in one WRITE with a COMMIT behind it.
        options: ",wsize=65536",
        more_probes: &[],
    },
];

pub(super) fn run() -> Result<()> {
    let options = options(&[], &[NO_CHECKPOINT, NO_COMMIT]);
    with_lab("nfs_async", options, crash)
}

fn crash(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    lab.run(A, NO_WRITEBACK)?;
    nfs::export(lab, A, Replies::AtOnce)?;
    for client in &CLIENTS {
        nfs::mount(lab, A, client.version, client.place, client.options)?;
        client.make_directories(lab)?;
    }
    // Also the control has the directories that all begins in.
    lab.run(A, "sync")?;
    all_mirrored(lab, A)?;
    let before = Undisturbed::of(lab)?;
    work(lab)?;
    let answered = Requests::answered(lab)?;
    all_mirrored(lab, A)?;
    let after = Undisturbed::of(lab)?;
    ensure!(
        after == before,
        "something came to the gate, or to the disk: {before:?} became {after:?}"
    );
    let disk = crash_and_copy(lab, A)?;
    for client in &CLIENTS {
        nfs::give_up(lab, B, client.place)?;
    }
    await_takeover(lab, B)?;
    let mirrored = Found::at(lab, MOUNT_POINT)?;
    mirrored.require_all(lab)?;
    disk.mount(lab)?;
    let without = Found::at(lab, CrashedDisk::MOUNT_POINT);
    disk.unmount(lab)?;
    let without = without.context("the oracle on the disk of the crash")?;
    without.require_loss()?;
    answered.require(&mirrored)?;
    progress::note(&format!(
        "answered, lost with twinwrite, lost without: {}; {}",
        MUST_BE_LOST
            .map(|kind| kind_in_words(kind, &mirrored, &without))
            .join("; "),
        tree_in_words(&mirrored, &without)
    ));
    Ok(())
}

/// What must not move meanwhile: an `async` export asks for no durability, so nothing comes to the gate.
#[derive(Debug, PartialEq)]
struct Undisturbed {
    epoch: u64,
    losses: [u64; 3],
    gate_calls: f64,
    checkpoints: f64,
}

impl Undisturbed {
    fn of(lab: &Lab) -> Result<Self> {
        Ok(Self {
            epoch: number(&volume(lab, A)?, "epoch")?,
            losses: losses(lab, A)?,
            gate_calls: metric(lab, A, "twinwrite_gate_calls_total", "")?,
            checkpoints: metric(lab, A, "twinwrite_checkpoints_total", "")?,
        })
    }
}

/// Both clients write at once, each with three processes; then each notes what it shows.
fn work(lab: &Lab) -> Result<()> {
    let mut script = "set -e; workers=".to_owned();
    for (seed, client) in (1..).step_by(STREAMS.len()).zip(&CLIENTS) {
        script += &client.start(seed);
    }
    script += "; for worker in $workers; do wait $worker; done";
    lab.run_within(B, &script, WORK_LIMIT)
        .with_context(|| CLIENTS.map(|client| client.complaints(lab)).join("\n"))?;
    for client in &CLIENTS {
        client.require_probed(lab)?;
        let Client { name, place, .. } = client;
        let describe = format!(
            "{FORGET} && twinwrite-workload describe --root {place} --prefix {name} \
             --manifest /host/{name}.manifest"
        );
        lab.run_within(B, &describe, WORK_LIMIT)?;
    }
    Ok(())
}

impl Client {
    fn probes(&self) -> impl Iterator<Item = &'static str> {
        PROBES.iter().chain(self.more_probes).copied()
    }

    fn make_directories(&self, lab: &Lab) -> Result<()> {
        let Self { name, place, .. } = self;
        let parts = STREAMS.map(|stream| format!("{place}/{name}/{stream}"));
        let command = format!("mkdir -p {place}/{name}/probes {}", parts.join(" "));
        lab.run(B, &command).map(drop)
    }

    /// Shell commands that start its processes.
    fn start(&self, seed: usize) -> String {
        let Self { name, place, .. } = self;
        let mut script = String::new();
        for (seed, stream) in (seed..).zip(STREAMS) {
            script += &format!(
                "; twinwrite-workload stream --root {place}/{name}/{stream} \
                 --log /host/{name}-{stream}.log --seed {seed} --operations {OPERATIONS} \
                 --operations-per-second 0 >/host/{name}-{stream}.out 2>&1 & workers=\"$workers $!\""
            );
        }
        let probes: Vec<_> = self.probes().collect();
        script += &format!(
            "; {{ for probe in {}; do for stage in prepare act; do twinwrite-workload probe --name $probe \
             --stage $stage --directory {place}/{name}/probes/$probe; done; done; }} \
             >/host/{name}-probes.out 2>&1 & workers=\"$workers $!\"",
            probes.join(" ")
        );
        script
    }

    fn complaints(&self, lab: &Lab) -> String {
        let said = |part: &&str| {
            let path = lab.share(B).join(format!("{}-{part}.out", self.name));
            fs::read_to_string(path).unwrap_or_default()
        };
        let parts = STREAMS.iter().chain(&["probes"]);
        parts.map(said).collect()
    }

    /// That the server has done all that the probes asked for.
    fn require_probed(&self, lab: &Lab) -> Result<()> {
        let path = lab.share(B).join(format!("{}-probes.out", self.name));
        let said = fs::read_to_string(path)?;
        for (index, line) in said.lines().enumerate() {
            let probe = self.probes().nth(index / 2).unwrap_or_default();
            let outcome: Value = serde_json::from_str(line).unwrap_or_default();
            ensure!(outcome["outcome"] == "done", "{probe}: {line}");
        }
        let (steps, wanted) = (said.lines().count(), 2 * self.probes().count());
        ensure!(steps == wanted, "{steps} of {wanted} steps: {said}");
        Ok(())
    }
}

/// Requests that both clients say were answered.
#[derive(Default)]
struct Requests {
    writes: u64,
    commits: u64,
    renames: u64,
}

impl Requests {
    fn answered(lab: &Lab) -> Result<Self> {
        let text = lab.run(B, "cat /proc/self/mountstats")?;
        let mut all = Self::default();
        for client in &CLIENTS {
            let count = |request: &str| requests_of(&text, client.place, request);
            let (writes, commits, renames) = (count("WRITE")?, count("COMMIT")?, count("RENAME")?);
            progress::note(&format!(
                "NFS {}: {writes} WRITE, {commits} COMMIT and {renames} RENAME requests were answered",
                client.version
            ));
            all.writes += writes;
            all.commits += commits;
            all.renames += renames;
        }
        Ok(all)
    }

    /// That the calls which returned went to the server, one request each at the least.
    fn require(&self, found: &Found) -> Result<()> {
        let Self {
            writes,
            commits,
            renames,
        } = *self;
        let [written, renamed] = ["write", "rename"].map(|kind| found.count(kind, "acknowledged"));
        ensure!(
            written > 0 && renamed > 0 && writes >= written && renames >= renamed && commits > 0,
            "{written} writes and {renamed} renames returned; {writes} WRITE, {commits} COMMIT and {renames} \
             RENAME requests were answered"
        );
        Ok(())
    }
}

/// How many requests of a kind the client mounted at `place` has sent.
fn requests_of(mountstats: &str, place: &str, request: &str) -> Result<u64> {
    let mounted = format!(" mounted on {place} ");
    let mut lines = mountstats
        .lines()
        .skip_while(|line| !line.contains(&mounted));
    let found = lines.find_map(|line| line.trim_start().strip_prefix(request)?.strip_prefix(": "));
    let count = found.and_then(|counts| counts.split(' ').next());
    count
        .with_context(|| format!("the client at {place} tells nothing of {request}: {mountstats}"))?
        .parse()
        .context("a count of requests")
}

/// What the oracle says of what the clients were told.
struct Found {
    streams: Vec<Value>,
    trees: Value,
}

impl Found {
    fn at(lab: &Lab, root: &str) -> Result<Self> {
        let mut streams = Vec::new();
        for Client { name, .. } in &CLIENTS {
            for stream in STREAMS {
                let against = format!(
                    "--stream /host/{name}-{stream}.log --expect-last-operation {OPERATIONS}"
                );
                let top = format!("{root}/{name}/{stream}");
                streams.push(oracle(lab, B, &top, &against)?);
            }
        }
        let manifests = CLIENTS.map(|client| format!("/host/{}.manifest", client.name));
        let against = format!("--manifest {}", manifests.join(" "));
        let trees = oracle(lab, B, root, &against)?;
        Ok(Self { streams, trees })
    }

    /// The streams' operations of a kind.
    fn count(&self, kind: &str, which: &str) -> u64 {
        let counts = (self.streams.iter()).map(|report| &report["stream_kinds"][kind][which]);
        counts.filter_map(Value::as_u64).sum()
    }

    fn require_all(&self, lab: &Lab) -> Result<()> {
        for report in &self.streams {
            ensure!(
                report["pass"] == true
                    && number(report, "stream_prefix")? == OPERATIONS
                    && number(report, "stream_operations_acknowledged")? == OPERATIONS,
                "of {OPERATIONS} operations not all are there: {report}\n{}",
                lab.explain()
            );
        }
        ensure!(
            self.trees["pass"] == true && number(&self.trees, "files_expected")? > 0,
            "not all is as the clients saw it: {}\n{}",
            self.trees,
            lab.explain()
        );
        Ok(())
    }

    fn require_loss(&self) -> Result<()> {
        for kind in MUST_BE_LOST {
            ensure!(
                self.count(kind, "lost") > 0,
                "the disk lost no {kind} in the crash, so this proves nothing"
            );
        }
        ensure!(
            self.trees["pass"] == false,
            "the disk shows all that the clients saw, so this proves nothing"
        );
        Ok(())
    }
}

fn kind_in_words(kind: &str, mirrored: &Found, without: &Found) -> String {
    format!(
        "{} {}, {}, {}",
        kind.to_uppercase(),
        mirrored.count(kind, "acknowledged"),
        mirrored.count(kind, "lost"),
        without.count(kind, "lost")
    )
}

fn tree_in_words(mirrored: &Found, without: &Found) -> String {
    let differing = |found: &Found| {
        ["files_missing", "files_different", "names_extra"]
            .map(|field| found.trees[field].as_u64().unwrap_or_default())
            .iter()
            .sum::<u64>()
    };
    format!(
        "names in the trees {}, {}, {}",
        mirrored.trees["files_expected"],
        differing(mirrored),
        differing(without)
    )
}
