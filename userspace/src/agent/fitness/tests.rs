use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::*;

fn volume(filesystem: &str, device: &Path) -> Volume {
    let text = include_str!("../../../../docs/twinwrite.toml");
    let config: crate::config::Config = toml::from_str(text).unwrap();
    let mut volume = config.volumes[0].clone();
    volume.filesystem = filesystem.into();
    volume.device = device.to_owned();
    volume
}

fn run(command: &str, arguments: &[&str]) -> String {
    let output = Command::new(command).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {text}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// An image of 64 MiB (mkfs.xfs wants 300, mkfs.btrfs 114), made by this command.
fn image(directory: &Path, name: &str, mkfs: &[&str]) -> PathBuf {
    let path = directory.join(name);
    let mib = match mkfs[0] {
        "mkfs.xfs" => 320,
        "mkfs.btrfs" => 128,
        _ => 64,
    };
    File::create(&path).unwrap().set_len(mib << 20).unwrap();
    let path_text = path.to_str().unwrap().to_owned();
    let arguments: Vec<&str> = mkfs[1..]
        .iter()
        .copied()
        .chain([path_text.as_str()])
        .collect();
    run(mkfs[0], &arguments);
    path
}

fn page(image: &Path, filesystem: &str) -> [u8; 4096] {
    let mut page = [0; 4096];
    let at = if filesystem == "btrfs" { 0x1_0000 } else { 0 };
    File::open(image)
        .unwrap()
        .read_exact_at(&mut page, at)
        .unwrap();
    page
}

fn found(filesystem: &str, mkfs: &[&str]) -> Vec<Unfit> {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), "volume.img", mkfs);
    of_super_block(&volume(filesystem, &image), &page(&image, filesystem))
}

#[test]
fn files_without_a_time_of_birth_are_unfit() {
    let small = found("ext4", &["mkfs.ext4", "-q", "-F", "-I", "128"]);
    assert!(
        matches!(small[..], [Unfit::NoBirth("inodes of 128 bytes", _)]),
        "{small:?}"
    );
    let old = found(
        "xfs",
        &[
            "mkfs.xfs",
            "-q",
            "-f",
            "-m",
            "crc=0,bigtime=0,inobtcount=0,reflink=0",
        ],
    );
    assert!(
        matches!(old[..], [Unfit::NoBirth("an old XFS", _)]),
        "{old:?}"
    );
}

#[test]
fn plain_file_systems_are_fit() {
    assert_eq!(found("ext4", &["mkfs.ext4", "-q", "-F"]), []);
    assert_eq!(found("xfs", &["mkfs.xfs", "-q", "-f"]), []);
    assert_eq!(found("btrfs", &["mkfs.btrfs", "-q", "-f"]), []);
}

#[test]
fn file_systems_that_cannot_be_protected_are_told_by_their_super_block() {
    let ext4 = |features: &str| found("ext4", &["mkfs.ext4", "-q", "-F", "-O", features]);
    assert_eq!(ext4("^has_journal"), [Unfit::NoJournal]);
    assert_eq!(ext4("casefold"), [Unfit::Caseless("casefold")]);
    assert_eq!(ext4("encrypt"), [Unfit::Encrypt]);
    assert_eq!(
        ext4("encrypt,casefold,^has_journal"),
        [
            Unfit::NoJournal,
            Unfit::Caseless("casefold"),
            Unfit::Encrypt
        ]
    );
    let caseless = ["mkfs.xfs", "-q", "-f", "-n", "version=ci"];
    assert_eq!(found("xfs", &caseless), [Unfit::Caseless("ascii-ci")]);
    let directory = tempfile::tempdir().unwrap();
    let realtime = directory.path().join("realtime.img");
    File::create(&realtime).unwrap().set_len(64 << 20).unwrap();
    let device = format!("rtdev={}", realtime.display());
    let with_realtime = ["mkfs.xfs", "-q", "-f", "-r", &device];
    assert_eq!(found("xfs", &with_realtime), [Unfit::Realtime]);
    for wanted in ["xfs", "btrfs"] {
        let other = found(wanted, &["mkfs.ext4", "-q", "-F"]);
        assert!(matches!(other[..], [Unfit::OtherFilesystem(..)]));
    }
    let second = directory.path().join("second.img");
    File::create(&second).unwrap().set_len(128 << 20).unwrap();
    let on_two = ["mkfs.btrfs", "-q", "-f", second.to_str().unwrap()];
    assert_eq!(found("btrfs", &on_two), [Unfit::Devices(2)]);
}

fn options(text: &str) -> MountOptions {
    text.split(',')
        .map(|option| match option.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (option.to_owned(), None),
        })
        .collect()
}

#[test]
fn ways_of_mounting_that_cannot_be_protected_are_told() {
    let ext4 = volume("ext4", Path::new("/dev/null"));
    let told = |text: &str, dax| of_mount(&ext4, &[0; 4096], &options(text), dax);
    assert_eq!(told("rw,errors=remount-ro,dax=never", true), []);
    assert_eq!(told("rw", false), []);
    assert_eq!(told("rw,dax=inode", false), []);
    assert!(matches!(told("rw", true)[..], [Unfit::Dax(_)]));
    assert!(matches!(told("rw,dax=inode", true)[..], [Unfit::Dax(_)]));
    assert!(matches!(told("rw,dax=always", false)[..], [Unfit::Dax(_)]));
    assert!(matches!(told("rw,dax", false)[..], [Unfit::Dax(_)]));
    assert!(matches!(
        told("ro,norecovery", false)[..],
        [Unfit::NoRecovery(_)]
    ));
    for off in ["rw,nobarrier", "rw,barrier=0"] {
        assert!(
            matches!(told(off, false)[..], [Unfit::NoBarriers(_)]),
            "{off}"
        );
        let allowed = Volume {
            allow_no_barriers: true,
            ..ext4.clone()
        };
        assert_eq!(of_mount(&allowed, &[0; 4096], &options(off), false), []);
    }
    let xfs = volume("xfs", Path::new("/dev/null"));
    let realtime = of_mount(&xfs, &[0; 4096], &options("rw,rtdev=/dev/sdz"), false);
    assert_eq!(realtime, [Unfit::Realtime]);
}

/// A loop device and its mount, while they live.
struct Mounted {
    device: PathBuf,
    mount: PathBuf,
}

impl Mounted {
    fn new(directory: &Path, image: &Path, options: &str) -> Self {
        let device = run("losetup", &["--find", "--show", image.to_str().unwrap()]);
        let mount = directory.join("mount");
        std::fs::create_dir_all(&mount).unwrap();
        run("mount", &["-o", options, &device, mount.to_str().unwrap()]);
        let device = PathBuf::from(device);
        Self { device, mount }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A child of another test's thread may hold the descriptors for a moment.
        for _ in 0..100 {
            if nix::mount::umount(&self.mount) != Err(nix::errno::Errno::EBUSY) {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Command::new("losetup")
            .arg("-d")
            .arg(&self.device)
            .status()
            .ok();
    }
}

#[test]
fn what_the_kernel_says_of_a_real_mount_is_what_counts() {
    if std::env::var_os("TWINWRITE_NO_LOOP").is_some() {
        println!("SKIPPED, because TWINWRITE_NO_LOOP is set");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let image = image(directory, "volume.img", &["mkfs.ext4", "-q", "-F"]);
    let check_with = |options: &str| {
        let mounted = Mounted::new(directory, &image, options);
        check(&volume("ext4", &mounted.device)).map_err(|error| error.to_string())
    };
    assert_eq!(check_with("noatime"), Ok(()));
    let told = check_with("nobarrier").unwrap_err();
    assert!(told.contains("option nobarrier"), "{told}");
    // A default that mountinfo does not show.
    run("tune2fs", &["-o", "nobarrier", image.to_str().unwrap()]);
    let told = check_with("noatime").unwrap_err();
    assert!(told.contains("tune2fs -o ^nobarrier"), "{told}");
    assert_eq!(check_with("barrier"), Ok(()));
    run("tune2fs", &["-O", "^has_journal", image.to_str().unwrap()]);
    let told = check_with("barrier").unwrap_err();
    assert!(
        told.contains("no journal") && told.contains("volume data"),
        "{told}"
    );
}

#[test]
fn a_btrfs_with_subvolumes_is_told() {
    if std::env::var_os("TWINWRITE_NO_LOOP").is_some() {
        println!("SKIPPED, because TWINWRITE_NO_LOOP is set");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let image = image(directory, "volume.img", &["mkfs.btrfs", "-q", "-f"]);
    let mounted = Mounted::new(directory, &image, "noatime");
    let volume = volume("btrfs", &mounted.device);
    let told = || {
        check(&volume)
            .err()
            .map_or_else(String::new, |error| error.to_string())
    };
    // Whether this host could refuse them is not the question.
    assert!(!told().contains("has subvolumes"), "{}", told());
    let below = mounted.mount.join("directory");
    std::fs::create_dir(&below).unwrap();
    let subvolume = below.join("subvolume");
    run(
        "btrfs",
        &["subvolume", "create", subvolume.to_str().unwrap()],
    );
    assert!(told().contains("has subvolumes"), "{}", told());
}
