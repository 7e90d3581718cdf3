use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::PREFIX;
use super::block::{BLOCK_BYTES, Block, Place, read};
use super::judge::{Verdict, judge};
use super::kinds;
use super::log::Log;
use super::observe::observe;
use super::operation::{Action, CURRENT, Generator, Operation};
use super::write::{Options, run};

const SEED: u64 = 42;

/// Takes one operation's effect back.
type Undo = Box<dyn Fn(&TempDir)>;

fn options(operations: u64) -> Options {
    Options {
        seed: SEED,
        time_limit: None,
        operations_max: Some(operations),
        operations_per_second: 0,
        buffered_max: 4,
        confirm_every: None,
    }
}

/// A volume on which so many operations were carried out, and its log.
fn written(operations: u64) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().expect("a root");
    let log = root.path().join("log");
    assert_eq!(
        run(root.path(), &log, &options(operations)).expect("a run"),
        operations
    );
    (root, log)
}

fn operations(count: u64) -> Vec<Operation> {
    let mut generator = Generator::new(SEED);
    (0..count).map(|_| generator.next()).collect()
}

/// Judges a volume on which `possible` operations may have been carried out.
fn verdict(root: &Path, possible: u64) -> Verdict {
    let operations = operations(possible);
    judge(&operations, &observe(root, SEED, &operations))
}

fn last(count: u64, wanted: impl Fn(&Action) -> bool) -> Operation {
    let all = operations(count);
    all.into_iter()
        .rev()
        .find(|operation| wanted(&operation.action))
        .expect("such an operation")
}

fn at(root: &TempDir, path: &str) -> PathBuf {
    root.path().join(PREFIX).join(path)
}

#[test]
fn every_kind_of_operation_occurs_and_the_sequence_is_repeatable() {
    let all = operations(5_000);
    assert_eq!(all, operations(5_000));
    let kinds: BTreeSet<_> = all
        .iter()
        .map(|operation| std::mem::discriminant(&operation.action))
        .map(|kind| format!("{kind:?}"))
        .collect();
    assert_eq!(kinds.len(), 9);
    for (number, operation) in (1..).zip(&all) {
        assert_eq!(operation.number, number);
        assert!(!operation.effects().is_empty());
    }
}

#[test]
fn a_volume_that_nothing_happened_to_has_the_whole_prefix_at_every_length() {
    for count in [1, 6, 7, 300, 3_000] {
        let (root, log) = written(count);
        let log = Log::load(&log).expect("a log");
        assert_eq!(log.acknowledged.len() as u64, count);
        assert_eq!(
            verdict(root.path(), count),
            Verdict {
                prefix: count,
                ..Verdict::default()
            }
        );
        let beyond = verdict(root.path(), log.last_possible());
        assert_eq!(
            (beyond.prefix, beyond.damage.len()),
            (count, 0),
            "{beyond:?}"
        );
    }
}

#[test]
fn a_volume_that_stopped_earlier_has_exactly_that_prefix() {
    for (done, acknowledged) in [(700, 701), (650, 900), (8, 1_000)] {
        let (root, _) = written(done);
        let found = verdict(root.path(), acknowledged);
        // An operation without a visible effect of its own (the same mode again) may follow.
        assert!((done..done + 3).contains(&found.prefix), "{found:?}");
        assert_eq!(found.damage, Vec::<String>::new());
    }
    let root = tempfile::tempdir().expect("a root");
    assert_eq!(verdict(root.path(), 500).prefix, 0);
}

#[test]
fn a_lost_append_a_lost_overwrite_and_a_hole_end_the_prefix_before_them() {
    let count = 2_000;
    let append = last(
        count,
        |action| matches!(action, Action::Append { path, .. } if path.contains("log")),
    );
    let overwrite = last(count, |action| matches!(action, Action::Overwrite { .. }));
    for operation in [append, overwrite] {
        let (root, _) = written(count);
        let (path, index) = match &operation.action {
            Action::Append { path, index, .. } | Action::Overwrite { path, index, .. } => {
                (path, *index)
            }
            other => panic!("{other:?}"),
        };
        let file = OpenOptions::new()
            .write(true)
            .open(at(&root, path))
            .expect("opened");
        let offset = u64::from(index) * BLOCK_BYTES as u64;
        file.write_all_at(&[0; BLOCK_BYTES], offset)
            .expect("a hole");
        let found = verdict(root.path(), count);
        assert!(
            found.prefix < operation.number,
            "{found:?} for {operation:?}"
        );
        assert!(found.damage.is_empty(), "{found:?}");
        assert!(found.seen_after_prefix > 0);
    }
}

#[test]
fn a_lost_rename_unlink_create_link_replace_and_chmod_end_the_prefix_before_them() {
    let count = 2_000;
    let alive: BTreeSet<String> = {
        let (root, _) = written(count);
        let all = operations(count);
        let names = super::observe::owners(&all).into_keys();
        names.filter(|name| at(&root, name).exists()).collect()
    };
    let is_alive = |name: &String| alive.contains(name);
    let undo: Vec<(Operation, Undo)> = vec![
        {
            let found = last(
                count,
                |a| matches!(a, Action::Rename { to, .. } if is_alive(to)),
            );
            let Action::Rename { from, to, .. } = found.action.clone() else {
                panic!()
            };
            (
                found,
                Box::new(move |root| fs::rename(at(root, &to), at(root, &from)).expect("undone")),
            )
        },
        {
            let found = last(
                count,
                |a| matches!(a, Action::Link { to, .. } if is_alive(to)),
            );
            let Action::Link { to, .. } = found.action.clone() else {
                panic!()
            };
            (
                found,
                Box::new(move |root| fs::remove_file(at(root, &to)).expect("undone")),
            )
        },
        {
            let found = last(
                count,
                |a| matches!(a, Action::Create { path } if is_alive(path)),
            );
            let Action::Create { path } = found.action.clone() else {
                panic!()
            };
            (
                found,
                Box::new(move |root| fs::remove_file(at(root, &path)).expect("undone")),
            )
        },
        {
            let found = last(count, |a| matches!(a, Action::Unlink { .. }));
            let Action::Unlink { path, .. } = found.action.clone() else {
                panic!()
            };
            (
                found,
                Box::new(move |root| fs::write(at(root, &path), b"").expect("undone")),
            )
        },
        {
            let found = last(count, |a| matches!(a, Action::Replace { .. }));
            let Action::Replace {
                victim: Some(victim),
                ..
            } = found.action.clone()
            else {
                panic!()
            };
            let number = operations(count).iter().find_map(|o| match o.action {
                Action::Append { file, .. } if file == victim => Some(o.number),
                _ => None,
            });
            let block = Block {
                seed: SEED,
                number: number.expect("filled"),
                file: victim,
                index: 0,
            };
            (
                found,
                Box::new(move |root| fs::write(at(root, CURRENT), block.bytes()).expect("undone")),
            )
        },
        {
            let found = last(
                count,
                |a| matches!(a, Action::ChangeMode { path, .. } if is_alive(path)),
            );
            let Action::ChangeMode { path, .. } = found.action.clone() else {
                panic!()
            };
            let mode = PermissionsExt::from_mode(0o600);
            (
                found,
                Box::new(move |root| {
                    fs::set_permissions(at(root, &path), fs::Permissions::clone(&mode))
                        .expect("undone");
                }),
            )
        },
    ];
    for (operation, undo) in undo {
        let (root, _) = written(count);
        undo(&root);
        let found = verdict(root.path(), count);
        assert!(
            found.prefix < operation.number,
            "{found:?} for {operation:?}"
        );
    }
}

#[test]
fn a_torn_block_is_damage_inside_the_prefix_and_allowed_after_it() {
    let count = 1_000;
    let (root, _) = written(count);
    let operation = last(
        count - 20,
        |a| matches!(a, Action::Append { path, .. } if path.contains("log")),
    );
    let Action::Append { path, index, .. } = &operation.action else {
        panic!()
    };
    let file = OpenOptions::new()
        .write(true)
        .open(at(&root, path))
        .expect("opened");
    file.write_all_at(&[1], u64::from(*index) * BLOCK_BYTES as u64 + 2_000)
        .expect("torn");
    let inside = verdict(root.path(), count);
    assert_eq!(inside.prefix, operation.number - 1);
    assert_eq!(
        (inside.damage.len(), inside.torn_after_prefix),
        (1, 0),
        "{inside:?}"
    );

    let (root, _) = written(operation.number - 1);
    let path = at(&root, path);
    if let Ok(file) = OpenOptions::new().write(true).open(&path) {
        let whole = Block {
            seed: SEED,
            number: operation.number,
            file: 0,
            index: *index,
        }
        .bytes();
        file.write_all_at(&whole[..2_048], u64::from(*index) * BLOCK_BYTES as u64)
            .expect("half");
    }
    let after = verdict(root.path(), count);
    assert_eq!(after.damage, Vec::<String>::new());
    assert_eq!(after.torn_after_prefix, 1, "{after:?}");
    // The torn cell is the only trace of its operation; the one before it is whole.
    assert!(after.prefix >= operation.number - 1, "{after:?}");
}

#[test]
fn what_no_operation_left_behind_is_damage() {
    let count = 400;
    let seen = |damage: &dyn Fn(&TempDir)| {
        let (root, _) = written(count);
        damage(&root);
        verdict(root.path(), count)
    };
    let name = seen(&|root| fs::write(at(root, "d1/foreign"), b"").expect("written"));
    assert_eq!(name.damage.len(), 1, "{name:?}");
    let slots = seen(&|root| {
        let mut bytes = fs::read(at(root, "d0/slots")).expect("read");
        let foreign = Block {
            seed: SEED,
            number: 3,
            file: 6,
            index: 0,
        }
        .bytes();
        bytes[..BLOCK_BYTES].copy_from_slice(&foreign);
        fs::write(at(root, "d0/slots"), bytes).expect("written");
    });
    assert_eq!(slots.damage.len(), 1, "{slots:?}");
    let empty = seen(&|root| fs::write(at(root, CURRENT), b"").expect("written"));
    assert!(
        !empty.damage.is_empty() || empty.prefix < count,
        "{empty:?}"
    );
}

#[test]
fn a_log_cut_anywhere_claims_only_whole_lines_and_a_changed_one_is_refused() {
    let (_root, path) = written(50);
    let text = fs::read(&path).expect("read");
    let mut most = 0;
    for end in (0..text.len()).rev().step_by(37) {
        fs::write(&path, &text[..end]).expect("cut");
        if let Ok(log) = Log::load(&path) {
            let lines = text[..end].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(log.acknowledged.len() + 1, lines);
            most = most.max(log.acknowledged.len());
        }
    }
    assert!(most >= 48);
    let changed = String::from_utf8(text)
        .expect("text")
        .replace("\"number\":9,", "\"number\":8,");
    fs::write(&path, changed).expect("changed");
    assert!(Log::load(&path).is_err());
}

#[test]
fn the_pace_is_kept_and_time_ends_the_stream() {
    let root = tempfile::tempdir().expect("a root");
    let log = root.path().join("log");
    let options = Options {
        time_limit: Some(Duration::from_millis(300)),
        operations_max: None,
        operations_per_second: 100,
        ..options(0)
    };
    let done = run(root.path(), &log, &options).expect("a run");
    assert!((1..=31).contains(&done), "{done}");
    assert_eq!(
        Log::load(&log).expect("a log").acknowledged.len() as u64,
        done
    );
    assert!(
        run(root.path(), &log, &options).is_err(),
        "an older log was overwritten"
    );
}

#[test]
fn a_block_tells_whole_from_zero_and_torn() {
    let block = Block {
        seed: 1,
        number: 2,
        file: 3,
        index: 4,
    };
    let mut bytes = block.bytes();
    assert_eq!(read(&bytes), Place::Whole(block));
    for at in [0, 8, 16, 24, 32, 36, 40, 4_095] {
        bytes[at] ^= 1;
        assert_eq!(read(&bytes), Place::Torn, "byte {at}");
        bytes[at] ^= 1;
    }
    assert_eq!(read(&[0; BLOCK_BYTES]), Place::Zero);
    assert_eq!(read(&bytes[..100]), Place::Torn);
}

#[test]
fn a_disk_that_is_ahead_does_not_lengthen_the_prefix() {
    let (done, possible) = (600, 900);
    let (root, _) = written(done);
    let file = OpenOptions::new()
        .write(true)
        .open(at(&root, "d0/slots"))
        .expect("opened");
    let mut ahead = BTreeSet::new();
    for operation in operations(possible)
        .into_iter()
        .filter(|operation| operation.number > done)
    {
        if let Action::Overwrite {
            file: slots, index, ..
        } = operation.action
        {
            let block = Block {
                seed: SEED,
                number: operation.number,
                file: slots,
                index,
            };
            let offset = u64::from(index) * BLOCK_BYTES as u64;
            file.write_all_at(&block.bytes(), offset).expect("written");
            ahead.insert(operation.number);
        }
    }
    let found = verdict(root.path(), possible);
    let first = operations(possible).into_iter().find(|operation| {
        operation.number > done
            && !matches!(
                operation.action,
                Action::Overwrite { .. } | Action::ChangeMode { .. }
            )
    });
    let expected = first.expect("an operation that is missing").number - 1;
    assert!((done..=expected).contains(&found.prefix), "{found:?}");
    assert!(
        found.seen_after_prefix > 20 && found.damage.is_empty(),
        "{found:?}"
    );
}

#[test]
fn a_volume_where_nothing_happened_shows_no_operation() {
    let root = tempfile::tempdir().expect("a root");
    assert_eq!(verdict(root.path(), 2_000), Verdict::default());
}

#[test]
fn what_is_lost_is_counted_by_its_kind() {
    let (root, _log) = written(600);
    let all = operations(617);
    let count = || kinds::count(&all, 600, &observe(root.path(), SEED, &all));
    let whole = count();
    assert_eq!(
        whole.values().map(|kind| kind.acknowledged).sum::<u64>(),
        600
    );
    assert!(whole.values().all(|kind| kind.lost == 0), "{whole:?}");

    let write = last(600, |action| matches!(action, Action::Overwrite { .. }));
    let Action::Overwrite { path, index, .. } = &write.action else {
        unreachable!("it was chosen so");
    };
    let file = OpenOptions::new().write(true).open(at(&root, path));
    let at = u64::from(*index) * BLOCK_BYTES as u64;
    let zeros = [0; BLOCK_BYTES];
    file.expect("it is there")
        .write_all_at(&zeros, at)
        .expect("zeroed");
    let found = count();
    assert!(found["write"].lost >= 1, "{found:?}");
    assert!(
        found
            .iter()
            .all(|(name, kind)| name == "write" || kind.lost == 0),
        "{found:?}"
    );

    fs::remove_dir_all(root.path().join(PREFIX)).expect("all of it is removed");
    let nothing = count();
    for name in ["mkdir", "create", "write", "rename", "link", "chmod"] {
        assert!(nothing[name].lost > 0, "{name}: {nothing:?}");
    }
}
