//! Faults of nodes and their memory that take more than one step: damage found at the takeover, and the
//! orders in which nodes die and return.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::pair::{Moment, Pair, Seen};
use super::{Course, Fault, Row};
use crate::lab::config::{MOUNT_POINT, VOLUME};
use crate::lab::{AgentAction, CrashKind, NodeName};
use crate::scenarios::bench::{self, LIMIT, number};

const fn fault(
    name: &'static str,
    what: &'static str,
    how: &'static str,
    within_s: u64,
    run: fn(&mut Pair<'_>, &Fault) -> Result<Row>,
) -> Fault {
    Fault {
        name,
        what,
        how,
        within_s,
        course: Course::Own(run),
    }
}

pub(super) const FAULTS: &[Fault] = &[
    fault(
        "region-damaged",
        "the owner dies, and the region's memory is damaged",
        "the whole log in the region file overwritten on the mirror right after the power cut; a person gives the region up",
        40,
        region_damaged,
    ),
    fault(
        "mailbox-slot-torn",
        "the owner's slot in the mailbox is torn by its death",
        "power cut, then 256 bytes in the middle of its slot overwritten",
        15,
        slot_torn,
    ),
    fault(
        "owner-reboots-unfenced",
        "the owner dies and reboots before it was taken over; no fence is configured",
        "power cut, boot, start of its agent; it does not serve before the mirror merged",
        20,
        owner_reboots_unfenced,
    ),
    fault(
        "both-off-owner-first",
        "both lose power; the owner returns first",
        "power cut of both, boot of the owner, later of the mirror, whose memory is lost",
        60,
        both_off_owner_first,
    ),
    fault(
        "both-off-mirror-first",
        "both lose power; the mirror returns first",
        "power cut of both, boot of the mirror, whose memory is lost; later of the owner",
        60,
        both_off_mirror_first,
    ),
    fault(
        "mirror-dies-in-replay",
        "the mirror's kernel dies in the middle of its replay",
        "sysrq b as soon as the replay's staging directory is there; boot",
        90,
        mirror_dies_in_replay,
    ),
];

/// The first event on the mirror, counted from a moment on the owner's clock.
fn told_by_mirror(pair: &Pair<'_>, fault: &Fault, begun: Moment, names: &[&str]) -> Result<Seen> {
    let begun = pair.on_clock_of(begun, pair.mirror())?;
    let limit = Duration::from_secs(fault.within_s);
    let mut seen = pair.await_event(begun, limit, fault.what, |event| {
        names.iter().any(|name| event["event"] == *name)
            && (event["event"] != "takeover_step" || !event["error"].is_null())
    })?;
    seen.event = format!("mirror: {}", seen.event);
    let (state, reason) = pair.shown(pair.mirror())?;
    seen.state = state;
    if !reason.is_empty() {
        seen.reason = reason;
    }
    Ok(seen)
}

fn region_damaged(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    let lag = pair.lag();
    let begun = pair.now(pair.owner)?;
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    // Before the takeover begins, and after the last frame: what is sent later is whole again.
    pair.lab.run(
        pair.mirror(),
        &format!(
            "region=/dev/shm/twinwrite/{VOLUME}.region; [ -s $region ] && \
             head -c $(($(stat -c %s $region) - 16384)) /dev/zero | tr '\\0' '\\377' | \
             dd of=$region bs=16k seek=1 conv=notrunc status=none"
        ),
    )?;
    let seen = told_by_mirror(pair, fault, begun, &["takeover_step", "takeover_waits"])?;
    let serves = pair.shown(pair.mirror())?.0 != "suspended";
    ensure!(
        !serves,
        "the region is damaged, and the volume is served without a person's word"
    );
    pair.lab.run(
        pair.mirror(),
        &format!("twinwrite takeover --discard-region {VOLUME}"),
    )?;
    let left = pair.taken_over(&writer)?;
    let row = fault.row(
        seen,
        "a person's word (`--discard-region`), taken over",
        Some(left),
        lag,
    )?;
    pair.come_back()?;
    Ok(row)
}

fn slot_torn(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    let lag = pair.lag();
    let begun = pair.now(pair.owner)?;
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let slot = match pair.owner {
        NodeName::A => 0,
        NodeName::B => 4096,
    };
    pair.lab.run(
        pair.mirror(),
        &format!(
            "head -c 256 /dev/urandom | dd of=$(cat /run/disk-mailbox) bs=1 seek={} conv=notrunc status=none; \
             sync",
            slot + 160
        ),
    )?;
    let seen = told_by_mirror(pair, fault, begun, &["takeover_began"])?;
    let left = pair.taken_over(&writer)?;
    let row = fault.row(seen, "taken over", Some(left), lag)?;
    pair.come_back()?;
    Ok(row)
}

const TOML: &str = "/etc/twinwrite/twinwrite.toml";

/// Starts the agents again with another configuration.
fn reconfigure(pair: &Pair<'_>, change: &str) -> Result<()> {
    for node in NodeName::ALL {
        pair.lab.agent(node, AgentAction::Kill)?;
        pair.lab.run(node, change)?;
    }
    for node in NodeName::ALL {
        pair.lab.agent(node, AgentAction::Start)?;
    }
    pair.ready()
}

fn owner_reboots_unfenced(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let no_fence = format!("sed -i '/^fence_command/d' {TOML}");
    reconfigure(pair, &no_fence)?;
    let writer = pair.write()?;
    let lag = pair.lag();
    let begun = pair.now(pair.owner)?;
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let seen = told_by_mirror(pair, fault, begun, &["takeover_waits", "takeover_step"])?;
    // It boots while the takeover waits for a person.
    let former = pair.owner;
    pair.boot(former)?;
    pair.lab.run(former, &no_fence)?;
    pair.lab.agent(former, AgentAction::Start)?;
    let left = pair.taken_over(&writer)?;
    ensure!(
        !bench::is_mounted(pair.lab, former)?,
        "the node that rebooted has the volume mounted, too"
    );
    let row = fault.row(
        seen,
        "it boots; the mirror merges and serves",
        Some(left),
        lag,
    )?;
    pair.owner = former.peer();
    reconfigure(pair, &format!("cp /host/etc/twinwrite.toml {TOML}"))?;
    pair.lab
        .run(pair.owner, &format!("rm -rf {MOUNT_POINT}/*"))?;
    pair.ready()?;
    Ok(row)
}

fn both_off(pair: &Pair<'_>) -> Result<Moment> {
    let begun = pair.now(pair.owner)?;
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    pair.lab.crash(pair.mirror(), CrashKind::Kill)?;
    Ok(begun)
}

fn both_off_owner_first(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    let lag = pair.lag();
    both_off(pair)?;
    let former = pair.owner;
    pair.boot(former)?;
    let started = pair.now(former)?;
    pair.lab.agent(former, AgentAction::Start)?;
    let limit = Duration::from_secs(fault.within_s);
    let mut seen = pair.await_event(started, limit, fault.what, |event| {
        event["event"] == "ownership_decided"
    })?;
    seen.event = format!("owner: {}", seen.event);
    bench::until(pair.lab, "it says what it waits for", LIMIT, || {
        Ok(pair.shown(former)?.0 == "suspended")
    })?;
    (seen.state, _) = pair.shown(former)?;
    ensure!(
        !bench::is_mounted(pair.lab, former)?,
        "it serves although its records may lie in the mirror's memory"
    );
    pair.bring_up(pair.mirror())?;
    let left = pair.taken_over(&writer)?;
    let row = fault.row(
        seen,
        "the mirror boots, merges what there is, serves",
        Some(left),
        lag,
    )?;
    pair.owner = former.peer();
    pair.lab
        .run(pair.owner, &format!("rm -rf {MOUNT_POINT}/*"))?;
    pair.ready()?;
    Ok(row)
}

fn both_off_mirror_first(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    let lag = pair.lag();
    both_off(pair)?;
    let survivor = pair.mirror();
    pair.boot(survivor)?;
    let started = pair.now(survivor)?;
    pair.lab.agent(survivor, AgentAction::Start)?;
    let seen = told_by_mirror(pair, fault, started, &["takeover_began"])?;
    let left = pair.taken_over(&writer)?;
    let serving = pair.await_event(started, LIMIT, "that the loss is unknown", |event| {
        event["event"] == "serving" && event["loss_unknown"] == true
    });
    ensure!(
        serving.is_ok(),
        "the region is lost, and nobody says that the loss is unknown\n{}",
        pair.lab.explain()
    );
    let row = fault.row(
        seen,
        "taken over; `serving` says loss_unknown",
        Some(left),
        lag,
    )?;
    pair.come_back()?;
    Ok(row)
}

fn mirror_dies_in_replay(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    /// So many that their replay can be hit in the middle.
    const OPERATIONS: u64 = 4000;
    /// Behind them some are confirmed by an `fsync`. A `syncfs` would leave nothing to replay.
    const CONFIRMED: u64 = 200;
    const PER_SECOND: u64 = 400;
    let writer = pair.write_at(PER_SECOND, 2 * OPERATIONS)?;
    bench::until(pair.lab, "there is enough to replay", LIMIT, || {
        let volume = bench::volume(pair.lab, pair.owner)?;
        let held = number(&volume, "mirrored_seq")?.saturating_sub(number(&volume, "purged_seq")?);
        Ok(writer.acknowledged() >= OPERATIONS + CONFIRMED && held >= OPERATIONS)
    })?;
    let lag = pair.lag();
    let survivor = pair.mirror();
    let begun = pair.now(pair.owner)?;
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let wait_and_die = format!(
        "until [ -d {MOUNT_POINT}/.twinwrite/staging ]; do :; done; echo b >/proc/sysrq-trigger; sleep 60"
    );
    let survived = pair.lab.exec(survivor, &wait_and_die, LIMIT);
    ensure!(survived.is_err(), "it did not die: {survived:?}");
    pair.lab.await_death(survivor)?;
    pair.boot(survivor)?;
    let begun = pair.on_clock_of(begun, survivor)?;
    pair.lab.agent(survivor, AgentAction::Start)?;
    let limit = Duration::from_secs(fault.within_s);
    let mut seen = pair.await_event(begun, limit, fault.what, |event| {
        event["event"] == "ownership_decided" && event["decision"] == "finish_takeover"
    })?;
    seen.event = format!("mirror: {}", seen.event);
    seen.state = pair.shown(survivor)?.0;
    let left = pair.taken_over(&writer)?;
    let row = fault.row(
        seen,
        "it boots and merges from its saved copy",
        Some(left),
        lag,
    )?;
    pair.come_back()?;
    Ok(row)
}
