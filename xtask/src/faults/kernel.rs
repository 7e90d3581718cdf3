//! Faults in what the kernel lets the hooks see.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::pair::{Pair, Seen};
use super::{Course, Fault, Row};
use crate::lab::CrashKind;
use crate::lab::config::MOUNT_POINT;
use crate::scenarios::bench;

const fn fault(
    name: &'static str,
    what: &'static str,
    how: &'static str,
    run: fn(&mut Pair<'_>, &Fault) -> Result<Row>,
) -> Fault {
    Fault {
        name,
        what,
        how,
        within_s: 10,
        course: Course::Own(run),
    }
}

pub(super) const FAULTS: &[Fault] = &[
    fault(
        "user-page-gone",
        "the pages that a write came from are gone when the hook looks at them",
        "another thread throws them away (MADV_DONTNEED) all the time; the agent fills from the page cache",
        user_page_gone,
    ),
    fault(
        "write-back-error-mended",
        "a write-back fails, its pages are marked clean, and the disk works again",
        "dm: the error target under one file's blocks, sync, linear again, sync",
        writeback_mended,
    ),
    fault(
        "write-back-error-crash",
        "a write-back fails, later syncs succeed, and the owner dies",
        "the same, the disk stays broken there; the power is cut",
        writeback_crash,
    ),
    fault(
        "thin-pool-full",
        "the thin pool under the volume is full",
        "writes of one file's blocks fail with ENOSPC after they were accepted; the pool grows again",
        thin_pool_full,
    ),
];

/// Makes a file durable, finds its blocks, writes others over it, and breaks the disk just there. What
/// it was is in `/run/broken`.
const BREAK: &str = "set -e; victim=/srv/vol0/victim; \
    dd if=/dev/urandom of=$victim bs=4k count=64 status=none; sync; \
    set -- $(filefrag -b512 -v $victim | awk '$1 == \"0:\" { print $4, $6 }' | tr -d .:); \
    start=$1; length=$2; disk=$(cat /run/disk-volume); size=$(cat /run/size-volume); \
    [ $length -ge 512 ]; after=$((start + 512)); \
    echo \"0 $size linear $disk 0\" >/run/whole; \
    { echo \"0 $start linear $disk 0\"; echo \"$start 512 FAULT\"; \
      echo \"$after $((size - after)) linear $disk $after\"; } >/run/broken; ";

/// Puts another mapping under the volume.
fn remap(table: &str) -> String {
    format!(
        "dmsetup suspend --noflush --nolockfs lab-volume && \
         dmsetup reload lab-volume {table} && dmsetup resume lab-volume"
    )
}

const VICTIM: &str = "sha256sum </srv/vol0/victim";

/// The write-back of the victim has failed, because this mapping lies under it.
fn fail_writeback(pair: &Pair<'_>, fault: &Fault, mapping: &str) -> Result<Seen> {
    let broken = remap("</run/broken.now");
    let command = format!(
        "{BREAK} sed 's|FAULT|{mapping}|' /run/broken >/run/broken.now; {broken}; \
         dd if=/dev/urandom of=$victim bs=4k count=64 conv=notrunc status=none; \
         date +%s%N >/run/begun; sync $victim && exit 9; true"
    );
    pair.lab.run_within(pair.owner, &command, bench::LIMIT)?;
    let begun = pair.at(pair.owner, "cat /run/begun")?;
    let limit = Duration::from_secs(fault.within_s);
    let mut seen = pair.await_event(begun, limit, "write-back", |event| {
        let reason = event["reason"].as_str().unwrap_or_default();
        event["event"] == "protection_changed" && reason.contains("write-back")
    })?;
    seen.event = format!("owner: {}", seen.event);
    Ok(seen)
}

fn writeback_mended(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    let seen = fail_writeback(pair, fault, "error")?;
    let written = pair.lab.run(pair.owner, VICTIM)?;
    pair.lab
        .run(pair.owner, &remap("--table \"$(cat /run/whole)\""))?;
    pair.ready()?;
    let lag = pair.lag();
    // Dropped from the cache, so that what is read now is what the disk has.
    let on_disk = format!("echo 1 >/proc/sys/vm/drop_caches; {VICTIM}");
    let found = pair.lab.run(pair.owner, &on_disk)?;
    ensure!(
        found == written,
        "protected again, and the disk has other bytes: {found}, not {written}"
    );
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let left = pair.taken_over(&writer)?;
    let found = pair.lab.run(pair.mirror(), VICTIM)?;
    ensure!(
        found == written,
        "the survivor has other bytes: {found}, not {written}"
    );
    let ending = "written again and proven, protected again; power cut, taken over";
    let row = fault.row(seen, ending, Some(left), lag)?;
    pair.come_back()?;
    Ok(row)
}

fn writeback_crash(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    let writer = pair.write()?;
    let seen = fail_writeback(pair, fault, "error")?;
    let written = pair.lab.run(pair.owner, VICTIM)?;
    // It was told of the error; asked again, the kernel says that all is well. Unless the gate keeps that
    // answer back: whom it has stopped only this signal ends.
    pair.lab.run(
        pair.owner,
        "timeout -s KILL 3 sync /srv/vol0/victim; timeout -s KILL 3 sync -f /srv/vol0; true",
    )?;
    let lag = pair.lag();
    let (state, _) = pair.shown(pair.owner)?;
    ensure!(
        state != "protected",
        "bytes are on no disk, and the volume is called protected"
    );
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let left = pair.taken_over(&writer)?;
    let found = pair.lab.run(pair.mirror(), VICTIM)?;
    ensure!(
        found == written,
        "the survivor has other bytes: {found}, not {written}"
    );
    let row = fault.row(seen, "power cut at once, taken over", Some(left), lag)?;
    pair.come_back()?;
    Ok(row)
}

/// A thin pool of one block, of which the victim needs four.
const POOL: &str = "set -e; modprobe -a dm-thin-pool loop; cd /var/lib/twinwrite; \
    truncate -s 4M thin-meta; truncate -s 1M thin-data; \
    meta=$(losetup --find --show thin-meta); data=$(losetup --find --show thin-data); \
    echo \"thin-pool $meta $data 128 0 1 error_if_no_space\" >/run/pool; \
    dmsetup create lab-pool --noudevsync --table \"0 128 $(cat /run/pool)\"; \
    dmsetup message lab-pool 0 'create_thin 0'; dmsetup mknodes; \
    dmsetup create lab-thin --noudevsync --table '0 512 thin /dev/mapper/lab-pool 0'; dmsetup mknodes";
const GROW: &str = "dmsetup suspend lab-pool && \
    dmsetup reload lab-pool --table \"0 2048 $(cat /run/pool)\" && dmsetup resume lab-pool";

fn thin_pool_full(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    pair.lab.run(pair.owner, POOL)?;
    let writer = pair.write()?;
    let seen = fail_writeback(pair, fault, "linear /dev/mapper/lab-thin 0")?;
    let written = pair.lab.run(pair.owner, VICTIM)?;
    pair.lab.run(pair.owner, GROW)?;
    pair.ready()?;
    let lag = pair.lag();
    let on_disk = format!("echo 1 >/proc/sys/vm/drop_caches; {VICTIM}");
    let found = pair.lab.run(pair.owner, &on_disk)?;
    ensure!(
        found == written,
        "protected again, and the disk has other bytes: {found}, not {written}"
    );
    writer.end()?;
    // What lies in the pool is seen by this node only.
    let whole = remap("--table \"$(cat /run/whole)\"");
    let clean = "dmsetup remove lab-thin && dmsetup remove lab-pool && losetup -D; \
                 rm -f /var/lib/twinwrite/thin-*";
    let command = format!("rm /srv/vol0/victim; sync; {whole} && {clean}");
    pair.lab.run(pair.owner, &command)?;
    let ending = "the pool grows: written again and proven, protected again";
    fault.row(seen, ending, None, lag)
}

fn user_page_gone(pair: &mut Pair<'_>, fault: &Fault) -> Result<Row> {
    const SUM: &str = "sha256sum <";
    let writer = pair.write()?;
    let fills = |pair: &Pair<'_>| bench::metric(pair.lab, pair.owner, "twinwrite_fills_total", "");
    let before = fills(pair)?;
    let script = include_str!("user_page.py");
    pair.lab.run(
        pair.owner,
        &format!(
            "cat >/run/user_page.py <<'END'\n{script}END\n\
             python3 /run/user_page.py {MOUNT_POINT}/torn-pages 80"
        ),
    )?;
    bench::throughout(
        pair.lab,
        "the volume is protected",
        Duration::from_secs(3),
        || Ok(pair.shown(pair.owner)?.0 == "protected"),
    )?;
    bench::until(pair.lab, "the lag is gone", bench::LIMIT, || {
        Ok(pair.lag() == Some(0))
    })?;
    let filled = fills(pair)? - before;
    ensure!(
        filled > 0.0,
        "no page was gone when the hook came: nothing was injected"
    );
    let written = pair
        .lab
        .run(pair.owner, &format!("{SUM}{MOUNT_POINT}/torn-pages"))?;
    let lag = pair.lag();
    pair.lab.crash(pair.owner, CrashKind::Kill)?;
    let left = pair.taken_over(&writer)?;
    let found = pair
        .lab
        .run(pair.mirror(), &format!("{SUM}{MOUNT_POINT}/torn-pages"))?;
    ensure!(
        found == written,
        "the mirror's bytes are others than the file had: {found}, not {written}"
    );
    let seen = Seen {
        state: "protected".to_owned(),
        reason: format!("{filled} writes filled from the page cache"),
        ..Seen::default()
    };
    let row = fault.row(seen, "power cut, taken over", Some(left), lag)?;
    pair.come_back()?;
    Ok(row)
}
