//! The table of faults: one row for each, kept as JSON and written out as a page.
//!
//! Every figure in it comes from a run; a fault that was not run has no row.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{json_file, paths};

const HEAD: &str = include_str!("head.md");

/// What a run found of one fault.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The fault, in words.
    pub fault: String,
    /// How it was injected.
    pub how: String,
    /// The event that told it, and where; `nothing` where nothing is weakened.
    pub told_by: String,
    /// How long after the injection.
    pub detected_ms: Option<u64>,
    /// Within what it must be told.
    pub limit_ms: u64,
    /// The volume's protection as shown then.
    pub state: String,
    /// The words with it.
    pub reason: String,
    /// What came after: a power cut, the fence, or that it healed.
    pub ending: String,
    /// How often the writer was told that something is durable.
    pub confirmations: Option<u64>,
    /// Bytes of that which the survivor's volume does not show.
    pub confirmed_bytes_lost: Option<u64>,
    /// Records that were acknowledged, never confirmed, and are not there.
    pub unconfirmed_records_lost: Option<u64>,
    /// Records that the owner last said were captured and not mirrored.
    pub lag_records: Option<u64>,
    /// Kernel and file system of the machines.
    pub machines: String,
    /// When it was run.
    pub run_at: String,
}

/// All rows, by the fault's name.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Table(BTreeMap<String, Row>);

impl Table {
    fn json_path() -> PathBuf {
        paths::root().join("docs/faults.json")
    }

    /// What earlier runs wrote; empty if there was none.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn load() -> Result<Self> {
        json_file::load(&Self::json_path())
    }

    /// Takes a row, in place of an earlier run's.
    pub fn put(&mut self, name: &str, row: Row) {
        self.0.insert(name.to_owned(), row);
    }

    /// Writes `docs/faults.json` and `docs/faults.md`: the rows in the order of `names`, those of faults
    /// that are gone left out.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&mut self, names: &[&str]) -> Result<()> {
        self.0.retain(|name, _| names.contains(&name.as_str()));
        let json = serde_json::to_string_pretty(&self.0)? + "\n";
        fs::write(Self::json_path(), json)?;
        fs::write(paths::root().join("docs/faults.md"), self.page(names))?;
        Ok(())
    }

    fn page(&self, names: &[&str]) -> String {
        let mut page = HEAD.to_owned();
        let rows: Vec<&Row> = names.iter().filter_map(|name| self.0.get(*name)).collect();
        let _ = writeln!(page, "{} faults.\n", rows.len());
        page.push_str(
            "| fault | how it is injected | told after (limit) | by | state shown, reason | then | confirmed \
             bytes lost | unconfirmed records lost | last lag, records |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for row in rows {
            let _ = writeln!(page, "{}", row.line());
        }
        page
    }
}

impl Row {
    fn line(&self) -> String {
        let number = |number: Option<u64>| number.map_or("-".to_owned(), |n| n.to_string());
        let seconds = |ms: u64| format!("{}.{:01} s", ms / 1000, ms % 1000 / 100);
        let told = match self.detected_ms {
            Some(ms) => format!("{} ({} s)", seconds(ms), self.limit_ms / 1000),
            None => "-".to_owned(),
        };
        let shown = match self.reason.as_str() {
            "" => format!("`{}`", self.state),
            reason => format!("`{}`: {}", self.state, cell(reason)),
        };
        let confirmed = match (self.confirmed_bytes_lost, self.confirmations) {
            (Some(lost), Some(of)) => format!("{lost} (of {of} confirmations)"),
            _ => "-".to_owned(),
        };
        format!(
            "| {} | {} | {told} | {} | {shown} | {} | {confirmed} | {} | {} |",
            cell(&self.fault),
            cell(&self.how),
            cell(&self.told_by),
            cell(&self.ending),
            number(self.unconfirmed_records_lost),
            number(self.lag_records)
        )
    }
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
        .replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_the_order_of_the_list_and_gone_ones_are_left_out() {
        let row = |fault: &str| Row {
            fault: fault.to_owned(),
            reason: "a | b\nc".to_owned(),
            state: "exposed".to_owned(),
            detected_ms: Some(1234),
            limit_ms: 8000,
            ..Row::default()
        };
        let mut table = Table::default();
        for name in ["first", "second", "gone"] {
            table.put(name, row(name));
        }
        let page = table.page(&["second", "never-run", "first"]);
        let (second, first) = (page.find("| second"), page.find("| first"));
        assert!(second.is_some() && second < first, "{page}");
        assert!(!page.contains("| gone"), "{page}");
        assert!(page.contains("`exposed`: a \\| b c"), "{page}");
        assert!(page.contains("1.2 s (8 s)"), "{page}");
    }
}
