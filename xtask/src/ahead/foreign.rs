//! A region that is offered after somebody else had the volume: the dead owner's records are still in
//! the mirror's memory, and older than what was confirmed to whoever mounted the volume by hand.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::pair::Pair;
use super::{CASES, judgement, round};
use crate::lab::config::{mount_point, volume_device, volume_name};

const LIMIT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(500);

/// Mounts every volume on the survivor, whose agent is not running, and overwrites durably all that
/// the dead owner's applications left.
pub(super) fn mount_and_overwrite(pair: &Pair<'_>, number: u64) -> Result<()> {
    let mut script = "set -e\n".to_owned();
    for (index, case) in CASES.iter().enumerate() {
        let (device, at) = (volume_device(index), format!("/tmp/elsewhere{index}"));
        let directory = round::directory(index, number).replace(&mount_point(index), &at);
        let (seed, log) = (round::seed(pair.seed, number, index), judgement::log(index));
        script += &format!(
            "mkdir -p {at}; mount {device} {at}\n\
             if [ -e {directory} ]; then twinwrite-workload ahead-follow --case {case} \
             --directory {directory} --log /host/{log} --seed {seed}; fi\n\
             umount {at}\n"
        );
    }
    pair.lab.run(pair.owner, &script).map(drop)
}

/// Waits until every takeover is complete, or asks a person; who lets the region go. Gives how many
/// asked.
pub(super) fn await_takeovers(pair: &Pair<'_>) -> Result<u64> {
    let deadline = Instant::now() + LIMIT;
    let mut told = vec![false; CASES.len()];
    loop {
        let status = pair.status().unwrap_or_default();
        let mut serving = 0;
        for (index, volume) in status.iter().enumerate() {
            let takeover = &volume["takeover"];
            let Some(told) = told.get_mut(index) else {
                continue;
            };
            if takeover["serving"] == true {
                serving += 1;
            } else if takeover["error"].is_string() && !*told {
                let name = volume_name(index);
                let word = format!("twinwrite takeover --discard-region {name}");
                // Refused while it asks nothing: asked again the next time round.
                *told = pair.lab.run(pair.owner, &word).is_ok();
            }
        }
        if serving == CASES.len() {
            return Ok(told.iter().filter(|told| **told).count() as u64);
        }
        ensure!(
            Instant::now() < deadline,
            "not all volumes are served after {} s\n{}",
            LIMIT.as_secs(),
            pair.lab.explain()
        );
        sleep(POLL);
    }
}
