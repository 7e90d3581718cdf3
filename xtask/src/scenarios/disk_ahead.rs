//! A small part of the disk-ahead suite: one power cut of eight volumes with their applications.

use anyhow::{Result, ensure};

use crate::ahead::disturbance::Disturbance;
use crate::ahead::{self, CASES, Plan};
use crate::lab::{Filesystem, KernelRelease, Programs};

/// The applications confirm for more than a second, then the wire is cut, then the power, before the epoch
/// can have ended.
const SEED: u64 = 8;

pub(super) fn run() -> Result<()> {
    let report = ahead::run(&Plan {
        crashes: CASES.len() as u64,
        seed: SEED,
        filesystems: vec![Filesystem::Ext4],
        kernels: vec![KernelRelease::V6_12],
        gate_off: false,
        stop_at_failure: true,
        time_limit: None,
        only: vec![Disturbance::LinkCut],
        without: Vec::new(),
        lab: "test-disk-ahead".to_owned(),
        programs: Programs::AsBuilt,
    });
    ensure!(report.is_as_it_should_be(), "{}", report.told());
    Ok(())
}
