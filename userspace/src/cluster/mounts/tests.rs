use procfs::FromBufRead;
use procfs::process::MountInfos;

use super::*;

const ROOT: &str = "21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw";
const DATA: &str = "30 21 254:16 / /srv/my\\040data rw,noatime shared:9 - ext4 /dev/vdb rw,discard";
const BIND: &str = "31 21 254:16 /sub /export rw,noatime shared:9 - ext4 /dev/vdb rw,discard";
const OVER: &str = "32 30 0:40 / /srv/my\\040data rw - tmpfs tmpfs rw";
const READ_ONLY: &str = "30 21 254:16 / /srv/my\\040data rw,noatime - xfs /dev/vdb ro,emergency";

fn state(lines: &[&str]) -> MountState {
    let text = lines.join("\n");
    let mounts = MountInfos::from_buf_read(text.as_bytes()).unwrap().0;
    classify(
        &mounts,
        KernelDev {
            major: 254,
            minor: 16,
        },
        Path::new("/srv/my data"),
    )
}

fn volume() -> Volume {
    let config = include_str!("../../../../docs/twinwrite.toml");
    let config = crate::config::Config::parse(Path::new("twinwrite.toml"), config).unwrap();
    let mut volume = config.volumes.into_iter().next().unwrap();
    volume.mount_point = "/srv/my data".into();
    volume
}

fn refused(lines: &[&str]) -> String {
    accept(&volume(), state(lines)).unwrap_err().to_string()
}

#[test]
fn a_volume_is_found_by_its_device_number() {
    let dev = KernelDev {
        major: 254,
        minor: 16,
    };
    let mounted = Mounted {
        part: None,
        filesystem: "ext4".into(),
        read_only: false,
    };
    assert_eq!(state(&[ROOT, DATA]), MountState::Mounted(mounted.clone()));
    assert_eq!(accept(&volume(), state(&[ROOT, DATA])).unwrap(), mounted);
    assert_eq!(dev.s_dev(), 0x0fe0_0010);
    assert_eq!(KernelDev::from_stat(nix::sys::stat::makedev(254, 16)), dev);
}

#[test]
fn each_wrong_place_is_told_with_its_remedy() {
    assert_eq!(state(&[ROOT]), MountState::NotMounted);
    assert!(refused(&[ROOT]).contains("not mounted at /srv/my data: mount it"));
    assert_eq!(
        state(&[ROOT, BIND]),
        MountState::Elsewhere {
            at: "/export".into()
        }
    );
    assert!(refused(&[ROOT, BIND]).contains("volume.mount_point"));
    let twice = MountState::Twice {
        at: vec!["/srv/my data".into(), "/export".into()],
    };
    assert_eq!(state(&[ROOT, DATA, BIND]), twice);
    assert!(refused(&[ROOT, DATA, BIND]).contains("/srv/my data, /export"));
    assert_eq!(
        state(&[ROOT, DATA, OVER]),
        MountState::Occupied {
            by: "tmpfs (tmpfs)".into()
        }
    );
    assert!(refused(&[ROOT, DATA, OVER]).contains("tmpfs"));
}

#[test]
fn another_file_system_and_a_read_only_one_are_refused() {
    assert!(refused(&[ROOT, READ_ONLY]).contains("mounted as xfs"));
    let mut volume = volume();
    volume.filesystem = "xfs".into();
    let error = accept(&volume, state(&[ROOT, READ_ONLY])).unwrap_err();
    assert!(matches!(error, MountError::ReadOnly { .. }));
}

#[test]
fn a_btrfs_is_known_by_its_source_and_mounted_as_a_whole() {
    // Its own number is that of no device, and its source must be one.
    let of_source = |source: &str| {
        let line =
            format!("30 21 0:37 / /srv/my\\040data rw - btrfs {source} rw,subvolid=5,subvol=/");
        state(&[ROOT, &line])
    };
    for source in ["/dev/null", "/nonexistent/device", "none"] {
        assert!(
            matches!(of_source(source), MountState::Occupied { .. }),
            "{source}"
        );
    }
    let mut volume = volume();
    volume.filesystem = "btrfs".into();
    let mounted = |part: Option<&str>| {
        MountState::Mounted(Mounted {
            part: part.map(str::to_owned),
            filesystem: "btrfs".into(),
            read_only: false,
        })
    };
    assert!(accept(&volume, mounted(None)).is_ok());
    let error = accept(&volume, mounted(Some("/sub")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("subvolid=5") && error.contains("/sub"),
        "{error}"
    );
}

#[test]
fn a_device_that_is_missing_or_no_block_device_is_told() {
    let mut volume = volume();
    volume.device = "/nonexistent/device".into();
    assert!(
        mount(&volume)
            .unwrap_err()
            .to_string()
            .contains("volume.device")
    );
    volume.device = "/dev/null".into();
    assert!(matches!(
        unmount(&volume),
        Err(MountError::NoBlockDevice { .. })
    ));
}

#[test]
fn mountinfo_escapes_are_undone() {
    for (text, plain) in [
        ("/a\\040b\\011c", "/a b\tc"),
        ("/a\\134b", "/a\\b"),
        ("/a\\04", "/a\\04"),
        ("/a\\", "/a\\"),
        ("/a\\0é0", "/a\\0é0"),
    ] {
        assert_eq!(unescaped(Path::new(text)), Path::new(plain));
    }
}
