use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

use super::*;
use crate::manifest::{Kind, Manifest};
use crate::walk::{describe, walk};

/// Changes one field.
type Flip = fn(&mut Entry);

/// A tree with one of everything below `tree`.
fn tree() -> (TempDir, Manifest) {
    let root = tempfile::tempdir().expect("a root");
    let top = root.path().join("tree");
    fs::create_dir_all(top.join("directory")).expect("a directory");
    fs::write(top.join("file"), vec![7; 200_000]).expect("a file");
    fs::write(top.join("other"), b"other").expect("a file");
    fs::hard_link(top.join("other"), top.join("twin")).expect("a link");
    symlink("file", top.join("symlink")).expect("a symlink");
    nix::unistd::mkfifo(&top.join("fifo"), Mode::from_bits_truncate(0o600)).expect("a fifo");
    let manifest = describe(root.path(), Path::new("tree")).expect("a manifest");
    (root, manifest)
}

/// The differences after a tree was damaged.
fn after(damage: impl FnOnce(&Path)) -> Differences {
    let (root, manifest) = tree();
    damage(&root.path().join("tree"));
    compare(&manifest.entries, &walk(root.path(), Path::new("tree")))
}

/// Keeps a path's times while something else about it is changed.
fn keeping_times(path: &Path, change: impl FnOnce()) {
    let times = |path: &Path| {
        fs::symlink_metadata(path)
            .and_then(|m| m.modified())
            .expect("times")
    };
    let (own, parent) = (times(path), path.parent().expect("a parent"));
    let parents = times(parent);
    change();
    for (path, time) in [(path, own), (parent, parents)] {
        if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_symlink()) {
            let opened = fs::File::open(path).expect("opened");
            opened.set_modified(time).expect("times set");
        }
    }
}

#[test]
fn an_unchanged_tree_has_no_difference() {
    let differences = after(|_| {});
    assert_eq!(
        differences,
        Differences {
            expected: 7,
            ..Differences::default()
        }
    );
}

#[test]
fn every_field_that_is_flipped_is_seen_by_itself() {
    let (_root, manifest) = tree();
    let flips: [(&str, Flip); 12] = [
        ("type", |entry| entry.kind = Kind::Socket),
        ("mode", |entry| entry.mode ^= 0o4000),
        ("uid", |entry| entry.uid ^= 1),
        ("gid", |entry| entry.gid ^= 1),
        ("size", |entry| entry.size += 1),
        ("mtime_ns", |entry| entry.mtime_ns += 1),
        ("links", |entry| entry.links += 1),
        ("rdev", |entry| entry.rdev += 1),
        ("target", |entry| {
            entry.target = Some(PathBytes(b"elsewhere".to_vec()));
        }),
        ("hard link to", |entry| {
            entry.link_group = Some(PathBytes(b"elsewhere".to_vec()));
        }),
        ("content", |entry| {
            entry.crc32c = Some(entry.crc32c.unwrap_or_default() ^ 1);
        }),
        ("content", |entry| entry.blocks.push(1)),
    ];
    for at in 0..manifest.entries.len() {
        for (name, flip) in &flips {
            let mut found = Tree::default();
            for (index, mut entry) in manifest.entries.iter().cloned().enumerate() {
                if index == at {
                    flip(&mut entry);
                }
                found.entries.insert(entry.path.clone(), entry);
            }
            let differences = compare(&manifest.entries, &found);
            assert_eq!(
                (
                    differences.missing,
                    differences.different,
                    differences.extra
                ),
                (0, 1, 0)
            );
            assert_eq!(differences.words.len(), 1);
            assert!(
                differences.words[0].contains(name),
                "{name}: {:?}",
                differences.words
            );
        }
    }
}

#[test]
fn real_damage_of_each_attribute_is_seen() {
    let one = |damage: &dyn Fn(&Path), word: &str| {
        let differences = after(|top| keeping_times(&top.join("file"), || damage(top)));
        assert_eq!(differences.different, 1, "{word}: {:?}", differences.words);
        assert!(
            differences.words[0].contains(word),
            "{word}: {:?}",
            differences.words
        );
    };
    one(
        &|top| {
            fs::set_permissions(top.join("file"), PermissionsExt::from_mode(0o4755))
                .expect("chmod");
        },
        "mode",
    );
    one(&|top| truncate(&top.join("file"), 199_999), "size");
    one(&|top| truncate(&top.join("file"), 200_001), "size");
    let directory = after(|top| {
        fs::File::open(top.join("directory"))
            .and_then(|d| d.set_modified(std::time::UNIX_EPOCH))
            .expect("times");
    });
    assert_eq!(directory.different, 1);
    assert!(
        directory.words[0].contains("mtime_ns"),
        "{:?}",
        directory.words
    );
    if nix::unistd::geteuid().is_root() {
        one(
            &|top| chown(top.join("file"), Some(5), None).expect("chown"),
            "uid",
        );
        one(
            &|top| chown(top.join("file"), None, Some(5)).expect("chown"),
            "gid",
        );
    }
}

fn truncate(path: &Path, size: u64) {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("opened");
    file.set_len(size).expect("truncated");
}

#[test]
fn one_flipped_byte_and_a_hole_are_seen_and_counted() {
    use std::os::unix::fs::FileExt;
    for (bytes, offset, lost) in [
        (&[8_u8][..], 199_999, 200_000 - 3 * 65_536),
        (&[0; 4096][..], 65_536, 65_536),
    ] {
        let differences = after(|top| {
            let path = top.join("file");
            keeping_times(&path, || {
                let file = fs::OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .expect("opened");
                file.write_all_at(bytes, offset).expect("damaged");
            });
        });
        assert_eq!((differences.different, differences.bytes_lost), (1, lost));
        assert!(
            differences.words[0].contains("content"),
            "{:?}",
            differences.words
        );
    }
}

#[test]
fn missing_and_extra_names_are_seen() {
    let missing = after(|top| fs::remove_file(top.join("file")).expect("removed"));
    assert_eq!(
        (missing.missing, missing.extra, missing.bytes_lost),
        (1, 0, 200_000)
    );
    let extra = after(|top| {
        keeping_times(&top.join("file"), || {
            fs::write(top.join("new"), b"").expect("written");
        });
    });
    assert_eq!((extra.missing, extra.different, extra.extra), (0, 0, 1));
    assert!(extra.words[0].contains("tree/new"), "{:?}", extra.words);
    let all = after(|top| fs::remove_dir_all(top).expect("removed"));
    assert_eq!((all.missing, all.bytes_lost), (7, 200_005));
}

#[test]
fn a_hard_link_that_became_a_copy_and_a_link_to_another_file_are_seen() {
    let copied = after(|top| {
        keeping_times(&top.join("twin"), || {
            fs::remove_file(top.join("twin")).expect("removed");
            fs::write(top.join("twin"), b"other").expect("written");
        });
    });
    assert_eq!(copied.different, 2, "{:?}", copied.words);
    assert!(copied.words[0].contains("links"), "{:?}", copied.words);
}

#[test]
fn another_target_another_type_and_another_device_are_seen() {
    let target = after(|top| {
        fs::remove_file(top.join("symlink")).expect("removed");
        symlink("elsewhere", top.join("symlink")).expect("a symlink");
    });
    assert!(
        target.words.iter().any(|words| words.contains("target")),
        "{:?}",
        target.words
    );
    let kind = after(|top| {
        fs::remove_file(top.join("fifo")).expect("removed");
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&top.join("fifo"), SFlag::S_IFSOCK, mode, makedev(0, 0)).expect("a socket");
    });
    assert!(
        kind.words.iter().any(|words| words.contains("type")),
        "{:?}",
        kind.words
    );
}

#[test]
fn what_cannot_be_read_is_a_difference_and_stops_nothing() {
    let (root, manifest) = tree();
    let mut found = walk(root.path(), Path::new("tree"));
    let path = PathBytes(b"tree/file".to_vec());
    found.entries.remove(&path);
    found.unreadable.push((path, "Input/output error".into()));
    let differences = compare(&manifest.entries, &found);
    assert_eq!(
        (
            differences.different,
            differences.missing,
            differences.extra
        ),
        (1, 0, 0)
    );
    assert_eq!(differences.bytes_lost, 200_000);
}

#[test]
fn words_are_limited_and_counts_are_not() {
    let (root, mut manifest) = tree();
    let entry = manifest.entries[0].clone();
    for number in 0..50 {
        let path = PathBytes(format!("tree/not-there-{number}").into_bytes());
        manifest.entries.push(Entry {
            path,
            ..entry.clone()
        });
    }
    let differences = compare(&manifest.entries, &walk(root.path(), Path::new("tree")));
    assert_eq!(
        (differences.missing, differences.words.len()),
        (50, WORDS_MAX)
    );
}

#[test]
fn a_manifest_survives_its_file_and_a_cut_one_is_refused() {
    let (root, manifest) = tree();
    let path = root.path().join("manifest");
    manifest.save(&path).expect("saved");
    assert_eq!(Manifest::load(&path).expect("loaded"), manifest);
    let text = fs::read_to_string(&path).expect("read");
    let whole: Vec<&str> = text.lines().collect();
    for lines in [&whole[..whole.len() - 1], &whole[1..], &[]] {
        fs::write(&path, lines.join("\n")).expect("written");
        assert!(
            Manifest::load(&path).is_err(),
            "{} lines were accepted",
            lines.len()
        );
    }
    assert!(fs::metadata(&path).expect("there").size() == 0);
}
