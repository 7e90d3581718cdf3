//! The patterns that break simpler replays, each by its name.

use super::cases::{Case, ROOT, replay};
use super::model::{Body, Model};
use super::oracle::Touched;
use super::world::{NewKind, Op, World};
use crate::ids::Identity;
use crate::record::gap;
use crate::replay::ReplayError;

const END: u64 = i64::MAX as u64;

fn world() -> World<'static> {
    World::new(1, ROOT, None)
}

fn name(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

fn create(world: &mut World<'_>, text: &str) -> Identity {
    world.create(ROOT, text, NewKind::File)
}

fn link(world: &mut World<'_>, file: Identity, to: &str) {
    world.run(Op::Link {
        file,
        directory: ROOT,
        name: name(to),
    });
}

fn unlink(world: &mut World<'_>, text: &str) {
    world.run(Op::Unlink {
        directory: ROOT,
        name: name(text),
    });
}

fn bytes_of(model: &Model, text: &str) -> Vec<u8> {
    match &model.nodes[&model.entries(ROOT)[text.as_bytes()]].body {
        Body::File(bytes) => bytes.clone(),
        other => panic!("{text} is {other:?}"),
    }
}

/// The disk is where the first `disk` events led; records up to event `cut` are merged.
fn merged(world: World<'static>, disk: usize, cut: usize) -> (Case<'static>, Model) {
    let case = Case::with_cut(world, cut);
    let mut model = case.state(disk);
    model.held.clear();
    model.nodes.retain(|_, node| node.links > 0);
    let before = model.clone();
    replay(&case.plan(), &mut model).expect("replay");
    let touched = case.touched(disk.max(cut), &|index| index < disk);
    case.check(&before, &model, &touched)
        .expect("as at the cut");
    (case, model)
}

#[test]
fn a_name_that_comes_back_keeps_the_confirmed_file_behind_it() {
    // mv a b; mv b a; create b, fsync b: every disk state in between.
    for disk in 1..=6 {
        let mut world = world();
        create(&mut world, "a");
        world.rename((ROOT, "a"), (ROOT, "b"));
        world.rename((ROOT, "b"), (ROOT, "a"));
        let fresh = create(&mut world, "b");
        world.write(fresh, 0, b"confirmed");
        world.fsync(fresh, 0, END);
        // An fsync puts all of it on the disk; without it the file is made from the log.
        let disk = if disk == 5 { 6 } else { disk };
        let cut = if disk == 6 { 6 } else { 5 };
        let (_, model) = merged(world, disk, cut);
        assert_eq!(bytes_of(&model, "b"), b"confirmed", "disk at {disk}");
    }
}

#[test]
fn links_that_change_places_keep_the_file_alive() {
    // ln p q; rm p; ln q p; rm q
    for disk in 1..=6 {
        let mut world = world();
        let file = create(&mut world, "p");
        world.write(file, 0, b"bytes");
        link(&mut world, file, "q");
        unlink(&mut world, "p");
        link(&mut world, file, "p");
        unlink(&mut world, "q");
        let (_, model) = merged(world, disk, 6);
        assert_eq!(bytes_of(&model, "p"), b"bytes");
        assert!(!model.entries(ROOT).contains_key(b"q".as_slice()));
    }
}

#[test]
fn a_gone_identity_is_not_taken_for_the_file_at_its_path() {
    let mut world = world();
    let old = create(&mut world, "f");
    world.run(Op::Checkpoint);
    world.write(old, 0, b"of the old file");
    // After the cut: the old one goes, another takes its path (and its inode number).
    unlink(&mut world, "f");
    let new = create(&mut world, "f");
    world.write(new, 0, b"new");
    assert_eq!(old.ino, new.ino);
    let (case, model) = merged(world, 6, 3);
    assert_eq!(bytes_of(&model, "f"), b"new");
    let outcome = replay(&case.plan(), &mut model.clone()).expect("replay");
    assert_eq!(outcome.deleted_ahead, [old]);
}

#[test]
fn a_range_mark_clips_its_range_of_what_was_before_it_only() {
    let mut world = world();
    let file = create(&mut world, "f");
    world.run(Op::Checkpoint);
    world.write(file, 0, b"aaaaaaaaaa");
    world.fsync(file, 2, 3);
    world.write(file, 3, b"bb");
    let case = Case::with_cut(world, 5);
    let mut model = case.state(2);
    // On the disk the confirmed bytes have since been changed by something no record tells.
    model.write_bytes(file, 0, b"..XX......");
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(bytes_of(&model, "f"), b"aaXbbaaaaa");
}

#[test]
fn a_truncation_leaves_bytes_alone_that_were_confirmed_after_it() {
    let mut world = world();
    let file = create(&mut world, "f");
    world.write(file, 0, b"0123456789");
    world.run(Op::Checkpoint);
    world.run(Op::Truncate { file, size: 2 });
    world.write(file, 6, b"cc");
    world.fsync(file, 6, 7);
    let case = Case::with_cut(world, 6);
    let mut model = case.state(3);
    model.write_bytes(file, 6, b"XX");
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(bytes_of(&model, "f"), b"01\0\0\0\0XX");
}

#[test]
fn a_mark_does_not_cover_what_came_while_its_call_ran() {
    let mut world = world();
    let file = create(&mut world, "f");
    world.run(Op::Checkpoint);
    world.write(file, 0, b"before");
    let entered = world.events.len();
    world.write(file, 0, b"during");
    let (start, last) = (0, u64::MAX);
    world.run(Op::Fsync {
        inode: file,
        start,
        last,
        datasync: false,
        entered,
    });
    let case = Case::with_cut(world, 5);
    let mut model = case.state(3);
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(bytes_of(&model, "f"), b"during");
}

#[test]
fn a_file_made_nameless_fsynced_and_linked_is_whole() {
    let mut world = world();
    world.run(Op::Tmpfile);
    let file = world.events[0].made.expect("made");
    world.write(file, 0, b"all of it");
    world.fsync(file, 0, END);
    world.run(Op::Checkpoint);
    link(&mut world, file, "f");
    // The journal never committed the link: recovery removed the inode and its bytes.
    let (_, model) = merged(world, 4, 5);
    assert_eq!(bytes_of(&model, "f"), b"all of it");
}

#[test]
fn fdatasync_does_not_prove_a_name_that_came_later() {
    let mut world = world();
    world.run(Op::Tmpfile);
    let file = world.events[0].made.expect("made");
    world.write(file, 0, b"all of it");
    link(&mut world, file, "f");
    let entered = world.events.len();
    world.run(Op::Fsync {
        inode: file,
        start: 0,
        last: END,
        datasync: true,
        entered,
    });
    // The journal had committed the inode, and not the link.
    let (_, model) = merged(world, 2, 4);
    assert_eq!(bytes_of(&model, "f"), b"all of it");
}

#[test]
fn a_nameless_file_whose_records_are_gone_is_loudly_lost() {
    let mut world = world();
    world.run(Op::Tmpfile);
    let file = world.events[0].made.expect("made");
    world.run(Op::Checkpoint);
    link(&mut world, file, "f");
    let case = Case {
        world,
        cut: 3,
        durable: 1,
        head: 1,
    };
    let mut model = case.state(0);
    let outcome = replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(outcome.lost.len(), 1);
    assert!(outcome.to_string().contains("LOST"));
}

#[test]
fn what_was_deleted_ahead_stays_deleted() {
    let mut world = world();
    let earlier = create(&mut world, "earlier");
    world.run(Op::Checkpoint);
    let proven = create(&mut world, "proven");
    world.fsync(proven, 0, END);
    world.write(earlier, 0, b"x");
    let cut = world.events.len();
    unlink(&mut world, "earlier");
    unlink(&mut world, "proven");
    let (case, model) = merged(world, 7, cut);
    assert_eq!(model.entries(ROOT).len(), 1, "only .twinwrite");
    let outcome = replay(&case.plan(), &mut model.clone()).expect("replay");
    assert_eq!(outcome.deleted_ahead.len(), 2);
}

#[test]
fn what_the_sentinel_proved_and_was_deleted_ahead_stays_deleted() {
    let mut world = world();
    let file = create(&mut world, "f");
    world.write(file, 0, b"x");
    world.run(Op::Checkpoint);
    create(&mut world, "g");
    let cut = world.events.len();
    unlink(&mut world, "f");
    // The region still holds the records that S covers.
    let case = Case {
        world,
        cut,
        durable: 2,
        head: 0,
    };
    let mut model = case.state(5);
    replay(&case.plan(), &mut model).expect("replay");
    assert!(!model.entries(ROOT).contains_key(b"f".as_slice()));
}

#[test]
fn what_took_the_name_of_something_deleted_ahead_is_left_there() {
    let mut world = world();
    let old = create(&mut world, "f");
    world.fsync(old, 0, END);
    let cut = world.events.len();
    unlink(&mut world, "f");
    let new = create(&mut world, "f");
    let (_, model) = merged(world, 4, cut);
    assert_eq!(model.entries(ROOT)[b"f".as_slice()], new);
}

#[test]
fn what_was_renamed_over_something_deleted_ahead_is_left_there() {
    let mut world = world();
    let old = create(&mut world, "f");
    world.fsync(old, 0, END);
    // The next version, whose name the log has and whose rename it has not.
    let new = create(&mut world, "new");
    world.write(new, 0, b"next");
    world.fsync(new, 0, END);
    let cut = world.events.len();
    world.rename((ROOT, "new"), (ROOT, "f"));
    let (_, model) = merged(world, cut + 1, cut);
    let names = model.entries(ROOT);
    assert_eq!(names.get(b"f".as_slice()), Some(&new));
    assert!(!names.contains_key(b"new".as_slice()), "{names:?}");
    assert_eq!(bytes_of(&model, "f"), b"next");
}

#[test]
fn an_unproven_file_deleted_ahead_is_made_again() {
    let mut world = world();
    let file = create(&mut world, "f");
    world.write(file, 0, b"0123456789");
    world.fsync(file, 2, 5);
    unlink(&mut world, "f");
    let (_, model) = merged(world, 4, 3);
    // The bytes of the range mark too: the disk that confirmed them is not there any more.
    assert_eq!(bytes_of(&model, "f"), b"0123456789");
}

#[test]
fn an_old_file_replaced_after_the_cut_comes_back_and_the_new_one_is_kept() {
    let mut world = world();
    let old = create(&mut world, "f");
    world.run(Op::Checkpoint);
    world.rename((ROOT, "f"), (ROOT, "g"));
    let cut = world.events.len();
    world.rename((ROOT, "g"), (ROOT, "h"));
    create(&mut world, "g");
    let (_, model) = merged(world, 5, cut);
    assert_eq!(model.entries(ROOT)[b"g".as_slice()], old);
    let recovered = model.reachable().len();
    assert_eq!(
        recovered, 6,
        "root, .twinwrite, staging, recovered, the old and the new file"
    );
}

#[test]
fn a_removed_directory_with_unknown_entries_is_kept_aside() {
    let mut world = world();
    let directory = world.create(ROOT, "d", NewKind::Directory);
    world.run(Op::Checkpoint);
    unlink(&mut world, "d");
    let case = Case::with_cut(world, 3);
    let mut model = case.state(2);
    let stranger = Identity {
        ino: 77,
        generation: 77,
    };
    model.insert(stranger, crate::replay::plan::Kind::File, 0o100_600);
    model
        .entries_mut(directory)
        .insert(name("unknown"), stranger);
    let outcome = replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(outcome.recovered.len(), 1);
    assert!(model.reachable().contains(&stranger));
    assert!(!model.entries(ROOT).contains_key(b"d".as_slice()));
}

#[test]
fn directories_that_change_places_do_so_whatever_the_disk_shows() {
    let mut world = world();
    let [a, b] = ["a", "b"].map(|name| world.create(ROOT, name, NewKind::Directory));
    world.run(Op::Checkpoint);
    world.rename((ROOT, "a"), (b, "a"));
    let cut = world.events.len();
    // After the cut the other way round: now b lies in a.
    world.rename((b, "a"), (ROOT, "a"));
    world.rename((ROOT, "b"), (a, "b"));
    let case = Case::with_cut(world, cut);
    let mut model = case.state(6);
    let before = model.clone();
    let outcome = replay(&case.plan(), &mut model).expect("replay");
    assert!(
        model.reachable().contains(&a) && model.reachable().contains(&b),
        "{outcome}"
    );
    assert_eq!(model.entries(b)[b"a".as_slice()], a);
    let touched = case.touched(6, &|_| true);
    case.check(&before, &model, &touched).expect("nothing lost");
}

#[test]
fn a_full_volume_stops_with_a_remedy_and_goes_on_later() {
    let mut world = world();
    for text in ["a", "b", "c"] {
        let file = create(&mut world, text);
        world.write(file, 0, text.as_bytes());
    }
    let case = Case::with_cut(world, 6);
    let plan = case.plan();
    let mut model = case.state(0);
    model.budget = Some((9, libc::ENOSPC));
    let error = replay(&plan, &mut model).expect_err("full");
    assert!(matches!(error, ReplayError::Full(_)));
    assert!(
        error.to_string().contains("run the replay again"),
        "{error}"
    );
    model.budget = None;
    replay(&plan, &mut model).expect("replay");
    case.check(&case.state(0), &model, &Touched::default())
        .expect("as at the cut");
}

#[test]
fn a_log_with_a_hole_is_refused() {
    let mut world = world();
    create(&mut world, "a");
    create(&mut world, "b");
    create(&mut world, "c");
    let mut input = world.log.input(0, 3, 0);
    input.items.remove(1);
    assert!(matches!(
        crate::replay::plan(input),
        Err(ReplayError::Order { .. })
    ));
}

#[test]
fn a_log_whose_directories_lie_in_each_other_is_refused() {
    let mut world = world();
    let [a, b] = ["a", "b"].map(|name| world.create(ROOT, name, NewKind::Directory));
    world.rename((ROOT, "a"), (b, "a"));
    // No file system lets this happen; a hostile region may say so.
    let mut forged = World::new(1, ROOT, None);
    forged.model = world.model.clone();
    forged.log = world.log.clone();
    forged.model.entries_mut(ROOT).insert(name("b"), b);
    forged.rename((ROOT, "b"), (a, "b"));
    let refused = crate::replay::plan(forged.log.input(0, 4, 0));
    assert!(
        matches!(refused, Err(ReplayError::Contradiction { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_record_without_its_bytes_is_refused() {
    let mut world = world();
    let file = create(&mut world, "a");
    world.run(Op::Write {
        file,
        at: 0,
        bytes: b"abc".to_vec(),
        bytes_in_ring: false,
    });
    let mut input = world.log.input(0, 2, 0);
    input.items[1].fill = None;
    assert!(matches!(
        crate::replay::plan(input),
        Err(ReplayError::BytesMissing { .. })
    ));
}

#[test]
fn the_dry_run_names_every_action() {
    let mut world = world();
    let file = create(&mut world, "a");
    world.write(file, 5, b"abc");
    world.run(Op::Truncate { file, size: 6 });
    unlink(&mut world, "a");
    create(&mut world, "b");
    let text = Case::with_cut(world, 5).plan().to_string();
    for part in [
        "merge 5 records",
        "remove the name 2.0/a",
        "bind 2.0/b to",
        "remove 10.100",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn changes_that_were_not_captured_are_told_after_the_merge() {
    let mut world = world();
    create(&mut world, "a");
    let case = Case::with_cut(world, 1);
    let mut disk = Model::new(ROOT);
    let mut plan = case.plan();
    let told = replay(&plan, &mut disk.clone()).expect("replay").warnings;
    assert!(told.is_empty(), "{told:?}");
    plan.gaps.insert(gap::MAPPING as u64, 2);
    plan.gaps.insert(gap::XATTR as u64, 1);
    plan.gaps.insert(99, 1);
    let outcome = replay(&plan, &mut disk).expect("replay");
    let wanted = "changes that were noticed and not captured: mapping (2 or more), xattr (1 or more), unknown (1 or more) are not in what was merged";
    assert_eq!(outcome.warnings, [wanted]);
    assert!(outcome.to_string().contains(wanted), "{outcome}");
    assert!(plan.to_string().contains(wanted), "{plan}");
}
