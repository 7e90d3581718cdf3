use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::cluster::claim::{BootId, EpochState, Phase, VolumeClaim};
use crate::cluster::liveness::Told;
use crate::ids::{Epoch, Seq};
use crate::region::layout::Sealed;

fn nodes() -> Vec<NodeId> {
    vec![NodeId("a".into()), NodeId("b".into())]
}

fn report(node: &str, counter: u64) -> NodeReport {
    let claim = VolumeClaim {
        table_version: 7,
        owner: NodeId("a".into()),
        phase: Phase::Settled,
        epoch: Epoch(3),
        epoch_state: EpochState::Open,
        last_mirrored: Seq(99),
    };
    NodeReport {
        node: NodeId(node.into()),
        boot_id: BootId([7; 16]),
        counter,
        time_ns: 1_700_000_000_000_000_000,
        state: AgentState::Running,
        volumes: BTreeMap::from([("data".to_owned(), claim)]),
        exposed: BTreeSet::new(),
        told: Told::default(),
    }
}

/// A blank mailbox in a file on a file system that can do direct I/O.
fn blank() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(4 * COPY_BYTES).unwrap();
    file
}

fn open(file: &tempfile::NamedTempFile, node: &str) -> Result<Mailbox, MailboxError> {
    Mailbox::open(file.path(), "office", &nodes(), &NodeId(node.into()))
}

#[test]
fn each_node_reads_what_the_other_wrote() {
    let file = blank();
    let (a, b) = (open(&file, "a").unwrap(), open(&file, "b").unwrap());
    assert_eq!(
        a.read().unwrap(),
        [Err(SlotError::Blank), Err(SlotError::Blank)]
    );
    a.write(&report("a", 1)).unwrap();
    b.write(&report("b", 2)).unwrap();
    a.write(&report("a", 3)).unwrap();
    assert_eq!(b.read().unwrap(), [Ok(report("a", 3)), Ok(report("b", 2))]);
    assert_eq!(a.read().unwrap(), b.read().unwrap());
    assert_eq!(b.index_of(&NodeId("b".into())), Some(1));
    let slots = b.read().unwrap();
    let claim = report("a", 3).volumes["data"].clone();
    assert_eq!(word_of(&slots[0], "data"), Word::Says(claim));
    assert_eq!(word_of(&slots[0], "other"), Word::Nothing);
    assert_eq!(word_of(&Err(SlotError::Blank), "data"), Word::Nothing);
}

#[test]
fn the_buffers_are_aligned_for_direct_io() {
    let pages = vec![Page::new_zeroed(); 3];
    for page in &pages {
        assert_eq!(std::ptr::from_ref(page).addr() % 4096, 0);
    }
    assert_eq!(pages.as_slice().as_bytes().len(), 3 * 4096);
    let file = blank();
    let flags = nix::fcntl::fcntl(
        &open(&file, "a").unwrap().file,
        nix::fcntl::FcntlArg::F_GETFL,
    );
    assert_ne!(flags.unwrap() & libc::O_DIRECT, 0);
    assert_ne!(flags.unwrap() & libc::O_SYNC, 0);
}

#[test]
fn a_slot_says_whether_its_node_owns_or_stopped() {
    let word = |report: NodeReport| match look_at(Some(&Ok(report))) {
        MailboxLook::Beat { beat, word } => {
            assert_eq!(
                beat,
                Beat {
                    boot_id: BootId([7; 16]),
                    counter: 4
                }
            );
            word
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(word(report("a", 4)), LastWord::Owns);
    assert_eq!(word(report("b", 4)), LastWord::OwnsNothing);
    let stopped = NodeReport {
        state: AgentState::Stopped,
        ..report("a", 4)
    };
    assert_eq!(word(stopped), LastWord::Stopped);
    assert_eq!(look_at(None), MailboxLook::Unreadable);
    assert_eq!(look_at(Some(&Err(SlotError::Blank))), MailboxLook::Nothing);
}

#[test]
fn what_a_slot_tells_beside_life_has_these_bytes_and_zeros_tell_nothing() {
    let told = Told {
        restart_within: Duration::from_millis(30_000),
        volume_io_age: Some(Duration::from_millis(1_500)),
    };
    let report = NodeReport {
        told,
        ..report("a", 1)
    };
    let slot = report.seal("office").unwrap();
    let bytes = slot.as_bytes();
    assert_eq!(&bytes[180..184], &30_000u32.to_le_bytes());
    assert_eq!(&bytes[952..956], &1_501u32.to_le_bytes());
    assert_eq!(&bytes[956..1020], &[0; 64]);
    let exposed = NodeReport {
        exposed: BTreeSet::from(["data".to_owned()]),
        ..report.clone()
    };
    let sealed = exposed.seal("office").unwrap();
    assert_eq!(&sealed.as_bytes()[956..960], &1u32.to_le_bytes());
    let node = NodeId("a".into());
    let read = NodeReport::open(sealed.as_bytes(), "office", &node).unwrap();
    assert_eq!(read, exposed);
    assert_eq!(NodeReport::open(bytes, "office", &node).unwrap(), report);
    // A slot of the first form, as it lies on devices.
    let mut first = super::tests::report("a", 1).seal("office").unwrap();
    (first.restart_ms, first.volume_io_ms) = (0, 0);
    let read = NodeReport::open(Sealed::seal(first).as_bytes(), "office", &node).unwrap();
    assert_eq!(read.told, Told::default());
    let just_now = Told {
        volume_io_age: Some(Duration::ZERO),
        ..Told::default()
    };
    assert_eq!(words_of(&just_now), (0, 1));
}

#[test]
fn the_bytes_of_a_slot_are_pinned() {
    let slot = report("a", 1).seal("office").unwrap();
    let bytes = slot.as_bytes();
    assert_eq!(&bytes[..16], b"TWMAILBX\x02\0\0\0\x02\0\0\0");
    assert_eq!(&bytes[16..23], b"office\0");
    assert_eq!(&bytes[80..82], b"a\0");
    assert_eq!(&bytes[160..168], &1u64.to_le_bytes());
    assert_eq!(&bytes[176..184], b"\x01\0\0\0\0\0\0\0");
    assert_eq!(&bytes[184..189], b"data\0");
    assert_eq!(&bytes[216..224], &7u64.to_le_bytes());
    assert_eq!(&bytes[256..264], &3u64.to_le_bytes());
    assert_eq!(&bytes[264..272], &99u64.to_le_bytes());
    assert_eq!(&bytes[272..280], b"\x01\0\0\0\0\0\0\0");
    assert_eq!(
        &bytes[1020..],
        &crc32c::crc32c(&bytes[..1020]).to_le_bytes()
    );
}

/// Makes a copy of `a`'s slot look as if the power had gone in the middle of its write.
fn tear(file: &tempfile::NamedTempFile, copy: u64) {
    let second_sector = copy * 2 * COPY_BYTES + 512;
    file.as_file()
        .write_all_at(&[1; 512], second_sector)
        .unwrap();
}

#[test]
fn a_torn_write_leaves_the_word_before_it() {
    let file = blank();
    let mut next_copy = 0;
    for counter in 1..=6 {
        // Every write by another agent, as after a restart: it must choose the right copy by itself.
        open(&file, "a")
            .unwrap()
            .write(&report("a", counter))
            .unwrap();
        assert_eq!(
            open(&file, "b").unwrap().read().unwrap()[0],
            Ok(report("a", counter))
        );
        if counter % 3 == 0 {
            tear(&file, next_copy);
            let read = open(&file, "b").unwrap().read().unwrap();
            assert_eq!(read[0], Ok(report("a", counter - 1)));
        } else {
            next_copy = 1 - next_copy;
        }
    }
}

#[test]
fn a_slot_without_a_whole_copy_is_told_and_may_be_written_again() {
    let file = blank();
    let a = open(&file, "a").unwrap();
    a.write(&report("a", 1)).unwrap();
    tear(&file, 0);
    assert_eq!(a.read().unwrap()[0], Err(SlotError::Torn));
    assert_eq!(word_of(&a.read().unwrap()[0], "data"), Word::Unreadable);
    assert_eq!(look_at(Some(&a.read().unwrap()[0])), MailboxLook::Nothing);
    let a = open(&file, "a").unwrap();
    a.write(&report("a", 2)).unwrap();
    assert_eq!(a.read().unwrap()[0], Ok(report("a", 2)));
}

#[test]
fn a_write_that_failed_is_tried_on_the_same_copy() {
    let file = blank();
    let mut a = open(&file, "a").unwrap();
    a.write(&report("a", 1)).unwrap();
    let writable = std::mem::replace(&mut a.file, File::open(file.path()).unwrap());
    assert!(a.write(&report("a", 2)).is_err());
    a.file = writable;
    a.write(&report("a", 3)).unwrap();
    tear(&file, 1);
    assert_eq!(a.read().unwrap()[0], Ok(report("a", 1)));
}

#[test]
fn a_device_with_something_else_on_it_is_not_touched() {
    let file = blank();
    file.as_file()
        .write_all_at(b"an ext4 super block, say", 4096 + 1024)
        .unwrap();
    let error = open(&file, "a").unwrap_err();
    assert!(matches!(
        error,
        MailboxError::Foreign {
            index: 1,
            source: SlotError::NoMailbox,
            ..
        }
    ));
    assert!(error.to_string().contains("slot 1"), "{error}");
}

#[test]
fn another_cluster_another_node_and_another_version_are_refused() {
    let file = blank();
    open(&file, "a").unwrap().write(&report("a", 1)).unwrap();
    let other = Mailbox::open(file.path(), "home", &nodes(), &NodeId("b".into())).unwrap_err();
    assert!(other.to_string().contains("`office`") && other.to_string().contains("`home`"));
    let swapped = [NodeId("b".into()), NodeId("a".into())];
    let swapped = Mailbox::open(file.path(), "office", &swapped, &swapped[0]).unwrap_err();
    assert!(
        swapped.to_string().contains("order of [[node]]"),
        "{swapped}"
    );
    let mut slot = report("a", 1).seal("office").unwrap();
    slot.version = 1;
    file.as_file()
        .write_all_at(Sealed::seal(slot).as_bytes(), 0)
        .unwrap();
    let version = open(&file, "b").unwrap_err();
    assert!(matches!(
        version,
        MailboxError::Foreign {
            source: SlotError::Version(1),
            ..
        }
    ));
}

#[test]
fn a_device_that_is_too_small_or_missing_or_a_directory_is_told() {
    let file = blank();
    file.as_file().set_len(3 * COPY_BYTES).unwrap();
    let error = open(&file, "a").unwrap_err().to_string();
    assert!(
        error.contains("12288 bytes") && error.contains("16384"),
        "{error}"
    );
    let at = |path: &str| {
        Mailbox::open(Path::new(path), "office", &nodes(), &NodeId("a".into())).unwrap_err()
    };
    assert!(
        at("/nonexistent/mailbox")
            .to_string()
            .contains("cluster.mailbox")
    );
    assert!(matches!(at("/tmp"), MailboxError::WrongKind { .. }));
}

#[test]
fn a_report_that_does_not_fit_or_is_anothers_is_not_written() {
    let file = blank();
    let a = open(&file, "a").unwrap();
    assert!(a.write(&report("b", 1)).is_err());
    let mut many = report("a", 1);
    let claim = many.volumes["data"].clone();
    for index in 0..8 {
        many.volumes.insert(format!("more{index}"), claim.clone());
    }
    assert!(
        a.write(&many)
            .unwrap_err()
            .to_string()
            .contains("9 volumes")
    );
    assert_eq!(a.read().unwrap()[0], Err(SlotError::Blank));
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
        let _ = NodeReport::open(&bytes, "office", &NodeId("a".into()));
    }

    #[test]
    fn sealed_nonsense_is_an_error_or_a_report(at in 8usize..1020, value: u8) {
        let mut slot = report("a", 1).seal("office").unwrap();
        slot.as_mut_bytes()[at] = value;
        let slot = Sealed::seal(slot);
        let _ = NodeReport::open(slot.as_bytes(), "office", &NodeId("a".into()));
    }

    #[test]
    fn one_wrong_bit_is_noticed(at in 0usize..1024, bit in 0u8..8) {
        let mut slot = report("a", 1).seal("office").unwrap();
        slot.as_mut_bytes()[at] ^= 1 << bit;
        let read = NodeReport::open(slot.as_bytes(), "office", &NodeId("a".into()));
        prop_assert!(read.is_err());
    }
}
