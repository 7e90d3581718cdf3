use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use super::*;
use crate::capture::to_kernel_device;

/// An ext4 whose count the test writes.
fn counted(sys: &Path) -> Ext4 {
    std::fs::create_dir_all(sys.join("dev/block")).unwrap();
    std::fs::create_dir_all(sys.join("fs/ext4/vda")).unwrap();
    let link = sys.join("dev/block/253:0");
    std::os::unix::fs::symlink("../../devices/block/vda", link).unwrap();
    Ext4::below(sys, 253 << 20).unwrap()
}

#[test]
fn a_rise_since_the_beginning_is_told_until_checkpoints_after_it_were_proven() {
    let sys = tempfile::tempdir().unwrap();
    let ext4 = counted(sys.path());
    let count = |errors: u64| std::fs::write(ext4.path(COUNT), format!("{errors}\n")).unwrap();
    count(3);
    let mut health = FilesystemHealth::new(Path::new("/srv/data"), Some(ext4.clone()), None);
    assert_eq!(health.look(10), None);
    count(5);
    let told = health.look(10).unwrap();
    assert!(
        told.contains("2 errors") && told.contains("/srv/data"),
        "{told}"
    );
    assert!(told.contains("read-only"), "{told}");
    // The one that was under way may have begun before.
    assert!(health.look(11).is_some());
    // Another error begins anew.
    count(6);
    assert!(health.look(12).unwrap().contains("3 errors"));
    assert!(health.look(13).is_some());
    assert_eq!((health.look(14), health.errors()), (None, 6));
    assert_eq!(health.look(14), None);
    // It was checked; then one error is one again.
    count(0);
    assert_eq!(health.look(14), None);
    count(1);
    assert!(health.look(14).unwrap().contains("1 errors"));
    std::fs::remove_file(ext4.path(COUNT)).unwrap();
    assert!(
        health.look(15).is_some() && health.errors() == 1,
        "nothing new"
    );
}

#[test]
fn a_file_system_that_answers_is_well() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "some bytes").unwrap();
    let mut health = FilesystemHealth::of(directory.path(), 0, &file);
    assert!(health.file.is_some());
    assert_eq!(health.look(0), None);
    let gone = directory.path().join("gone");
    let mut missing = FilesystemHealth::of(directory.path(), 0, &gone);
    assert_eq!(missing.look(0), None);
}

fn run(command: &str, arguments: &[&str]) {
    let output = Command::new(command).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {error}");
}

/// What a look says after `harm` has been done to a file system made by `make`, and the errors counted.
fn after(make: &[&str], harm: impl FnOnce(&Path, u32)) -> (Option<String>, u64) {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let (image, mount) = (scratch.path().join("image"), scratch.path().join("mount"));
    File::create(&image).unwrap().set_len(320 << 20).unwrap();
    std::fs::create_dir(&mount).unwrap();
    let (image_text, mount_text) = (image.to_str().unwrap(), mount.to_str().unwrap());
    run(make[0], &[&make[1..], &[image_text]].concat());
    run("mount", &["-o", "loop", image_text, mount_text]);
    let file = mount.join("file");
    std::fs::write(&file, "some bytes").unwrap();
    let device = to_kernel_device(std::fs::metadata(&mount).unwrap().dev());
    let mut health = FilesystemHealth::of(&mount, device, &file);
    assert_eq!(health.look(0), None);
    harm(&mount, device);
    let told = health.look(0);
    let errors = health.errors();
    drop(health);
    nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH).unwrap();
    (told, errors)
}

#[test]
fn a_file_system_that_gave_up_is_told() {
    if std::env::var_os("TWINWRITE_NO_LOOP").is_some() {
        println!("SKIPPED, because TWINWRITE_NO_LOOP is set");
        return;
    }
    let shut = |mount: &Path, _| run("xfs_io", &["-x", "-c", "shutdown", mount.to_str().unwrap()]);
    for make in [&["mkfs.xfs", "-q"][..], &["mkfs.ext4", "-q", "-F"]] {
        let (told, _) = after(make, shut);
        let told = told.unwrap_or_else(|| panic!("{make:?} was shut down, and nothing is told"));
        assert!(told.contains("shut itself down"), "{told}");
    }
    let (told, errors) = after(&["mkfs.ext4", "-q", "-F"], |_, device| {
        let ext4 = Ext4::on(device).unwrap();
        std::fs::write(ext4.path("trigger_fs_error"), "injected by a test\n").unwrap();
        // The count is renewed by a worker.
        for _ in 0..100 {
            if ext4.number(COUNT) != Some(0) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    assert_eq!(errors, 1);
    assert!(told.is_some_and(|told| told.contains("read-only")));
}
