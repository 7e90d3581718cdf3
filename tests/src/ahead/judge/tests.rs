use super::*;

const SEED: u64 = 5;

struct Bench {
    root: tempfile::TempDir,
}

impl Bench {
    /// A log, and a file of blocks in these versions.
    fn new(log: &str, shown: &[u64]) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::write(root.path().join("log"), log).expect("a log");
        let mut bytes = Vec::new();
        for cell in 0..blocks::BLOCKS {
            let version = shown.get(cell as usize).copied().unwrap_or(0);
            bytes.extend(super::super::sector::block(SEED, cell, 0, version));
        }
        std::fs::write(blocks::path(root.path()), bytes).expect("a file");
        Self { root }
    }

    fn judge(&self, older_mirrored: bool) -> Report {
        let log = self.root.path().join("log");
        judge(Case::Fsync, self.root.path(), &log, SEED, older_mirrored).expect("a judgement")
    }
}

const LOG: &str = "try 1 0\ntry 2 1\nready\ntry 3 0\nown 3\ntry 4 0\n";

#[test]
fn what_was_confirmed_or_tried_later_passes() {
    for first in [3, 4] {
        let report = Bench::new(LOG, &[first, 2]).judge(true);
        assert!(report.pass, "{report:?}");
        assert_eq!((report.confirmations, report.tried), (1, 4));
    }
    assert!(Bench::new(LOG, &[3, 0]).judge(false).pass);
}

#[test]
fn a_reverted_block_a_lost_one_and_a_foreign_one_are_seen() {
    for first in [0, 1, 2, 9] {
        let report = Bench::new(LOG, &[first, 2]).judge(false);
        assert_eq!((report.pass, report.confirmed_lost), (false, 1), "{first}");
    }
    let report = Bench::new(LOG, &[3, 0]).judge(true);
    assert_eq!((report.pass, report.mirrored_lost), (false, 1));
    let bench = Bench::new(LOG, &[3, 2]);
    std::fs::remove_file(blocks::path(bench.root.path())).expect("removal");
    assert_eq!(bench.judge(true).confirmed_lost, 1);
    assert_eq!(bench.judge(true).mirrored_lost, 1);
}

/// A run whose only file has this content.
fn replaced(log: &str, content: &[u8]) -> Report {
    let root = tempfile::tempdir().expect("a directory");
    let path = root.path().join("log");
    std::fs::write(&path, log).expect("a log");
    std::fs::write(replaced::path(root.path(), 0), content).expect("a file");
    judge(Case::Rename, root.path(), &path, SEED, true).expect("a judgement")
}

#[test]
fn only_a_version_that_nobody_had_made_durable_may_be_there_in_part() {
    let log = "try 1 0\nready\ntry 2 0\nown 2\nloose 3 0\ntry 4 0\n";
    let of = |version| {
        let places = 0..replaced::BLOCKS_EACH;
        let blocks = places.map(|place| super::super::sector::block(SEED, 0, place, version));
        blocks.flatten().collect::<Vec<u8>>()
    };
    let begun = |version| of(version)[..BLOCK_BYTES].to_vec();
    let hollow = |version| {
        let mut bytes = of(version);
        bytes[..BLOCK_BYTES].fill(0);
        bytes
    };
    for good in [of(2), of(3), of(4), begun(3), hollow(3), vec![]] {
        assert!(replaced(log, &good).pass);
    }
    for bad in [
        of(1),
        begun(2),
        begun(4),
        hollow(4),
        [of(3), of(3)].concat(),
    ] {
        assert_eq!(replaced(log, &bad).confirmed_lost, 1);
    }
    let mixed = [begun(3), of(4)[BLOCK_BYTES..].to_vec()].concat();
    assert_eq!(replaced(log, &mixed).confirmed_lost, 1);
    // What came after it was made durable.
    let later = format!("{log}own 4\n");
    assert_eq!(replaced(&later, &[]).confirmed_lost, 1);
    assert!(replaced(&later, &of(4)).pass);
    // Before anything was confirmed: what was mirrored, unless it was given up.
    let early = "try 1 0\nready\n";
    assert_eq!(replaced(early, &[]).mirrored_lost, 1);
    assert!(replaced(&format!("{early}loose 2 0\n"), &[]).pass);
}

fn rows(log: &str, rows: Result<Vec<(u32, u64)>, String>) -> Report {
    let root = tempfile::tempdir().expect("a directory");
    let path = root.path().join("log");
    std::fs::write(&path, log).expect("a log");
    let history = History::load(&path).expect("a history");
    let mut report = Report::default();
    report.hold_rows(&history, rows, false);
    report
}

#[test]
fn rows_of_half_a_transaction_are_seen() {
    let log = "try 1 0,1\nready\ntry 2 0,1\nall 2\ntry 3 0,2\n";
    let lost = |found: &[(u32, u64)]| rows(log, Ok(found.to_vec())).confirmed_lost;
    assert_eq!(lost(&[(0, 2), (1, 2), (2, 0)]), 0);
    assert_eq!(lost(&[(0, 3), (1, 2), (2, 3)]), 0);
    // Transaction 3 in half, 2 reverted, a row gone.
    assert_eq!(lost(&[(0, 3), (1, 2), (2, 0)]), 1);
    assert_eq!(lost(&[(0, 1), (1, 1), (2, 0)]), 2);
    assert_eq!(lost(&[(0, 2), (2, 0)]), 1);
    assert_eq!(rows(log, Err("damaged".into())).confirmed_lost, 1);
    // Nothing was confirmed, nothing is owed.
    let careless = "try 1 0,1\nready\ntry 2 0,1\n";
    assert_eq!(rows(careless, Err("damaged".into())).confirmed_lost, 0);
}
