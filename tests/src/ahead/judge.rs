//! What the survivor's volume shows, held against what the application was told.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::history::{Cell, History};
use super::sector::{BLOCK_BYTES, SECTOR_BYTES, sector, versions};
use super::{Case, blocks, postgres, replaced, sqlite};
use crate::error::Error;

/// Differences told in words.
const TOLD_MAX: usize = 6;

/// What a judgement found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Nothing is missing that must be there.
    pub pass: bool,
    /// The older content was written before the power went.
    pub ready: bool,
    /// Versions tried.
    pub tried: u64,
    /// Operations that were confirmed as durable after the wait.
    pub confirmations: u64,
    /// Cells that show less than what was confirmed.
    pub confirmed_lost: u64,
    /// Cells that show less than the older content, all of which was mirrored.
    pub mirrored_lost: u64,
    /// The first of them in words.
    pub differences: Vec<String>,
}

/// What a cell shows.
enum Shown {
    /// Versions: one, or those of its parts.
    Versions(Vec<u64>),
    /// No content of this cell.
    Nothing(String),
    /// Only a part of one version, or of no version that can be told; what it looks like.
    Part(Option<u64>, String),
}

/// Judges a run's directory. `older_mirrored`: all that the log tried before the wait had reached the
/// mirror, so that no cell may show less.
///
/// # Errors
/// If the log cannot be read.
pub fn judge(
    case: Case,
    directory: &Path,
    log: &Path,
    seed: u64,
    older_mirrored: bool,
) -> Result<Report, Error> {
    let history = History::load(log)?;
    let mut report = Report {
        ready: history.ready,
        tried: history.versions.len() as u64,
        confirmations: history.confirmations,
        ..Report::default()
    };
    match case {
        Case::Fsync | Case::SyncWrite | Case::Direct | Case::Msync => {
            let path = blocks::path(directory);
            let bytes = fs::read(&path).unwrap_or_default();
            let mut blocks = bytes.chunks(BLOCK_BYTES);
            for cell in 0..blocks::BLOCKS {
                let block = blocks.next().unwrap_or_default();
                let shown = shown(versions(block, seed, cell, 0));
                report.hold(&history, cell, &shown, older_mirrored);
            }
        }
        Case::Rename => {
            for cell in 0..replaced::FILES {
                let shown = file(&replaced::path(directory, cell), seed, cell);
                report.hold(&history, cell, &shown, older_mirrored);
            }
        }
        Case::SqliteDelete | Case::SqliteWal => {
            report.hold_rows(&history, sqlite::read(directory), older_mirrored);
        }
        Case::Postgres => {
            report.hold_rows(&history, postgres::read(directory, seed), older_mirrored);
        }
    }
    report.pass = report.confirmed_lost == 0 && report.mirrored_lost == 0;
    Ok(report)
}

fn shown(versions: Result<Vec<u64>, &'static str>) -> Shown {
    match versions {
        Ok(versions) => Shown::Versions(versions),
        Err(reason) => Shown::Nothing(reason.to_owned()),
    }
}

/// A file that is replaced as a whole shows one version.
fn file(path: &Path, seed: u64, cell: u32) -> Shown {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return Shown::Nothing(format!("cannot be read: {error}")),
    };
    let whole = BLOCK_BYTES * replaced::BLOCKS_EACH as usize;
    let (mut all, mut missing) = (Vec::new(), None);
    if bytes.len() > whole {
        return Shown::Nothing(format!("has {} bytes", bytes.len()));
    }
    if bytes.len() < whole {
        missing = Some(format!("has {} bytes", bytes.len()));
    }
    for (number, bytes) in bytes.chunks(SECTOR_BYTES).enumerate() {
        match sector(bytes, seed, cell, number as u32) {
            Ok(version) => all.push(version),
            Err(reason) if bytes.iter().all(|byte| *byte == 0) => {
                missing.get_or_insert_with(|| reason.to_owned());
            }
            Err(reason) => return Shown::Nothing(reason.to_owned()),
        }
    }
    all.dedup();
    if all.len() > 1 {
        return Shown::Nothing(format!("is torn: {all:?}"));
    }
    match missing {
        Some(looks) => Shown::Part(all.first().copied(), looks),
        None => Shown::Versions(all),
    }
}

impl Report {
    fn hold(&mut self, history: &History, cell: u32, shown: &Shown, older_mirrored: bool) {
        let nothing = Cell::default();
        let of = history.cells.get(&cell).unwrap_or(&nothing);
        let less_than = |least: Option<u64>| {
            least.is_some_and(|least| match shown {
                Shown::Versions(versions) => versions.iter().any(|version| *version < least),
                Shown::Nothing(_) => true,
                // It was given up for a later version that nobody had made durable.
                Shown::Part(part, _) => !(of.loose.iter())
                    .any(|loose| *loose > least && part.is_none_or(|part| part == *loose)),
            })
        };
        let foreign = match shown {
            Shown::Versions(versions) => versions
                .iter()
                .any(|version| *version > 0 && !of.tried.contains(version)),
            Shown::Part(part, _) => part.is_some_and(|part| !of.tried.contains(&part)),
            Shown::Nothing(_) => false,
        };
        let kind = if less_than(of.confirmed) || foreign {
            self.confirmed_lost += 1;
            "confirmed"
        } else if older_mirrored && less_than(of.older) {
            self.mirrored_lost += 1;
            "mirrored"
        } else {
            return;
        };
        if self.differences.len() < TOLD_MAX {
            let shows = match shown {
                Shown::Versions(versions) => format!("shows {versions:?}"),
                Shown::Nothing(reason) | Shown::Part(_, reason) => reason.clone(),
            };
            let last = of.tried.last().copied().unwrap_or_default();
            self.differences.push(format!(
                "cell {cell} {shows}; {kind} {:?} (older {:?}, last tried {last})",
                of.confirmed.or(of.older),
                of.older,
            ));
        }
    }

    /// Rows must show their versions, and all together the state after one and the same transaction.
    fn hold_rows(
        &mut self,
        history: &History,
        found: Result<Vec<(u32, u64)>, String>,
        older_mirrored: bool,
    ) {
        let rows = match found {
            Ok(rows) => rows,
            Err(reason) => {
                // Before the first confirmation the database was written without any care.
                let owed = history.confirmations > 0 || (older_mirrored && history.ready);
                self.confirmed_lost += u64::from(history.confirmations > 0);
                self.mirrored_lost += u64::from(owed && history.confirmations == 0);
                self.differences.extend(owed.then_some(reason));
                return;
            }
        };
        for cell in history.cells.keys() {
            let row = rows.iter().find(|(row, _)| row == cell);
            let shown = match row {
                Some((_, version)) => Shown::Versions(vec![*version]),
                None => Shown::Nothing("is not there".to_owned()),
            };
            self.hold(history, *cell, &shown, older_mirrored);
        }
        if history.confirmations == 0 {
            return;
        }
        let last = rows.iter().map(|(_, version)| *version).max();
        for (row, version) in &rows {
            let tried = history.cells.get(row).map(|cell| cell.tried.as_slice());
            let mut tried = tried.unwrap_or_default().iter();
            let state = tried.rfind(|tried| Some(**tried) <= last).copied();
            if state.unwrap_or_default() != *version {
                self.confirmed_lost += 1;
                self.differences.push(format!(
                    "row {row} shows {version}, which is no state after transaction {last:?}"
                ));
            }
        }
        self.differences.truncate(TOLD_MAX);
    }
}

#[cfg(test)]
mod tests;
