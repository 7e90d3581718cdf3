//! The sender against a fake link and a fake memory: delays, torn writes, lost links, restarts, many
//! laps, fills and purges; after every step a scan of the memory must give exactly what was written.

mod cases;

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::*;
use crate::record::{RecordHeader, RecordView, encode};
use crate::region::layout::{
    FrameHeader, HEAD_OFFSETS, LOG_OFFSET, Mirrored, REGION_MAGIC, REGION_VERSION, RegionHeader,
    STATUS_OFFSET, Sealed,
};
use crate::region::scan::{self, Scan};

const EPOCH: u64 = 7;
const RING_START: u64 = 640;
const LOG_BYTES: u64 = 64 * 1024;
const FILL_MAX: u32 = 9000;

#[derive(Clone, Debug)]
enum Step {
    /// Records of these data lengths; a record without bytes where the flag is set.
    Capture(Vec<(u16, bool)>),
    /// Pull up to this many actions.
    Act(u8),
    /// This many posts reach the memory.
    Land(u8),
    /// This many completions reach the core.
    Complete(u8),
    /// The driver answers a fill; the flag: part of the file is gone.
    Fill(bool),
    /// This share (of 255) of what is mirrored becomes durable.
    Purge(u8),
    /// As a purge, of everything captured, with a mark.
    Checkpoint,
    /// The link breaks; the post on the wire is torn after this many lines.
    Relink(u8),
    /// As before, and the agent starts afresh.
    Restart(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let record = (0u16..4000, prop::bool::weighted(0.1));
    prop_oneof![
        6 => prop::collection::vec(record, 1..12).prop_map(Step::Capture),
        8 => (1u8..24).prop_map(Step::Act),
        8 => (1u8..24).prop_map(Step::Land),
        8 => (1u8..24).prop_map(Step::Complete),
        5 => prop::bool::weighted(0.2).prop_map(Step::Fill),
        5 => any::<u8>().prop_map(Step::Purge),
        1 => Just(Step::Checkpoint),
        1 => (0u8..90).prop_map(Step::Relink),
        1 => (0u8..90).prop_map(Step::Restart),
    ]
}

struct Flying {
    id: PostId,
    offset: u64,
    head: [u8; 64],
    body: PostBody,
    landed: bool,
}

struct World {
    core: MirrorCore,
    header: RegionHeader,
    memory: Vec<u8>,
    /// The ring as the NIC reads it: scribbled over once released.
    ring: Vec<u8>,
    /// The records as they were captured.
    truth: Vec<(RecordMeta, Vec<u8>)>,
    released: u64,
    /// End of the last frame whose completion was told.
    completed_lsn: u64,
    flying: VecDeque<Flying>,
    ask: Option<(Seq, u32, u32)>,
    purged: Seq,
    /// Records whose fill may have ended early.
    gone: Vec<Seq>,
    now_us: u64,
    laps: u64,
    /// Up to here marks have passed the gate.
    gate: RingPos,
}

fn fill_byte(seq: Seq, at: u32) -> u8 {
    (seq.0 as u32).wrapping_mul(31).wrapping_add(at) as u8
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
}

impl World {
    fn new(log_bytes: u64) -> Self {
        let tail = Tail::of_epoch(Epoch(EPOCH), log_bytes, RingPos(RING_START));
        Self {
            core: MirrorCore::build(&tail, 16, 0).expect("a fresh tail is valid"),
            header: header(log_bytes),
            memory: vec![0; (LOG_OFFSET + log_bytes) as usize],
            ring: vec![0; RING_START as usize],
            truth: Vec::new(),
            released: RING_START,
            completed_lsn: 0,
            flying: VecDeque::new(),
            ask: None,
            purged: Seq(0),
            gone: Vec::new(),
            now_us: 0,
            laps: 0,
            gate: RingPos(0),
        }
    }

    fn capture(&mut self, records: &[(u32, bool)]) {
        let mut metas = Vec::new();
        for (len, lacking) in records {
            let from = self.ring.len();
            let seq = self.truth.len() as u64 + 1;
            let head = RecordHeader {
                ino: 5 + seq % 3,
                time_ns: seq as i64,
                ..Default::default()
            };
            if *lacking {
                encode::push_write_without_bytes(&mut self.ring, head, (*len * 3).min(FILL_MAX));
            } else {
                encode::push_write(&mut self.ring, head, &vec![seq as u8; *len as usize]);
            }
            let bytes = self.ring[from..].to_vec();
            let view = RecordView::parse(&bytes, 0).expect("encoded");
            let meta = RecordMeta::of(&view, RingPos(from as u64));
            metas.push(meta);
            self.truth.push((meta, bytes));
        }
        self.core.captured(&metas, self.now_us).expect("contiguous");
    }

    /// Pulls one action; false if there was none.
    fn act(&mut self) -> bool {
        let ring = &self.ring;
        let crc = |pos: RingPos, len: u32| {
            crc32c::crc32c(&ring[pos.0 as usize..(pos.0 + u64::from(len)) as usize])
        };
        let Some(action) = self.core.next_action(crc) else {
            return false;
        };
        match action {
            Action::Post {
                id,
                offset,
                head,
                body,
                kind,
            } => {
                self.check_post(offset, &head, kind);
                self.flying.push_back(Flying {
                    id,
                    offset,
                    head,
                    body,
                    landed: false,
                });
                assert!(self.flying.len() <= 16, "the window is 16 posts");
            }
            Action::NeedFill {
                seq,
                len,
                fill_offset,
                ..
            } => self.ask = Some((seq, len, fill_offset)),
            Action::ReleaseRing(pos) => {
                assert!(pos.0 >= self.released && pos.0 <= self.ring.len() as u64);
                let from = self.released as usize;
                self.ring[from..pos.0 as usize].fill(0xee);
                self.released = pos.0;
            }
            Action::RegionHalf | Action::RegionFull => {}
        }
        true
    }

    /// What the memory's state cannot show, because the fake link keeps the order and never tears a line.
    fn check_post(&self, offset: u64, head: &[u8; 64], kind: PostKind) {
        match kind {
            PostKind::Head => {
                let counts = self
                    .scan()
                    .head
                    .slot
                    .map(|slot| HEAD_OFFSETS[usize::from(slot)]);
                assert_ne!(
                    Some(offset),
                    counts,
                    "the head that counts is not overwritten"
                );
            }
            PostKind::Mirrored => {
                let line = Mirrored::open(head).expect("sealed");
                assert!(
                    line.lsn <= self.completed_lsn,
                    "only what has completed is published"
                );
            }
            _ => {}
        }
    }

    fn bytes_of(&self, post: &Flying) -> Vec<u8> {
        let mut bytes = post.head.to_vec();
        match &post.body {
            PostBody::None => {}
            PostBody::Bytes(body) => bytes.extend(body),
            PostBody::Ring { pos, len } => {
                let from = pos.0 as usize;
                bytes.extend(&self.ring[from..from + *len as usize]);
            }
        }
        bytes
    }

    fn land(&mut self) -> bool {
        let Some(index) = self.flying.iter().position(|post| !post.landed) else {
            return false;
        };
        let bytes = self.bytes_of(&self.flying[index]);
        self.store(self.flying[index].offset, &bytes);
        self.flying[index].landed = true;
        true
    }

    fn store(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset >= STATUS_OFFSET, "the header page is the mirror's");
        let from = offset as usize;
        self.memory[from..from + bytes.len()].copy_from_slice(bytes);
    }

    fn complete(&mut self) -> bool {
        if !self.flying.front().is_some_and(|post| post.landed) {
            return false;
        }
        let post = self.flying.pop_front().expect("checked");
        self.core.completed(post.id, self.now_us).expect("in order");
        if let Some(frame) = FrameHeader::open(&post.head) {
            self.completed_lsn = frame.lsn + frame.stride();
        }
        true
    }

    fn fill(&mut self, gone: bool) {
        let Some((seq, len, fill_offset)) = self.ask.take() else {
            return;
        };
        let len = if gone { len / 2 } else { len };
        if gone {
            self.gone.push(seq);
        }
        let bytes = (0..len)
            .map(|at| fill_byte(seq, fill_offset + at))
            .collect();
        let captured = self.core.captured_seq();
        self.core
            .filled(seq, fill_offset, bytes, gone, captured)
            .expect("as asked");
    }

    fn purge(&mut self, seq: Seq) {
        self.purged = self.purged.max(seq);
        self.core.purge_to(seq).expect("captured");
    }

    /// Everything on the wire is lost, but for the first lines of the post that was being written.
    fn lose_link(&mut self, lines: u8) -> Tail {
        if let Some(post) = self.flying.iter().find(|post| !post.landed) {
            let bytes = self.bytes_of(post);
            let keep = (usize::from(lines) * 64).min(bytes.len());
            self.store(post.offset, &bytes[..keep]);
        }
        self.flying.clear();
        self.ask = None;
        let mut tail = self.scan().tail();
        tail.end.ring_pos_end.get_or_insert(RingPos(RING_START));
        self.completed_lsn = tail.end.lsn.0;
        tail
    }

    fn restart(&mut self, lines: u8) {
        let tail = self.lose_link(lines);
        self.core = MirrorCore::build(&tail, 16, self.now_us).expect("own tail");
        // It must find out anew what is safe.
        self.gate = RingPos(0);
        let metas: Vec<_> = self
            .truth
            .iter()
            .map(|(meta, _)| *meta)
            .filter(|meta| Some(meta.ring_pos) >= tail.end.ring_pos_end)
            .collect();
        self.core.captured(&metas, self.now_us).expect("contiguous");
    }

    fn apply(&mut self, step: &Step) {
        self.now_us += 137;
        self.core.tick(self.now_us, self.now_us as i64 * 1000);
        match step {
            Step::Capture(records) => {
                let records: Vec<_> = records.iter().map(|(l, f)| (u32::from(*l), *f)).collect();
                self.capture(&records);
            }
            Step::Act(n) => (0..*n).for_each(|_| _ = self.act()),
            Step::Land(n) => (0..*n).for_each(|_| _ = self.land()),
            Step::Complete(n) => (0..*n).for_each(|_| _ = self.complete()),
            Step::Fill(gone) => self.fill(*gone),
            Step::Purge(share) => {
                let (from, to) = (self.core.purged_seq().0, self.core.mirrored_seq().0);
                self.purge(Seq(from + to.saturating_sub(from) * u64::from(*share) / 255));
            }
            Step::Checkpoint => {
                let seq = self.core.captured_seq();
                self.core.checkpoint_mark(seq, 5).expect("captured");
                self.purge(seq);
            }
            Step::Relink(lines) => {
                let tail = self.lose_link(*lines);
                self.core.relink(&tail).expect("own tail");
            }
            Step::Restart(lines) => self.restart(*lines),
        }
    }

    fn scan(&self) -> Scan {
        let (status, log) = self.memory[STATUS_OFFSET as usize..].split_at(4096);
        scan::read(&self.header, status, log).expect("the memory is sound at every moment")
    }

    /// What must hold whenever the owner could die.
    fn check(&mut self) {
        let scan = self.scan();
        let (mirrored, captured) = (self.core.mirrored_seq(), self.core.captured_seq());
        assert!(
            scan.tail().last_complete_seq() >= mirrored,
            "acknowledged records are there"
        );
        assert!(scan.last_seq <= captured);
        if let Some((next, _)) = self.truth.get(mirrored.0 as usize) {
            assert!(
                self.released <= next.ring_pos.0,
                "the ring is kept until all bytes are there"
            );
        }
        assert!(
            scan.head.seq.0 <= self.purged.0 + 1,
            "only purged records have left"
        );
        assert!(scan.cut <= scan.tail().last_complete_seq());
        self.check_gate(&scan);
        self.laps = scan.end.lsn.0 / self.header.log_bytes;
        let log = &self.memory[LOG_OFFSET as usize..];
        let mut seq = scan.head.seq;
        for record in scan.records(log) {
            assert_eq!(record.seq, seq);
            let (meta, bytes) = &self.truth[seq.0 as usize - 1];
            assert_eq!(record.ring_pos, meta.ring_pos);
            let at = record.log_offset as usize;
            assert_eq!(&log[at..at + bytes.len()], &bytes[..], "record {seq}");
            let mut filled = 0;
            for part in record.payload().filter(|_| meta.needs_fill()) {
                assert_eq!(part.data_offset, filled);
                for at in 0..part.len {
                    let byte = log[part.log_offset as usize + at as usize];
                    assert_eq!(byte, fill_byte(seq, part.data_offset + at));
                }
                filled += part.len;
            }
            let whole = !meta.needs_fill()
                || filled == meta.data_len
                || scan.pending_fill.is_some_and(|fill| fill.seq == seq)
                || self.gone.contains(&seq)
                || seq <= self.purged;
            assert!(
                whole,
                "record {seq} has {filled} of {} bytes",
                meta.data_len
            );
            seq = seq.next();
        }
        assert_eq!(seq, scan.end.next_seq);
    }

    /// What has passed the gate is what a replay would show, or is durable.
    fn check_gate(&mut self, scan: &Scan) {
        let gate = self.core.gate_open_to();
        assert!(gate >= self.gate, "the gate goes back");
        self.gate = gate;
        let passed = self
            .truth
            .partition_point(|(meta, _)| meta.ring_end() <= gate);
        let shown = scan.cut.max(self.purged);
        assert!(
            passed as u64 <= shown.0,
            "record {passed} passed the gate, a replay would show up to {shown}"
        );
    }

    /// With a working link everything arrives, whatever happened before.
    fn drain(&mut self) {
        for _ in 0..10_000 {
            let mut moved = false;
            while self.act() {
                moved = true;
            }
            if self.ask.is_some() {
                self.fill(false);
                moved = true;
            }
            while self.land() || self.complete() {
                moved = true;
            }
            if moved {
                continue;
            }
            if self.core.is_region_full() {
                self.purge(self.core.captured_seq());
            } else if let Some(at_us) = self.core.publish_at_us() {
                self.now_us = self.now_us.max(at_us);
                self.core.tick(self.now_us, self.now_us as i64 * 1000);
            } else {
                break;
            }
        }
        assert_eq!(self.core.mirrored_seq(), self.core.captured_seq());
        assert_eq!(
            (
                self.core.lag_records(),
                self.core.lag_bytes(),
                self.core.lag_us()
            ),
            (0, 0, 0)
        );
        assert_eq!(
            self.released,
            self.core.captured_end().0,
            "all ring space is released"
        );
        self.check();
        assert_eq!(self.gate, self.core.captured_end(), "nobody waits for ever");
        let published = self.scan().mirrored;
        if let Some(published) = published {
            assert_eq!(published.seq, self.core.mirrored_seq().0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn nothing_acknowledged_is_ever_lost(steps in prop::collection::vec(step(), 1..160)) {
        let mut world = World::new(LOG_BYTES);
        for step in &steps {
            world.apply(step);
            world.check();
        }
        world.drain();
    }
}

#[test]
fn a_long_life_goes_round_many_times() {
    let mut world = World::new(LOG_BYTES);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..6000 {
        let step = step().new_tree(&mut runner).expect("a step").current();
        world.apply(&step);
        world.check();
    }
    world.drain();
    assert!(world.laps >= 100, "{} laps", world.laps);
}
