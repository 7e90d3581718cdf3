//! A small part of the torture suite: six seeds, three whose operations are mirrored at the power cut and
//! three that are in the middle of them.

use anyhow::{Result, ensure};

use crate::lab::{Filesystem, KernelRelease};
use crate::torture::{self, Plan, Regime, Turn};

/// What leaves the epoch open: the crash takes all of it from the disk.
const CAPTURED: [&str; 4] = ["data", "sizes", "names", "attributes"];

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
            turn(Regime::Settled, &CAPTURED),
            turn(Regime::Running, &[&CAPTURED[..], &["sync"]].concat()),
        ],
        seeds_per_crash: 3,
        shrink_crashes: 0,
        lab: "torture".to_owned(),
    });
    ensure!(report.is_as_it_should_be(), "{}", report.told());
    Ok(())
}
