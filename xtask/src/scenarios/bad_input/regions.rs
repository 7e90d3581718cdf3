//! Regions that must not be merged, and a volume without room.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::refused;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{AgentAction, AwaitedState, Lab, NodeName};
use crate::scenarios::bench::{
    CrashedDisk, LIMIT, Stream, all_mirrored, await_takeover, crash_and_copy, number,
};

use NodeName::{A, B};

const OPERATIONS: u64 = 600;
/// What the takeover merged.
const SAVED: &str = "/var/lib/twinwrite/saved/vol0.merged";
const REGION: &str = "/var/lib/twinwrite/region";
const ROOT: &str = CrashedDisk::MOUNT_POINT;

pub(super) fn run(lab: &Lab) -> Result<()> {
    let stream = Stream::start(lab, A, OPERATIONS, 0)?;
    stream.finish()?;
    all_mirrored(lab, A)?;
    let disk = crash_and_copy(lab, A)?;
    await_takeover(lab, B)?;
    stream.require_all(B)?;
    disk.mount(lab)?;
    damaged(lab)?;
    foreign(lab)?;
    full(lab, &stream)?;
    disk.unmount(lab)?;
    stale(lab)
}

fn replay(to: &str) -> String {
    format!("twinwrite replay --region {REGION} --to {to}")
}

/// Everything of the volume and of the region.
fn state(lab: &Lab) -> Result<String> {
    lab.run(
        B,
        &format!(
            "sha256sum {REGION}; twinwrite-workload inventory --root {ROOT} | sha256sum; \
             find {ROOT}/.twinwrite -type f -exec sha256sum {{}} +; ls -lR {ROOT}/.twinwrite"
        ),
    )
}

/// The region `make` makes of the saved one is refused, and nothing is changed.
fn nothing_changes(lab: &Lab, what: &str, make: &str, words: &[&str]) -> Result<()> {
    lab.run(B, &format!("cp {SAVED} {REGION}; {make}"))?;
    let before = state(lab)?;
    refused(lab, B, &replay(ROOT), words).with_context(|| what.to_owned())?;
    refused(lab, B, &format!("{} --dry-run", replay(ROOT)), words)
        .with_context(|| format!("{what}, tried dry"))?;
    ensure!(
        state(lab)? == before,
        "{what}: refused, and the volume or the region is changed"
    );
    Ok(())
}

fn damaged(lab: &Lab) -> Result<()> {
    // The log begins behind two pages; a byte of the first frame, of the header, of the middle.
    let flip = |at: u64| {
        format!("printf '\\377\\376' | dd of={REGION} bs=1 seek={at} conv=notrunc status=none")
    };
    nothing_changes(lab, "a damaged header", &flip(40), &["region", "header"])?;
    nothing_changes(lab, "a damaged frame", &flip(8192 + 300), &["region"])?;
    nothing_changes(
        lab,
        "a truncated region",
        &format!("truncate -s 40K {REGION}"),
        &["region"],
    )?;
    nothing_changes(
        lab,
        "no bytes at all",
        &format!("truncate -s 0 {REGION}"),
        &["region"],
    )?;
    nothing_changes(
        lab,
        "something else",
        &format!("dd if=/dev/urandom of={REGION} bs=64k count=16 status=none"),
        &["region"],
    )
}

/// A volume that the region does not belong to.
fn foreign(lab: &Lab) -> Result<()> {
    lab.run(
        B,
        &format!(
            "cp {SAVED} {REGION}; mkdir -p /tmp/foreign; truncate -s 64M /tmp/foreign.raw; \
             mkfs.ext4 -q /tmp/foreign.raw && mount -o loop /tmp/foreign.raw /tmp/foreign && \
             echo theirs >/tmp/foreign/file && sync"
        ),
    )?;
    let inventory = "twinwrite-workload inventory --root /tmp/foreign; ls -A /tmp/foreign";
    let before = lab.run(B, inventory)?;
    refused(lab, B, &replay("/tmp/foreign"), &["sentinel"]).context("a foreign volume")?;
    ensure!(
        lab.run(B, inventory)? == before,
        "a foreign volume was changed"
    );
    lab.run(B, "umount /tmp/foreign; rm /tmp/foreign.raw")
        .map(drop)
}

/// No room on the volume: the replay says so, and is run again when there is. The room is taken
/// without writing to it: the disk below has no gigabyte to give.
fn full(lab: &Lab, stream: &Stream<'_>) -> Result<()> {
    lab.run(
        B,
        &format!(
            "cp {SAVED} {REGION}; rm -f {ROOT}/.twinwrite/reserve; sync; for size in 256M 32M 4M 512k 64k 4k; do number=0; \
             while fallocate -l $size {ROOT}/filler-$size-$number 2>/dev/null; do \
             number=$((number + 1)); done; done; sync; df {ROOT} | tail -n 1"
        ),
    )?;
    let region = lab.run(B, &format!("sha256sum {REGION}"))?;
    refused(lab, B, &replay(ROOT), &["space"]).context("a full volume")?;
    // So full that the replay could not even begin; with room for the names and some of the bytes it
    // stops in the middle.
    lab.run(B, &format!("truncate -s -256K {ROOT}/filler-256M-0; sync"))?;
    refused(lab, B, &replay(ROOT), &["space", "write"]).context("a volume with little room")?;
    ensure!(
        lab.run(B, &format!("sha256sum {REGION}"))? == region,
        "the replay that ran out of space changed the region"
    );
    lab.run(B, &format!("rm {ROOT}/filler-*; sync"))?;
    let short = stream.judge(B, ROOT)?;
    ensure!(
        short["pass"] == false && number(&short, "stream_prefix")? < OPERATIONS,
        "the volume was full and the replay complete: {short}"
    );
    lab.run(B, &replay(ROOT)).context("with room again")?;
    let all = stream.judge(B, ROOT)?;
    ensure!(
        all["pass"] == true && number(&all, "stream_prefix")? == OPERATIONS,
        "run again with room, the replay is not complete: {all}"
    );
    lab.run(B, &replay(ROOT))
        .context("once more, with nothing to do")
        .map(drop)
}

/// A region of an epoch that the volume has left.
fn stale(lab: &Lab) -> Result<()> {
    lab.boot(A, false)?;
    lab.agent(A, AgentAction::Start)?;
    lab.wait(B, AwaitedState::Protected, LIMIT)?;
    lab.run(
        B,
        &format!("echo new >{MOUNT_POINT}/stream/f-new; sync; cp {SAVED} {REGION}"),
    )?;
    let inventory = format!("twinwrite-workload inventory --root {MOUNT_POINT} | sha256sum");
    let before = lab.run(B, &inventory)?;
    refused(lab, B, &replay(MOUNT_POINT), &["epoch"]).context("a stale region")?;
    ensure!(
        lab.run(B, &inventory)? == before,
        "a stale region changed the volume"
    );
    let events = fs::read_to_string(lab.agent_log(B))?;
    ensure!(!events.contains("panicked"), "B's agent panicked");
    Ok(())
}
