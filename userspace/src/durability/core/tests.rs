//! The purge rule against the table it implements, applied effect by effect.

use proptest::prelude::*;
use twinwrite_abi::ATTR_SIZE;

use super::*;

const FULL: (u64, u64) = (0, i64::MAX as u64);

fn meta(op: u8, ino: u64, ring_pos: u64) -> RecordMeta {
    RecordMeta {
        ring_pos: RingPos(ring_pos),
        span: 64,
        op,
        flags: 0,
        identity: Identity { ino, generation: 1 },
        pos: 0,
        data_len: 0,
        size_after: 0,
        arg: 0,
    }
}

fn write(ino: u64, ring_pos: u64, pos: u64, data_len: u32) -> RecordMeta {
    RecordMeta {
        pos,
        data_len,
        size_after: pos + u64::from(data_len),
        ..meta(op::WRITE, ino, ring_pos)
    }
}

fn fsync(ino: u64, ring_pos: u64, range: (u64, u64), flags: u8, arg: u64) -> RecordMeta {
    RecordMeta {
        pos: range.0,
        size_after: range.1,
        flags,
        arg,
        ..meta(op::FSYNC, ino, ring_pos)
    }
}

fn log(records: &[RecordMeta]) -> LiveLog {
    let mut log = LiveLog::new(Seq(1), Seq(1));
    for (seq, record) in (1..).zip(records) {
        assert_eq!(log.appended(Seq(seq), record), Ok(None));
    }
    log
}

#[test]
fn a_full_fsync_covers_what_was_written_before_its_entry() {
    let mut records = vec![write(5, 0, 0, 10), write(5, 64, 10, 10)];
    assert_eq!(log(&records).purgeable(), Seq(0));
    records.push(fsync(5, 128, FULL, 0, 64));
    assert_eq!(
        log(&records).purgeable(),
        Seq(1),
        "the second was written during the call"
    );
    records.push(fsync(5, 192, FULL, 0, 128));
    assert_eq!(log(&records).purgeable(), Seq(4));
}

#[test]
fn weaker_marks_purge_nothing() {
    for (range, flags) in [
        ((0, 9), 0),
        (FULL, flag::DATASYNC),
        (FULL, flag::UNLINKED),
        (FULL, flag::TAINTED),
        ((1, FULL.1), 0),
        ((0, 9), flag::DATASYNC),
    ] {
        let records = [write(5, 0, 0, 10), fsync(5, 64, range, flags, 64)];
        assert_eq!(log(&records).purgeable(), Seq(0), "{range:?} {flags}");
    }
    let other = RecordMeta {
        identity: Identity {
            ino: 5,
            generation: 2,
        },
        ..fsync(5, 64, FULL, 0, 64)
    };
    assert_eq!(
        log(&[write(5, 0, 0, 10), other]).purgeable(),
        Seq(0),
        "another use of the number"
    );
}

#[test]
fn names_wait_for_a_checkpoint() {
    let mut log = log(&[
        meta(op::CREATE, 5, 0),
        write(5, 64, 0, 1),
        fsync(5, 128, FULL, 0, 128),
        meta(op::RENAME, 5, 192),
    ]);
    assert_eq!(log.purgeable(), Seq(0));
    assert_eq!(log.checkpoint(Seq(1)), Ok(()));
    assert_eq!(log.purgeable(), Seq(3));
    assert_eq!(
        log.checkpoint(Seq(5)),
        Err(LiveError::Checkpoint {
            seq: Seq(5),
            last: Seq(4)
        })
    );
    assert_eq!(log.checkpoint(Seq(4)), Ok(()));
    assert_eq!(
        (log.purgeable(), log.live_records(), log.live_inodes()),
        (Seq(4), 0, 0)
    );
}

#[test]
fn a_named_tmpfile_stays_until_its_name_is_proven() {
    let link = RecordMeta {
        flags: flag::FROM_TMPFILE,
        ..meta(op::LINK, 5, 192)
    };
    let records = [
        meta(op::TMPFILE, 5, 0),
        write(5, 64, 0, 1),
        fsync(5, 128, FULL, flag::UNLINKED, 128),
        link,
    ];
    let mut held = log(&records);
    held.checkpoint(Seq(3)).expect("appended");
    assert_eq!(
        held.purgeable(),
        Seq(0),
        "the inode is proven only as an orphan"
    );
    held.checkpoint(Seq(4)).expect("appended");
    assert_eq!(held.purgeable(), Seq(4));

    let mut purged = log(&records[..3]);
    purged.checkpoint(Seq(3)).expect("appended");
    assert_eq!(purged.purgeable(), Seq(3));
    let gap = GapReason::LinkOfPurgedTmpfile {
        identity: link.identity,
    };
    assert_eq!(purged.appended(Seq(4), &link), Ok(Some(gap)));
}

#[test]
fn a_nameless_inode_may_have_been_what_a_checkpoint_covered_without_effect() {
    let tmpfile = meta(op::TMPFILE, 5, 64);
    let link = RecordMeta {
        flags: flag::FROM_TMPFILE,
        ..meta(op::LINK, 5, 128)
    };
    let gap = meta(op::GAP, 0, 0);
    let behind_gap = GapReason::LinkBehindGap {
        identity: link.identity,
    };
    let mut gapped = log(&[gap, tmpfile]);
    gapped.checkpoint(Seq(2)).expect("appended");
    assert_eq!(gapped.appended(Seq(3), &link), Ok(Some(behind_gap)));
    // Named before the checkpoint, or without any gap, it is whole.
    let mut named = log(&[gap, tmpfile]);
    assert_eq!(named.appended(Seq(3), &link), Ok(None));
    let mut whole = log(&[write(6, 0, 0, 1), tmpfile]);
    whole.checkpoint(Seq(2)).expect("appended");
    assert_eq!(whole.appended(Seq(3), &link), Ok(None));
}

#[test]
fn records_of_an_earlier_agent_wait_for_a_checkpoint() {
    let mut log = LiveLog::new(Seq(10), Seq(20));
    assert_eq!(log.purgeable(), Seq(9));
    log.appended(Seq(20), &write(5, 0, 0, 1)).expect("next");
    log.appended(Seq(21), &fsync(5, 64, FULL, 0, 64))
        .expect("next");
    assert_eq!(log.purgeable(), Seq(9));
    log.checkpoint(Seq(15)).expect("appended");
    assert_eq!(log.purgeable(), Seq(15));
    log.checkpoint(Seq(19)).expect("appended");
    assert_eq!(log.purgeable(), Seq(21));
    let order = LiveError::Order {
        found: Seq(23),
        last: Seq(21),
    };
    assert_eq!(log.appended(Seq(23), &write(5, 128, 0, 1)), Err(order));
}

#[test]
fn millions_of_records_cost_what_is_live() {
    let mut log = LiveLog::new(Seq(1), Seq(1));
    for seq in 1..=2_000_000u64 {
        log.appended(Seq(seq), &write(seq % 1000, seq * 64, 0, 1))
            .expect("next");
        if seq % 10_000 == 0 {
            assert!(log.live_records() <= 10_000);
            log.checkpoint(Seq(seq)).expect("appended");
            assert_eq!((log.purgeable(), log.live_inodes()), (Seq(seq), 0));
        }
    }
}

/// A mark as the design says it: a range of one inode, up to a ring position.
struct Mark {
    identity: Identity,
    range: (u64, u64),
    datasync: bool,
    before: u64,
}

impl Mark {
    fn is_full(&self) -> bool {
        self.range.0 == 0 && self.range.1 >= i64::MAX as u64
    }
}

/// Applies the table of the module's documentation to one record, effect by effect.
fn naive_covered(records: &[RecordMeta], marks: &[Mark], s: u64, index: usize) -> bool {
    let record = &records[index];
    let marks = || {
        marks
            .iter()
            .filter(|m| m.identity == record.identity && record.ring_pos.0 < m.before)
    };
    let size = || marks().any(Mark::is_full);
    let attributes = || marks().any(|m| m.is_full() && !m.datasync);
    let content = || {
        (record.pos..record.pos + u64::from(record.data_len))
            .all(|byte| marks().any(|m| m.range.0 <= byte && byte <= m.range.1))
    };
    let by_checkpoint = (index as u64) < s;
    match record.op {
        op::FSYNC | op::GAP => true,
        op::WRITE => by_checkpoint || (content() && size() && attributes()),
        op::SETATTR => by_checkpoint || (attributes() && (record.arg & ATTR_SIZE == 0 || size())),
        op::TMPFILE => {
            let name = records.iter().position(|r| {
                r.op == op::LINK
                    && r.flags & flag::FROM_TMPFILE != 0
                    && r.identity == record.identity
            });
            by_checkpoint && name.is_none_or(|at| (at as u64) < s)
        }
        _ => by_checkpoint,
    }
}

fn naive_purgeable(records: &[RecordMeta], s: u64) -> u64 {
    let marks: Vec<_> = records
        .iter()
        .filter(|r| r.op == op::FSYNC && r.flags & flag::UNLINKED == 0)
        .map(|r| Mark {
            identity: r.identity,
            range: (r.pos, r.size_after),
            datasync: r.flags & flag::DATASYNC != 0,
            before: r.arg,
        })
        .collect();
    (0..records.len())
        .take_while(|i| naive_covered(records, &marks, s, *i))
        .count() as u64
}

fn any_record() -> impl Strategy<Value = RecordMeta> {
    let range = prop_oneof![2 => Just(FULL), 1 => (0u64..20, 0u64..20)];
    prop_oneof![
        6 => (0u64..3, 0u64..16, 0u32..8).prop_map(|(ino, pos, len)| write(ino, 0, pos, len)),
        2 => (0u64..3, prop::bool::ANY).prop_map(|(ino, size)| RecordMeta {
            arg: if size { ATTR_SIZE } else { 1 },
            ..meta(op::SETATTR, ino, 0)
        }),
        1 => (0u64..3).prop_map(|ino| meta(op::UNLINK, ino, 0)),
        6 => (0u64..3, range, 0u8..8, 0u64..6).prop_map(|(ino, range, flags, back)| {
            // Rarely datasync or unlinked; `arg` is patched to lie a few records back.
            let flags = [0, 0, 0, 0, 0, 0, flag::DATASYNC, flag::UNLINKED][usize::from(flags)];
            fsync(ino, 0, range, flags, back)
        }),
        1 => Just(meta(op::GAP, 0, 0)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]
    #[test]
    fn the_rule_is_the_table(
        drawn in prop::collection::vec((any_record(), prop::option::weighted(0.1, 0u64..8)), 1..60),
        tmpfile in prop::option::of((0usize..30, 0usize..30)),
    ) {
        let mut log = LiveLog::new(Seq(1), Seq(1));
        let (mut records, mut s, mut told_gap) = (Vec::new(), 0, false);
        for (index, (mut record, checkpoint)) in drawn.into_iter().enumerate() {
            let tmp = Identity { ino: 77, generation: 1 };
            match tmpfile {
                Some((at, _)) if at == index => record = RecordMeta { identity: tmp, ..meta(op::TMPFILE, 77, 0) },
                Some((at, gap)) if at + gap + 1 == index => {
                    record = RecordMeta { flags: flag::FROM_TMPFILE, ..meta(op::LINK, 77, 0) };
                }
                _ => {}
            }
            record.ring_pos = RingPos(index as u64 * 64);
            if record.op == op::FSYNC {
                record.arg = (index as u64).saturating_sub(record.arg) * 64;
            }
            let seq = Seq(index as u64 + 1);
            let purged = log.purgeable();
            let gap = log.appended(seq, &record).expect("in order");
            records.push(record);
            if record.op == op::LINK {
                let gone = tmpfile.is_some_and(|(at, _)| (at as u64) < purged.0);
                prop_assert_eq!(gap.is_some(), gone);
                told_gap |= gone;
            }
            if let Some(back) = checkpoint {
                s = s.max(seq.0.saturating_sub(back));
                log.checkpoint(Seq(s)).expect("appended");
            }
            if told_gap {
                // The epoch is closed by a gap; only that nothing uncovered is purged still counts.
                prop_assert!(log.purgeable() <= seq);
                break;
            }
            prop_assert_eq!(log.purgeable().0, naive_purgeable(&records, s));
        }
    }
}

#[test]
fn unproven_bytes_are_those_of_live_writes_and_unknown_after_a_restart() {
    let inode = |ino| Identity { ino, generation: 1 };
    let mut log = LiveLog::new(Seq(1), Seq(1));
    let written = [
        write(1, 64, 0, 4096),
        write(1, 128, 4096, 100),
        write(2, 192, 50, 10),
        write(1, 256, 9000, 10),
        meta(op::CREATE, 3, 320),
    ];
    for (at, meta) in written.iter().enumerate() {
        log.appended(Seq(at as u64 + 1), meta).unwrap();
    }
    let unproven = log.unproven_bytes().unwrap();
    assert_eq!(unproven[&inode(1)], [0..4196, 9000..9010]);
    assert_eq!(unproven[&inode(2)].len(), 1);
    assert_eq!(unproven.len(), 2, "a name has no bytes");
    log.checkpoint(Seq(3)).unwrap();
    assert_eq!(log.purgeable(), Seq(3));
    let unproven = log.unproven_bytes().unwrap();
    assert_eq!(unproven.keys().collect::<Vec<_>>(), [&inode(1)]);
    assert!(LiveLog::new(Seq(4), Seq(9)).unproven_bytes().is_none());
}
