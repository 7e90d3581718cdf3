//! The scan against regions written by hand: what it must accept, refuse and tell.

use proptest::prelude::*;
use twinwrite_abi::RecordHeader;
use zerocopy::IntoBytes;

use super::*;
use crate::record::encode;
use crate::region::layout::{
    CheckpointMark, FILL_GONE, FILL_LAST, FRAME_MAGIC, FrameHeader, HEAD_MAGIC, MIRRORED_MAGIC,
    REGION_MAGIC, kind,
};

const EPOCH: u64 = 3;
const LOG_BYTES: u64 = 64 * 1024;

/// Writes frames as a sender would, and as none would.
struct Builder {
    region: Vec<u8>,
    end: LogEnd,
    frames: Vec<FrameHeader>,
}

fn header(log_bytes: u64) -> RegionHeader {
    RegionHeader {
        magic: REGION_MAGIC,
        version: REGION_VERSION,
        state: 1,
        epoch: EPOCH,
        log_bytes,
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

impl Builder {
    fn new() -> Self {
        let tail = Tail::of_epoch(Epoch(EPOCH), LOG_BYTES, RingPos(128));
        Self {
            region: vec![0; (LOG_OFFSET + LOG_BYTES) as usize],
            end: tail.end,
            frames: vec![],
        }
    }

    /// A frame that fits, changed by `change` before it is sealed.
    fn frame_with(
        &mut self,
        kind: u8,
        body: &[u8],
        change: impl FnOnce(&mut FrameHeader),
    ) -> &mut Self {
        let mut frame = FrameHeader {
            magic: FRAME_MAGIC,
            version: 1,
            kind,
            flags: 0,
            epoch: EPOCH,
            lsn: self.end.lsn.0,
            first_seq: self.end.next_seq.0,
            ring_pos: 0,
            count: 0,
            body_len: body.len() as u32,
            body_crc32c: crc32c::crc32c(body),
            previous_crc32c: self.end.last_header_crc,
            fill_offset: 0,
            header_crc32c: 0,
        };
        change(&mut frame);
        let frame = frame.seal();
        let at = (LOG_OFFSET + self.end.lsn.0 % LOG_BYTES) as usize;
        self.region[at..at + 64].copy_from_slice(frame.as_bytes());
        self.region[at + 64..at + 64 + body.len()].copy_from_slice(body);
        self.end.lsn = Lsn(self.end.lsn.0 + frame.stride());
        self.end.last_header_crc = frame.header_crc32c;
        self.frames.push(frame);
        self
    }

    /// Writes of these lengths; a negative one lacks its bytes.
    fn run_with(&mut self, lens: &[i32], change: impl FnOnce(&mut FrameHeader)) -> &mut Self {
        let mut body = Vec::new();
        for len in lens {
            let header = RecordHeader {
                ino: 9,
                ..Default::default()
            };
            if *len < 0 {
                encode::push_write_without_bytes(&mut body, header, len.unsigned_abs());
            } else {
                encode::push_write(&mut body, header, &vec![0x5a; *len as usize]);
            }
        }
        let pos = self.end.ring_pos_end.unwrap_or_default();
        self.frame_with(kind::RUN, &body, |frame| {
            frame.ring_pos = pos.0;
            frame.count = lens.len() as u32;
            change(frame);
        });
        self.end.next_seq.0 += lens.len() as u64;
        self.end.ring_pos_end = Some(RingPos(pos.0 + body.len() as u64));
        self
    }

    fn run(&mut self, lens: &[i32]) -> &mut Self {
        self.run_with(lens, |_| {})
    }

    fn fill(&mut self, len: usize, offset: u32, safe_at: u64, flags: u16) -> &mut Self {
        self.frame_with(kind::FILL, &vec![0x77; len], |frame| {
            frame.first_seq -= 1;
            frame.fill_offset = offset;
            frame.ring_pos = safe_at;
            frame.flags = flags;
        })
    }

    fn publish(&mut self, lsn: u64, seq: u64) -> &mut Self {
        let line = Mirrored {
            magic: MIRRORED_MAGIC,
            reserved: 0,
            epoch: EPOCH,
            lsn,
            seq,
            time_ns: 1,
            lag_records: 0,
            reserved2: [0; 3],
            crc32c: 0,
        };
        self.status(0, line.seal().as_bytes())
    }

    fn publish_all(&mut self) -> &mut Self {
        self.publish(self.end.lsn.0, self.end.next_seq.0 - 1)
    }

    fn head(&mut self, slot: usize, at: LogEnd) -> &mut Self {
        let line = HeadSlot {
            magic: HEAD_MAGIC,
            previous_crc32c: at.last_header_crc,
            epoch: EPOCH,
            lsn: at.lsn.0,
            seq: at.next_seq.0,
            ring_pos: at.ring_pos_end.unwrap_or_default().0,
            reserved: [0; 2],
            reserved2: 0,
            crc32c: 0,
        };
        self.status(64 + 64 * slot, line.seal().as_bytes())
    }

    fn status(&mut self, at: usize, line: &[u8]) -> &mut Self {
        let at = STATUS_OFFSET as usize + at;
        self.region[at..at + line.len()].copy_from_slice(line);
        self
    }

    fn log(&self) -> &[u8] {
        &self.region[LOG_OFFSET as usize..]
    }

    fn scan(&self) -> Result<Scan, ScanError> {
        read(
            &header(LOG_BYTES),
            &self.region[STATUS_OFFSET as usize..LOG_OFFSET as usize],
            self.log(),
        )
    }

    fn sound(&self) -> Scan {
        self.scan().expect("a sound region")
    }
}

#[test]
fn a_fresh_region_is_empty() {
    let scan = Builder::new().sound();
    assert_eq!(
        (scan.last_seq, scan.cut, scan.end.lsn),
        (Seq(0), Seq(0), Lsn(0))
    );
    assert_eq!(scan.stop, Stop::NoFrame { word: 0 });
    assert_eq!(scan.end.ring_pos_end, None);
}

#[test]
fn records_come_with_the_places_of_their_bytes() {
    let mut b = Builder::new();
    b.run(&[5, 200])
        .run(&[70, -9])
        .fill(4, 0, 4, 0)
        .fill(5, 4, 4, FILL_LAST)
        .run(&[1])
        .publish_all();
    let scan = b.sound();
    assert_eq!(
        (scan.last_seq, scan.cut, scan.pending_fill),
        (Seq(5), Seq(5), None)
    );
    let records: Vec<_> = scan.records(b.log()).collect();
    let seqs: Vec<_> = records.iter().map(|r| r.seq.0).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5]);
    for record in &records {
        let expected = if record.seq == Seq(4) { 0x77 } else { 0x5a };
        let mut at = 0;
        for part in record.payload() {
            assert_eq!(part.data_offset, at);
            let from = part.log_offset as usize;
            assert!(
                b.log()[from..from + part.len as usize]
                    .iter()
                    .all(|byte| *byte == expected)
            );
            at += part.len;
        }
        assert_eq!(at, record.view.header.data_len);
    }
    assert_eq!(records[0].ring_pos, RingPos(128));
    assert_eq!(scan.end, b.end);
}

#[test]
fn the_cut_is_before_a_record_read_too_late() {
    // Record 2 was read when 5 were captured, and only 4 are in the log: 2 may show 5.
    let mut b = Builder::new();
    b.run(&[1, -8]).fill(8, 0, 5, FILL_LAST).run(&[1, 1]);
    assert_eq!((b.sound().last_seq, b.sound().cut), (Seq(4), Seq(1)));
    b.run(&[1]);
    assert_eq!(b.sound().cut, Seq(5));
    // Without its last part a record does not count.
    b.run(&[1, -8]).fill(3, 0, 7, 0);
    let scan = b.sound();
    assert_eq!((scan.last_seq, scan.cut), (Seq(7), Seq(6)));
    assert_eq!(
        scan.pending_fill.map(|fill| (fill.seq, fill.filled)),
        Some((Seq(7), 3))
    );
}

#[test]
fn a_cut_never_falls_before_what_was_purged() {
    let mut b = Builder::new();
    b.run(&[1, 1]);
    let head = b.end;
    b.publish_all()
        .head(0, head)
        .run(&[-4])
        .fill(4, 0, 9, FILL_LAST);
    assert_eq!(b.sound().cut, Seq(2));
}

#[test]
fn the_larger_valid_head_counts() {
    let mut b = Builder::new();
    b.run(&[1]);
    let first = b.end;
    b.run(&[1, 1]);
    let second = b.end;
    b.run(&[1]).publish_all().head(1, first).head(0, second);
    let scan = b.sound();
    assert_eq!(
        (scan.head.slot, scan.head.seq, scan.last_seq),
        (Some(0), Seq(4), Seq(4))
    );
    assert_eq!(scan.head.ring_pos, second.ring_pos_end);
}

#[test]
fn a_log_that_ends_before_what_was_published_is_damaged() {
    let mut b = Builder::new();
    b.run(&[5]).run(&[6]).run(&[7]).publish_all();
    for (frame, expected_last) in [(0, 0), (1, 1), (2, 2)] {
        for at in [0, 17, 48, 64, 130] {
            let mut region = Builder {
                region: b.region.clone(),
                end: b.end,
                frames: vec![],
            };
            let place = LOG_OFFSET + b.frames[frame].lsn + at;
            region.region[place as usize] ^= 0x40;
            match region.scan() {
                Err(ScanError::Damaged {
                    last_seq,
                    mirrored_seq,
                    ..
                }) => {
                    assert_eq!((last_seq, mirrored_seq), (Seq(expected_last), Seq(3)));
                }
                other => panic!("frame {frame} byte {at}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_status_page_that_cannot_be_believed_is_told() {
    let status = |b: &Builder| matches!(b.scan(), Err(ScanError::Status { .. }));
    for at in [0, 20, 100, 150] {
        let mut b = Builder::new();
        b.run(&[5]);
        let head = b.end;
        b.publish_all().head(0, head).head(1, head);
        b.region[STATUS_OFFSET as usize + at] ^= 1;
        assert!(status(&b), "byte {at}");
    }
    let mut b = Builder::new();
    b.run(&[5]);
    let head = b.end;
    b.head(0, head);
    assert!(status(&b), "a head without a published end");
    b.publish(head.lsn.0 - 64, 0);
    assert!(status(&b), "a head beyond the published end");
    b.publish_all().head(
        1,
        LogEnd {
            lsn: Lsn(u64::MAX - 63),
            ..head
        },
    );
    assert!(status(&b), "a head no log reaches");
}

#[test]
fn frames_that_no_sender_writes_end_the_log() {
    type Change = fn(&mut FrameHeader);
    let wrong: [(&str, Change); 12] = [
        ("version", |f| f.version = 2),
        ("epoch", |f| f.epoch += 1),
        ("lsn", |f| f.lsn += 64),
        ("chain", |f| f.previous_crc32c ^= 1),
        ("seq", |f| f.first_seq += 1),
        ("ring position", |f| f.ring_pos += 64),
        ("count", |f| f.count += 1),
        ("no count", |f| f.count = 0),
        ("kind", |f| f.kind = 9),
        ("flags", |f| f.flags = FILL_LAST),
        ("fill offset", |f| f.fill_offset = 1),
        ("body checksum", |f| f.body_crc32c ^= 1),
    ];
    for (what, change) in wrong {
        let mut b = Builder::new();
        b.run(&[1]).run_with(&[2], change);
        assert_eq!(b.sound().last_seq, Seq(1), "{what}");
    }
    let mut b = Builder::new();
    b.run(&[1]).run(&[-4, 1]);
    assert_eq!(
        b.sound().last_seq,
        Seq(1),
        "a record without bytes ends its run"
    );
    let mut b = Builder::new();
    b.run(&[-4]).run(&[1]);
    assert_eq!(b.sound().last_seq, Seq(1), "its fill follows at once");
}

#[test]
fn fills_that_no_sender_writes_end_the_log() {
    let wrong: [(&str, usize, u32, u64, u16); 8] = [
        ("too long", 9, 0, 1, FILL_LAST),
        ("offset", 8, 1, 1, FILL_LAST),
        ("last too early", 4, 0, 1, FILL_LAST),
        ("not last at the end", 8, 0, 1, 0),
        ("nothing", 0, 0, 1, 0),
        ("gone, but not last", 4, 0, 1, FILL_GONE),
        ("read before the record", 8, 0, 0, FILL_LAST),
        ("unknown flag", 8, 0, 1, FILL_LAST | 8),
    ];
    for (what, len, offset, safe_at, flags) in wrong {
        let mut b = Builder::new();
        b.run(&[-8]).fill(len, offset, safe_at, flags);
        assert_eq!(b.sound().fills, [], "{what}");
    }
    let mut b = Builder::new();
    b.run(&[-8]).fill(3, 0, 1, FILL_LAST | FILL_GONE).run(&[1]);
    assert_eq!(b.sound().cut, Seq(2), "what is gone is complete");
    let mut b = Builder::new();
    b.run(&[8]).fill(8, 0, 1, FILL_LAST);
    assert_eq!(b.sound().fills, [], "nobody asked for it");
}

#[test]
fn marks_are_read_and_must_speak_of_the_past() {
    let mark = |seq| CheckpointMark { seq, time_ns: 4 };
    let mut b = Builder::new();
    b.run(&[1, 1])
        .frame_with(kind::MARK, mark(2).as_bytes(), |_| {})
        .run(&[1]);
    assert_eq!(
        (b.sound().checkpoint_seq, b.sound().last_seq),
        (Seq(2), Seq(3))
    );
    b.frame_with(kind::MARK, mark(4).as_bytes(), |_| {});
    assert_eq!(b.sound().frames.len(), 3);
}

#[test]
fn a_lap_ends_with_a_pad_and_older_laps_are_not_taken_for_frames() {
    let mut b = Builder::new();
    let mut heads = Vec::new();
    // Each run takes 64 + 4096 bytes, so the lap does not divide.
    for _ in 0..40 {
        let to_end = LOG_BYTES - b.end.lsn.0 % LOG_BYTES;
        if to_end < 4160 {
            b.frame_with(kind::PAD, &[], |f| f.body_len = (to_end - 64) as u32);
        }
        heads.push(b.end);
        b.run(&[4032]);
    }
    b.publish_all().head(0, heads[30]).head(1, heads[29]);
    let scan = b.sound();
    assert_eq!(
        (scan.head.seq, scan.last_seq, scan.end.lsn),
        (Seq(31), Seq(40), b.end.lsn)
    );
    assert!(scan.end.lsn.0 > 2 * LOG_BYTES);
    // A whole lap of frames ends at the head.
    let full = b.head(1, heads[26]);
    assert!(full.scan().is_ok_and(|s| s.last_seq == Seq(40)));
}

#[test]
fn a_header_is_checked_before_anything_is_read() {
    let good = [
        header(4 << 20).as_bytes(),
        &vec![0; (8192 - 312) + (4 << 20)][..],
    ]
    .concat();
    let (h, status, log) = split(&good).expect("whole");
    assert_eq!((status.len(), log.len()), (4096, 4 << 20));
    assert_eq!(scan(&h, status, log).map(|s| s.last_seq), Ok(Seq(0)));
    assert_eq!(split(&good[1..]).err(), Some(ScanError::NotARegion));
    assert!(matches!(
        split(&good[..9000]),
        Err(ScanError::Truncated {
            what: "the log",
            ..
        })
    ));
    assert!(matches!(
        scan(&h, status, &log[..4096]),
        Err(ScanError::Truncated { .. })
    ));
    assert!(matches!(
        scan(&h, &status[..100], log),
        Err(ScanError::Truncated { .. })
    ));
    let other = RegionHeader { version: 2, ..h }.seal();
    assert_eq!(
        split(other.as_bytes()).err(),
        Some(ScanError::Version { found: 2 })
    );
    for found in [0, 4096, (4 << 20) + 64, u64::MAX] {
        let other = RegionHeader {
            log_bytes: found,
            ..h
        }
        .seal();
        assert_eq!(
            split(other.as_bytes()).err(),
            Some(ScanError::LogBytes { found })
        );
    }
}

/// The cut by trying every N.
fn naive_cut(head: u64, last: u64, fills: &[FillRef]) -> u64 {
    (head - 1..=last)
        .rev()
        .find(|n| fills.iter().all(|f| f.seq.0 > *n || f.safe_at.0 <= *n))
        .unwrap_or(head - 1)
}

proptest! {
    #[test]
    fn the_cut_is_the_last_that_fits(
        head in 1u64..5,
        extra in 0u64..30,
        reads in prop::collection::vec((0u64..34, 0u64..9), 0..12),
    ) {
        let last = head - 1 + extra;
        let mut fills: Vec<_> = reads
            .into_iter()
            .map(|(seq, late)| (head + seq, late))
            .filter(|(seq, _)| *seq <= last)
            .map(|(seq, late)| FillRef {
                seq: Seq(seq), log_offset: 0, len: 1, fill_offset: 0, safe_at: Seq(seq + late),
            })
            .collect();
        fills.sort_by_key(|fill| fill.seq);
        prop_assert_eq!(find_cut(Seq(head), Seq(last), &fills).0, naive_cut(head, last, &fills));
    }

    #[test]
    fn damage_is_never_read_as_records(
        runs in prop::collection::vec(prop::collection::vec(0i32..300, 1..4), 1..20),
        published in 0usize..20,
        hits in prop::collection::vec((any::<prop::sample::Index>(), 1u8..=255), 0..4),
    ) {
        let mut b = Builder::new();
        let mut ends = vec![(0, 0)];
        for run in &runs {
            b.run(run);
            ends.push((b.end.lsn.0, b.end.next_seq.0 - 1));
        }
        let (lsn, seq) = ends[published.min(ends.len() - 1)];
        if lsn != 0 {
            b.publish(lsn, seq);
        }
        let whole = Builder { region: b.region.clone(), end: b.end, frames: vec![] };
        let truth = whole.sound();
        let used = (LOG_OFFSET + b.end.lsn.0 - STATUS_OFFSET) as usize;
        let mut first = u64::MAX;
        for (index, flip) in hits {
            let at = STATUS_OFFSET as usize + index.index(used);
            b.region[at] ^= flip;
            if b.region[at] != whole.region[at] && at as u64 >= LOG_OFFSET {
                first = first.min(at as u64 - LOG_OFFSET);
            }
        }
        match b.scan() {
            Ok(scan) => {
                prop_assert!(scan.end.lsn.0 >= lsn, "damage before the published end is told");
                prop_assert!(scan.frames.len() <= truth.frames.len());
                prop_assert_eq!(&scan.frames[..], &truth.frames[..scan.frames.len()]);
                for (got, written) in scan.records(b.log()).zip(truth.records(whole.log())) {
                    prop_assert_eq!(got.seq, written.seq);
                    prop_assert_eq!(got.view.header, written.view.header);
                    prop_assert_eq!(got.view.data(), written.view.data());
                }
            }
            Err(ScanError::Damaged { end, .. }) => prop_assert!(end.lsn.0 < lsn && end.lsn.0 <= first),
            Err(ScanError::Status { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn any_log_is_scanned_without_a_panic(
        resealed in prop::collection::vec((0usize..60, any::<u64>(), 0usize..8), 0..6),
        lens in prop::collection::vec(prop::collection::vec(-300i32..300, 1..3), 1..12),
    ) {
        // Headers with wrong numbers and right checksums: what a hostile writer would send.
        let mut b = Builder::new();
        for lens in &lens {
            b.run(lens);
        }
        for (at, value, frame) in resealed {
            let place = (LOG_OFFSET + b.frames[frame % b.frames.len()].lsn) as usize;
            let line = &mut b.region[place..place + 64];
            let bytes = value.to_le_bytes();
            let n = (60 - at).min(8);
            line[at..at + n].copy_from_slice(&bytes[..n]);
            let crc = crc32c::crc32c(&line[..60]);
            line[60..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(scan) = b.scan() {
            prop_assert!(scan.records(b.log()).count() as u64 == scan.last_seq.0 + 1 - scan.head.seq.0);
        }
    }
}
