//! The whole of it, in short: protect, write without a flush, cut the power, take over, look.

use anyhow::{Result, ensure};

use super::bench::{
    NO_CHECKPOINT, Stream, all_mirrored, await_takeover, crash_and_copy, number, options,
    require_start,
};
use super::with_lab;
use crate::lab::{Filesystem, KernelRelease, Lab, NodeName, Options};

const OPERATIONS: u64 = 600;

pub(super) fn run() -> Result<()> {
    with_lab("survives_crash", options(&[], &[NO_CHECKPOINT]), crash)
}

pub(super) fn on_btrfs() -> Result<()> {
    with_lab("survives_crash_btrfs", btrfs(KernelRelease::V6_12), crash)
}

pub(super) fn on_btrfs_of_6_1() -> Result<()> {
    with_lab(
        "survives_crash_btrfs_6_1",
        btrfs(KernelRelease::V6_1),
        crash,
    )
}

fn btrfs(kernel: KernelRelease) -> Options {
    Options {
        filesystem: Filesystem::Btrfs,
        kernel,
        ..options(&[], &[NO_CHECKPOINT])
    }
}

fn crash(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let stream = Stream::start(lab, NodeName::A, OPERATIONS, 0)?;
    stream.finish()?;
    let records = all_mirrored(lab, NodeName::A)?;
    let disk = crash_and_copy(lab, NodeName::A)?;
    let takeover = await_takeover(lab, NodeName::B)?;
    ensure!(
        number(&takeover, "records_replayed")? >= OPERATIONS
            && number(&takeover, "cut_seq")? >= records,
        "{records} records were mirrored and not all were replayed: {takeover}"
    );
    stream.require_all(NodeName::B)?;
    stream.require_loss(&disk)
}
