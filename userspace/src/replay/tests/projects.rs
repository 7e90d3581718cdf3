//! Directories that pass a quota project on, and let in nothing of another one.

use std::path::Path;
use std::process::Command;

use super::cases::Case;
use super::loopfs::{Format, LiveDisk, left_out, read};
use super::real::{protected, scratch};
use super::world::{NewKind, Op, World};
use crate::capture::handle::{Project, project_of, set_project};
use crate::replay::{apply, tidy};

fn project(path: &Path) -> Project {
    project_of(std::fs::File::open(path).expect("open")).expect("a project")
}

fn give(path: &Path, number: u32, passed_on: bool) {
    let file = std::fs::File::open(path).expect("open");
    set_project(file, Project { number, passed_on }).expect("set the project");
}

/// Whether this kernel was built with the quotas without which it does not mount an ext4 with projects.
fn ext4_has_projects() -> bool {
    let scratch = scratch();
    let image = scratch.path().join("image");
    let file = std::fs::File::create(&image).expect("create");
    file.set_len(8 << 20).expect("size");
    let run = |command: &mut Command| command.output().expect("it exists").status.success();
    let features = ["-q", "-F", "-O", "project,quota"];
    assert!(run(Command::new("mkfs.ext4").args(features).arg(&image)));
    let mount = scratch.path().join("mount");
    std::fs::create_dir(&mount).expect("mkdir");
    let options = ["-o", "loop"];
    let has = run(Command::new("mount").args(options).arg(&image).arg(&mount));
    if has {
        assert!(run(Command::new("umount").arg(&mount)));
    } else {
        println!("ext4: SKIPPED, because this kernel mounts none with projects");
    }
    has
}

/// A directory of project 5 in a root of project `root_project`, which passes it on if it is not 0.
fn replayed_into_a_project(format: Format, root_project: u32) {
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", format);
    let mount = &mounted.mount;
    if root_project != 0 {
        give(mount, root_project, true);
        give(&mount.join(".twinwrite"), root_project, true);
    }
    let mut live = LiveDisk::new(mount);
    let root = live.root();
    let mut world = World::new(1, root, Some(&mut live));
    let p = world.create(root, "p", NewKind::Directory);
    give(&mount.join("p"), 5, true);
    world.create(p, "kept", NewKind::File);
    let to_target = || NewKind::Symlink(b"target".to_vec());
    world.create(p, "kept symlink", to_target());
    world.create(root, "file", NewKind::File);
    world.create(root, "directory", NewKind::Directory);
    world.run(Op::Checkpoint);
    let crashed = mounted.crash(scratch.path(), "crashed", format);

    let f = world.create(p, "f", NewKind::File);
    world.write(f, 0, b"bytes");
    world.create(p, "symlink", NewKind::Symlink(b"target".to_vec()));
    world.create(p, "fifo", NewKind::Fifo);
    let d = world.create(p, "d", NewKind::Directory);
    world.create(d, "g", NewKind::File);
    world.create(d, "symlink", NewKind::Symlink(b"target".to_vec()));
    world.create(root, "top", NewKind::File);
    for name in ["kept", "kept symlink"] {
        world.rename((p, name), (d, name));
    }
    // What the log does not tell: these come into the project before they come into its directory.
    for (name, passed_on) in [("file", false), ("directory", true)] {
        give(&mount.join(name), 5, passed_on);
        world.rename((root, name), (p, name));
    }

    let count = world.events.len();
    let case = Case::with_cut(world, count);
    let before = read(&crashed.mount);
    let outcome = apply(&case.plan(), &crashed.mount, &mut |_| {}).expect("replay");
    let touched = case.touched(count, &|_| true);
    case.check(&before, &read(&crashed.mount), &touched)
        .expect("as at the cut");
    tidy(&crashed.mount, &outcome).expect("tidy");
    let in_project = |passed_on| Project {
        number: 5,
        passed_on,
    };
    for (name, passed_on) in [
        ("f", false),
        ("d", true),
        ("d/g", false),
        ("d/kept", false),
        ("file", false),
        ("directory", true),
    ] {
        let got = project(&crashed.mount.join("p").join(name));
        assert_eq!(got, in_project(passed_on), "{name}");
    }
    assert_eq!(project(&crashed.mount.join("top")).number, root_project);
}

#[test]
fn what_replay_makes_gets_the_project_of_its_directory() {
    if left_out("what_replay_makes_gets_the_project_of_its_directory") {
        return;
    }
    replayed_into_a_project(Format::Xfs, 0);
    if ext4_has_projects() {
        replayed_into_a_project(Format::Ext4Projects, 0);
    }
}

#[test]
fn a_volume_that_is_one_project_does_not_keep_survivors_of_another_out() {
    if left_out("a_volume_that_is_one_project_does_not_keep_survivors_of_another_out") {
        return;
    }
    replayed_into_a_project(Format::Xfs, 1);
    if ext4_has_projects() {
        replayed_into_a_project(Format::Ext4Projects, 1);
    }
}
