//! A mark behind a failed write-back proves nothing.

use crate::ids::{Epoch, RingPos, Seq};
use crate::record::{RecordHeader, Records, encode, flag, op};
use crate::replay::{LogItem, ReplayInput, plan};

/// Whether a write followed by a whole-file mark with these flags is still to be written.
fn is_written(flags: u8) -> bool {
    let head = |op| RecordHeader {
        op,
        ino: 11,
        generation: 1,
        ..RecordHeader::default()
    };
    let mut log = Vec::new();
    encode::push_write(&mut log, head(op::WRITE), b"unproven");
    let entry = log.len() as u64;
    let mark = RecordHeader {
        arg: entry,
        flags,
        size_after: i64::MAX as u64,
        ..head(op::FSYNC)
    };
    encode::push(&mut log, mark, b"");
    let items = Records::new(&log).enumerate().map(|(index, item)| {
        let (at, record) = item.expect("an own log can be read");
        LogItem {
            seq: Seq(index as u64 + 1),
            ring_pos: RingPos(at as u64),
            record,
            fill: None,
        }
    });
    let input = ReplayInput {
        epoch: Epoch(1),
        after: Seq(0),
        items,
    };
    plan(input).expect("an own log can be planned").bytes() > 0
}

#[test]
fn a_tainted_mark_clips_nothing() {
    assert!(!is_written(0));
    assert!(!is_written(flag::DATASYNC));
    assert!(is_written(flag::TAINTED));
    assert!(is_written(flag::TAINTED | flag::DATASYNC));
}
