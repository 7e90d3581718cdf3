//! Faults in what the kernel lets the hooks see.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::pair::{Pair, Seen};
use super::{Course, Fault, Row};
use crate::lab::CrashKind;
use crate::lab::config::MOUNT_POINT;
use crate::scenarios::bench;

pub(super) const FAULTS: &[Fault] = &[Fault {
    name: "user-page-gone",
    what: "the pages that a write came from are gone when the hook looks at them",
    how: "another thread throws them away (MADV_DONTNEED) all the time; the agent fills from the page cache",
    within_s: 10,
    course: Course::Own(user_page_gone),
}];

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
