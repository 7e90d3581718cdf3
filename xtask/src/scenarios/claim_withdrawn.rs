//! The peer claims a volume whose owner lives, cannot fence it, and gives it back. Meanwhile the owner
//! cannot unmount the volume, because something keeps it busy: nobody is told that anything is durable.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, await_takeover, is_mounted, options, require_start, until, volume,
};
use super::with_lab;
use crate::lab::{AwaitedState, CrashKind, Lab, NodeName};

use NodeName::{A, B};

const FENCE: &str = "/usr/local/sbin/twinwrite-fence";
/// It takes its time, so that the owner finds the claim, and fails.
const NO_FENCE: &str = "#!/bin/sh\nsleep 15\necho the other node does not answer >&2\nexit 1\n";
/// Counts up in a file, and notes each number that an fsync has confirmed.
const WRITER: &str = r#"
import os
fd = os.open("/srv/vol0/number", os.O_RDWR | os.O_CREAT, 0o600)
noted = open("/host/noted", "a")
number = int.from_bytes(os.pread(fd, 8, 0), "little")
while True:
    number += 1
    os.pwrite(fd, number.to_bytes(8, "little") * 512, 0)
    os.fsync(fd)
    noted.write(f"{number}\n")
    noted.flush()
"#;

pub(super) fn run() -> Result<()> {
    let options = options(&["dead_after = \"6s\""], &[NO_CHECKPOINT]);
    with_lab("claim_withdrawn", options, |lab| {
        require_start(lab)?;
        lab.run(B, &format!("cp -p {FENCE} {FENCE}.works"))?;
        fs::write(lab.share(B).join("no-fence"), NO_FENCE)?;
        lab.run(B, &format!("install -m 755 /host/no-fence {FENCE}"))?;
        fs::write(lab.share(A).join("writer.py"), WRITER)?;
        start_writer(lab)?;
        lab.run(
            A,
            "cd /srv/vol0 && setsid sleep 1000 </dev/null >/dev/null 2>&1 &",
        )?;
        claimed_and_busy(lab).context("while the peer claims the volume")?;
        lab.wait(A, AwaitedState::Protected, LIMIT)?;
        ensure!(is_mounted(lab, A)?, "A serves what it has not mounted");
        lab.run(B, &format!("mv {FENCE}.works {FENCE}"))?;
        let before = noted(lab)?;
        start_writer(lab)?;
        until(lab, "fsyncs are answered again", LIMIT, || {
            Ok(noted(lab)? > before + 3)
        })?;
        lab.crash(A, CrashKind::Kill)?;
        let confirmed = noted(lab)?;
        await_takeover(lab, B)?;
        let number = lab.run(B, "od -An -tu8 -N8 /srv/vol0/number")?;
        let number: u64 = number.trim().parse().context("the number on B")?;
        ensure!(
            number >= confirmed,
            "{confirmed} was confirmed, B has {number}"
        );
        Ok(())
    })
}

fn start_writer(lab: &Lab) -> Result<()> {
    lab.run(
        A,
        "setsid python3 /host/writer.py </dev/null >/dev/null 2>&1 &",
    )?;
    let before = noted(lab)?;
    until(lab, "the writer's fsyncs are answered", LIMIT, || {
        Ok(noted(lab)? > before)
    })
}

/// The last number that was confirmed.
fn noted(lab: &Lab) -> Result<u64> {
    let text = fs::read_to_string(lab.share(A).join("noted")).unwrap_or_default();
    Ok(text.lines().next_back().unwrap_or("0").parse()?)
}

fn claimed_and_busy(lab: &Lab) -> Result<()> {
    lab.run(A, "kill -STOP $(cat /run/twinwrite-agent.pid)")?;
    let shows = |node, protection: &str, words: &str| -> Result<bool> {
        let volume = volume(lab, node)?;
        let reason = volume["reason"].as_str().unwrap_or_default();
        Ok(volume["protection"] == protection && reason.contains(words))
    };
    until(lab, "B claims the volume", LIMIT, || {
        shows(B, "suspended", "takes the volume over")
    })?;
    lab.run(A, "kill -CONT $(cat /run/twinwrite-agent.pid)")?;
    until(lab, "A says what keeps the volume busy", LIMIT, || {
        shows(A, "suspended", "busy")
    })?;
    let confirmed = noted(lab)?;
    let late = lab.exec(
        A,
        "timeout 4 dd if=/dev/zero of=/srv/vol0/late bs=4k count=1 conv=fsync 2>&1",
        Duration::from_secs(30),
    )?;
    ensure!(
        late.status != 0,
        "an fsync was answered on a volume that the peer claims"
    );
    ensure!(
        noted(lab)? == confirmed,
        "the writer's fsyncs were answered"
    );
    Ok(())
}
