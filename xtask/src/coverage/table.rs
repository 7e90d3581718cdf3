//! The matrix: a row for each operation, a column for each file system on each kernel, kept as JSON and
//! written out as a page.
//!
//! Every cell comes from a run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Cell, Probe, Verdict};
use crate::{json_file, paths};

const HEAD: &str = include_str!("head.md");
/// More rows of a column may not be without capture.
pub const NOT_CAPTURED_MAX: usize = 8;

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    group: String,
    name: String,
    cells: BTreeMap<String, Cell>,
}

/// All of them, in the order of the probes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table(Vec<Row>);

impl Table {
    fn json_path() -> PathBuf {
        paths::root().join("docs/coverage.json")
    }

    /// What earlier runs wrote; empty if there was none.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn load() -> Result<Self> {
        json_file::load(&Self::json_path())
    }

    /// Takes a column, in place of an earlier run's; a whole one also takes away what that one had besides.
    pub fn put(&mut self, column: &str, found: Vec<(Probe, Cell)>, is_whole: bool) {
        if is_whole {
            for row in &mut self.0 {
                row.cells.remove(column);
            }
        }
        for (probe, cell) in found {
            let at = self.0.iter().position(|row| row.name == probe.name);
            let at = at.unwrap_or_else(|| {
                self.0.push(Row {
                    group: probe.group,
                    name: probe.name,
                    cells: BTreeMap::new(),
                });
                self.0.len() - 1
            });
            if let Some(row) = self.0.get_mut(at) {
                row.cells.insert(column.to_owned(), cell);
            }
        }
        self.0.retain(|row| !row.cells.is_empty());
    }

    /// Rows of a column that are not captured although the file system has the operation.
    #[must_use]
    pub fn not_captured(&self, column: &str) -> usize {
        let verdicts = self.0.iter().filter_map(|row| row.cells.get(column));
        verdicts
            .filter(|cell| !matches!(cell.verdict, Verdict::Captured | Verdict::NotOffered))
            .count()
    }

    /// Writes `docs/coverage.json` and `docs/coverage.md`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&self) -> Result<()> {
        let json = serde_json::to_string_pretty(&self)? + "\n";
        fs::write(Self::json_path(), json)?;
        fs::write(paths::root().join("docs/coverage.md"), self.page())?;
        Ok(())
    }

    fn columns(&self) -> Vec<&String> {
        let mut columns: Vec<&String> = self.0.iter().flat_map(|row| row.cells.keys()).collect();
        columns.sort();
        columns.dedup();
        columns
    }

    fn page(&self) -> String {
        let columns = self.columns();
        let mut page = HEAD.to_owned();
        let _ = write!(page, "| kind | operation |");
        for column in &columns {
            let _ = write!(page, " {column} |");
        }
        let _ = writeln!(page, "\n|---|---|{}", "---|".repeat(columns.len()));
        for row in &self.0 {
            let _ = write!(page, "| {} | {} |", row.group, row.name);
            for column in &columns {
                let words = row.cells.get(*column).map(Cell::told);
                let _ = write!(page, " {} |", words.unwrap_or_default());
            }
            page.push('\n');
        }
        page
    }
}

impl Cell {
    /// In a word or two.
    #[must_use]
    pub fn told(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Captured => "captured",
            Verdict::Refused => "refused",
            Verdict::Covered => "covered later",
            Verdict::NotOffered => "not offered",
            Verdict::Failed => "**lost**",
        };
        if self.words.is_empty() || self.verdict == Verdict::NotOffered {
            return verdict.to_owned();
        }
        let words = self.words.replace('|', "\\|").replace('<', "&lt;");
        format!("{verdict}: {words}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_stands_out_and_what_is_not_offered_counts_for_nothing() {
        let probe = |name: &str| Probe {
            name: name.to_owned(),
            group: "data".to_owned(),
            is_durable: false,
        };
        let cell = |verdict, words: &str| Cell {
            verdict,
            words: words.to_owned(),
        };
        let mut table = Table::default();
        table.put(
            "ext4 6.12",
            vec![
                (probe("write"), cell(Verdict::Captured, "")),
                (probe("fallocate"), cell(Verdict::Covered, "a | gap")),
                (probe("reflink"), cell(Verdict::NotOffered, "no")),
            ],
            true,
        );
        table.put(
            "xfs 6.12",
            vec![(probe("write"), cell(Verdict::Failed, "<gone>"))],
            true,
        );
        assert_eq!(table.not_captured("ext4 6.12"), 1);
        assert_eq!(table.not_captured("xfs 6.12"), 1);
        let page = table.page();
        assert!(page.contains("| data | write | captured | **lost**: &lt;gone> |"));
        assert!(page.contains("| data | fallocate | covered later: a \\| gap |  |"));
        assert!(page.contains("| data | reflink | not offered |  |"));
    }
}
