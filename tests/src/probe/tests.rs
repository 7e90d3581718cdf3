use super::*;
use crate::walk;

/// Every probe on the file system of the temporary directory: it must be possible there, or say that it is
/// not, and change what a survivor would be compared by.
#[test]
fn every_probe_changes_what_is_compared() {
    let root = tempfile::tempdir().expect("a directory");
    let mut done = 0;
    // One lowers a limit of its process, in which other tests write unless each has one of its own.
    let alone = std::env::var_os("NEXTEST").is_some();
    let is_chosen = |probe: &&&Probe| alone || probe.name != "write-over-the-size-limit";
    for probe in all().filter(|probe| is_chosen(&probe)) {
        let directory = root.path().join(probe.name);
        assert_eq!(
            probe.run(Stage::Prepare, &directory).expect("prepared"),
            Outcome::Done
        );
        let before = walk::describe(root.path(), probe.name.as_ref()).expect("described");
        let outcome = probe.run(Stage::Act, &directory).expect(probe.name);
        let after = walk::describe(root.path(), probe.name.as_ref()).expect("described");
        if outcome == Outcome::Done {
            assert_ne!(
                before.entries, after.entries,
                "{} changes nothing",
                probe.name
            );
            done += 1;
        } else {
            assert_eq!(before.entries, after.entries, "{}: {outcome:?}", probe.name);
        }
        release(&directory);
    }
    assert!(done >= 60, "only {done} probes could be carried out");
}

#[test]
fn names_are_unique() {
    let names: std::collections::BTreeSet<_> = all().map(|probe| probe.name).collect();
    assert_eq!(names.len(), all().count());
    assert!(DURABLE.iter().all(|name| names.contains(name)));
    assert!(find("write").is_some() && find("nothing").is_none());
}

/// Flags that would keep the directory from being removed.
fn release(directory: &Path) {
    if let Ok(file) = File::open(directory.join(BASE)) {
        let _ = rustix::fs::ioctl_setflags(&file, rustix::fs::IFlags::empty());
    }
}
