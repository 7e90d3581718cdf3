use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt, chown};
use std::path::PathBuf;

use rustix::fs::{IFlags, XattrFlags, ioctl_setflags, lsetxattr};
use tempfile::TempDir;

use super::*;
use crate::compare::compare;
use crate::walk;

/// A directory in which a case was run; flags that would keep it from being removed are taken away.
struct Ran {
    root: TempDir,
    logs: TempDir,
    case: Case,
}

impl Drop for Ran {
    fn drop(&mut self) {
        let mut pending = vec![self.root.path().to_owned()];
        while let Some(path) = pending.pop() {
            let is_kept = fs::symlink_metadata(&path)
                .is_ok_and(|metadata| metadata.is_dir() || metadata.is_file());
            if let Ok(file) = is_kept.then(|| File::open(&path)).transpose()
                && let Some(file) = file
            {
                let _ = ioctl_setflags(&file, IFlags::empty());
            }
            let below = fs::read_dir(&path).into_iter().flatten().flatten();
            let is_directory = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
            pending.extend(
                is_directory
                    .then_some(below)
                    .into_iter()
                    .flatten()
                    .map(|e| e.path()),
            );
        }
    }
}

impl Ran {
    fn new(case: Case, is_settled: bool) -> (Self, Summary) {
        let ran = Self {
            root: tempfile::tempdir().expect("a directory"),
            logs: tempfile::tempdir().expect("a directory"),
            case,
        };
        let options = Options {
            root: ran.root.path().to_owned(),
            case,
            kinds: Vec::new(),
            regime: if is_settled {
                Regime::Settled
            } else {
                Regime::Running(ran.logs.path().to_owned())
            },
            part: Part::All,
        };
        prepare(&options.root, &case).expect("prepared");
        let summary = run(&options).expect("all operations return as they must");
        (ran, summary)
    }

    fn verdict(&self, thread: u64) -> judge::Verdict {
        let logs = self.logs.path();
        judge::judge(self.root.path(), &self.case, thread, &[], logs, Some(logs))
            .expect("a log that can be followed")
    }

    /// The paths of the first thread's regular files.
    fn files(&self) -> Vec<PathBuf> {
        let prefix = self.case.directory().join("t0");
        let tree = walk::walk(self.root.path(), &prefix);
        let files = tree.entries.values();
        files
            .filter(|entry| entry.kind == crate::manifest::Kind::File && entry.size > 0)
            .map(|entry| self.root.path().join(entry.path.as_path()))
            .collect()
    }
}

const fn case(seed: u64, length: u64, threads: u64) -> Case {
    Case {
        seed,
        length,
        threads,
    }
}

/// That the file system shows what the model says is what makes the model worth anything.
#[test]
fn a_finished_run_is_exactly_what_the_model_says() {
    for seed in 1..=12 {
        let (ran, summary) = Ran::new(case(seed, 400, 2), false);
        assert!(summary.succeeded > 600, "{summary:?}");
        for thread in 0..2 {
            let verdict = ran.verdict(thread);
            assert_eq!(verdict.differences, Vec::<String>::new(), "seed {seed}");
            assert_eq!(verdict.exact, Some(400), "seed {seed}: {verdict:?}");
        }
    }
}

#[test]
fn a_seed_reproduces_a_run_but_for_its_times() {
    let tree = |ran: &Ran| {
        let mut entries = walk::walk(ran.root.path(), &ran.case.directory()).entries;
        entries.values_mut().for_each(|entry| entry.mtime_ns = 0);
        entries
    };
    let (first, summary) = Ran::new(case(5, 300, 1), true);
    let (second, again) = Ran::new(case(5, 300, 1), true);
    assert_eq!(summary, again);
    assert_eq!(tree(&first), tree(&second));
    let (other, _) = Ran::new(case(6, 300, 1), true);
    assert_ne!(
        tree(&first)
            .into_values()
            .map(|e| e.crc32c)
            .collect::<Vec<_>>(),
        tree(&other)
            .into_values()
            .map(|e| e.crc32c)
            .collect::<Vec<_>>()
    );
}

type Damage = fn(&std::path::Path);

const DAMAGES: [(&str, Damage); 7] = [
    ("a byte", |path| {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.expect("opened");
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).expect("read");
        file.write_all_at(&[!byte[0]], 0).expect("written");
    }),
    ("a size", |path| {
        let file = OpenOptions::new().write(true).open(path).expect("opened");
        let bytes = file.metadata().expect("metadata").len();
        file.set_len(bytes + 1).expect("resized");
    }),
    ("a mode", |path| {
        let mode = fs::metadata(path).expect("metadata").permissions().mode();
        fs::set_permissions(path, PermissionsExt::from_mode(mode ^ 0o001)).expect("changed");
    }),
    ("an owner", |path| {
        chown(path, Some(77), None).expect("changed");
    }),
    ("an attribute", |path| {
        lsetxattr(path, "user.one", b"damage", XattrFlags::empty()).expect("set");
    }),
    ("a name", |path| {
        fs::rename(path, path.with_file_name("moved-away")).expect("moved");
    }),
    ("a link", |path| {
        fs::hard_link(path, path.with_file_name("linked")).expect("linked");
    }),
];

#[test]
fn damage_is_seen_by_the_manifest() {
    for (what, damage) in DAMAGES {
        let (ran, _) = Ran::new(case(3, 150, 2), true);
        let prefix = ran.case.directory();
        let manifest = walk::describe(ran.root.path(), &prefix).expect("described");
        let differences = || compare(&manifest.entries, &walk::walk(ran.root.path(), &prefix));
        assert!(differences().none());
        damage(ran.files().first().expect("a file"));
        assert!(!differences().none(), "{what} is not seen");
    }
}

#[test]
fn damage_is_seen_by_the_judge() {
    for (what, damage) in DAMAGES {
        let (ran, _) = Ran::new(case(3, 150, 1), false);
        assert!(ran.verdict(0).differences.is_empty());
        damage(ran.files().first().expect("a file"));
        let verdict = ran.verdict(0);
        assert!(
            !verdict.differences.is_empty(),
            "{what} is not seen: {verdict:?}"
        );
    }
}

#[test]
fn a_tree_that_ends_earlier_is_accepted_down_to_the_floor_and_no_further() {
    let (ran, _) = Ran::new(case(9, 200, 1), false);
    // The log of a run that went on for longer than the tree that is there.
    let (longer, _) = Ran::new(case(9, 260, 1), false);
    let judged = |floor: &Ran| {
        let logs = tempfile::tempdir().expect("a directory");
        let case = longer.case;
        let name = |case: &Case| format!("{case}.t0");
        let from = longer.logs.path().join(name(&case));
        fs::copy(&from, logs.path().join(name(&case))).expect("copied");
        let mirrored = tempfile::tempdir().expect("a directory");
        let from = floor.logs.path().join(name(&floor.case));
        fs::copy(&from, mirrored.path().join(name(&case))).expect("copied");
        let top = ran.root.path().join(PREFIX);
        let there = top.join(case.to_string());
        if !there.exists() {
            fs::rename(top.join(ran.case.to_string()), there).expect("renamed");
        }
        let kinds = [];
        judge::judge(
            ran.root.path(),
            &case,
            0,
            &kinds,
            logs.path(),
            Some(mirrored.path()),
        )
        .expect("judged")
    };
    let (short, _) = Ran::new(case(9, 150, 1), false);
    let accepted = judged(&short);
    // Nothing was confirmed after the tree's end, or the floor would be higher.
    if accepted.floor <= 200 {
        assert_eq!(accepted.differences, Vec::<String>::new(), "{accepted:?}");
        assert!(
            accepted.exact.is_some_and(|exact| exact >= 200),
            "{accepted:?}"
        );
    }
    let refused = judged(&longer);
    assert_eq!(refused.floor, 260);
    assert!(!refused.differences.is_empty(), "{refused:?}");
}
