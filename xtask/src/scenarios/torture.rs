//! A small part of the torture suite: six seeds, three whose operations are mirrored at the power cut and
//! three that are in the middle of them.

use anyhow::{Result, ensure};

use crate::lab::{Filesystem, KernelRelease};
use crate::torture::{self, Plan, Regime, Turn};

/// All but stores through mappings. While some of them are not yet told, what many threads confirm at once may end
/// the epoch, and then the cut proves nothing.
const WITHOUT_MAPPINGS: [&str; 10] = [
    "data",
    "sizes",
    "names",
    "attributes",
    "sync",
    "direct",
    "space",
    "clones",
    "xattrs",
    "flags",
];

fn turn(regime: Regime, kinds: &[&str]) -> Turn {
    let only = kinds.iter().map(|kind| (*kind).to_owned()).collect();
    Turn { regime, only }
}

pub(super) fn run() -> Result<()> {
    let report = torture::run(&Plan {
        seed: 1,
        seeds: 6,
        length: 120,
        threads: 4,
        filesystem: Filesystem::Ext4,
        kernel: KernelRelease::V6_12,
        turns: vec![
            turn(Regime::Settled, &[]),
            turn(Regime::Running, &WITHOUT_MAPPINGS),
        ],
        seeds_per_crash: 3,
        shrink_crashes: 0,
        lab: "torture".to_owned(),
    });
    ensure!(report.is_as_it_should_be(), "{}", report.told());
    Ok(())
}
