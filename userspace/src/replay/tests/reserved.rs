//! Volumes that are full to the last block, with a reserve and without.

use std::path::Path;

use super::cases::Case;
use super::loopfs::{Format, LiveDisk, left_out};
use super::real::{protected, scratch};
use super::world::{NewKind, World};
use crate::replay::{ReplayError, apply, finish, reserve, tidy, underway};

const FILES: u8 = 20;
const FILE_BYTES: usize = 20_000;

/// A log that makes some files, together smaller than the smallest reserve.
fn some_files(root: crate::ids::Identity) -> Case<'static> {
    let mut world = World::new(1, root, None);
    for number in 0..FILES {
        let name = [b'a' + number];
        let file = world.create(root, name, NewKind::File);
        world.write(file, 0, &[number; FILE_BYTES]);
    }
    let count = world.events.len();
    Case::with_cut(world, count)
}

/// Takes all that is free, as root.
fn fill(mount: &Path) {
    let none = rustix::fs::FallocateFlags::empty();
    for shift in (12..26).rev() {
        let name = mount.join(format!("filler-{shift}"));
        let file = match std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(name)
        {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return,
            other => other.expect("create"),
        };
        let mut at = file.metadata().expect("stat").len();
        while rustix::fs::fallocate(&file, none, at, 1 << shift).is_ok() {
            at += 1 << shift;
        }
        file.set_len(at)
            .expect("what was found before there was no more");
        while rustix::fs::fallocate(&file, none, at, 4096).is_ok() {
            at += 4096;
        }
        file.sync_all().expect("fsync");
    }
}

fn holds_all(mount: &Path) -> bool {
    (0..FILES).all(|number| {
        let read = std::fs::read(mount.join(char::from(b'a' + number).to_string()));
        read.is_ok_and(|bytes| bytes == vec![number; FILE_BYTES])
    })
}

fn full_to_the_last_block(format: Format) {
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", format);
    let mount = &mounted.mount;
    let case = some_files(LiveDisk::new(mount).root());
    let reserved = reserve::make(mount).expect("it is not full yet");
    assert!(reserved > u64::from(FILES) * FILE_BYTES as u64);
    fill(mount);
    assert_eq!(reserve::make(mount).expect("it is kept"), reserved);
    let free = reserve::free_bytes(mount).expect("statvfs");
    assert!(free < 64 << 10, "{free} bytes are free on a full volume");

    // What a power cut leaves, once with the reserve and once without.
    let bare = mounted.crash(scratch.path(), "bare", format);
    reserve::release(&bare.mount).expect("given back");
    fill(&bare.mount);
    assert!(reserve::make(&bare.mount).is_err(), "there is no room");
    let error = apply(&case.plan(), &bare.mount, &mut |_| {}).expect_err("it is full");
    assert!(matches!(error, ReplayError::Full(_)), "{error}");

    let crashed = mounted.crash(scratch.path(), "crashed", format);
    let mount = &crashed.mount;
    // Interrupted right after the reserve was given back.
    underway::begin(mount, case.plan().epoch).expect("a note");
    reserve::release(mount).expect("given back");
    drop(crashed.crash(scratch.path(), "again", format));
    let outcome = apply(&case.plan(), mount, &mut |_| {}).expect("there is the reserve");
    finish(mount, &super::real::sentinel_of(8, 0)).expect("finish");
    tidy(mount, &outcome).expect("tidy");
    let durable = crashed.crash(scratch.path(), "durable", format);
    assert!(holds_all(&durable.mount), "{outcome}");
    // What is left of the room is set aside again.
    let again = reserve::make(&durable.mount).expect("some is left");
    assert!((1..reserved).contains(&again), "{again} of {reserved}");
}

#[test]
fn a_full_ext4_with_a_reserve_is_merged_into() {
    if !left_out("a_full_ext4_with_a_reserve_is_merged_into") {
        full_to_the_last_block(Format::Ext4);
    }
}

#[test]
fn a_full_xfs_with_a_reserve_is_merged_into() {
    if !left_out("a_full_xfs_with_a_reserve_is_merged_into") {
        full_to_the_last_block(Format::Xfs);
    }
}
