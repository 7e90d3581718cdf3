//! A volume that is protected and stays so: its metrics, its cost, and a host that is busy.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::bench::{
    LIMIT, Stream, all_mirrored, log_mark, logged, metric, metrics_text, number, volume,
};
use crate::lab::{Lab, NodeName};
use crate::progress;

use NodeName::{A, B};

/// What the lab's own looks into the machines cost is left out by looking only twice.
const IDLE_FOR: Duration = Duration::from_secs(60);
/// Of one processor.
const IDLE_SHARE_MAX: f64 = 0.015;
const TICKS_PER_SECOND: f64 = 100.0;

/// Longest uninterrupted time in which a loaded host may keep a volume exposed.
const EXPOSED_MAX: Duration = Duration::from_secs(10);

const OPERATIONS: u64 = 200;

pub(super) fn metrics(lab: &Lab) -> Result<()> {
    for node in NodeName::ALL {
        promtool(&metrics_text(lab, node)?)?;
    }
    let read = |name| metric(lab, A, name, "");
    let before = [
        read("twinwrite_captured_seq")?,
        read("twinwrite_mirrored_seq")?,
    ];
    lab.run(A, "rm -rf /srv/vol0/stream")?;
    let stream = Stream::start(lab, A, OPERATIONS, 0)?;
    stream.finish()?;
    all_mirrored(lab, A)?;
    let after = [
        read("twinwrite_captured_seq")?,
        read("twinwrite_mirrored_seq")?,
    ];
    for (name, (before, after)) in ["captured", "mirrored"]
        .iter()
        .zip(before.iter().zip(after))
    {
        ensure!(
            after >= before + OPERATIONS as f64,
            "{OPERATIONS} operations moved {name} only from {before} to {after}"
        );
    }
    let protected = metric(lab, A, "twinwrite_protection_state", "state=\"protected\"")?;
    ensure!(
        protected == 1.0,
        "the volume is protected and its metric says {protected}"
    );
    let role = metric(lab, B, "twinwrite_role", "role=\"mirror\"")?;
    ensure!(role == 1.0, "B mirrors and its metric says {role}");
    promtool(&metrics_text(lab, A)?)
}

fn promtool(text: &str) -> Result<()> {
    ensure!(
        text.contains("\ntwinwrite_"),
        "no metric of twinwrite in:\n{text}"
    );
    // The negative control: a checker that accepts everything.
    ensure!(
        check(&format!("{text}\n9bad{{ 1\n"))?.is_some(),
        "promtool accepts nonsense"
    );
    let complaint = check(text)?;
    ensure!(
        complaint.is_none(),
        "promtool: {}",
        complaint.unwrap_or_default()
    );
    Ok(())
}

/// What promtool does not like.
fn check(text: &str) -> Result<Option<String>> {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool cannot be started: apt-get install prometheus")?;
    child
        .stdin
        .take()
        .context("promtool has no input")?
        .write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((!output.status.success()).then_some(said))
}

pub(super) fn idle_cost(lab: &Lab) -> Result<()> {
    all_mirrored(lab, A)?;
    let begin = NodeName::ALL.map(|node| Usage::of(lab, node));
    sleep(IDLE_FOR);
    let end = NodeName::ALL.map(|node| Usage::of(lab, node));
    let mut said = String::new();
    for (node, (begin, end)) in NodeName::ALL.into_iter().zip(begin.into_iter().zip(end)) {
        let (begin, end) = (begin?, end?);
        let seconds = end.uptime_s - begin.uptime_s;
        ensure!(
            seconds >= IDLE_FOR.as_secs_f64() / 2.0,
            "{node} slept: {seconds:.0} s went by"
        );
        let share = (end.ticks - begin.ticks) / TICKS_PER_SECOND / seconds;
        let _ = write!(said, " {node} {:.2} %", share * 100.0);
        ensure!(
            share < IDLE_SHARE_MAX,
            "the idle agent of {node} used {:.2} % of a processor\n{}",
            share * 100.0,
            threads(lab, node)
        );
        // The counter of what was used must be able to move.
        ensure!(
            begin.ticks > 0.0,
            "the agent of {node} seems never to have used a processor"
        );
    }
    progress::note(&format!("idle agents use{said} of a processor"));
    let missed = metric(lab, A, "twinwrite_missed_wakeups_total", "")?;
    ensure!(
        missed == 0.0,
        "{missed} sleeps of A's agent missed their wakeup"
    );
    Ok(())
}

/// Processor time of an agent and the machine's clock, read at one moment in the machine.
struct Usage {
    ticks: f64,
    uptime_s: f64,
}

impl Usage {
    fn of(lab: &Lab, node: NodeName) -> Result<Self> {
        // Fields 14 and 15 of stat: user and system time; the name in field 2 has no blank.
        let said = lab.run(
            node,
            "awk '{ print $14 + $15 }' /proc/$(cat /run/twinwrite-agent.pid)/stat; \
             cut -d' ' -f1 /proc/uptime",
        )?;
        let mut numbers = said.lines().map(str::parse::<f64>);
        let mut next = || {
            numbers
                .next()
                .context("too little was said")
                .and_then(|n| Ok(n?))
        };
        Ok(Self {
            ticks: next()?,
            uptime_s: next()?,
        })
    }
}

/// Which thread used how much since the agent started.
fn threads(lab: &Lab, node: NodeName) -> String {
    let command = "cd /proc/$(cat /run/twinwrite-agent.pid)/task && \
                   for t in *; do awk '{ print $2, $14 + $15 }' $t/stat; done";
    lab.run(node, command).unwrap_or_default()
}

pub(super) fn loaded_host(lab: &Lab) -> Result<()> {
    let time = Duration::from_secs(if super::is_long() { 300 } else { 60 });
    let epochs_closed = metric(lab, A, "twinwrite_epochs_closed_total", "")?;
    let marks = NodeName::ALL.map(|node| log_mark(lab, node));
    let _load = [Busy::start()?, Busy::start()?];
    let end = Instant::now() + time;
    let (mut protected_at, mut exposed_longest) = (Instant::now(), Duration::ZERO);
    while Instant::now() < end {
        lab.run(
            A,
            "dd if=/dev/urandom of=/srv/vol0/under-load bs=64k count=8 status=none",
        )?;
        let (owner, mirror) = (volume(lab, A)?, volume(lab, B)?);
        ensure!(
            owner["role"] == "owner" && mirror["role"] == "mirror" && mirror["takeover"].is_null(),
            "the host was busy, and somebody took over\n{}",
            lab.explain()
        );
        if owner["protection"] == "protected" {
            protected_at = Instant::now();
        }
        exposed_longest = exposed_longest.max(protected_at.elapsed());
        ensure!(
            exposed_longest < EXPOSED_MAX,
            "the host is busy, and the volume is exposed for {exposed_longest:?}\n{}",
            lab.explain()
        );
        sleep(Duration::from_millis(500));
    }
    // Also for a moment only: an owner's mistake ends an epoch and moves no volume.
    for (node, mark) in NodeName::ALL.into_iter().zip(marks) {
        ensure!(
            !logged(lab, node, mark, &["peer", "-> Dead"])?,
            "the host was busy, and {node} took its living peer for dead\n{}",
            lab.explain()
        );
    }
    // The next scenario in this lab counts every name that nobody made.
    lab.run(A, "rm /srv/vol0/under-load")?;
    let machines = lab.machines()?;
    ensure!(
        machines.iter().all(|machine| machine.ended.is_none()),
        "a machine was fenced"
    );
    let closed = metric(lab, A, "twinwrite_epochs_closed_total", "")? - epochs_closed;
    progress::note(&format!(
        "two busy loops for {} s: {closed} epochs ended, longest time exposed {:.1} s",
        time.as_secs(),
        exposed_longest.as_secs_f32()
    ));
    lab.wait(A, crate::lab::AwaitedState::Protected, LIMIT)?;
    number(&volume(lab, A)?, "epoch").map(drop)
}

/// A process that does nothing, as fast as it can.
struct Busy(Child);

impl Busy {
    fn start() -> Result<Self> {
        let child = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn();
        Ok(Self(child.context("a busy loop cannot be started")?))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
