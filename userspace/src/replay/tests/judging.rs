//! Which regions may be merged, and the sentinel's file.

use std::os::unix::fs::FileExt;

use super::real::sentinel_of;
use crate::ids::{Epoch, Seq};
use crate::replay::{
    NothingToDo, Refusal, RegionClaim, SentinelError, SentinelFile, Verdict, judge, sentinel,
};

fn region() -> RegionClaim {
    RegionClaim {
        cluster: "test".into(),
        volume: "v".into(),
        filesystem_uuid: [7; 16],
        epoch: Epoch(7),
        closed: false,
        last: Seq(50),
        marked: Seq(10),
    }
}

const NEW: Epoch = Epoch(8);
const MOUNTED: Option<[u8; 16]> = Some([7; 16]);

#[test]
fn a_region_of_the_volumes_epoch_is_merged_behind_s() {
    let verdict = judge(Ok(&sentinel_of(7, 20)), &region(), NEW, MOUNTED);
    assert_eq!(verdict, Verdict::Merge { after: Seq(20) });
}

#[test]
fn a_durable_region_and_a_finished_replay_leave_nothing_to_do() {
    for seq in [50, 51] {
        let verdict = judge(Ok(&sentinel_of(7, seq)), &region(), NEW, MOUNTED);
        assert!(
            matches!(verdict, Verdict::Nothing(NothingToDo::Durable { .. })),
            "{verdict:?}"
        );
    }
    let verdict = judge(Ok(&sentinel_of(8, 0)), &region(), NEW, MOUNTED);
    assert_eq!(
        verdict,
        Verdict::Nothing(NothingToDo::Finished { epoch: NEW })
    );
}

#[test]
fn a_stale_epoch_is_refused() {
    for epoch in [6, 9] {
        let verdict = judge(Ok(&sentinel_of(epoch, 20)), &region(), NEW, MOUNTED);
        assert!(
            matches!(verdict, Verdict::Refuse(Refusal::OtherEpoch { .. })),
            "{verdict:?}"
        );
    }
}

#[test]
fn a_closed_epoch_is_refused_whoever_tells() {
    let closed = crate::replay::Sentinel {
        closed: true,
        ..sentinel_of(7, 20)
    };
    let verdict = judge(Ok(&closed), &region(), NEW, MOUNTED);
    assert!(matches!(
        verdict,
        Verdict::Refuse(Refusal::Closed {
            told_by: "the sentinel",
            ..
        })
    ));
    let verdict = judge(
        Ok(&sentinel_of(7, 20)),
        &RegionClaim {
            closed: true,
            ..region()
        },
        NEW,
        MOUNTED,
    );
    assert!(matches!(
        verdict,
        Verdict::Refuse(Refusal::Closed {
            told_by: "the region",
            ..
        })
    ));
}

#[test]
fn a_foreign_or_unreadable_sentinel_is_refused() {
    let foreign = crate::replay::Sentinel {
        volume: "other".into(),
        ..sentinel_of(7, 20)
    };
    let verdict = judge(Ok(&foreign), &region(), NEW, MOUNTED);
    assert!(matches!(verdict, Verdict::Refuse(Refusal::Foreign { .. })));
    let verdict = judge(Err("torn".into()), &region(), NEW, MOUNTED);
    assert!(matches!(verdict, Verdict::Refuse(Refusal::Unreadable(_))));
}

#[test]
fn a_region_of_another_file_system_is_refused_and_both_are_named() {
    let verdict = judge(Ok(&sentinel_of(7, 20)), &region(), NEW, Some([0xab; 16]));
    let Verdict::Refuse(refusal @ Refusal::OtherFilesystem { .. }) = verdict else {
        panic!("{verdict:?}");
    };
    let text = refusal.to_string();
    for uuid in [
        "07070707-0707-0707-0707-070707070707",
        "abababab-abab-abab-abab-abababababab",
    ] {
        assert!(text.contains(uuid), "{uuid} is not in {text}");
    }
}

#[test]
fn an_unknown_file_system_is_not_compared() {
    let merge = Verdict::Merge { after: Seq(20) };
    let unknown = RegionClaim {
        filesystem_uuid: [0; 16],
        ..region()
    };
    let sentinel = sentinel_of(7, 20);
    assert_eq!(judge(Ok(&sentinel), &region(), NEW, None), merge);
    assert_eq!(judge(Ok(&sentinel), &unknown, NEW, MOUNTED), merge);
}

#[test]
fn a_volume_behind_a_proven_mark_is_refused() {
    let verdict = judge(Ok(&sentinel_of(7, 9)), &region(), NEW, MOUNTED);
    assert!(matches!(
        verdict,
        Verdict::Refuse(Refusal::VolumeBehind { .. })
    ));
}

#[test]
fn a_torn_sentinel_write_leaves_the_one_before() {
    let mount = tempfile::tempdir().expect("a directory");
    assert!(matches!(
        sentinel::read(mount.path()),
        Err(SentinelError::Missing(_))
    ));
    let mut file = SentinelFile::open(mount.path()).expect("open");
    assert!(matches!(
        sentinel::read(mount.path()),
        Err(SentinelError::Missing(_))
    ));
    for seq in 1..=5 {
        file.write(&sentinel_of(7, seq)).expect("write");
        assert_eq!(
            sentinel::read(mount.path()).expect("read").seq,
            Seq(seq as u64)
        );
    }
    drop(file);
    // The fifth went to the first slot. Tear it anywhere.
    let path = mount.path().join(".twinwrite/sentinel");
    let raw = std::fs::File::options()
        .write(true)
        .open(&path)
        .expect("open");
    for torn_at in [0, 24, 33, 60, 2000, 4095] {
        raw.write_all_at(b"?", torn_at).expect("tear");
        assert_eq!(
            sentinel::read(mount.path()).expect("read").seq,
            Seq(4),
            "torn at {torn_at}"
        );
        let mut file = SentinelFile::open(mount.path()).expect("open again");
        file.write(&sentinel_of(7, 5)).expect("write");
        assert_eq!(sentinel::read(mount.path()).expect("read").seq, Seq(5));
    }
}

#[test]
fn a_sentinel_whose_first_write_was_torn_was_never_written_and_a_later_one_is_damaged() {
    let mount = tempfile::tempdir().expect("a directory");
    let mut file = SentinelFile::open(mount.path()).expect("open");
    file.write(&sentinel_of(7, 1)).expect("write");
    let path = mount.path().join(".twinwrite/sentinel");
    let raw = std::fs::File::options()
        .write(true)
        .open(&path)
        .expect("open");
    raw.write_all_at(b"?", 40).expect("tear");
    assert!(matches!(
        sentinel::read(mount.path()),
        Err(SentinelError::Missing(_))
    ));
    raw.write_all_at(b"?", 4096 + 40).expect("damage");
    assert!(matches!(
        sentinel::read(mount.path()),
        Err(SentinelError::Damaged(_))
    ));
}

#[test]
fn a_sentinel_has_these_bytes() {
    let mount = tempfile::tempdir().expect("a directory");
    let mut file = SentinelFile::open(mount.path()).expect("open");
    file.write(&sentinel_of(7, 0x1234)).expect("write");
    let bytes = std::fs::read(mount.path().join(".twinwrite/sentinel")).expect("read");
    assert_eq!(bytes.len(), 8192);
    assert_eq!(&bytes[..8], b"TWSENTIN");
    assert_eq!(
        &bytes[8..32],
        [
            1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(
        &bytes[32..48],
        [0x34, 0x12, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(&bytes[48..53], b"test\0");
    assert_eq!(&bytes[112..114], b"v\0");
    let crc = crc32c::crc32c(&bytes[..4092]).to_le_bytes();
    assert_eq!(&bytes[4092..4096], crc);
}
