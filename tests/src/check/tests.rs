use std::os::unix::fs::FileExt;

use tempfile::TempDir;

use super::*;
use crate::settled;
use crate::stream::write::{Options, run as run_stream};

/// Spoils a volume.
type Damage = fn(&Path);

struct Lab {
    volume: TempDir,
    outside: TempDir,
}

const OPERATIONS: u64 = 800;

impl Lab {
    /// A volume with all three workloads on it.
    fn new() -> Self {
        let (volume, outside, source) = (
            tempfile::tempdir().expect("one"),
            tempfile::tempdir().expect("two"),
            tempfile::tempdir().expect("three"),
        );
        for number in 0..200 {
            let path = source.path().join(format!("{}/{number}", number % 9));
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, vec![number as u8; number * 41]).expect("a file");
        }
        let lab = Self { volume, outside };
        fs::create_dir(lab.root().join(AGENT_DIRECTORY)).expect("a directory");
        fs::create_dir(lab.root().join(LOST_AND_FOUND)).expect("a directory");
        let (_, settled) = settled::run(lab.root(), source.path(), 150).expect("settled");
        settled
            .save(&lab.outside.path().join("settled"))
            .expect("saved");
        let database = sqlite::run(lab.root(), 300, 10).expect("a database");
        database
            .save(&lab.outside.path().join("sqlite"))
            .expect("saved");
        let options = Options {
            seed: 5,
            time_limit: None,
            operations_max: Some(OPERATIONS),
            operations_per_second: 0,
            buffered_max: 1,
            confirm_every: None,
        };
        run_stream(lab.root(), &lab.outside.path().join("stream"), &options).expect("a stream");
        lab
    }

    fn root(&self) -> &Path {
        self.volume.path()
    }

    fn check(&self) -> Report {
        let at = |name: &str| self.outside.path().join(name);
        let expectations = Expectations {
            manifests: vec![at("settled"), at("sqlite")],
            stream_log: Some(at("stream")),
            last_operation: Some(OPERATIONS),
        };
        check(self.root(), &expectations).expect("a report")
    }
}

#[test]
fn an_untouched_volume_passes() {
    let report = Lab::new().check();
    assert!(report.pass, "{report:?}");
    assert!(report.files_expected > 200 && report.sqlite_rows_expected > 200);
    assert_eq!(report.sqlite_rows_found, report.sqlite_rows_expected);
    assert_eq!(
        (report.stream_prefix, report.tail_operations_lost),
        (OPERATIONS, 0)
    );
    assert_eq!(report.stream_operations_acknowledged, OPERATIONS);
    assert_eq!(report.sqlite_integrity, "ok");
}

#[test]
fn an_empty_volume_fails_with_everything_lost() {
    let lab = Lab::new();
    for name in [settled::PREFIX, sqlite::PREFIX, stream::PREFIX] {
        fs::remove_dir_all(lab.root().join(name)).expect("removed");
    }
    let report = lab.check();
    assert!(!report.pass);
    assert_eq!(report.files_missing, report.files_expected);
    assert_eq!((report.sqlite_rows_found, report.stream_prefix), (0, 0));
    assert_eq!(report.tail_operations_lost, OPERATIONS);
    assert!(report.bytes_lost > 0);
}

#[test]
fn each_part_fails_the_check_by_itself() {
    let damages: [(&str, Damage); 5] = [
        ("a lost file", |root| {
            let manifest = walk(root, Path::new(settled::PREFIX));
            let file = manifest
                .entries
                .values()
                .find(|entry| entry.crc32c.is_some());
            fs::remove_file(root.join(file.expect("a file").path.as_path())).expect("removed");
        }),
        ("a name nobody made", |root| {
            fs::write(root.join("foreign"), b"").expect("written");
        }),
        ("something in lost+found", |root| {
            fs::write(root.join(LOST_AND_FOUND).join("#12"), b"").expect("written");
        }),
        ("a damaged database", |root| {
            let path = root.join(sqlite::DATABASE);
            let file = fs::OpenOptions::new()
                .write(true)
                .open(path)
                .expect("opened");
            file.write_all_at(&[0xff; 64], 5_000).expect("damaged");
        }),
        ("a lost operation", |root| {
            let slots = root.join("stream/d0/slots");
            fs::File::create(slots).expect("emptied");
        }),
    ];
    for (what, damage) in damages {
        let lab = Lab::new();
        damage(lab.root());
        let report = lab.check();
        assert!(!report.pass, "{what}: {report:?}");
    }
}

#[test]
fn a_lost_tail_passes_unless_it_was_expected() {
    let lab = Lab::new();
    let log = lab.outside.path().join("stream");
    fs::remove_dir_all(lab.root().join(stream::PREFIX)).expect("removed");
    let fresh = lab.outside.path().join("other-log");
    let options = Options {
        seed: 5,
        time_limit: None,
        operations_max: Some(OPERATIONS - 60),
        operations_per_second: 0,
        buffered_max: 1,
        confirm_every: None,
    };
    run_stream(lab.root(), &fresh, &options).expect("a stream");
    let mut expectations = Expectations {
        manifests: Vec::new(),
        stream_log: Some(log),
        last_operation: None,
    };
    expectations
        .manifests
        .push(lab.outside.path().join("settled"));
    expectations
        .manifests
        .push(lab.outside.path().join("sqlite"));
    let report = check(lab.root(), &expectations).expect("a report");
    assert!(report.pass, "{report:?}");
    assert!(
        (50..=60).contains(&report.tail_operations_lost),
        "{report:?}"
    );
    expectations.last_operation = Some(OPERATIONS - 40);
    assert!(!check(lab.root(), &expectations).expect("a report").pass);
    expectations.last_operation = Some(OPERATIONS - 60);
    assert!(check(lab.root(), &expectations).expect("a report").pass);
}
