//! A volume without a free block: what its owner's death costs there.

use anyhow::{Result, ensure};

use super::pair::{Pair, Seen};
use super::{Course, Fault, Row};
use crate::lab::CrashKind;
use crate::lab::config::MOUNT_POINT;
use crate::scenarios::bench::{self, LIMIT, number, volume};

/// Files that are made once the volume is full: that needs no block, and bringing them back needs some.
const NAMES: u64 = 20;

/// Takes all that root can take.
const FILL: &str = "cd /srv/vol0 && for size in 256M 32M 4M 512k 64k 4k; do number=0; \
    while fallocate -l $size filler-$size-$number 2>/dev/null; do number=$((number + 1)); done; done; \
    sync; ! fallocate -l 4k filler-last 2>/dev/null";

pub(super) const FAULTS: &[Fault] = &[Fault {
    name: "disk-full",
    what: "the volume has no space left",
    how: "fallocate takes all of it; files are made, which needs no block, and the owner dies",
    within_s: 10,
    course: Course::Own(disk_full),
}];

fn disk_full(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    pair.inject(pair.owner, FILL)?;
    pair.ready()?;
    let before = volume(pair.lab, pair.owner)?;
    let captured = number(&before, "captured_seq")?;
    let reserved = number(&before, "reserve_bytes")?;
    ensure!(reserved > 0, "nothing is set aside on the full volume");
    // To be full is no weakness as long as that is there.
    let seen = Seen {
        state: "protected".to_owned(),
        reason: format!("{reserved} bytes are set aside"),
        ..Seen::default()
    };
    pair.lab.run(
        pair.owner,
        &format!("for i in $(seq {NAMES}); do : >{MOUNT_POINT}/made-$i; done"),
    )?;
    bench::until(pair.lab, "they are mirrored", LIMIT, || {
        let volume = volume(pair.lab, pair.owner)?;
        Ok(volume["protection"] == "protected"
            && number(&volume, "captured_seq")? >= captured + NAMES
            && number(&volume, "mirrored_seq")? == number(&volume, "captured_seq")?)
    })?;
    let lag = pair.lag();
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let left = pair.taken_over(&writer)?;
    let merged = merged(pair)?;
    // With no more room than before the survivor attaches, tries its hooks, and looks for its mirror.
    bench::until(pair.lab, "capture works on the survivor", LIMIT, || {
        Ok(pair.shown(pair.mirror())?.1.contains("not mirrored"))
    })?;
    let ending = format!("power cut, taken over with {merged} records merged");
    let row = fault.row(seen, &ending, Some(left), lag)?;
    pair.come_back()?;
    Ok(row)
}

/// How many records were merged into the full volume; all files are there.
fn merged(pair: &Pair<'_>) -> Result<u64> {
    let (lab, survivor) = (pair.lab, pair.mirror());
    let takeover = volume(lab, survivor)?["takeover"].clone();
    let merged = number(&takeover, "records_replayed")?;
    ensure!(
        merged >= NAMES,
        "fewer records were merged than files were made: {takeover}"
    );
    let made = lab.run(survivor, &format!("ls -d {MOUNT_POINT}/made-* | wc -l"))?;
    ensure!(
        made.trim() == NAMES.to_string(),
        "of {NAMES} files {made} are there"
    );
    Ok(merged)
}
