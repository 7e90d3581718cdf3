//! A region with the largest records whose bytes are filled in later, from its frames to a volume.

use zerocopy::{FromZeros as _, IntoBytes as _};

use super::cases::ROOT;
use super::model::{Body, Model};
use crate::ids::{Epoch, Identity, Seq};
use crate::record::extended::{Extended, InodeFlags};
use crate::record::{NameBody, RecordHeader, encode, op};
use crate::region::layout::{
    FILL_GONE, FILL_LAST, FRAME_BODY_BYTES_MAX, FRAME_MAGIC, FrameHeader, REGION_MAGIC,
    REGION_VERSION, RegionHeader, Sealed as _, chain_start, kind,
};
use crate::region::scan;
use crate::replay::apply::apply_to;
use crate::replay::{LogItem, ReplayInput, plan};

const EPOCH: u64 = 7;
const LARGEST: usize = 64 << 20;
const FILE: Identity = Identity {
    ino: 11,
    generation: 5,
};

/// The log of a region, frame by frame.
struct Frames {
    log: Vec<u8>,
    previous: u32,
    next_seq: u64,
    ring_pos: u64,
}

impl Frames {
    fn frame(&mut self, header: FrameHeader, body: &[u8]) {
        let header = FrameHeader {
            magic: FRAME_MAGIC,
            version: 1,
            epoch: EPOCH,
            lsn: self.log.len() as u64,
            body_len: body.len() as u32,
            body_crc32c: crc32c::crc32c(body),
            previous_crc32c: self.previous,
            ..header
        }
        .seal();
        self.previous = header.header_crc32c;
        let end = self.log.len() + header.stride() as usize;
        self.log.extend(header.as_bytes());
        self.log.extend(body);
        self.log.resize(end, 0);
    }

    fn record(&mut self, record: &[u8]) {
        let header = FrameHeader {
            kind: kind::RUN,
            first_seq: self.next_seq,
            ring_pos: self.ring_pos,
            count: 1,
            ..FrameHeader::new_zeroed()
        };
        self.frame(header, record);
        self.next_seq += 1;
        self.ring_pos += record.len() as u64;
    }

    /// The bytes of the record before, as far as there are any.
    fn fill(&mut self, bytes: &[u8], is_gone: bool) {
        let pieces: Vec<&[u8]> = bytes.chunks(FRAME_BODY_BYTES_MAX as usize).collect();
        for (index, piece) in pieces.iter().enumerate() {
            let is_last = index + 1 == pieces.len();
            let last = if is_gone {
                FILL_LAST | FILL_GONE
            } else {
                FILL_LAST
            };
            let header = FrameHeader {
                kind: kind::FILL,
                flags: if is_last { last } else { 0 },
                first_seq: self.next_seq - 1,
                ring_pos: self.next_seq - 1,
                fill_offset: index as u32 * FRAME_BODY_BYTES_MAX,
                ..FrameHeader::new_zeroed()
            };
            self.frame(header, piece);
        }
    }
}

fn head(operation: u8) -> RecordHeader {
    RecordHeader {
        op: operation,
        ino: FILE.ino,
        generation: FILE.generation,
        mode: 0o100_640,
        time_ns: 99,
        ..RecordHeader::default()
    }
}

fn region(bytes: &[u8], state: &[u8]) -> Frames {
    let mut frames = Frames {
        log: Vec::new(),
        previous: chain_start(EPOCH),
        next_seq: 1,
        ring_pos: 128,
    };
    let mut record = Vec::new();
    let create = RecordHeader {
        pos: ROOT.ino,
        arg: ROOT.generation.into(),
        ..head(op::CREATE)
    };
    let names = NameBody {
        nlink: 1,
        ..NameBody::default()
    };
    encode::push_name(&mut record, create, names, b"f", b"", b"");
    frames.record(&record);
    record.clear();
    let write = RecordHeader {
        size_after: bytes.len() as u64,
        ..head(op::WRITE)
    };
    encode::push_write_without_bytes(&mut record, write, bytes.len() as u32);
    frames.record(&record);
    frames.fill(bytes, false);
    record.clear();
    let extended = RecordHeader {
        flags: crate::record::flag::NO_BYTES,
        data_len: twinwrite_abi::EXTENDED_BYTES_MAX,
        ..head(op::EXTENDED)
    };
    encode::push(&mut record, extended, b"");
    frames.record(&record);
    frames.fill(state, true);
    frames
}

#[test]
fn the_largest_fills_are_read_and_merged() {
    let bytes: Vec<u8> = (0..LARGEST).map(|at| (at / 4099) as u8).collect();
    let value = vec![3; 100];
    let state = Extended {
        mode: 0o100_640,
        flags: Some(InodeFlags {
            flags: 0x10,
            ..InodeFlags::default()
        }),
        attributes: [(&b"user.a"[..], &value[..])].into(),
    };
    let frames = region(&bytes, &state.encode().expect("small"));
    let mut log = frames.log;
    log.resize(log.len().next_multiple_of(4096) + 4096, 0);
    let header = RegionHeader {
        magic: REGION_MAGIC,
        version: REGION_VERSION,
        state: 1,
        epoch: EPOCH,
        log_bytes: log.len() as u64,
        ..RegionHeader::new_zeroed()
    }
    .seal();
    let scan = scan::scan(&header, &[0; 4096], &log).expect("a sound region");
    assert_eq!(scan.cut, Seq(3), "{:?}", scan.stop);
    let input = ReplayInput {
        epoch: Epoch(EPOCH),
        after: Seq(0),
        items: LogItem::up_to_the_cut(&scan, &log),
    };
    let plan = plan(input).expect("an own log can be planned");
    let mut disk = Model::new(ROOT);
    apply_to(&plan, &mut disk, &mut |_| {}).expect("replay");
    let file = disk.entries(ROOT)[b"f".as_slice()];
    let node = &disk.nodes[&file];
    assert!(node.body == Body::File(bytes), "the bytes differ");
    assert_eq!(node.attributes[b"user.a".as_slice()], value);
    assert_eq!(node.flags.flags, 0x10);
}
