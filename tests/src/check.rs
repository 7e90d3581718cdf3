//! The verdict on a survivor's volume: the settled part, the databases, the stream.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::compare::{Differences, compare};
use crate::error::{Error, Told};
use crate::escape::PathBytes;
use crate::manifest::Manifest;
use crate::stream::confirmed::{self, Confirmed};
use crate::stream::judge::judge;
use crate::stream::kinds::{self, Kind};
use crate::stream::log::Log;
use crate::stream::observe::observe;
use crate::stream::operation::{Generator, Operation};
use crate::walk::walk;
use crate::{AGENT_DIRECTORY, LOST_AND_FOUND, sqlite, stream};

/// What to check against.
#[derive(Clone, Debug, Default)]
pub struct Expectations {
    /// Manifests of what must be there.
    pub manifests: Vec<PathBuf>,
    /// Log of the stream.
    pub stream_log: Option<PathBuf>,
    /// Every operation of the stream up to this one must be there.
    pub last_operation: Option<u64>,
}

/// What was found; field names are part of the interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// No difference in the settled part and the databases, no damage in the stream, and the
    /// expected last operation is there.
    pub pass: bool,
    /// Paths of every type that the manifests name.
    pub files_expected: u64,
    /// Those that are not there.
    pub files_missing: u64,
    /// Those that are there and differ.
    pub files_different: u64,
    /// Names that nobody made.
    pub names_extra: u64,
    /// The first differences in words.
    pub differences: Vec<String>,
    /// Content bytes missing or wrong, in whole 64 KiB blocks.
    pub bytes_lost: u64,
    /// Rows after the last acknowledged commits.
    pub sqlite_rows_expected: u64,
    /// Rows found.
    pub sqlite_rows_found: u64,
    /// Whether the rows are the expected ones, byte for byte.
    pub sqlite_rows_match: bool,
    /// SQLite's own check: `ok`, what it found, or `none` where no database was expected.
    pub sqlite_integrity: String,
    /// Operations the log claims to have returned.
    pub stream_operations_acknowledged: u64,
    /// Wall clock after the last of them returned, nanoseconds since 1970.
    pub stream_last_returned_at_ns: i64,
    /// Operations that may have returned without being in the log yet.
    pub stream_log_buffered_max: u64,
    /// Every operation up to this one is there.
    pub stream_prefix: u64,
    /// Acknowledged operations after the prefix.
    pub tail_operations_lost: u64,
    /// Acknowledged operations of each kind, and those of them that are not there.
    pub stream_kinds: BTreeMap<String, Kind>,
    /// Operations after the prefix of which something is there.
    pub stream_seen_after_prefix: u64,
    /// Blocks or names of those that are there in part.
    pub stream_torn_after_prefix: u64,
    /// What no operation explains, in words.
    pub stream_damage: Vec<String>,
    /// How often something was confirmed to be durable.
    pub stream_confirmations: u64,
    /// Bytes of confirmed operations that are not there: must be 0.
    pub stream_confirmed_bytes_lost: u64,
}

/// Checks everything below `root`.
///
/// # Errors
/// Only if a manifest, the log or the root cannot be read; whatever is wrong on the volume is in the
/// report.
pub fn check(root: &Path, expectations: &Expectations) -> Result<Report, Error> {
    let manifests: Vec<Manifest> = expectations
        .manifests
        .iter()
        .map(|path| Manifest::load(path))
        .collect::<Result<_, _>>()?;
    let log = expectations
        .stream_log
        .as_deref()
        .map(Log::load)
        .transpose()?;
    let confirmed = match &expectations.stream_log {
        Some(log) => confirmed::load(log)?,
        None => Vec::new(),
    };
    let mut differences = Differences::default();
    for manifest in &manifests {
        let found = walk(root, manifest.prefix.as_path());
        differences.add(compare(&manifest.entries, &found));
    }
    extra_at_root(root, &manifests, log.is_some(), &mut differences)?;
    let mut report = Report {
        files_expected: differences.expected,
        files_missing: differences.missing,
        files_different: differences.different,
        names_extra: differences.extra,
        bytes_lost: differences.bytes_lost,
        ..Report::default()
    };
    let databases_match = check_databases(root, &manifests, &mut report);
    if let Some(log) = &log {
        check_stream(root, log, &confirmed, &mut report);
    }
    report.pass = differences.none()
        && databases_match
        && report.stream_damage.is_empty()
        && report.stream_confirmed_bytes_lost == 0
        && expectations
            .last_operation
            .is_none_or(|last| report.stream_prefix >= last);
    report.differences = differences.words;
    Ok(report)
}

/// Names at the volume's root that neither a workload nor twinwrite nor mkfs made.
fn extra_at_root(
    root: &Path,
    manifests: &[Manifest],
    streamed: bool,
    differences: &mut Differences,
) -> Result<(), Error> {
    if manifests
        .iter()
        .any(|manifest| manifest.prefix.0.is_empty())
    {
        return Ok(());
    }
    let mut known: BTreeSet<PathBytes> = manifests
        .iter()
        .filter_map(|manifest| first_name(manifest.prefix.as_path()))
        .collect();
    known.insert(Path::new(AGENT_DIRECTORY).into());
    if streamed {
        known.insert(Path::new(stream::PREFIX).into());
    }
    for child in fs::read_dir(root).told("list", root)? {
        let name = child.told("list", root)?.file_name();
        let bytes = PathBytes::from(Path::new(&name));
        let empty = || fs::read_dir(root.join(&name)).is_ok_and(|mut names| names.next().is_none());
        let made = known.contains(&bytes) || name == LOST_AND_FOUND && empty();
        if !made {
            differences.extra(&bytes);
        }
    }
    Ok(())
}

fn first_name(prefix: &Path) -> Option<PathBytes> {
    prefix.components().find_map(|part| match part {
        Component::Normal(name) => Some(Path::new(name).into()),
        _ => None,
    })
}

/// Opens the databases after their files were compared: a rollback would change them.
fn check_databases(root: &Path, manifests: &[Manifest], report: &mut Report) -> bool {
    report.sqlite_integrity = "none".into();
    report.sqlite_rows_match = true;
    for expected in manifests.iter().flat_map(|manifest| &manifest.databases) {
        let found = sqlite::read(&root.join(expected.path.as_path()));
        report.sqlite_rows_expected += expected.rows;
        report.sqlite_rows_found += found.rows;
        report.sqlite_rows_match &= sqlite::matches(expected, &found);
        if matches!(report.sqlite_integrity.as_str(), "none" | "ok") {
            report.sqlite_integrity = found.integrity;
        }
    }
    report.sqlite_rows_match
}

fn check_stream(root: &Path, log: &Log, confirmed: &[Confirmed], report: &mut Report) {
    let mut generator = Generator::new(log.header.seed);
    let operations: Vec<Operation> = (0..log.last_possible()).map(|_| generator.next()).collect();
    let observed = observe(root, log.header.seed, &operations);
    let verdict = judge(&operations, &observed);
    let acknowledged = log.acknowledged.len() as u64;
    report.stream_operations_acknowledged = acknowledged;
    report.stream_last_returned_at_ns = log
        .acknowledged
        .last()
        .map_or(0, |line| line.returned_at_ns);
    report.stream_log_buffered_max = log.header.buffered_max;
    report.stream_prefix = verdict.prefix;
    report.tail_operations_lost = acknowledged.saturating_sub(verdict.prefix);
    report.stream_kinds = kinds::count(&operations, acknowledged, &observed);
    report.stream_seen_after_prefix = verdict.seen_after_prefix;
    report.stream_torn_after_prefix = verdict.torn_after_prefix;
    report.stream_damage = verdict.damage;
    report.stream_confirmations = confirmed.len() as u64;
    let lost = confirmed::lost(confirmed, &operations, &observed, verdict.prefix);
    report.stream_confirmed_bytes_lost = confirmed::bytes(lost);
}

#[cfg(test)]
mod tests;
