//! Who may open the sentinel file, and what is taken for it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use super::loopfs::{Format, left_out};
use super::real::{protected, scratch, sentinel_of};
use crate::ids::{Epoch, Seq};
use crate::replay::{ReplayError, SentinelError, SentinelFile, finish, finish_held, sentinel};

fn is_untrusted<T>(result: Result<T, SentinelError>, why: &str) {
    match result {
        Err(error @ SentinelError::Untrusted { .. }) => {
            let text = error.to_string();
            assert!(text.contains(why), "{why:?} is not in {text:?}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("was accepted, but it {why}"),
    }
}

fn both_refuse(mount: &Path, why: &str) {
    is_untrusted(sentinel::read(mount), why);
    is_untrusted(SentinelFile::open(mount), why);
}

#[test]
fn a_second_opener_is_told_who_holds_the_sentinel() {
    let mount = tempfile::tempdir().expect("a directory");
    let mut held = SentinelFile::open(mount.path()).expect("open");
    held.write(&sentinel_of(7, 1)).expect("write");
    for _ in 0..2 {
        let error = SentinelFile::open(mount.path()).expect_err("it is held");
        assert!(matches!(error, SentinelError::Held(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("another agent or a replay"), "{text}");
        assert!(text.contains("stop it first"), "{text}");
    }
    assert_eq!(sentinel::read(mount.path()).expect("read").seq, Seq(1));
    drop(held);
    SentinelFile::open(mount.path()).expect("nobody holds it any more");
}

#[test]
fn a_takeover_finishes_alone_and_not_beside_another() {
    if left_out("a_takeover_finishes_alone_and_not_beside_another") {
        return;
    }
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", Format::Ext4);
    let mount = &mounted.mount;
    finish(mount, &sentinel_of(8, 0)).expect("nobody else holds it");
    let mut held = SentinelFile::open(mount).expect("open");
    let error = finish(mount, &sentinel_of(9, 0)).expect_err("it is held");
    assert!(
        matches!(error, ReplayError::Sentinel(SentinelError::Held(_))),
        "{error}"
    );
    assert_eq!(sentinel::read(mount).expect("read").epoch, Epoch(8));
    finish_held(mount, &mut held, &sentinel_of(9, 0)).expect("the holder may");
    assert_eq!(sentinel::read(mount).expect("read").epoch, Epoch(9));
}

#[test]
fn the_directory_is_made_for_its_owner_alone() {
    let mount = tempfile::tempdir().expect("a directory");
    let own = mount.path().join(".twinwrite");
    let mode = || std::fs::metadata(&own).expect("stat").mode() & 0o7777;
    drop(SentinelFile::open(mount.path()).expect("open"));
    assert_eq!(mode(), 0o700);
    let wider = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&own, wider).expect("chmod");
    drop(SentinelFile::open(mount.path()).expect("open"));
    assert_eq!(mode(), 0o700);
}

#[test]
fn symlinks_are_not_followed() {
    let elsewhere = tempfile::tempdir().expect("a directory");
    let mount = tempfile::tempdir().expect("a directory");
    let own = mount.path().join(".twinwrite");
    symlink(elsewhere.path(), &own).expect("symlink");
    both_refuse(mount.path(), "is a symlink");
    std::fs::remove_file(&own).expect("remove");
    std::fs::create_dir(&own).expect("mkdir");
    let precious = elsewhere.path().join("precious");
    std::fs::write(&precious, b"as it was").expect("write");
    std::fs::set_permissions(&precious, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    symlink(&precious, own.join("sentinel")).expect("symlink");
    both_refuse(mount.path(), "is a symlink");
    assert_eq!(std::fs::read(&precious).expect("read"), b"as it was");
    let here = std::fs::read_dir(elsewhere.path()).expect("list");
    assert_eq!(here.count(), 1);
}

#[test]
fn what_others_may_have_made_is_not_believed() {
    let mount = tempfile::tempdir().expect("a directory");
    let own = mount.path().join(".twinwrite");
    std::fs::write(&own, b"").expect("write");
    both_refuse(mount.path(), "is no directory");
    std::fs::remove_file(&own).expect("remove");
    let mut file = SentinelFile::open(mount.path()).expect("open");
    file.write(&sentinel_of(7, 1)).expect("write");
    drop(file);
    let mode = |mode| std::fs::set_permissions(&own, std::fs::Permissions::from_mode(mode));
    mode(0o770).expect("chmod");
    both_refuse(mount.path(), "may be written by others (mode 0770)");
    mode(0o700).expect("chmod");
    sentinel::read(mount.path()).expect("trusted again");
    let sentinel_file = own.join("sentinel");
    std::fs::remove_file(&sentinel_file).expect("remove");
    std::fs::create_dir(&sentinel_file).expect("mkdir");
    is_untrusted(sentinel::read(mount.path()), "is not of the right type");
}

#[test]
fn a_directory_of_a_user_or_from_another_mount_is_refused() {
    if left_out("a_directory_of_a_user_or_from_another_mount_is_refused") {
        return;
    }
    let scratch = scratch();
    let mounted = protected(scratch.path(), "live", Format::Ext4);
    let own = mounted.mount.join(".twinwrite");
    let owner = |uid| std::os::unix::fs::chown(&own, Some(uid), None).expect("chown");
    owner(1000);
    both_refuse(&mounted.mount, "belongs to user 1000");
    owner(0);
    sentinel::read(&mounted.mount).expect("trusted again");
    let bind = nix::mount::MsFlags::MS_BIND;
    let none = None::<&str>;
    nix::mount::mount(Some(&own), &own, none, bind, none).expect("bind");
    let read = sentinel::read(&mounted.mount);
    let opened = SentinelFile::open(&mounted.mount);
    // A child that another test's thread has just forked may hold a descriptor below it for a moment.
    nix::mount::umount2(&own, nix::mount::MntFlags::MNT_DETACH).expect("umount");
    is_untrusted(read, "is a mount point");
    is_untrusted(opened, "is a mount point");
}
