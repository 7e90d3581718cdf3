//! Extended state, locks and sizes that are not known exactly, each case by its name.

use super::attributes::{ACL, CAPABILITY, IMMUTABLE, acl, capability, extended_of};
use super::cases::{Case, ROOT, replay};
use super::model::{Body, Model};
use super::oracle::Touched;
use super::world::{NewKind, Op, World};
use crate::ids::Identity;
use crate::replay::ReplayError;
use crate::replay::apply::tidy_on;

const END: u64 = i64::MAX as u64;

/// A world with one durable file of this many bytes.
fn with_file(bytes: usize) -> (World<'static>, Identity) {
    let mut world = World::new(1, ROOT, None);
    let file = world.create(ROOT, "f", NewKind::File);
    world.write(file, 0, &vec![b'.'; bytes]);
    world.run(Op::Checkpoint);
    (world, file)
}

fn set(world: &mut World<'_>, inode: Identity, name: &[u8], value: Option<Vec<u8>>) {
    let name = name.to_vec();
    world.run(Op::SetAttribute { inode, name, value });
}

fn set_flags(world: &mut World<'_>, inode: Identity, flags: u32) {
    world.run(Op::SetFlags {
        inode,
        flags,
        project: 0,
    });
}

fn cut_here(world: World<'static>) -> Case<'static> {
    let count = world.events.len();
    Case::with_cut(world, count)
}

/// The disk has the first `disk` events; whatever happened up to now is merged.
fn merged(world: World<'static>, disk: usize) -> Model {
    let case = cut_here(world);
    let mut model = case.state(disk);
    replay(&case.plan(), &mut model).expect("replay");
    let before = case.state(disk);
    case.check(&before, &model, &Touched::default())
        .expect("as at the cut");
    model
}

fn size_of(model: &Model, file: Identity) -> u64 {
    model.nodes[&file].size()
}

#[test]
fn an_immutable_file_that_is_written_stays_immutable_wherever_the_run_ends() {
    let (mut world, file) = with_file(4);
    world.write(file, 1, b"new");
    world.fsync(ROOT, 0, END);
    let case = cut_here(world);
    // Made immutable before the log began, and so on the disk alone.
    let mut disk = case.state(3);
    disk.nodes.get_mut(&file).expect("it is there").flags.flags = IMMUTABLE;
    let mut done = disk.clone();
    replay(&case.plan(), &mut done).expect("replay");
    assert_eq!(done.locks(file), IMMUTABLE);
    for first in 0..done.steps {
        for second in 0..done.steps {
            let mut half = disk.clone();
            for stop in [first, second] {
                half.budget = Some((stop, libc::EINTR));
                if replay(&case.plan(), &mut half).is_ok() {
                    break;
                }
            }
            half.budget = None;
            replay(&case.plan(), &mut half).expect("begun again");
            assert_eq!(half.locks(file), IMMUTABLE, "stopped at {first}, {second}");
            assert_eq!(half.file_bytes(file), b".new");
            let own = half.entries(ROOT)[b".twinwrite".as_slice()];
            let staging = half.entries(own)[b"staging".as_slice()];
            assert!(half.entries(staging).is_empty());
        }
    }
}

#[test]
fn a_note_of_an_epoch_that_was_never_merged_is_heeded() {
    let (mut world, file) = with_file(4);
    world.write(file, 1, b"new");
    let case = cut_here(world);
    let mut disk = case.state(3);
    disk.nodes.get_mut(&file).expect("it is there").flags.flags = IMMUTABLE;
    let plan = case.plan();
    for stop in 0.. {
        disk.budget = Some((stop, libc::EINTR));
        replay(&plan, &mut disk).expect_err("stopped");
        if disk.locks(file) == 0 {
            break;
        }
    }
    disk.budget = None;
    let mut later = plan.clone();
    later.epoch.0 += 1;
    replay(&later, &mut disk).expect("replay");
    assert_eq!(disk.locks(file), IMMUTABLE);
}

#[test]
fn names_in_an_immutable_directory_and_of_immutable_files_are_changed() {
    let (mut world, file) = with_file(4);
    let directory = world.create(ROOT, "d", NewKind::Directory);
    world.run(Op::Checkpoint);
    world.rename((ROOT, "f"), (directory, "g"));
    set_flags(&mut world, file, IMMUTABLE);
    set_flags(&mut world, directory, IMMUTABLE);
    let model = merged(world, 5);
    assert_eq!(
        (model.locks(file), model.locks(directory)),
        (IMMUTABLE, IMMUTABLE)
    );
}

#[test]
fn an_immutable_file_that_replay_made_is_known_and_keeps_no_stamp() {
    let mut world = World::new(1, ROOT, None);
    let [file, _] = ["a", "b"].map(|name| world.create(ROOT, name, NewKind::File));
    set_flags(&mut world, file, IMMUTABLE);
    let case = cut_here(world);
    let mut model = case.state(0);
    let plan = case.plan();
    replay(&plan, &mut model).expect("replay");
    // Its power is cut before the sentinel is written: it is the same file for the next run.
    let made = model.entries(ROOT)[b"a".as_slice()];
    let again = replay(&plan, &mut model).expect("replay again");
    assert_eq!(model.entries(ROOT)[b"a".as_slice()], made);
    assert_eq!(again.created.len(), 2);
    assert!(again.recovered.is_empty());
    tidy_on(&mut model, &again).expect("tidy");
    let stamped = |name: &[u8]| model.nodes[&model.entries(ROOT)[name]].stamp.is_some();
    assert!(!stamped(b"a") && !stamped(b"b"));
    assert_eq!(model.locks(made), IMMUTABLE);
    let own = model.entries(ROOT)[b".twinwrite".as_slice()];
    assert!(model.entries(own).is_empty());
}

#[test]
fn a_write_that_does_not_know_the_size_cuts_nothing_off() {
    let (mut world, file) = with_file(8);
    world.run(Op::Direct {
        file,
        at: 2,
        bytes: b"dd".to_vec(),
    });
    let case = cut_here(world);
    let mut model = case.state(3);
    // Somebody else's, confirmed, and of records that have left the log.
    model.write_bytes(file, 8, b"confirmed");
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(model.file_bytes(file), b"..dd....confirmed");
    // It raises the size all the same.
    let mut model = case.state(1);
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(size_of(&model, file), 4);
    assert!(case.plan().to_string().contains("at least 4"));
}

#[test]
fn a_size_that_the_log_knows_is_raised_and_never_lowered() {
    let (mut world, file) = with_file(8);
    world.run(Op::Truncate { file, size: 30 });
    world.run(Op::Direct {
        file,
        at: 0,
        bytes: b"d".to_vec(),
    });
    world.run(Op::Truncate { file, size: 6 });
    world.run(Op::Zero {
        file,
        at: 4,
        len: 8,
        grows: true,
    });
    world.run(Op::Zero {
        file,
        at: 11,
        len: 8,
        grows: false,
    });
    for disk in 3..=8 {
        let mut copy = World::new(1, ROOT, None);
        for event in &world.events {
            copy.run(event.op.clone());
        }
        assert_eq!(size_of(&merged(copy, disk), file), 12, "disk at {disk}");
    }
}

#[test]
fn a_snapshot_of_a_mapping_tells_bytes_and_time_and_no_size() {
    let (mut world, file) = with_file(20);
    world.run(Op::Store {
        file,
        at: 17,
        bytes: b"mm".to_vec(),
    });
    let mtime_ns = world.model.nodes[&file].mtime_ns;
    let case = cut_here(world);
    assert_eq!(case.plan().inodes[&file].size, None);
    let mut model = case.state(3);
    model.write_bytes(file, 20, b"confirmed");
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(model.file_bytes(file)[16..], *b".mm.confirmed");
    assert_eq!(model.nodes[&file].mtime_ns, mtime_ns);
}

#[test]
fn attributes_that_fit_only_without_the_old_ones_are_set() {
    let (mut world, file) = with_file(1);
    set(&mut world, file, b"user.a", Some(vec![1; 20]));
    set(&mut world, file, b"user.b", Some(vec![1; 130]));
    set(&mut world, file, b"user.b", Some(vec![2; 20]));
    set(&mut world, file, b"user.a", Some(vec![2; 130]));
    merged(world, 5);
}

#[test]
fn confirmed_attributes_and_locks_are_left_alone() {
    let (mut world, file) = with_file(1);
    set(&mut world, file, b"user.a", Some(vec![1]));
    world.fsync(file, 0, END);
    world.write(file, 0, b"w");
    let case = cut_here(world);
    let mut model = case.state(5);
    // Changed since, confirmed, and of records that no region holds.
    let node = model.nodes.get_mut(&file).expect("it is there");
    node.attributes.insert(b"user.a".to_vec(), vec![2]);
    node.flags.flags = IMMUTABLE;
    replay(&case.plan(), &mut model).expect("replay");
    assert_eq!(model.nodes[&file].attributes[b"user.a".as_slice()], [2]);
    assert_eq!(model.locks(file), IMMUTABLE);
}

#[test]
fn a_new_owner_takes_neither_capability_nor_permissions_nor_the_acls_mask() {
    let (mut world, file) = with_file(1);
    set(&mut world, file, ACL, Some(acl(6, 4, 0)));
    world.run(Op::Chown {
        inode: file,
        uid: 5,
        gid: 6,
    });
    world.run(Op::Chmod {
        inode: file,
        mode: 0o4751,
    });
    set(&mut world, file, CAPABILITY, Some(capability(3)));
    for disk in 3..=7 {
        let mut copy = World::new(1, ROOT, None);
        for event in &world.events {
            copy.run(event.op.clone());
        }
        let model = merged(copy, disk);
        assert_eq!(model.nodes[&file].mode, 0o104_751);
        assert_eq!(model.nodes[&file].attributes[ACL], acl(7, 5, 1));
    }
}

#[test]
fn a_confirmed_capability_outlives_a_store_through_a_mapping() {
    let (mut world, file) = with_file(20);
    set(&mut world, file, CAPABILITY, Some(capability(3)));
    world.fsync(file, 0, END);
    world.run(Op::Store {
        file,
        at: 0,
        bytes: b"m".to_vec(),
    });
    let case = cut_here(world);
    let disk = case.state(5);
    let mut done = disk.clone();
    replay(&case.plan(), &mut done).expect("replay");
    for stop in 0..done.steps {
        let mut half = disk.clone();
        half.budget = Some((stop, libc::EINTR));
        replay(&case.plan(), &mut half).expect_err("stopped");
        half.budget = None;
        replay(&case.plan(), &mut half).expect("begun again");
        assert_eq!(
            extended_of(&half.nodes[&file]),
            extended_of(&done.nodes[&file])
        );
        assert!(half.nodes[&file].attributes.contains_key(CAPABILITY));
    }
}

#[test]
fn what_nobody_may_set_is_a_warning_and_stops_nothing() {
    for code in [libc::EPERM, libc::EOPNOTSUPP, libc::EACCES] {
        let (mut world, file) = with_file(1);
        set(&mut world, file, b"security.ima", Some(vec![1; 4]));
        set(&mut world, file, b"user.a", Some(vec![1; 4]));
        let case = cut_here(world);
        let mut model = case.state(3);
        model.refused = Some((b"security.ima".to_vec(), code));
        let outcome = replay(&case.plan(), &mut model).expect("replay");
        let told = outcome.to_string();
        assert!(told.contains("WARNING: attribute security.ima"), "{told}");
        assert!(
            model.nodes[&file]
                .attributes
                .contains_key(b"user.a".as_slice())
        );
    }
}

#[test]
fn flags_that_this_file_system_has_not_take_no_others_with_them() {
    let (mut world, file) = with_file(1);
    set_flags(&mut world, file, 0x40 | 0x80 | IMMUTABLE);
    let case = cut_here(world);
    let mut model = case.state(3);
    model.refused_flags = 0x80;
    let outcome = replay(&case.plan(), &mut model).expect("replay");
    let told = outcome.to_string();
    assert!(told.contains("WARNING: Flag(80)"), "{told}");
    assert_eq!(model.nodes[&file].flags.flags, 0x40 | IMMUTABLE);
}

#[test]
fn without_room_for_attributes_the_replay_stops_and_can_be_run_again() {
    let (mut world, file) = with_file(1);
    set(&mut world, file, b"user.a", Some(vec![1; 100]));
    let case = cut_here(world);
    let mut model = case.state(3);
    model.refused = Some((b"user.a".to_vec(), libc::ENOSPC));
    let error = replay(&case.plan(), &mut model).expect_err("full");
    assert!(matches!(error, ReplayError::Full(_)), "{error}");
    model.refused = None;
    replay(&case.plan(), &mut model).expect("run again");
    assert!(matches!(&model.nodes[&file].body, Body::File(bytes) if bytes == b"."));
    assert_eq!(model.nodes[&file].attributes.len(), 1);
}
