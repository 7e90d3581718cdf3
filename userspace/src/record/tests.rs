//! The record format is pinned by bytes, and its reader by what must be refused.

use super::*;

#[test]
fn a_write_has_these_bytes() {
    let mut run = Vec::new();
    encode::push_write(
        &mut run,
        RecordHeader {
            ino: 0x1122,
            generation: 7,
            mode: 0o100_644,
            pos: 4096,
            size_after: 4101,
            time_ns: 9,
            ..Default::default()
        },
        b"hello",
    );
    let mut golden = vec![120, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0];
    golden.extend([0x22, 0x11, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0xa4, 0x81, 0, 0]);
    golden.extend([0, 0x10, 0, 0, 0, 0, 0, 0, 5, 0x10, 0, 0, 0, 0, 0, 0]);
    golden.extend([9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend(b"hello");
    golden.resize(128, 0);
    assert_eq!(run, golden);
    let view = RecordView::parse(&run, 0).expect("valid");
    assert_eq!(view.data(), b"hello");
    assert_eq!(view.span(), 128);
}

#[test]
fn names_are_read_back_in_order() {
    let mut run = Vec::new();
    let header = RecordHeader {
        op: op::RENAME,
        ino: 5,
        pos: 2,
        arg: 3,
        ..Default::default()
    };
    let names = NameBody {
        new_parent_ino: 9,
        victim_ino: 11,
        ..Default::default()
    };
    encode::push_name(&mut run, header, names, b"old", b"newer", b"");
    let view = RecordView::parse(&run, 0).expect("valid");
    assert_eq!((view.name(), view.name2()), (&b"old"[..], &b"newer"[..]));
    assert_eq!(view.parent().generation, 3);
    assert_eq!(view.victim().map(|v| v.ino), Some(11));
}

#[test]
fn a_record_that_claims_more_than_there_is_is_refused() {
    let mut run = Vec::new();
    encode::push_write(&mut run, RecordHeader::default(), &[1; 100]);
    for cut in 0..run.len() {
        assert!(RecordView::parse(&run[..cut], 0).is_err(), "cut at {cut}");
    }
    run[12..16].copy_from_slice(&200u32.to_le_bytes());
    assert!(RecordView::parse(&run, 0).is_err());
}

#[test]
fn names_that_no_directory_holds_are_refused() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
        let mut run = Vec::new();
        let header = RecordHeader {
            op: op::CREATE,
            ino: 5,
            ..Default::default()
        };
        encode::push_name(&mut run, header, NameBody::default(), name, b"", b"");
        assert!(RecordView::parse(&run, 0).is_err(), "{name:?}");
    }
}

#[test]
fn any_bytes_are_read_without_a_panic() {
    proptest::proptest!(|(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..512))| {
        for (_, view) in Records::new(&bytes).flatten() {
            let _ = (view.data(), view.name(), view.name2(), view.target());
        }
    });
}
