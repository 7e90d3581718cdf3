//! One power cut: operations, the cut, the takeover, the comparison.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::report::{Judgement, Round, Thread};
use super::{Case, Pair, Regime, Turn};
use crate::lab::config::MOUNT_POINT;
use crate::lab::{AwaitedState, CrashKind, NodeName};
use crate::scenarios::bench::{
    CrashedDisk, LIMIT, all_mirrored, await_takeover, crash_and_copy, log_mark, number, until,
    volume,
};

/// A change that is noticed and not captured has ended the protection by then; a store through a mapping too.
const NOTICED_WITHIN: Duration = Duration::from_secs(2);
/// Many cases, one after the other, on emulated machines.
const LONG: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(100);
/// Below a machine's share.
const DIRECTORY: &str = "torture";

/// Runs the cases on the owner, cuts its power and judges its peer, which is the owner then. Looks at
/// the disk without mirroring, too, if `control`.
pub(super) fn run(
    pair: &mut Pair<'_>,
    turn: &Turn,
    cases: &[Case],
    control: bool,
) -> Result<Round> {
    let began = Instant::now();
    pair.ran.extend(cases);
    come_back(pair)?;
    let owner = pair.owner;
    for node in NodeName::ALL {
        let directory = pair.lab.share(node).join(DIRECTORY);
        let _ = fs::remove_dir_all(&directory);
        for name in ["told", "mirrored", "reports"] {
            fs::create_dir_all(directory.join(name))?;
        }
    }
    let mark = log_mark(pair.lab, owner);
    let mut floor = None;
    let succeeded = match turn.regime {
        Regime::Settled => settle(pair, turn, cases)?,
        Regime::Running => {
            floor = interrupt(pair, turn, cases)?;
            0
        }
    };
    let disk = if control {
        Some(crash_and_copy(pair.lab, owner)?)
    } else {
        pair.lab.crash(owner, CrashKind::Kill)?;
        None
    };
    let epochs_ended = epochs_ended(pair, owner, mark)?;
    pair.owner = owner.peer();
    let takeover = await_takeover(pair.lab, pair.owner)?;
    hand_over(pair, owner)?;
    let is_mirrored = floor.is_some_and(|floor| {
        epochs_ended == floor.epochs_ended
            && number(&takeover, "cut_seq").is_ok_and(|cut| cut >= floor.captured_seq)
    });
    let judge = |root: &str| match turn.regime {
        Regime::Settled => compare(pair, cases, pair.owner, root),
        Regime::Running => judge(pair, turn, cases, root, is_mirrored),
    };
    let judgements = judge(MOUNT_POINT)?;
    let lost_without = match disk {
        None => None,
        Some(disk) => {
            disk.mount(pair.lab)?;
            let found = judge(CrashedDisk::MOUNT_POINT);
            disk.unmount(pair.lab)?;
            let found = found.context("the oracle on the disk of the crash")?;
            Some(
                found
                    .iter()
                    .filter(|each| !each.differences.is_empty())
                    .count(),
            )
        }
    };
    Ok(Round {
        regime: turn.regime,
        judgements,
        succeeded,
        epochs_ended,
        records_replayed: number(&takeover, "records_replayed")?,
        lost_without,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The owner has its mirror, which may have been the last one to die.
fn come_back(pair: &Pair<'_>) -> Result<()> {
    let mirror = pair.owner.peer();
    if pair.lab.machine(mirror)?.ended.is_some() {
        pair.lab.boot(mirror, true)?;
    }
    pair.lab.wait(pair.owner, AwaitedState::Protected, LIMIT)?;
    pair.lab.wait(mirror, AwaitedState::Mirror, LIMIT).map(drop)
}

/// The cases, and the kinds of operations, for the command line.
fn words(turn: &Turn, cases: &[Case]) -> String {
    let cases: Vec<String> = cases.iter().map(Case::to_string).collect();
    let mut words = format!("--case {}", cases.join(","));
    if !turn.only.is_empty() {
        words += &format!(" --only {}", turn.only.join(","));
    }
    words
}

/// Runs them to their end and waits until the volume is protected with nothing left to mirror. How many
/// operations succeeded.
fn settle(pair: &Pair<'_>, turn: &Turn, cases: &[Case]) -> Result<u64> {
    let owner = pair.owner;
    let command = format!(
        "twinwrite-workload torture --root {MOUNT_POINT} --manifests /host/{DIRECTORY}/told {}",
        words(turn, cases)
    );
    let said = pair.lab.run_within(owner, &command, LONG)?;
    let said: Value = serde_json::from_str(&said).context("the workload's answer")?;
    let each = said.as_array().map(Vec::as_slice).unwrap_or_default();
    let succeeded = each.iter().filter_map(|case| case["succeeded"].as_u64());
    sleep(NOTICED_WITHIN);
    let shown = compare(pair, cases, owner, MOUNT_POINT)?;
    let differs = shown.iter().find(|each| !each.differences.is_empty());
    ensure!(
        differs.is_none(),
        "the oracle does not know what it was shown: {differs:?}"
    );
    all_mirrored(pair.lab, owner)?;
    Ok(succeeded.sum())
}

/// A moment at which all that the threads' logs held was mirrored.
#[derive(Clone, Copy)]
struct Floor {
    captured_seq: u64,
    /// By then; if another one ended later, what was mirrored in it counts no longer.
    epochs_ended: u64,
}

/// Starts them all at once, and returns somewhere in their middle; the operations go on.
fn interrupt(pair: &mut Pair<'_>, turn: &Turn, cases: &[Case]) -> Result<Option<Floor>> {
    let (lab, owner) = (pair.lab, pair.owner);
    let mark = log_mark(lab, owner);
    let total: u64 = cases.iter().map(|case| case.length * case.threads).sum();
    let part = |random: &mut crate::random::Random, from: u64, percent: u64| {
        total * (from + random.below(percent)) / 100
    };
    let (first, last) = (
        part(&mut pair.random, 5, 25),
        part(&mut pair.random, 40, 40),
    );
    let command = format!(
        "setsid twinwrite-workload torture --root {MOUNT_POINT} --logs /host/{DIRECTORY}/told {} \
         </dev/null >/host/{DIRECTORY}/out 2>&1 &",
        words(turn, cases)
    );
    lab.run(owner, &command)?;
    let directory = lab.share(owner).join(DIRECTORY);
    let reached = |operations: u64| {
        let what = format!("{operations} of {total} operations");
        until(lab, &what, LONG, || {
            Ok(noted(&directory.join("told"))? >= operations)
        })
        .with_context(|| fs::read_to_string(directory.join("out")).unwrap_or_default())
    };
    reached(first)?;
    let mut floor = None;
    // What is in the logs now has returned, so its records are in the ring.
    copy_all(&directory.join("told"), &directory.join("mirrored"))?;
    let ended_before = epochs_ended(pair, owner, mark)?;
    let captured_seq = number(&volume(lab, owner)?, "captured_seq")?;
    while floor.is_none() && noted(&directory.join("told"))? < last {
        let now = volume(lab, owner)?;
        let ended = epochs_ended(pair, owner, mark)?;
        if ended != ended_before {
            break;
        }
        if number(&now, "mirrored_seq")? >= captured_seq && now["protection"] == "protected" {
            floor = Some(Floor {
                captured_seq,
                epochs_ended: ended,
            });
        }
    }
    while noted(&directory.join("told"))? < last {
        sleep(POLL);
    }
    Ok(floor)
}

/// Operations that the logs in a directory tell of.
fn noted(directory: &Path) -> Result<u64> {
    let mut lines = 0;
    for entry in fs::read_dir(directory)? {
        let bytes = fs::read(entry?.path())?;
        lines += bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
    }
    Ok(lines)
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// What was told on the owner, for its peer to judge by.
fn hand_over(pair: &Pair<'_>, dead: NodeName) -> Result<()> {
    let [from, to] = [dead, dead.peer()].map(|node| pair.lab.share(node).join(DIRECTORY));
    for name in ["told", "mirrored"] {
        copy_all(&from.join(name), &to.join(name))?;
    }
    Ok(())
}

/// Epochs that an agent's log says have ended since a mark.
fn epochs_ended(pair: &Pair<'_>, node: NodeName, mark: usize) -> Result<u64> {
    let log = fs::read(pair.lab.agent_log(node))?;
    let log = String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned();
    let is_end = |line: &&str| {
        line.split_once("epoch ")
            .and_then(|(_, rest)| rest.split_once(" ended"))
            .is_some_and(|(epoch, _)| epoch.parse::<u64>().is_ok())
    };
    Ok(log.lines().filter(is_end).count() as u64)
}

/// Holds the volume against the manifests.
fn compare(pair: &Pair<'_>, cases: &[Case], node: NodeName, root: &str) -> Result<Vec<Judgement>> {
    let names: Vec<String> = cases.iter().map(Case::to_string).collect();
    let script = format!(
        "cd /host/{DIRECTORY}; for name in {}; do twinwrite-workload check --root {root} \
         --manifest told/$name --report reports/$name; test $? -lt 2 || exit 2; done",
        names.join(" ")
    );
    pair.lab.run_within(node, &script, LONG)?;
    let reports = pair.lab.share(node).join(DIRECTORY).join("reports");
    let judged = cases.iter().map(|case| {
        let report: Value = serde_json::from_slice(&fs::read(reports.join(case.to_string()))?)?;
        let mut differences = texts(&report["differences"]);
        if report["pass"] != true && differences.is_empty() {
            differences.push(report.to_string());
        }
        Ok(Judgement {
            case: *case,
            differences,
            threads: Vec::new(),
        })
    });
    judged.collect()
}

/// Holds the volume against the threads' logs.
fn judge(
    pair: &Pair<'_>,
    turn: &Turn,
    cases: &[Case],
    root: &str,
    is_mirrored: bool,
) -> Result<Vec<Judgement>> {
    let mirrored = if is_mirrored {
        format!(" --mirrored /host/{DIRECTORY}/mirrored")
    } else {
        String::new()
    };
    let command = format!(
        "twinwrite-workload torture-check --root {root} --logs /host/{DIRECTORY}/told{mirrored} {}",
        words(turn, cases)
    );
    let output = pair.lab.exec(pair.owner, &command, LONG)?;
    ensure!(
        output.status < 2,
        "the oracle failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let found: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let judged = cases.iter().zip(found).map(|(case, found)| {
        let threads = found["threads"].as_array().cloned().unwrap_or_default();
        let mut judgement = Judgement {
            case: *case,
            differences: Vec::new(),
            threads: Vec::new(),
        };
        for (index, thread) in threads.iter().enumerate() {
            let words = texts(&thread["differences"]).into_iter();
            let words = words.map(|words| format!("thread {index}: {words}"));
            judgement.differences.extend(words);
            judgement.threads.push(Thread {
                acknowledged: number(thread, "acknowledged")?,
                floor: number(thread, "floor")?,
                exact: thread["exact"].as_u64(),
            });
        }
        Ok(judgement)
    });
    judged.collect()
}

fn texts(list: &Value) -> Vec<String> {
    let all = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    all.iter().filter_map(text).collect()
}
