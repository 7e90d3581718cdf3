//! What of capture can be tested without loading programs; the rest is verified on every kernel by
//! calibration itself, in virtual machines.

use std::fs::File;
use std::path::Path;

use super::handle::Handle;
use super::load::pin_directory;
use super::page_cache::{identity_of, identity_of_file};
use super::{Filesystem, HOOKS, Need, features, to_kernel_device};
use crate::ids::Identity;

#[test]
fn pins_of_any_volume_name_stay_in_their_directory() {
    for (name, want) in [
        ("vol0", "/sys/fs/bpf/twinwrite/vol0"),
        ("a.b", "/sys/fs/bpf/twinwrite/a%2eb"),
        ("../x", "/sys/fs/bpf/twinwrite/%2e%2e%2fx"),
    ] {
        assert_eq!(pin_directory(name), Path::new(want));
    }
}

#[test]
fn device_numbers_are_in_the_kernels_form() {
    assert_eq!(to_kernel_device(libc::makedev(254, 16)), 254 << 20 | 16);
    assert_eq!(
        to_kernel_device(libc::makedev(8, 0x12345)),
        8 << 20 | 0x12345
    );
}

#[test]
fn handles_carry_the_identity_in_both_sizes() {
    for ino in [12, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        let identity = Identity {
            ino,
            generation: 0x8000_0007,
        };
        assert_eq!(Handle::of(identity).identity().ok(), Some(identity));
    }
}

#[test]
fn a_handle_of_btrfs_keeps_its_subvolume() {
    let [first, second] =
        [(257, 9), (1 << 40, 0x8000_0007)].map(|(ino, generation)| Identity { ino, generation });
    let of = |identity: Identity| {
        let mut body = [0; 20];
        body[..8].copy_from_slice(&identity.ino.to_ne_bytes());
        body[8..16].copy_from_slice(&5_u64.to_ne_bytes());
        body[16..].copy_from_slice(&identity.generation.to_ne_bytes());
        Handle::with_body(0x4d, &body)
    };
    assert_eq!(of(first).identity().ok(), Some(first));
    assert_eq!(of(first).sibling(second), of(second));
}

#[test]
fn a_name_and_its_open_file_have_one_identity() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    let file = File::create(&path).expect("a file");
    match (identity_of(&path), identity_of_file(&file)) {
        (Ok(by_name), Ok(by_file)) => {
            use std::os::unix::fs::MetadataExt as _;
            assert_eq!(by_name, by_file);
            assert_eq!(by_name.ino, file.metadata().expect("metadata").ino());
        }
        // A file system of another handle type: both must say so.
        (by_name, by_file) => assert!(by_name.is_err() && by_file.is_err()),
    }
}

#[test]
fn hooks_are_named_once_and_every_program_is_in_the_object() {
    for (index, hook) in HOOKS.iter().enumerate() {
        assert!(
            HOOKS[..index]
                .iter()
                .all(|other| other.program != hook.program),
            "{hook:?}"
        );
    }
    let Ok(object) = super::object::object() else {
        return;
    };
    for hook in HOOKS {
        let name = hook.program.as_bytes();
        assert!(
            object.windows(name.len()).any(|window| window == name),
            "{hook:?}"
        );
    }
}

#[test]
fn each_file_system_has_its_own_write_hook() {
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs] {
        assert!(HOOKS.iter().any(|hook| {
            let is_its = match hook.need {
                Need::On(filesystems) => filesystems == [filesystem],
                Need::Only(only) => only == filesystem,
                _ => false,
            };
            hook.program.starts_with("write_") && is_its
        }));
    }
}

#[test]
fn every_missing_feature_comes_with_a_remedy() {
    for feature in features() {
        assert!(feature.ok || !feature.remedy.is_empty(), "{feature:?}");
    }
}

#[test]
fn a_mount_is_found_among_such_whose_names_are_no_text() {
    let mounts = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        23 22 0:44 / /tmp/\xff rw - fuse.x x rw\n\
        a line of another kind\n\
        24 22 0:45 / /srv/vol0 rw - btrfs /dev/vdb rw\n";
    assert_eq!(super::device_of_mount(mounts, 24), Some(45));
    assert_eq!(super::device_of_mount(mounts, 22), Some(8 << 20 | 1));
    assert_eq!(super::device_of_mount(mounts, 2), None);
}
