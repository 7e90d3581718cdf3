use std::fs;

use super::*;
use crate::compare::compare;
use crate::walk::walk;

/// A small tree with every kind of thing the copy takes.
fn source() -> tempfile::TempDir {
    let source = tempfile::tempdir().expect("a directory");
    for directory in 0..12 {
        let path = source.path().join(format!("directory-{directory}/inner"));
        fs::create_dir_all(&path).expect("a directory");
        for file in 0..30 {
            let len = (directory * 1_709 + file * 977) % 40_000;
            fs::write(path.join(format!("file-{file}")), vec![file as u8; len]).expect("a file");
        }
        std::os::unix::fs::symlink("inner/file-1", path.join("link")).expect("a symlink");
    }
    source
}

#[test]
fn two_runs_make_the_same_tree_and_every_kind_of_change() {
    let source = source();
    let roots = [
        tempfile::tempdir().expect("a root"),
        tempfile::tempdir().expect("a root"),
    ];
    let run = |root: &tempfile::TempDir| run(root.path(), source.path(), 250).expect("a run");
    let [(summary, first), (_, second)] = roots.each_ref().map(run);
    assert!(
        (250..=360).contains(&summary.files_copied),
        "{}",
        summary.files_copied
    );
    for (what, times) in &summary.changes {
        assert!(*times > 0, "{what} never happened");
    }
    assert!(summary.changes.len() >= 22, "{:?}", summary.changes);
    let contents = |manifest: &Manifest| -> Vec<_> {
        let entries = manifest.entries.iter();
        entries
            .map(|entry| (entry.path.clone(), entry.crc32c, entry.mode, entry.uid))
            .collect()
    };
    assert_eq!(contents(&first), contents(&second));
}

#[test]
fn the_manifest_describes_the_tree_that_is_there() {
    let source = source();
    let root = tempfile::tempdir().expect("a root");
    let (_, manifest) = run(root.path(), source.path(), 250).expect("a run");
    let differences = compare(&manifest.entries, &walk(root.path(), Path::new(PREFIX)));
    assert!(differences.none(), "{:?}", differences.words);
    assert!(manifest.entries.len() > 300);
}

#[test]
fn a_source_with_too_little_is_refused_before_anything_is_written() {
    let source = source();
    let root = tempfile::tempdir().expect("a root");
    let error = run(root.path(), source.path(), 2_000).expect_err("too few files");
    assert!(error.to_string().contains("are needed"), "{error}");
    assert!(!root.path().join(PREFIX).exists());
}
