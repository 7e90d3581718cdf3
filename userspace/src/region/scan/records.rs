//! The records of a scanned log, each with the places of its bytes.

use super::{FillRef, Scan};
use crate::ids::{RingPos, Seq};
use crate::record::{RecordView, Records};
use crate::region::layout::kind;

/// A stretch of a WRITE's bytes in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Offset in the log (not in the region).
    pub log_offset: u64,
    /// Bytes.
    pub len: u32,
    /// Offset within the record's data.
    pub data_offset: u32,
}

/// One record of the log.
#[derive(Clone, Copy, Debug)]
pub struct ScannedRecord<'a> {
    /// Its number.
    pub seq: Seq,
    /// Where it began in the owner's ring.
    pub ring_pos: RingPos,
    /// Where it begins in the log.
    pub log_offset: u64,
    /// The record.
    pub view: RecordView<'a>,
    /// The bytes that were filled in later; of an incomplete last record, those there are.
    pub fill: &'a [FillRef],
}

impl<'a> ScannedRecord<'a> {
    /// Where its data lies in the log, in order; nothing for records other than WRITE.
    pub fn payload(&self) -> impl Iterator<Item = Payload> + use<'a> {
        let inline = self.view.data().len() as u32;
        let own = (inline != 0).then_some(Payload {
            log_offset: self.log_offset + 64,
            len: inline,
            data_offset: 0,
        });
        let filled = self.fill.iter().map(|fill| Payload {
            log_offset: fill.log_offset,
            len: fill.len,
            data_offset: fill.fill_offset,
        });
        own.into_iter().chain(filled).filter(|part| part.len != 0)
    }
}

/// The records of a log, in order.
#[derive(Clone, Debug)]
pub struct ScannedRecords<'a> {
    scan: &'a Scan,
    log: &'a [u8],
    next_frame: usize,
    run: Records<'a>,
    run_offset: u64,
    run_ring_pos: u64,
    seq: Seq,
}

impl<'a> ScannedRecords<'a> {
    pub(super) fn new(scan: &'a Scan, log: &'a [u8]) -> Self {
        let seq = scan.head.seq;
        Self {
            scan,
            log,
            next_frame: 0,
            run: Records::new(&[]),
            run_offset: 0,
            run_ring_pos: 0,
            seq,
        }
    }
}

impl<'a> Iterator for ScannedRecords<'a> {
    type Item = ScannedRecord<'a>;

    fn next(&mut self) -> Option<ScannedRecord<'a>> {
        loop {
            // The scan has parsed every record, so an error means another log: end there.
            if let Some(item) = self.run.next() {
                let (at, view) = item.ok()?;
                let seq = self.seq;
                self.seq = seq.next();
                let fills = &self.scan.fills;
                let from = fills.partition_point(|fill| fill.seq < seq);
                let to = from + fills.get(from..)?.partition_point(|fill| fill.seq == seq);
                return Some(ScannedRecord {
                    seq,
                    ring_pos: RingPos(self.run_ring_pos + at as u64),
                    log_offset: self.run_offset + at as u64,
                    view,
                    fill: fills.get(from..to)?,
                });
            }
            let frame = self.scan.frames.get(self.next_frame)?;
            self.next_frame += 1;
            if frame.kind == kind::RUN {
                let start = frame.body_offset as usize;
                self.run = Records::new(self.log.get(start..start + frame.body_len as usize)?);
                self.run_offset = frame.body_offset;
                self.run_ring_pos = frame.ring_pos;
                self.seq = frame.first_seq;
            }
        }
    }
}
