//! Injected faults: each is brought about on a running pair of machines, must be told within a stated
//! time, and may cost nothing that was confirmed.
//!
//! One pair serves many faults in a row; after a takeover the two have changed roles, and the next fault
//! goes on with them so. After a failure the next one gets fresh machines. What the runs find is written
//! to the table in `docs/faults.md`, and nothing else writes there.

mod kernel;
mod list;
mod nodes;
pub(crate) mod pair;
mod space;
mod table;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::lab::{CrashKind, Lab, NodeName};
use crate::progress;
use crate::scenarios::{bench, with_lab};

use pair::{Left, Moment, Pair, Seen};
pub use table::{Row, Table};

/// A fault.
pub struct Fault {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in words.
    pub what: &'static str,
    /// How it is injected.
    pub how: &'static str,
    /// How long it may go untold.
    pub within_s: u64,
    course: Course,
}

/// How its run goes.
#[derive(Clone, Copy)]
enum Course {
    /// Injected while the writer writes, told, ended.
    Plain {
        inject: Inject,
        sign: Sign,
        ending: Ending,
        undo: Undo,
    },
    /// One of its own.
    Own(fn(&mut Pair<'_>, &Fault) -> Result<Row>),
}

/// How a fault is brought about.
#[derive(Clone, Copy)]
enum Inject {
    /// By a shell command on the owner.
    Owner(&'static str),
    /// By a shell command on the mirror; the owner's clock tells when.
    Mirror(&'static str),
    /// From outside.
    Host(fn(&Pair<'_>) -> Result<Moment>),
}

/// What tells it.
#[derive(Clone, Copy)]
enum Sign {
    /// The owner shows something else than `protected`.
    Weakened,
    /// The same, and its reason holds this.
    Says(&'static str),
    /// An event of this name on the owner, where the volume may stay `protected`.
    Owner(&'static str),
    /// An event of this name on the owner, whose agent says nothing after it: what is shown then is what
    /// the mirror shows, with a reason that holds these words.
    OwnerLast(&'static str, &'static str),
    /// An event of this name on the mirror.
    Mirror(&'static str),
    /// The same, and its reason holds these words.
    MirrorSays(&'static str, &'static str),
    /// The mirror sees the owner like this.
    SeenAs(&'static str),
    /// Nothing is weakened: it stays `protected` for so many seconds.
    Stays(u64),
}

/// What comes after.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The mirror fences the owner and takes over by itself.
    Fenced,
    /// The owner's power is cut while it lasts.
    PowerCut,
    /// The same once the volume is protected again.
    PowerCutLater,
    /// It is undone, and the volume is protected again.
    Healed,
}

impl Ending {
    const fn told(self) -> &'static str {
        match self {
            Self::Fenced => "fenced by the mirror, taken over",
            Self::PowerCut => "power cut at once, taken over",
            Self::PowerCutLater => "protected again; power cut, taken over",
            Self::Healed => "undone, protected again",
        }
    }
}

/// What takes it back, as far as a reboot of the owner does not.
#[derive(Clone, Copy)]
enum Undo {
    Nothing,
    Mirror(&'static str),
    Host(fn(&Pair<'_>) -> Result<()>),
}

/// All of them, in the order they run.
pub fn all() -> impl Iterator<Item = &'static Fault> {
    list::AGENTS
        .iter()
        .chain(list::LINKS)
        .chain(list::CAPTURE)
        .chain(list::DISKS)
        .chain(space::FAULTS)
        .chain(list::NODES)
        .chain(nodes::FAULTS)
        .chain(kernel::FAULTS)
}

/// Runs those of these names, or all; each row is handed to `found` at once. Gives the names of those that
/// failed.
///
/// # Errors
/// If there is none of such a name, and those of `found`. A fault that fails is part of the outcome.
pub fn run(
    only: &[String],
    mut found: impl FnMut(&'static str, Row) -> Result<()>,
) -> Result<Vec<&'static str>> {
    for name in only {
        let known = all().any(|fault| fault.name == name);
        ensure!(known, "no fault `{name}`: cargo xtask faults --list");
    }
    let wanted = |fault: &&Fault| only.is_empty() || only.iter().any(|name| name == fault.name);
    let mut rest = all().filter(wanted).peekable();
    let mut failed = Vec::new();
    while let Some(first) = rest.next() {
        let mut next = Some(first);
        let ran = with_lab("faults", pair::options(), |lab| {
            let mut pair = Pair::start(lab)?;
            while let Some(fault) = next.take() {
                let began = Instant::now();
                let row = fault
                    .run(&mut pair)
                    .inspect_err(|_| show_logs(lab))
                    .with_context(|| fault.name)?;
                let seconds = began.elapsed().as_secs_f32();
                println!("{}: {seconds:.0} s: {row:?}", fault.name);
                found(fault.name, row)?;
                next = rest.next();
                if next.is_some() {
                    pair.ready()?;
                }
            }
            Ok(())
        });
        if let Err(error) = ran {
            // What failed may be the next one's machines, too; then it has not been tried.
            let told = error
                .chain()
                .find_map(|cause| all().find(|fault| cause.to_string() == fault.name));
            println!("FAILED\n{error:#}");
            failed.push(told.or(next).map_or("the machines", |fault| fault.name));
        }
    }
    Ok(failed)
}

/// What the agents and the kernels said last: the machines of a fault that failed are not kept.
fn show_logs(lab: &Lab) {
    for node in NodeName::ALL {
        let (agent, console) = (lab.agent_log(node), lab.console_log(node));
        println!("--- agent of {node}\n{}", progress::tail(&agent, 80));
        println!("--- console of {node}\n{}", progress::tail(&console, 15));
    }
    for event in lab.events().unwrap_or_default().iter().rev().take(12) {
        println!("{event}");
    }
}

impl Fault {
    fn run(&self, pair: &mut Pair<'_>) -> Result<Row> {
        progress::note(&format!("fault: {} ({})", self.name, self.what));
        let row = match self.course {
            Course::Plain {
                inject,
                sign,
                ending,
                undo,
            } => self.plain(pair, inject, sign, ending, undo)?,
            Course::Own(run) => run(pair, self)?,
        };
        if let Some(after_ms) = row.detected_ms {
            ensure!(
                after_ms <= self.within_s * 1000,
                "told after {after_ms} ms only, and {} s are stated: {row:?}",
                self.within_s
            );
        }
        ensure!(
            row.confirmed_bytes_lost.unwrap_or(0) == 0,
            "something confirmed is lost: {row:?}"
        );
        Ok(row)
    }

    fn plain(
        &self,
        pair: &mut Pair<'_>,
        inject: Inject,
        sign: Sign,
        ending: Ending,
        undo: Undo,
    ) -> Result<Row> {
        let writer = pair.write()?;
        let lag_before = pair.lag();
        let begun = bring_about(pair, inject)?;
        let seen = self.detect(pair, sign, begun)?;
        if ending == Ending::PowerCutLater {
            pair.ready()?;
            writer.go_on(100, Duration::from_secs(10));
        } else if ending != Ending::Fenced {
            writer.go_on(100, Duration::from_secs(3));
        }
        let lag = if ending == Ending::Fenced {
            lag_before
        } else {
            pair.lag().or(lag_before)
        };
        let mut left = None;
        match ending {
            Ending::Healed => {
                take_back(pair, undo)?;
                pair.ready()?;
                writer.end()?;
            }
            Ending::Fenced => left = Some(pair.taken_over(&writer)?),
            Ending::PowerCut | Ending::PowerCutLater => {
                pair.lab.crash(pair.owner, CrashKind::Kill)?;
                take_back(pair, undo)?;
                left = Some(pair.taken_over(&writer)?);
            }
        }
        let row = self.row(seen, ending.told(), left, lag)?;
        if left.is_some() {
            pair.come_back()?;
        }
        Ok(row)
    }

    /// Waits until it is told.
    fn detect(&self, pair: &Pair<'_>, sign: Sign, begun: Moment) -> Result<Seen> {
        let limit = Duration::from_secs(self.within_s);
        let weakened = |event: &serde_json::Value| {
            event["event"] == "protection_changed" && event["to"] != "protected"
        };
        let begun = match sign {
            Sign::Mirror(_) | Sign::MirrorSays(..) | Sign::SeenAs(_) => {
                pair.on_clock_of(begun, pair.mirror())?
            }
            _ => begun,
        };
        let mut seen = match sign {
            Sign::Weakened => pair.await_event(begun, limit, "anything", weakened)?,
            Sign::Says(words) => pair.await_event(begun, limit, words, |event| {
                weakened(event) && event["reason"].as_str().is_some_and(|r| r.contains(words))
            })?,
            Sign::Owner(name) | Sign::OwnerLast(name, _) | Sign::Mirror(name) => {
                pair.await_event(begun, limit, name, |event| event["event"] == name)?
            }
            Sign::MirrorSays(name, words) => pair.await_event(begun, limit, words, |event| {
                event["event"] == name
                    && event["reason"].as_str().is_some_and(|r| r.contains(words))
            })?,
            Sign::SeenAs(state) => pair.await_event(begun, limit, state, |event| {
                event["event"] == "peer_changed" && event["to"] == state
            })?,
            Sign::Stays(seconds) => {
                let time = Duration::from_secs(seconds);
                bench::throughout(pair.lab, "the volume is protected", time, || {
                    Ok(pair.shown(pair.owner)?.0 == "protected")
                })?;
                Seen::default()
            }
        };
        match sign {
            Sign::Weakened | Sign::Says(_) => {}
            Sign::Owner(_) | Sign::SeenAs(_) | Sign::Stays(_) => {
                let (state, reason) = pair.shown(pair.owner)?;
                seen.state = state;
                if !reason.is_empty() {
                    seen.reason = reason;
                }
            }
            Sign::OwnerLast(_, words) => {
                let limit = limit.saturating_sub(Duration::from_millis(seen.after_ms.unwrap_or(0)));
                bench::until(pair.lab, "the mirror tells of it, too", limit, || {
                    (seen.state, seen.reason) = pair.shown(pair.mirror())?;
                    Ok(seen.state != "protected" && seen.reason.contains(words))
                })?;
            }
            Sign::Mirror(_) | Sign::MirrorSays(..) => seen.state = pair.shown(pair.mirror())?.0,
        }
        if !seen.event.is_empty() {
            let whose = if begun.node == pair.owner {
                "owner"
            } else {
                "mirror"
            };
            seen.event = format!("{whose}: {}", seen.event);
        }
        Ok(seen)
    }

    fn row(
        &self,
        seen: Seen,
        ending: &str,
        left: Option<Left>,
        lag_records: Option<u64>,
    ) -> Result<Row> {
        Ok(Row {
            fault: self.what.to_owned(),
            how: self.how.to_owned(),
            told_by: if seen.event.is_empty() {
                "nothing to tell".to_owned()
            } else {
                seen.event
            },
            detected_ms: seen.after_ms,
            limit_ms: self.within_s * 1000,
            state: seen.state,
            reason: seen.reason,
            ending: ending.to_owned(),
            confirmations: left.map(|left| left.confirmations),
            confirmed_bytes_lost: left.map(|left| left.confirmed_bytes_lost),
            unconfirmed_records_lost: left.map(|left| left.unconfirmed_records_lost),
            lag_records,
            machines: "kernel 6.12, ext4".to_owned(),
            run_at: jiff::Timestamp::now()
                .strftime("%Y-%m-%d %H:%M")
                .to_string(),
        })
    }
}

fn bring_about(pair: &Pair<'_>, inject: Inject) -> Result<Moment> {
    match inject {
        Inject::Owner(command) => pair.inject(pair.owner, command),
        Inject::Mirror(command) => {
            let begun = pair.now(pair.owner)?;
            pair.inject(pair.mirror(), command)?;
            Ok(begun)
        }
        Inject::Host(inject) => inject(pair),
    }
}

fn take_back(pair: &Pair<'_>, undo: Undo) -> Result<()> {
    match undo {
        Undo::Nothing => Ok(()),
        Undo::Mirror(command) => pair.lab.run(pair.mirror(), command).map(drop),
        Undo::Host(undo) => undo(pair),
    }
}

/// Machines stop and go on at the emulator's word.
fn pause(lab: &Lab, node: NodeName) -> Result<()> {
    let said = lab.monitor(node, "stop")?;
    if said.is_empty() {
        return Ok(());
    }
    bail!("QEMU does not stop {node}: {said}")
}

fn go_on(lab: &Lab, node: NodeName) -> Result<()> {
    let said = lab.monitor(node, "cont")?;
    if said.is_empty() {
        return Ok(());
    }
    bail!("QEMU does not let {node} go on: {said}")
}
