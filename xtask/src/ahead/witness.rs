//! The disk's own witness: pages written to a spare disk right before the cut, half of them flushed.
//! It shows of each cut that the flushed ones are there, and of the run that the others get lost.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};

use crate::lab::config::SPARE_DISK;
use crate::lab::{Lab, NodeName};

const PAGE_BYTES: usize = 4096;
const PAGES: usize = 64;
const DEVICE: &str = "/dev/disk/by-id/virtio-spare";
const FILE: &str = "witness";

/// Which page of which round.
fn page(round: u64, number: usize) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_BYTES);
    while page.len() < PAGE_BYTES {
        page.extend(round.to_le_bytes());
        page.extend((number as u64).to_le_bytes());
    }
    page
}

/// The command that writes them, flushed pages first.
pub(super) fn command(lab: &Lab, node: NodeName, round: u64) -> Result<String> {
    let bytes: Vec<u8> = (0..2 * PAGES).flat_map(|n| page(round, n)).collect();
    let path = lab.share(node).join(FILE);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    let half = |conversion: &str, skip: usize| {
        format!(
            "dd if=/host/{FILE} of={DEVICE} bs={PAGE_BYTES} count={PAGES} skip={skip} seek={skip} \
             oflag=direct conv=notrunc{conversion} status=none"
        )
    };
    Ok(format!("{} && {}", half(",fsync", 0), half("", PAGES)))
}

/// How many of the unflushed pages the cut took.
///
/// # Errors
/// If it took a flushed one.
pub(super) fn lost(lab: &Lab, round: u64) -> Result<u64> {
    let disk = File::open(lab.shared_disk(SPARE_DISK)).context("cannot open the spare disk")?;
    let mut lost = [0_u64; 2];
    for number in 0..2 * PAGES {
        let mut found = vec![0; PAGE_BYTES];
        disk.read_exact_at(&mut found, (number * PAGE_BYTES) as u64)?;
        if found != page(round, number)
            && let Some(count) = lost.get_mut(number / PAGES)
        {
            *count += 1;
        }
    }
    let [flushed, unflushed] = lost;
    ensure!(
        flushed == 0,
        "the disk lost {flushed} of {PAGES} pages that were flushed"
    );
    Ok(unflushed)
}
