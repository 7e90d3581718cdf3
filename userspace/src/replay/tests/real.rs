//! Random cases on mounted ext4, XFS and btrfs, with power cuts by copying the image.

use std::path::Path;

use super::attributes::IMMUTABLE;
use super::cases::{Case, Ran, run_cases};
use super::loopfs::{Format, LiveDisk, Mounted, left_out, read};
use super::oracle::Touched;
use super::stopping::Stopping;
use super::world::{NewKind, Op, Random, World};
use crate::capture::handle;
use crate::ids::{Epoch, Seq};
use crate::record::extended::InodeFlags;
use crate::replay::apply::apply_to;
use crate::replay::disk::Disk;
use crate::replay::plan::Plan;
use crate::replay::volume::Volume;
use crate::replay::{ReplayError, Sentinel, SentinelFile, apply, finish, sentinel, tidy};

pub(super) fn sentinel_of(epoch: u64, seq: usize) -> Sentinel {
    Sentinel {
        cluster: "test".into(),
        volume: "v".into(),
        epoch: Epoch(epoch),
        seq: Seq(seq as u64),
        closed: false,
        time_ns: 1,
    }
}

/// A fresh file system, as protection begins on it.
pub(super) fn protected(directory: &Path, name: &str, format: Format) -> Mounted {
    let mounted = Mounted::make(directory, name, format, format.image_bytes());
    let mut file = SentinelFile::open(&mounted.mount).expect("a sentinel file");
    file.write(&sentinel_of(7, 0)).expect("a sentinel");
    let mut disk = Disk::open(&mounted.mount).expect("open");
    let root = disk.root().expect("root");
    disk.set_times(root, None, Some(1))
        .expect("the model's time");
    disk.sync().expect("sync");
    mounted
}

/// Where images live: memory, so that the machine's disk is no part of it.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("twinwrite-replay-")
        .tempdir_in("/dev/shm")
        .expect("scratch")
}

fn run_one(seed: u64, format: Format, scratch: &Path) -> Result<Ran, String> {
    let mut shape = Random(seed ^ 0x4ea1);
    let mounted = protected(scratch, "live", format);
    let mut live = LiveDisk::new(&mounted.mount);
    let root = live.root();
    let mut world = World::new(seed, root, Some(&mut live));
    world.file_bytes_max = 20_000;
    world.has_projects = format == Format::Xfs;
    let (before, after) = (5 + shape.below(40), shape.below(20));
    let mut case = Case::random(world, before, after);
    for _ in 0..2 {
        let crashed = match mounted.try_to_crash(scratch, "crashed", format) {
            Ok(crashed) => crashed,
            // The kernel's recovery of fast commits fails now and then, whatever is merged afterwards.
            Err(_) if format == Format::Ext4FastCommit => return Ok(Ran::NotRecovered),
            Err(text) => return Err(text),
        };
        let mut touched = case.touched(case.world.events.len(), &|_| true);
        if format == Format::Xfs {
            touched.attributes.extend(case.exchanged_directories());
        }
        replay_twice(&case, &crashed, format, scratch, &touched, &mut shape)
            .map_err(|e| format!("{e}\n{}\n{}", case.history(), case.plan()))?;
        case = case.random_cut();
    }
    Ok(Ran::Merged)
}

fn replay_twice(
    case: &Case<'_>,
    crashed: &Mounted,
    format: Format,
    scratch: &Path,
    touched: &Touched,
    shape: &mut Random,
) -> Result<(), String> {
    let plan = case.plan();
    let before = read(&crashed.mount);
    let stop = shape.below(30) as u64;
    let (done, what) = match interrupted(&plan, &crashed.mount, stop)? {
        false => (None, String::from("not interrupted")),
        true if shape.chance(50) => (
            Some(crashed.crash(scratch, "again", format)),
            format!("crashed at {stop}"),
        ),
        true => (None, format!("interrupted at {stop}")),
    };
    let mount = done
        .as_ref()
        .map_or(&crashed.mount, |mounted| &mounted.mount);
    let outcome = apply(&plan, mount, &mut |_| {}).map_err(|e| format!("{what}: {e}"))?;
    let got = read(mount);
    case.check(&before, &got, touched)
        .map_err(|e| format!("{what}: {e}\n{outcome}"))?;
    finish(mount, &sentinel_of(8, 0)).map_err(|e| e.to_string())?;
    {
        let from = done.as_ref().unwrap_or(crashed);
        let durable = from.crash(scratch, "durable", format);
        let got = read(&durable.mount);
        case.check(&before, &got, touched)
            .map_err(|e| format!("after a crash: {e}\n{outcome}"))?;
        let told = sentinel::read(&durable.mount).map_err(|e| e.to_string())?;
        if told.epoch != Epoch(8) {
            return Err(format!("the sentinel says {}", told.epoch));
        }
    }
    tidy(mount, &outcome).map_err(|e| e.to_string())?;
    let stamped = read(mount)
        .nodes
        .values()
        .filter(|node| node.stamp.is_some())
        .count();
    if stamped > 0 {
        return Err(format!("{what}: {stamped} stamps are left"));
    }
    Ok(())
}

/// Applies until `stop` steps are done; whether that was before the end.
fn interrupted(plan: &Plan<'_>, mount: &Path, stop: u64) -> Result<bool, String> {
    let disk = Disk::open(mount).map_err(|e| e.to_string())?;
    let mut stopping = Stopping::new(disk, stop);
    match apply_to(plan, &mut stopping, &mut |_| {}) {
        Ok(_) => Ok(false),
        Err(_) if stopping.taken == stop => Ok(true),
        Err(error) => Err(error.to_string()),
    }
}

fn run_many(format: Format, test: &str) {
    if left_out(test) {
        return;
    }
    let directory = scratch();
    run_cases(format.name(), test, "TWINWRITE_MOUNTED_CASES", 12, |seed| {
        run_one(seed, format, directory.path())
    });
}

#[test]
fn random_histories_on_ext4_end_as_they_were_at_the_cut() {
    let test = "random_histories_on_ext4_end_as_they_were_at_the_cut";
    run_many(Format::Ext4, test);
}

#[test]
fn random_histories_on_ext4_with_fast_commits_end_as_they_were_at_the_cut() {
    let test = "random_histories_on_ext4_with_fast_commits_end_as_they_were_at_the_cut";
    run_many(Format::Ext4FastCommit, test);
}

#[test]
fn random_histories_on_xfs_end_as_they_were_at_the_cut() {
    let test = "random_histories_on_xfs_end_as_they_were_at_the_cut";
    run_many(Format::Xfs, test);
}

/// The next free number and the next transaction's for a generation: what replay makes gets, as a rule, the
/// identities that the log gave to others.
#[test]
fn random_histories_on_btrfs_end_as_they_were_at_the_cut() {
    let test = "random_histories_on_btrfs_end_as_they_were_at_the_cut";
    run_many(Format::Btrfs, test);
}

/// A volume of 24 MiB, and a log that makes a file of 4 MiB on it.
fn four_mebibytes(world: &mut World<'_>, root: crate::ids::Identity) {
    let file = world.create(root, "big", NewKind::File);
    for index in 0..32 {
        world.write(file, index << 17, &vec![index as u8 + 1; 128 << 10]);
    }
}

#[test]
fn a_full_ext4_stops_the_replay_and_loses_nothing() {
    if left_out("a_full_ext4_stops_the_replay_and_loses_nothing") {
        return;
    }
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", Format::Ext4);
    let root = LiveDisk::new(&mounted.mount).root();
    let mut world = World::new(1, root, None);
    four_mebibytes(&mut world, root);
    let count = world.events.len();
    let case = Case::with_cut(world, count);
    let filler = mounted.mount.join("filler");
    let mut file = std::fs::File::create(&filler).expect("create");
    while std::io::Write::write_all(&mut file, &[7; 4096]).is_ok() {}
    drop(file);
    let error = apply(&case.plan(), &mounted.mount, &mut |_| {}).expect_err("it is full");
    assert!(matches!(error, ReplayError::Full(_)), "{error}");
    std::fs::remove_file(&filler).expect("free space");
    apply(&case.plan(), &mounted.mount, &mut |_| {}).expect("run again");
    let bytes = std::fs::read(mounted.mount.join("big")).expect("read");
    let right = bytes
        .iter()
        .enumerate()
        .all(|(at, byte)| usize::from(*byte) == (at >> 17) + 1);
    assert!(right && bytes.len() == 4 << 20, "{} bytes", bytes.len());
}

#[test]
fn an_immutable_file_is_written_and_immutable_again() {
    if left_out("an_immutable_file_is_written_and_immutable_again") {
        return;
    }
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", Format::Ext4);
    let mut live = LiveDisk::new(&mounted.mount);
    let root = live.root();
    let mut world = World::new(1, root, Some(&mut live));
    four_mebibytes(&mut world, root);
    let count = world.events.len();
    let case = Case::with_cut(world, count);
    let path = mounted.mount.join("big");
    let lsattr = || {
        let file = std::fs::File::open(&path).expect("open");
        let flags = handle::flags_of(file).expect("flags");
        flags.expect("it has some")
    };
    let unlocked = lsattr();
    let lock = InodeFlags {
        flags: unlocked.flags | IMMUTABLE,
        ..unlocked
    };
    handle::set_flags(std::fs::File::open(&path).expect("open"), lock).expect("chattr +i");
    for stop in 0..8 {
        assert!(interrupted(&case.plan(), &mounted.mount, stop).expect("stopped"));
    }
    apply(&case.plan(), &mounted.mount, &mut |_| {}).expect("replay");
    assert_ne!(lsattr().locks(), 0);
    let bytes = std::fs::read(&path).expect("read");
    assert_eq!(bytes.len(), 4 << 20);
    handle::set_flags(std::fs::File::open(&path).expect("open"), unlocked).expect("chattr -i");
}

/// A btrfs changes that flag of no file that has bytes, and says nothing.
#[test]
fn a_file_that_is_written_in_place_is_made_so() {
    if left_out("a_file_that_is_written_in_place_is_made_so") {
        return;
    }
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", Format::Btrfs);
    let root = LiveDisk::new(&mounted.mount).root();
    let mut world = World::new(1, root, None);
    let file = world.create(root, "image", NewKind::File);
    world.run(Op::SetFlags {
        inode: file,
        flags: InodeFlags::IN_PLACE,
        project: 0,
    });
    world.write(file, 0, b"some bytes");
    let count = world.events.len();
    let case = Case::with_cut(world, count);
    let outcome = apply(&case.plan(), &mounted.mount, &mut |_| {}).expect("replay");
    let path = mounted.mount.join("image");
    assert_eq!(std::fs::read(&path).expect("read"), b"some bytes");
    let image = std::fs::File::open(&path).expect("open");
    let flags = handle::flags_of(image)
        .expect("flags")
        .expect("it has some");
    assert_ne!(flags.flags & InodeFlags::IN_PLACE, 0, "{outcome}");
}

#[test]
fn a_handle_of_another_generation_finds_nothing() {
    if left_out("a_handle_of_another_generation_finds_nothing") {
        return;
    }
    let scratch = scratch();
    for format in [Format::Ext4, Format::Xfs, Format::Btrfs] {
        let mounted = protected(scratch.path(), "live", format);
        let path = mounted.mount.join("f");
        let file = std::fs::File::create(&path).expect("create");
        let identity = handle::identity_of(&file).expect("a handle");
        drop(file);
        let mut disk = Disk::open(&mounted.mount).expect("open");
        assert!(disk.stat(identity).expect("stat").is_some());
        for generation in [0, identity.generation ^ 1] {
            let other = crate::ids::Identity {
                generation,
                ..identity
            };
            assert_eq!(
                disk.stat(other).expect("stat"),
                None,
                "{other} instead of {identity}"
            );
        }
        std::fs::remove_file(&path).expect("remove");
        assert_eq!(
            disk.stat(identity).expect("stat"),
            None,
            "{identity} was removed"
        );
    }
}
