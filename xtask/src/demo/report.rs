//! The figures, the verdict and the words. Field names are part of the interface.
//!
//! What was not measured is absent (`null`), and its absence is a failure.

use clap::ValueEnum as _;
use serde::Serialize;

use super::Plan;
use super::timeline::{self, Moment};
use super::workload::Checked;
use crate::lab::{Filesystem, KernelRelease, LinkKind};

/// Everything a demo found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether every one of the demo's claims was shown.
    pub pass: bool,
    /// The claims that were not, in words.
    pub failures: Vec<String>,
    /// What stopped the demo before its end.
    pub error: Option<String>,
    /// Files, directories and the like that A's applications left before the crash.
    pub files_expected: Option<u64>,
    /// Whether the whole check on B found no difference, with mirroring.
    pub check_pass_with: Option<bool>,
    /// How many of them were missing or different without mirroring.
    pub files_lost_without: Option<u64>,
    /// And with it.
    pub files_lost_with: Option<u64>,
    /// Names with mirroring that nobody made.
    pub names_extra_with: Option<u64>,
    /// Content bytes that were missing or wrong without mirroring, in blocks of 64 KiB.
    pub bytes_lost_without: Option<u64>,
    /// And with it.
    pub bytes_lost_with: Option<u64>,
    /// The first differences with mirroring, in words.
    pub differences_with: Vec<String>,
    /// Rows that the database's commits left.
    pub sqlite_rows_expected: Option<u64>,
    /// Rows found with mirroring.
    pub sqlite_rows_found: Option<u64>,
    /// Rows found without.
    pub sqlite_rows_found_without: Option<u64>,
    /// Whether the rows with mirroring are the expected ones, byte for byte.
    pub sqlite_rows_match: Option<bool>,
    /// What SQLite says of the database with mirroring.
    pub sqlite_integrity: Option<String>,
    /// What it says of it without.
    pub sqlite_integrity_without: Option<String>,
    /// Operations of the stream that had returned at the crash, as far as noted.
    pub stream_operations_acknowledged: Option<u64>,
    /// The same without mirroring.
    pub stream_operations_acknowledged_without: Option<u64>,
    /// Operations of the stream that were in the region.
    pub stream_operations_in_region: Option<u64>,
    /// What A's agent said of epochs that ended before the crash: none should, and the region's last
    /// record then no longer says which operations were in it.
    pub epochs_ended: Vec<String>,
    /// Operations of the stream that are there without a hole.
    pub stream_operations_found: Option<u64>,
    /// Acknowledged operations, one record each, after the last that is there.
    pub tail_records_lost: Option<u64>,
    /// The same without mirroring.
    pub tail_records_lost_without: Option<u64>,
    /// What of the stream no operation explains, with mirroring.
    pub stream_damage: Vec<String>,
    /// The peak of the lag in the owner's metrics right before the crash, records.
    pub lag_records_exported: Option<u64>,
    /// Records of the region that B merged.
    pub records_replayed: Option<u64>,
    /// The volume's protection right before the crash.
    pub protection_at_crash: Option<String>,
    /// From the crash until B held A for dead.
    pub detect_ms: Option<i64>,
    /// From the crash until B served, both stamped on the host.
    pub takeover_ms: Option<i64>,
    /// What happened when.
    pub timeline: Vec<Moment>,
    /// `clean`, or what the file system's own check said after the mirrored run.
    pub filesystem_check: Option<String>,
    /// The machines' kernel.
    pub kernel: KernelRelease,
    /// The volume's file system.
    pub fs: Filesystem,
    /// How A died.
    pub crash: String,
    /// The link that was asked for.
    pub link_asked: LinkKind,
    /// The link that the owner's agent reported.
    pub link: Option<LinkKind>,
    /// Whether the owner's agent sent the ring's bytes without a copy.
    pub zero_copy: Option<bool>,
}

impl Report {
    pub(super) fn new(plan: &Plan) -> Self {
        let crash = plan.crash.to_possible_value();
        Self {
            pass: false,
            failures: Vec::new(),
            error: None,
            files_expected: None,
            check_pass_with: None,
            files_lost_without: None,
            files_lost_with: None,
            names_extra_with: None,
            bytes_lost_without: None,
            bytes_lost_with: None,
            differences_with: Vec::new(),
            sqlite_rows_expected: None,
            sqlite_rows_found: None,
            sqlite_rows_found_without: None,
            sqlite_rows_match: None,
            sqlite_integrity: None,
            sqlite_integrity_without: None,
            stream_operations_acknowledged: None,
            stream_operations_acknowledged_without: None,
            stream_operations_in_region: None,
            epochs_ended: Vec::new(),
            stream_operations_found: None,
            tail_records_lost: None,
            tail_records_lost_without: None,
            stream_damage: Vec::new(),
            lag_records_exported: None,
            records_replayed: None,
            protection_at_crash: None,
            detect_ms: None,
            takeover_ms: None,
            timeline: Vec::new(),
            filesystem_check: None,
            kernel: plan.kernel,
            fs: plan.filesystem,
            crash: crash.map_or_else(String::new, |value| value.get_name().to_owned()),
            link_asked: plan.link,
            link: None,
            zero_copy: None,
        }
    }

    pub(super) fn took_over(&mut self, moments: Vec<Moment>) {
        let after = |what| moments.iter().find(|m| m.what == what).map(|m| m.after_ms);
        self.detect_ms = after("detected");
        self.takeover_ms = after("serving");
        self.timeline = moments;
    }

    pub(super) fn with_mirror(&mut self, checked: &Checked) {
        self.files_expected = Some(checked.files_expected);
        self.check_pass_with = Some(checked.pass);
        self.files_lost_with = Some(checked.files_lost());
        self.names_extra_with = Some(checked.names_extra);
        self.bytes_lost_with = Some(checked.bytes_lost);
        self.differences_with.clone_from(&checked.differences);
        self.sqlite_rows_expected = Some(checked.sqlite_rows_expected);
        self.sqlite_rows_found = Some(checked.sqlite_rows_found);
        self.sqlite_rows_match = Some(checked.sqlite_rows_match);
        self.sqlite_integrity = Some(checked.sqlite_integrity.clone());
        self.stream_operations_acknowledged = Some(checked.stream_operations_acknowledged);
        self.stream_operations_found = Some(checked.stream_prefix);
        self.tail_records_lost = Some(checked.tail_operations_lost);
        self.stream_damage.clone_from(&checked.stream_damage);
    }

    pub(super) fn without_mirror(&mut self, checked: &Checked) {
        self.files_lost_without = Some(checked.files_lost());
        self.bytes_lost_without = Some(checked.bytes_lost);
        self.sqlite_rows_found_without = Some(checked.sqlite_rows_found);
        self.sqlite_integrity_without = Some(checked.sqlite_integrity.clone());
        self.stream_operations_acknowledged_without = Some(checked.stream_operations_acknowledged);
        self.tail_records_lost_without = Some(checked.tail_operations_lost);
    }

    /// Decides `pass`.
    pub(super) fn judge(&mut self) {
        let mut failures: Vec<String> = self.error.iter().cloned().collect();
        if self.error.is_none() {
            failures.extend(
                self.claims()
                    .into_iter()
                    .filter(|(holds, _)| !holds)
                    .map(|(_, what)| what.to_owned()),
            );
            let ended = self.epochs_ended.iter();
            failures.extend(ended.map(|said| format!("an epoch ended before the crash: {said}")));
        }
        self.pass = failures.is_empty();
        self.failures = failures;
    }

    fn claims(&self) -> [(bool, &'static str); 14] {
        let bounded = matches!(
            (self.tail_records_lost, self.lag_records_exported),
            (Some(lost), Some(exported)) if lost <= exported
        );
        let up_to_the_cut = matches!(
            (self.stream_operations_found, self.stream_operations_in_region),
            (Some(found), Some(in_region)) if in_region > 0 && found >= in_region
        );
        [
            (
                self.files_lost_without.is_some_and(|lost| lost > 0),
                "without mirroring the crash lost no file, so it proves nothing",
            ),
            (
                self.files_expected
                    .is_some_and(|expected| expected >= 2_000),
                "fewer than 2,000 files were expected",
            ),
            (
                self.files_lost_with == Some(0),
                "with mirroring files were lost",
            ),
            (
                self.names_extra_with == Some(0),
                "with mirroring there are names that nobody made",
            ),
            (
                self.bytes_lost_with == Some(0),
                "with mirroring bytes were lost",
            ),
            (
                self.sqlite_rows_match == Some(true)
                    && self.sqlite_rows_found == self.sqlite_rows_expected
                    && self.sqlite_integrity.as_deref() == Some("ok"),
                "the database is not what its commits left",
            ),
            (
                self.stream_damage.is_empty(),
                "the stream's files hold what no operation explains",
            ),
            (
                up_to_the_cut,
                "an operation of the stream that was in the region is not there",
            ),
            (
                self.check_pass_with == Some(true),
                "the check of B's volume found a difference",
            ),
            (bounded, "the lost tail is longer than the exported lag"),
            (
                self.records_replayed.is_some_and(|records| records > 0),
                "nothing was replayed",
            ),
            (
                self.protection_at_crash.as_deref() == Some("protected"),
                "the volume was not protected at the crash",
            ),
            (
                self.link == Some(self.link_asked),
                "the link is not the one that was asked for",
            ),
            (
                self.filesystem_check.as_deref() == Some("clean"),
                "the file system's own check found something",
            ),
        ]
    }

    /// Timeline, table and verdict for a person.
    #[must_use]
    pub fn told(&self) -> String {
        let mut text = String::new();
        if !self.timeline.is_empty() {
            text += &format!("\nTimeline\n{}\n", timeline::told(&self.timeline));
        }
        text += &format!("\n{}\n", self.table());
        text += &format!(
            "Right before the crash A exported: {}, at most {} records not yet mirrored. B merged {} records.\n",
            self.protection_at_crash.as_deref().unwrap_or("-"),
            number(self.lag_records_exported),
            number(self.records_replayed),
        );
        text += &format!(
            "{}, kernel {}, link {} ({}), crash by {}.\n",
            self.fs,
            self.kernel,
            self.link
                .map_or_else(|| "-".to_owned(), |link| link.to_string()),
            match self.zero_copy {
                Some(true) => "no byte copied by A's agent",
                Some(false) => "one copy by A's agent",
                None => "copies unknown",
            },
            self.crash
        );
        for what in &self.failures {
            text += &format!("FAILED: {what}\n");
        }
        for what in self.differences_with.iter().chain(&self.stream_damage) {
            text += &format!("  {what}\n");
        }
        if self.pass {
            text += "Passed: what A's applications were told was written is there.";
        }
        text
    }

    fn table(&self) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        table.set_header(["after the crash, B has", "without", "with"]);
        let lost_of = |lost| format!("{} of {}", number(lost), number(self.files_expected));
        let rows_of = |rows| format!("{} of {}", number(rows), number(self.sqlite_rows_expected));
        let word = |text: &Option<String>| match text {
            Some(text) => text
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(44)
                .collect(),
            None => "-".to_owned(),
        };
        table.add_row([
            "files lost or damaged".to_owned(),
            lost_of(self.files_lost_without),
            lost_of(self.files_lost_with),
        ]);
        table.add_row([
            "file content lost, bytes".to_owned(),
            number(self.bytes_lost_without),
            number(self.bytes_lost_with),
        ]);
        table.add_row([
            "database rows".to_owned(),
            rows_of(self.sqlite_rows_found_without),
            rows_of(self.sqlite_rows_found),
        ]);
        table.add_row([
            "database integrity".to_owned(),
            word(&self.sqlite_integrity_without),
            word(&self.sqlite_integrity),
        ]);
        table.add_row([
            "second writer: last operations lost".to_owned(),
            format!(
                "{} of {}",
                number(self.tail_records_lost_without),
                number(self.stream_operations_acknowledged_without)
            ),
            format!(
                "{} of {}",
                number(self.tail_records_lost),
                number(self.stream_operations_acknowledged)
            ),
        ]);
        table
    }
}

fn number(value: Option<u64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::Report;
    use crate::demo::Plan;
    use crate::lab::{CrashKind, Filesystem, KernelRelease, LinkKind, Programs};

    /// Breaks one claim.
    type Break = fn(&mut Report);

    fn passing() -> Report {
        let plan = Plan {
            lab: "demo".to_owned(),
            crash: CrashKind::Kill,
            filesystem: Filesystem::Ext4,
            kernel: KernelRelease::V6_12,
            link: LinkKind::Rdma,
            programs: Programs::AsBuilt,
            keep: false,
        };
        Report {
            files_expected: Some(2_800),
            check_pass_with: Some(true),
            files_lost_without: Some(1),
            files_lost_with: Some(0),
            names_extra_with: Some(0),
            bytes_lost_with: Some(0),
            sqlite_rows_expected: Some(900),
            sqlite_rows_found: Some(900),
            sqlite_rows_match: Some(true),
            sqlite_integrity: Some("ok".to_owned()),
            stream_operations_in_region: Some(40),
            stream_operations_found: Some(40),
            tail_records_lost: Some(3),
            lag_records_exported: Some(3),
            records_replayed: Some(1),
            protection_at_crash: Some("protected".to_owned()),
            filesystem_check: Some("clean".to_owned()),
            link: Some(LinkKind::Rdma),
            ..Report::new(&plan)
        }
    }

    #[test]
    fn every_claim_counts_by_itself() {
        let mut report = passing();
        report.judge();
        assert!(report.pass, "{:?}", report.failures);
        let breaks: [Break; 20] = [
            |r| r.error = Some("it stopped".to_owned()),
            |r| r.files_lost_without = Some(0),
            |r| r.files_lost_without = None,
            |r| r.files_expected = Some(1_999),
            |r| r.files_lost_with = Some(1),
            |r| r.files_lost_with = None,
            |r| r.names_extra_with = Some(1),
            |r| r.bytes_lost_with = Some(1),
            |r| r.check_pass_with = Some(false),
            |r| r.sqlite_rows_found = Some(899),
            |r| r.sqlite_rows_match = Some(false),
            |r| r.sqlite_integrity = Some("row 7 missing".to_owned()),
            |r| r.stream_damage.push("a block".to_owned()),
            |r| r.stream_operations_found = Some(39),
            |r| r.tail_records_lost = Some(4),
            |r| r.lag_records_exported = None,
            |r| r.records_replayed = Some(0),
            |r| r.protection_at_crash = Some("exposed".to_owned()),
            |r| r.link = Some(LinkKind::Tcp),
            |r| r.filesystem_check = Some("exit status: 4".to_owned()),
        ];
        for (index, break_it) in breaks.iter().enumerate() {
            let mut report = passing();
            break_it(&mut report);
            report.judge();
            assert!(!report.pass, "break {index} passes");
            assert_eq!(report.failures.len(), 1, "{:?}", report.failures);
        }
    }
}
