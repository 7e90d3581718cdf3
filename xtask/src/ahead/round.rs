//! One round: write, disturb, confirm, cut, take over, judge, come back.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use super::disturbance::{Disturbance, Schedule};
use super::foreign;
use super::judgement::{self, Judgement};
use super::pair::{Awaited, Pair};
use super::{CASES, POSTGRES, Plan, witness};
use crate::lab::config::mount_point;
use crate::lab::{Lab, NodeName};
use crate::random::Random;

/// Where the applications' logs lie, in the share of their machine.
const DIRECTORY: &str = "ahead";
const READY_LIMIT: Duration = Duration::from_secs(90);
const MIRRORED_LIMIT: Duration = Duration::from_secs(20);
const FENCED_LIMIT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(40);
/// What a round did and found.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// Its number, from 1 in each part.
    pub number: u64,
    /// Whose power was cut.
    pub dead: &'static str,
    /// What happened before.
    pub schedule: Schedule,
    /// The peer fenced the owner before this run cut it.
    pub fenced_first: bool,
    /// By volume.
    pub judgements: Vec<Judgement>,
    /// Unflushed writes that the disks lost at the cut.
    pub unflushed_lost: u64,
    /// Unflushed pages of the witness that the cut took.
    pub witness_lost: u64,
    /// Takeovers that asked a person, all volumes together.
    pub asked: u64,
    /// Records merged, all volumes together.
    pub records_replayed: u64,
    /// Seconds up to the cut, to all volumes serving, to the judgement, to protection.
    pub seconds: [f64; 4],
}

impl Round {
    /// Volumes on which something is missing.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.judgements.iter().filter(|found| !found.pass).count()
    }

    /// One line about it.
    #[must_use]
    pub fn line(&self, before: u64) -> String {
        let [cut, serving, judged, protected] = self.seconds;
        let confirmations: u64 = self.judgements.iter().map(|j| j.confirmations).sum();
        let mut line = format!(
            "round {}: {} died, {} ({}) {}+{} ms; {confirmations} confirmed, {} replayed, {} unflushed lost; \
             cut {cut:.1} s, serving {serving:.1}, judged {judged:.1}, protected {protected:.1}; {} crashes",
            self.number,
            self.dead,
            self.schedule.disturbance.name(),
            self.schedule.amount,
            self.schedule.before_ms,
            self.schedule.after_ms,
            self.records_replayed,
            self.unflushed_lost,
            before + self.judgements.len() as u64,
        );
        for found in self.judgements.iter().filter(|found| !found.pass) {
            line += &format!(
                "\n  FAILED {}: {} confirmed and {} mirrored cells lost: {}",
                found.case,
                found.confirmed_lost,
                found.mirrored_lost,
                found.differences.first().map_or("", String::as_str)
            );
        }
        line
    }
}

/// Where a volume's application works in a round.
pub(super) fn directory(index: usize, number: u64) -> String {
    match CASES.get(index) {
        Some(&POSTGRES) => format!("{}/{POSTGRES}", mount_point(index)),
        _ => format!("{}/round{number}", mount_point(index)),
    }
}

/// An application's log in the share of its machine.
pub(super) fn log(share: &Path, index: usize) -> PathBuf {
    share.join(DIRECTORY).join(format!("vol{index}.log"))
}

/// What decides an application's operations.
pub(super) fn seed(part: u64, number: u64, index: usize) -> u64 {
    let mut random = Random::new(part ^ number.rotate_left(32) ^ index as u64);
    // Databases keep it as a signed number.
    random.number() >> 1
}

/// Plays it.
pub(super) fn run(pair: &mut Pair<'_>, plan: &Plan, number: u64) -> Result<Round> {
    let began = Instant::now();
    let elapsed = || began.elapsed().as_secs_f64();
    let (lab, dead) = (pair.lab, pair.owner);
    let mut random = Random::new(pair.seed.wrapping_add(number));
    let schedule =
        Disturbance::any(&mut random, number, |kind| plan.has(kind)).schedule(&mut random);
    start_applications(pair, number)?;
    let mut mirrored = pair.mirrored(MIRRORED_LIMIT)?;
    let cut = disturb_and_cut(pair, schedule)?;
    schedule.end(lab)?;
    judgement::hand_over(lab, dead)?;
    let seconds_cut = elapsed();
    let witness_lost = witness::lost(lab, number)?;
    pair.owner = dead.peer();
    let mark = cut.log_mark;
    let is_foreign = schedule.disturbance == Disturbance::MountedElsewhere;
    let mut asked = 0;
    if is_foreign {
        // Letting the region go lets go what only it held.
        mirrored.fill(false);
        foreign::mount_and_overwrite(pair, number)?;
        pair.start_agent(pair.owner)?;
        asked = foreign::await_takeovers(pair)?;
    }
    let (serving, judgements, seconds) = thread::scope(|scope| {
        let back = scope.spawn(|| come_back(lab, dead, cut.mark, pair.volumes().len()));
        let serving = pair.await_all(Awaited::Serving, mark)?;
        let seconds_serving = elapsed();
        let judgements = judgement::judge(pair, dead.peer(), number, &mirrored)?;
        let seconds_judged = elapsed();
        back.join()
            .unwrap_or_else(|_| bail!("the thread that boots {dead} panicked"))?;
        anyhow::Ok((
            serving,
            judgements,
            [seconds_cut, seconds_serving, seconds_judged],
        ))
    })?;
    pair.start_agent(dead)?;
    pair.await_all(Awaited::Protected, mark)?;
    let [cut_at, serving_at, judged_at] = seconds;
    let replayed = serving
        .iter()
        .filter_map(|volume| volume["takeover"]["records_replayed"].as_u64());
    let round = Round {
        number,
        dead: dead.name(),
        schedule,
        fenced_first: cut.fenced_first,
        judgements,
        unflushed_lost: cut.unflushed_lost,
        witness_lost,
        asked,
        records_replayed: replayed.sum(),
        seconds: [cut_at, serving_at, judged_at, elapsed()],
    };
    if round.failures() > 0 {
        keep_evidence(lab, &round, &serving)?;
    }
    Ok(round)
}

/// Starts them all, and waits until they have written their older content.
fn start_applications(pair: &Pair<'_>, number: u64) -> Result<()> {
    let (lab, owner) = (pair.lab, pair.owner);
    let share = lab.share(owner);
    let _ = fs::remove_dir_all(share.join(DIRECTORY));
    fs::create_dir_all(share.join(DIRECTORY))?;
    let mut script = String::new();
    for (index, case) in CASES.iter().enumerate() {
        let (directory, seed) = (directory(index, number), seed(pair.seed, number, index));
        script += &format!(
            "setsid twinwrite-workload ahead --case {case} --directory {directory} --seed {seed} \
             --log /host/{DIRECTORY}/vol{index}.log --go /host/{DIRECTORY}/go \
             </dev/null >/host/{DIRECTORY}/vol{index}.out 2>&1 &\n"
        );
    }
    script += &witness::command(lab, owner, number)?;
    lab.run(owner, &script)?;
    let deadline = Instant::now() + READY_LIMIT;
    for (index, case) in CASES.iter().enumerate() {
        let path = log(&share, index);
        while !fs::read_to_string(&path).is_ok_and(|text| text.contains("ready\n")) {
            if Instant::now() >= deadline {
                let said = fs::read_to_string(path.with_extension("out")).unwrap_or_default();
                bail!(
                    "{case} is not ready after {} s: {said}\n{}",
                    READY_LIMIT.as_secs(),
                    lab.explain()
                );
            }
            sleep(POLL);
        }
    }
    Ok(())
}

struct Cut {
    fenced_first: bool,
    unflushed_lost: u64,
    /// Events before it.
    mark: usize,
    /// Bytes of the survivor's log before it.
    log_mark: usize,
}

fn disturb_and_cut(pair: &Pair<'_>, schedule: Schedule) -> Result<Cut> {
    let (lab, owner) = (pair.lab, pair.owner);
    let mark = lab.events()?.len();
    let go = lab.share(owner).join(DIRECTORY).join("go");
    if schedule.before_ms > 0 {
        fs::write(&go, "")?;
        sleep(Duration::from_millis(schedule.before_ms));
    }
    schedule.begin(lab, owner)?;
    fs::write(&go, "")?;
    sleep(Duration::from_millis(schedule.after_ms));
    let log_mark = pair.log_mark_of(owner.peer());
    let fenced_first = !lab.cut_power(owner)?;
    let events = lab.events()?;
    let lost = events.iter().skip(mark).find_map(|event| {
        (event["event"] == "power_lost").then(|| event["unflushed_lost"].as_u64())
    });
    let unflushed_lost = lost
        .flatten()
        .context("the disks were not told of the power cut")?;
    Ok(Cut {
        fenced_first,
        unflushed_lost,
        mark,
        log_mark,
    })
}

/// Boots the dead machine once it was fenced for every volume: a fence that comes later would take
/// the new boot down.
fn come_back(lab: &Lab, dead: NodeName, mark: usize, volumes: usize) -> Result<()> {
    let deadline = Instant::now() + FENCED_LIMIT;
    loop {
        let events = lab.events()?;
        let fences = events
            .iter()
            .skip(mark)
            .filter(|event| event["event"] == "fenced" && event["node"] == dead.name());
        if fences.count() >= volumes {
            return lab.boot(dead, false);
        }
        ensure!(
            Instant::now() < deadline,
            "{dead} was not fenced for every volume within {} s\n{}",
            FENCED_LIMIT.as_secs(),
            lab.explain()
        );
        sleep(POLL);
    }
}

/// Copies what tells of a failed round, which the next one overwrites.
fn keep_evidence(lab: &Lab, round: &Round, serving: &[serde_json::Value]) -> Result<()> {
    let to = lab
        .directory()
        .with_extension(format!("failed-{}", round.number));
    let _ = fs::remove_dir_all(&to);
    fs::create_dir_all(&to)?;
    for node in NodeName::ALL {
        fs::copy(lab.agent_log(node), to.join(format!("agent-{node}.log")))?;
    }
    let dead = NodeName::parse(round.dead).context("who died?")?;
    for entry in fs::read_dir(lab.share(dead).join(DIRECTORY))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    fs::write(
        to.join("takeovers.json"),
        serde_json::to_vec_pretty(serving)?,
    )?;
    fs::write(to.join("round.json"), serde_json::to_vec_pretty(round)?)?;
    Ok(())
}
