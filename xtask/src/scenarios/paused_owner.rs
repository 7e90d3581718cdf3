//! An owner that stands still for a while and goes on, again and again: it is never two who write.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::bench::{LIMIT, until, volume};
use super::with_lab;
use crate::faults::pair::{self, Pair, Writer};
use crate::lab::config::{MOUNT_POINT, VOLUME};
use crate::lab::{AgentAction, AwaitedState, Filesystem, Lab, NodeName, Options};
use crate::progress;

/// After which the other one takes over.
const DEAD_AFTER: &str = "dead_after = \"3s\"";
/// With `TWINWRITE_LONG=1`; the first ones of the same sequence otherwise.
const PAUSES_LONG: u32 = 50;
const PAUSES: u32 = 8;
/// So many of them last for about as long as `dead_after`, or longer.
const LONG_EVERY: u32 = 4;

pub(super) fn on_ext4() -> Result<()> {
    paused("paused_owner", Filesystem::Ext4)
}

pub(super) fn on_xfs() -> Result<()> {
    paused("paused_owner_xfs", Filesystem::Xfs)
}

fn paused(name: &str, filesystem: Filesystem) -> Result<()> {
    let mut options = Options {
        filesystem,
        ..pair::options()
    };
    options.cluster_settings = vec![DEAD_AFTER.to_owned()];
    with_lab(name, options, |lab| {
        let mut pair = Pair::start(lab)?;
        let mut writer = pair.write()?;
        let (mut taken_over, mut seed) = (0, 0x2545_f491_4f6c_dd1d_u64);
        let pauses = pauses()?;
        for number in 1..=pauses {
            let pause = time(number, &mut seed);
            progress::note(&format!("pause {number}: {pause:?}"));
            stand_still(lab, pair.owner, number, pause)?;
            if is_taken_over(&pair)? {
                taken_over += 1;
                after_takeover(&mut pair, &writer, filesystem)
                    .with_context(|| format!("after pause {number}, of {pause:?}"))?;
                writer = pair.write()?;
            } else {
                writer.go_on(10, Duration::from_secs(1));
            }
        }
        ensure!(
            (1..pauses).contains(&taken_over),
            "of {pauses} pauses {taken_over} ended in a takeover: the times do not try both"
        );
        progress::note(&format!(
            "{pauses} pauses, {taken_over} takeovers, {filesystem} clean after each"
        ));
        Ok(())
    })
}

/// `TWINWRITE_PAUSES` says another number, for a shorter look.
fn pauses() -> Result<u32> {
    match std::env::var("TWINWRITE_PAUSES") {
        Ok(number) => number.parse().context("TWINWRITE_PAUSES is no number"),
        Err(_) if super::is_long() => Ok(PAUSES_LONG),
        Err(_) => Ok(PAUSES),
    }
}

/// How long the pause of this number is: mostly short, now and then around the limit and above.
fn time(number: u32, seed: &mut u64) -> Duration {
    // Any sequence will do that is the same in each run (Knuth's multiplier).
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    let part = *seed >> 33;
    let (least_ms, spread_ms) = if number.is_multiple_of(LONG_EVERY) {
        (2_500, 6_000)
    } else {
        (100, 1_500)
    };
    Duration::from_millis(least_ms + part % spread_ms)
}

/// Stops the emulator's process, or in turn its processors, which then know nothing of the time.
fn stand_still(lab: &Lab, node: NodeName, number: u32, pause: Duration) -> Result<()> {
    let machine = lab.machine(node)?;
    if number.is_multiple_of(2) {
        lab.monitor(node, "stop")?;
        sleep(pause);
        // By then it may have been fenced.
        let _ = lab.monitor(node, "cont");
    } else {
        machine.process.signal(Signal::SIGSTOP)?;
        sleep(pause);
        let _ = machine.process.signal(Signal::SIGCONT);
    }
    Ok(())
}

/// Waits until it is decided who serves.
fn is_taken_over(pair: &Pair<'_>) -> Result<bool> {
    let (lab, mut taken_over) = (pair.lab, false);
    until(lab, "one of them serves the volume", LIMIT, || {
        taken_over = lab.machine(pair.owner)?.ended.is_some();
        if taken_over {
            return Ok(volume(lab, pair.mirror())?["takeover"]["serving"] == true);
        }
        let mirror = volume(lab, pair.mirror())?;
        Ok(mirror["role"] == "mirror" && volume(lab, pair.owner)?["protection"] == "protected")
    })?;
    Ok(taken_over)
}

fn after_takeover(pair: &mut Pair<'_>, writer: &Writer<'_>, filesystem: Filesystem) -> Result<()> {
    let region = format!("sha256sum /dev/shm/twinwrite/{VOLUME}.region");
    let revoked = pair.lab.run(pair.mirror(), &region);
    let left = pair.taken_over(writer)?;
    ensure!(
        left.confirmed_bytes_lost == 0,
        "something confirmed is lost: {left:?}"
    );
    // A region is thrown away once it is merged; as long as it is there, nobody may write into it.
    if let (Ok(before), Ok(after)) = (revoked, pair.lab.run(pair.mirror(), &region)) {
        ensure!(before == after, "somebody wrote into a revoked region");
    }
    check_disk(pair, filesystem)?;
    pair.come_back()
}

/// The survivor lets the volume go, the disk is checked from outside, and it goes on.
fn check_disk(pair: &Pair<'_>, filesystem: Filesystem) -> Result<()> {
    let survivor = pair.mirror();
    pair.lab.agent(survivor, AgentAction::Stop)?;
    let unmount = format!("if mountpoint -q {MOUNT_POINT}; then umount {MOUNT_POINT}; fi");
    pair.lab.run(survivor, &unmount)?;
    let output = filesystem.check().arg(pair.lab.volume_disk()).output()?;
    if !output.status.success() {
        bail!(
            "{filesystem} is damaged: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    pair.lab.agent(survivor, AgentAction::Start)?;
    pair.lab.wait(survivor, AwaitedState::Owner, LIMIT)?;
    Ok(())
}
