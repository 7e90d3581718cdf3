//! A region of arbitrary bytes is scanned, its records are walked, and it is dumped.
//!
//! The input is laid over a valid region of the smallest size: the first bytes over the status page, the
//! rest over the log. Where the input says so, the checksums are then made right, so that the checks
//! behind them are reached as well.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twinwrite::region::dump;
use twinwrite::region::layout::{
    FrameHeader, LOG_BYTES_MIN, LOG_OFFSET, REGION_MAGIC, REGION_VERSION, RegionHeader,
    STATUS_OFFSET, Sealed, chain_start, region_state,
};
use zerocopy::{FromBytes, IntoBytes};

const EPOCH: u64 = 1;
const STATUS_BYTES: usize = 192;

fn header() -> RegionHeader {
    RegionHeader {
        magic: REGION_MAGIC,
        version: REGION_VERSION,
        state: region_state::OPEN,
        epoch: EPOCH,
        log_bytes: LOG_BYTES_MIN,
        cluster: [0; 64],
        volume: [0; 64],
        owner: [0; 64],
        mirror: [0; 64],
        filesystem_uuid: [0; 16],
        reserved: 0,
        crc32c: 0,
    }
    .seal()
}

/// Makes the checksums of the status lines and of the frames from the log's start right.
fn seal(region: &mut [u8]) {
    for line in region[STATUS_OFFSET as usize..][..STATUS_BYTES].chunks_exact_mut(64) {
        if line.iter().any(|byte| *byte != 0) {
            let crc = crc32c::crc32c(&line[..60]);
            line[60..].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let log = &mut region[LOG_OFFSET as usize..];
    let (mut at, mut previous) = (0, chain_start(EPOCH));
    while let Some(Ok(mut frame)) = log.get(at..at + 64).map(FrameHeader::read_from_bytes) {
        let Some(body) = log.get(at + 64..at + 64 + frame.body_len as usize) else {
            break;
        };
        frame.magic = twinwrite::region::layout::FRAME_MAGIC;
        (frame.epoch, frame.lsn, frame.version) = (EPOCH, at as u64, 1);
        frame.previous_crc32c = previous;
        frame.body_crc32c = crc32c::crc32c(body);
        let frame = frame.seal();
        log[at..at + 64].copy_from_slice(frame.as_bytes());
        previous = frame.header_crc32c;
        at += frame.stride() as usize;
        if at > 64 * 1024 {
            break;
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, data)) = data.split_first() else {
        return;
    };
    let mut region = vec![0u8; (LOG_OFFSET + LOG_BYTES_MIN) as usize];
    let header = header();
    region[..size_of::<RegionHeader>()].copy_from_slice(header.as_bytes());
    let status = if how & 1 == 0 {
        0
    } else {
        data.len().min(STATUS_BYTES)
    };
    region[STATUS_OFFSET as usize..][..status].copy_from_slice(&data[..status]);
    let log = &data[status..];
    let len = log.len().min(LOG_BYTES_MIN as usize);
    region[LOG_OFFSET as usize..][..len].copy_from_slice(&log[..len]);
    if how & 2 != 0 {
        seal(&mut region);
    }
    let verdict = dump::verify(&region);
    if let Ok(scan) = &verdict.result {
        let records = scan.records(&region[LOG_OFFSET as usize..]).count() as u64;
        assert_eq!(records, scan.last_seq.0 + 1 - scan.head.seq.0);
        assert!(scan.cut <= scan.last_seq && scan.cut.0 + 1 >= scan.head.seq.0);
        assert!(scan.end.lsn.0 - scan.head.lsn.0 <= LOG_BYTES_MIN);
    }
    dump::write_json(&mut std::io::sink(), &region, &verdict).expect("a sink takes everything");
});
