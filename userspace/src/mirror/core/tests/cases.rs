//! Single cases that a person can read: batching, sizes, a full region, ages, breaches.

use super::*;

/// A world with the sizes of the product.
fn real() -> World {
    World::new(LOG_BYTES_MIN)
}

fn kinds(world: &mut World) -> Vec<PostKind> {
    let mut kinds = Vec::new();
    while let Some(action) = world.core.next_action(|_, _| 0) {
        if let Action::Post { kind, .. } = action {
            kinds.push(kind);
        }
    }
    kinds
}

#[test]
fn records_travel_together_under_load_and_one_alone_at_once() {
    let mut world = real();
    world.capture(&[(100, false)]);
    assert_eq!(kinds(&mut world), [PostKind::Run], "no delay when alone");
    world.capture(&vec![(4032, false); 100]);
    assert_eq!(
        kinds(&mut world),
        [PostKind::Run; 2],
        "64 records of 4 KiB in a frame, and the rest"
    );
    world.capture(&vec![(4032, false); 64 * 20]);
    assert_eq!(kinds(&mut world).len(), 13, "the window is full");
    assert_eq!(world.core.in_flight(), 16);
}

#[test]
fn the_largest_records_go_round() {
    let mut world = real();
    for _ in 0..50 {
        world.capture(&[(twinwrite_abi::INLINE_BYTES_MAX, false), (1, false)]);
        world.drain();
        let purge = world.core.mirrored_seq();
        world.purge(purge);
    }
    assert!(world.laps >= 3);
    let meta = RecordMeta {
        span: FRAME_BODY_BYTES_MAX + 64,
        ..world.truth[0].0
    };
    let meta = RecordMeta {
        ring_pos: world.core.captured_end(),
        ..meta
    };
    assert!(matches!(
        world.core.captured(&[meta], 0),
        Err(CoreError::Span { .. })
    ));
}

#[test]
fn a_filling_region_is_told_once_and_goes_on_after_a_purge() {
    let mut world = World::new(LOG_BYTES);
    world.capture(&vec![(4032, false); 30]);
    let (mut half, mut full) = (0, 0);
    for _ in 0..50 {
        while let Some(action) = world.core.next_action(|_, _| 0) {
            match action {
                Action::RegionHalf => half += 1,
                Action::RegionFull => full += 1,
                Action::Post { id, .. } => _ = world.core.completed(id, 0).expect("in order"),
                _ => {}
            }
        }
    }
    assert_eq!((half, full, world.core.is_region_full()), (1, 1, true));
    world.core.purge_to(Seq(30)).expect("captured");
    while let Some(action) = world.core.next_action(|_, _| 0) {
        if let Action::Post { id, .. } = action {
            world.core.completed(id, 0).expect("in order");
        }
    }
    assert_eq!(
        (world.core.mirrored_seq(), world.core.is_region_full()),
        (Seq(30), false)
    );
    assert_eq!(world.core.unpurged_bytes(), 0);
}

#[test]
fn a_fill_larger_than_the_region_ends_when_its_record_is_purged() {
    let mut world = World::new(LOG_BYTES);
    let mut run = Vec::new();
    encode::push_write_without_bytes(&mut run, RecordHeader::default(), 1 << 20);
    let view = RecordView::parse(&run, 0).expect("encoded");
    world
        .core
        .captured(&[RecordMeta::of(&view, RingPos(RING_START))], 0)
        .expect("first");
    let mut asked = 0;
    for _ in 0..100 {
        while let Some(action) = world.core.next_action(|_, _| 0) {
            match action {
                Action::NeedFill { len, .. } => asked = len,
                Action::Post { id, .. } => _ = world.core.completed(id, 0).expect("in order"),
                _ => {}
            }
        }
        if asked != 0 {
            let bytes = vec![1; asked as usize];
            world
                .core
                .filled(Seq(1), 0, bytes, false, Seq(1))
                .expect("as asked");
            asked = 0;
        }
    }
    assert!(world.core.is_region_full());
    assert_eq!(world.core.mirrored_seq(), Seq(0));
    world.core.purge_to(Seq(1)).expect("captured");
    while let Some(action) = world.core.next_action(|_, _| 0) {
        if let Action::Post { id, .. } = action {
            world.core.completed(id, 0).expect("in order");
        }
    }
    assert_eq!(
        (world.core.mirrored_seq(), world.core.lag_bytes()),
        (Seq(1), 0)
    );
    assert_eq!(world.core.unpurged_bytes(), 0);
}

#[test]
fn ages_and_lag_are_told() {
    let mut world = real();
    world.core.tick(1000, 0);
    world.capture(&[]);
    world.now_us = 1000;
    world.capture(&[(64, false)]);
    world.now_us = 21_000;
    world.capture(&[(64, false), (10, true)]);
    world.core.tick(30_000, 0);
    assert_eq!((world.core.lag_records(), world.core.lag_us()), (3, 29_000));
    assert_eq!(world.core.lag_bytes(), 128 + 128 + 64 + 30);
    while world.act() {}
    while world.land() {}
    let first = world.flying[0].id;
    let advance = world.core.completed(first, 31_000).expect("in order");
    assert_eq!(
        advance,
        Some(Advance {
            mirrored: Seq(2),
            records: 2,
            captured_us: 1000
        })
    );
    assert_eq!((world.core.lag_records(), world.core.lag_us()), (1, 10_000));
    assert_eq!(world.core.oldest_unflushed_age_us(), 30_000);
    world.core.purge_to(Seq(1)).expect("captured");
    assert_eq!(world.core.oldest_unflushed_age_us(), 10_000);
}

#[test]
fn breaches_of_the_protocol_are_typed() {
    let mut world = real();
    world.capture(&[(64, false), (8, true)]);
    let core = &mut world.core;
    let hole = RecordMeta {
        ring_pos: RingPos(9),
        ..world.truth[0].0
    };
    assert!(matches!(
        core.captured(&[hole], 0),
        Err(CoreError::Hole { seq: Seq(3), .. })
    ));
    let none = CoreError::Completion {
        found: 4,
        expected: None,
    };
    assert_eq!(core.completed(PostId(4), 0), Err(none));
    assert!(matches!(
        core.purge_to(Seq(3)),
        Err(CoreError::Purge { .. })
    ));
    assert!(matches!(
        core.checkpoint_mark(Seq(3), 0),
        Err(CoreError::Purge { .. })
    ));
    assert_eq!(
        core.filled(Seq(2), 0, vec![], false, Seq(2)),
        Ok(false),
        "nobody asked"
    );
    while core.next_action(|_, _| 0).is_some() {}
    let mut fill = |len, gone, safe_at| core.filled(Seq(2), 0, vec![0; len], gone, Seq(safe_at));
    assert!(matches!(
        fill(23, false, 2),
        Err(CoreError::FillLength { .. })
    ));
    assert!(matches!(
        fill(25, true, 2),
        Err(CoreError::FillLength { .. })
    ));
    assert!(matches!(fill(24, false, 1), Err(CoreError::SafeAt { .. })));
    assert!(matches!(fill(24, false, 3), Err(CoreError::SafeAt { .. })));
    assert_eq!(fill(24, false, 2), Ok(true));
    assert_eq!(fill(24, false, 2), Ok(false), "twice");
    let second = CoreError::Completion {
        found: 2,
        expected: Some(1),
    };
    assert_eq!(core.completed(PostId(2), 0), Err(second));
    let tail = Tail::of_epoch(Epoch(EPOCH), 4096, RingPos(0));
    assert!(matches!(
        MirrorCore::new(&tail, 16, 0),
        Err(CoreError::LogBytes { .. })
    ));
    let tail = Tail {
        log_bytes: LOG_BYTES_MIN,
        ..tail
    };
    assert!(matches!(
        MirrorCore::new(&tail, 2, 0),
        Err(CoreError::Window { .. })
    ));
    assert!(MirrorCore::new(&tail, 16, 0).is_ok());
}

#[test]
fn a_region_that_lacks_what_was_acknowledged_is_refused() {
    let mut world = World::new(LOG_BYTES);
    world.capture(&[(100, false), (200, false)]);
    world.drain();
    let tail = world.scan().tail();
    let refused =
        |tail: &Tail| matches!(world.core.clone().relink(tail), Err(CoreError::Tail { .. }));
    assert!(!refused(&tail));
    assert!(refused(&Tail::of_epoch(
        Epoch(EPOCH),
        LOG_BYTES,
        RingPos(RING_START)
    )));
    assert!(refused(&Tail {
        epoch: Epoch(EPOCH + 1),
        ..tail
    }));
    assert!(refused(&Tail {
        log_bytes: LOG_BYTES * 2,
        ..tail
    }));
    for end in [
        LogEnd {
            lsn: Lsn(tail.end.lsn.0 + 64),
            ..tail.end
        },
        LogEnd {
            next_seq: tail.end.next_seq.next(),
            ..tail.end
        },
        LogEnd {
            last_header_crc: tail.end.last_header_crc ^ 1,
            ..tail.end
        },
        LogEnd {
            ring_pos_end: None,
            ..tail.end
        },
        LogEnd {
            ring_pos_end: Some(RingPos(64)),
            ..tail.end
        },
    ] {
        assert!(refused(&Tail { end, ..tail }), "{end:?}");
    }
}
