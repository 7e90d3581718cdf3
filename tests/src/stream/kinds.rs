//! How many operations of each kind returned, and how many of those are lost.
//!
//! An operation is lost if something that it changed shows an older value. What was overwritten or
//! removed since shows nothing of it and counts as there; so the number is a lower bound.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::judge::{Histories, histories, last_seen, seen};
use super::observe::Observed;
use super::operation::{Cell, Operation};

/// The operations of one kind; field names are part of the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kind {
    /// Those that returned.
    pub acknowledged: u64,
    /// Those of them that are not there.
    pub lost: u64,
}

/// Counts the first so many of `operations`, which returned, by their kind.
#[must_use]
pub fn count(
    operations: &[Operation],
    acknowledged: u64,
    observed: &Observed,
) -> BTreeMap<String, Kind> {
    let lost = lost(&histories(operations), observed);
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    for operation in operations {
        if operation.number > acknowledged {
            break;
        }
        let kind = kinds.entry(operation.action.kind().to_owned()).or_default();
        kind.acknowledged += 1;
        kind.lost += u64::from(lost.contains(&operation.number));
    }
    kinds
}

fn lost(histories: &Histories, observed: &Observed) -> BTreeSet<u64> {
    let mut lost = BTreeSet::new();
    for (cell, history) in histories {
        let there = match seen(cell, observed) {
            // Where its file has no name the name tells whether it should have one.
            None if is_alive(cell, histories) => 0,
            None => continue,
            Some(seen) => last_seen(history, seen).unwrap_or(history.len().saturating_sub(1)),
        };
        lost.extend(history.iter().skip(there).map(|(number, _)| *number));
    }
    lost
}

/// Whether the file that a block or a mode belongs to has a name in the end.
fn is_alive(cell: &Cell, histories: &Histories) -> bool {
    let (Cell::Block(file, _) | Cell::Mode(file)) = cell else {
        return false;
    };
    let last = histories
        .get(&Cell::Alive(*file))
        .and_then(|all| all.last());
    last.is_some_and(|(_, value)| *value == 1)
}
