//! The mirror's side: memory with the real format, and who may write to it; as `agent::region_host`.

use twinwrite::ids::Epoch;
use twinwrite::region::layout::{
    LOG_OFFSET, REGION_MAGIC, REGION_VERSION, RegionHeader, STATUS_OFFSET, Sealed as _,
    region_state,
};
use twinwrite::region::scan::{Scan, ScanError, Tail, scan_small_log};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::ledger::{CLUSTER, VOLUME};

/// The memory that holds an owner's records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Header, status page, log.
    pub bytes: Vec<u8>,
}

fn padded(name: &str) -> [u8; 64] {
    let mut field = [0; 64];
    field[..name.len()].copy_from_slice(name.as_bytes());
    field
}

impl Region {
    /// Allocated, holds nothing.
    pub fn new(log_bytes: u64) -> Self {
        let mut region = Self {
            bytes: vec![0; (LOG_OFFSET + log_bytes) as usize],
        };
        region.write_header(region_state::EMPTY, 0);
        region
    }

    fn log_bytes(&self) -> u64 {
        self.bytes.len() as u64 - LOG_OFFSET
    }

    fn write_header(&mut self, state: u32, epoch: u64) {
        let mut header = RegionHeader::new_zeroed();
        header.magic = REGION_MAGIC;
        header.version = REGION_VERSION;
        header.state = state;
        header.epoch = epoch;
        header.log_bytes = self.log_bytes();
        header.cluster = padded(CLUSTER);
        header.volume = padded(VOLUME);
        let header = header.seal();
        self.bytes[..size_of::<RegionHeader>()].copy_from_slice(header.as_bytes());
    }

    /// Its header.
    pub fn header(&self) -> Option<RegionHeader> {
        RegionHeader::open(&self.bytes)
    }

    /// Empties it for a new epoch; false if that is not later than its own.
    pub fn begin_epoch(&mut self, epoch: Epoch) -> bool {
        if self.header().is_some_and(|old| old.epoch >= epoch.0) {
            return false;
        }
        self.write_header(region_state::EMPTY, epoch.0);
        self.bytes[STATUS_OFFSET as usize..LOG_OFFSET as usize].fill(0);
        let log = LOG_OFFSET as usize;
        self.bytes[log..log + 64].fill(0);
        self.write_header(region_state::OPEN, epoch.0);
        true
    }

    /// The owner ended this epoch on purpose.
    pub fn close_epoch(&mut self, epoch: Epoch) {
        if let Some(header) = self.header()
            && header.epoch == epoch.0
            && header.state == region_state::OPEN
        {
            self.write_header(region_state::CLOSED, epoch.0);
        }
    }

    /// A write by the link.
    pub fn store(&mut self, offset: u64, bytes: &[u8]) {
        let from = offset as usize;
        if let Some(place) = self.bytes.get_mut(from..from + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Reads it.
    pub fn scan(&self) -> Result<Scan, ScanError> {
        let header = self.header().ok_or(ScanError::NotARegion)?;
        let (status, log) =
            self.bytes[STATUS_OFFSET as usize..].split_at((LOG_OFFSET - STATUS_OFFSET) as usize);
        scan_small_log(&header, status, log)
    }

    /// The log.
    pub fn log(&self) -> &[u8] {
        &self.bytes[LOG_OFFSET as usize..]
    }

    /// What an owner is told when it opens the region: epoch, whether it is open, where it ends.
    pub fn opened(&self) -> (Epoch, bool, Option<Tail>) {
        let header = self.header();
        let open = header.is_some_and(|h| h.state == region_state::OPEN);
        let tail = if open {
            self.scan().ok().map(|s| s.tail())
        } else {
            None
        };
        (Epoch(header.map_or(0, |h| h.epoch)), open, tail)
    }
}
