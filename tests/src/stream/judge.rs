//! Up to which operation everything is there.
//!
//! Each cell's history is the list of operations that changed it. The last one whose value is seen
//! says: whatever changed the cell after that is not there. The prefix ends before the first
//! operation that is not there. Effects of operations after the prefix may be seen too: a disk is
//! allowed to be ahead. Where a value occurs twice in a history the later one is believed, which
//! can only lengthen the prefix as far as other cells allow.
//!
//! A cell that shows none of its values is torn. That is allowed where an operation after the prefix
//! changed it, or where nothing later than its last change is there (it is there in part);
//! otherwise it is damage. Either way the prefix ends before it.

use std::collections::{BTreeMap, BTreeSet};

use super::observe::{Observed, Seen};
use super::operation::{Cell, Operation};

/// What a crash left of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Every operation up to this one is there.
    pub prefix: u64,
    /// Operations after it of which something is there (a name that is gone proves nothing).
    pub seen_after_prefix: u64,
    /// Torn cells that an operation after the prefix explains.
    pub torn_after_prefix: u64,
    /// What nothing explains, in words.
    pub damage: Vec<String>,
}

/// The operations that changed each cell, and the values they gave it.
pub(super) type Histories = BTreeMap<Cell, Vec<(u64, u64)>>;

pub(super) fn histories(operations: &[Operation]) -> Histories {
    let mut histories = Histories::new();
    for operation in operations {
        for (cell, value) in operation.effects() {
            let history = histories.entry(cell).or_default();
            history.push((operation.number, value));
        }
    }
    histories
}

/// Judges what was observed against all operations that may have been carried out.
#[must_use]
pub fn judge(operations: &[Operation], observed: &Observed) -> Verdict {
    let histories = histories(operations);
    let mut verdict = Verdict {
        prefix: operations.len() as u64,
        damage: observed.damage.clone(),
        ..Verdict::default()
    };
    let mut torn = Vec::new();
    let mut seen_operations = BTreeSet::new();
    for (cell, history) in &histories {
        let Some(seen) = seen(cell, observed) else {
            continue;
        };
        match last_seen(history, seen) {
            Some(at) => {
                if let Some((first_missing, _)) = history.get(at) {
                    verdict.prefix = verdict.prefix.min(first_missing - 1);
                }
                let shown = at.checked_sub(1).and_then(|at| history.get(at));
                // What is absent may never have been there: only a value proves its operation.
                seen_operations.extend(
                    shown
                        .filter(|(_, value)| *value != 0)
                        .map(|(number, _)| *number),
                );
            }
            None => torn.push((cell, history.last().map_or(0, |(number, _)| *number))),
        }
    }
    judge_torn(torn, &seen_operations, observed, &mut verdict);
    for cell in observed
        .cells
        .keys()
        .filter(|cell| !histories.contains_key(cell))
    {
        verdict.damage.push(format!("{cell}: no operation made it"));
    }
    let after = (
        std::ops::Bound::Excluded(verdict.prefix),
        std::ops::Bound::Unbounded,
    );
    verdict.seen_after_prefix = seen_operations.range(after).count() as u64;
    verdict
}

/// What a cell shows; `None` if it cannot be looked at because its file has no name.
pub(super) fn seen<'a>(cell: &Cell, observed: &'a Observed) -> Option<&'a Seen> {
    const ABSENT: &Seen = &Seen::Value(0);
    match (observed.cells.get(cell), cell) {
        (Some(seen), _) => Some(seen),
        (None, Cell::Block(file, _) | Cell::Mode(file)) => observed
            .cells
            .contains_key(&Cell::Alive(*file))
            .then_some(ABSENT),
        (None, Cell::Name(_) | Cell::Alive(_) | Cell::Current) => Some(ABSENT),
    }
}

/// How many of a history's operations are there, as far as this cell tells; `None` if it is torn.
pub(super) fn last_seen(history: &[(u64, u64)], seen: &Seen) -> Option<usize> {
    let Seen::Value(seen) = seen else { return None };
    match history.iter().rposition(|(_, value)| value == seen) {
        Some(at) => Some(at + 1),
        None => (*seen == 0).then_some(0),
    }
}

/// Torn cells, the one whose last change is the latest first.
fn judge_torn(
    mut torn: Vec<(&Cell, u64)>,
    seen_operations: &BTreeSet<u64>,
    observed: &Observed,
    verdict: &mut Verdict,
) {
    torn.sort_by_key(|(_, last)| std::cmp::Reverse(*last));
    for (cell, last) in torn {
        let later = last.saturating_add(1)..=verdict.prefix.max(last.saturating_add(1));
        let explained = last > verdict.prefix || seen_operations.range(later).next().is_none();
        verdict.prefix = verdict.prefix.min(last.saturating_sub(1));
        if explained {
            verdict.torn_after_prefix += 1;
            continue;
        }
        let words = match observed.cells.get(cell) {
            Some(Seen::Torn(words)) => words.clone(),
            Some(Seen::Value(value)) => format!("has the value {value}, which it never had"),
            None => "has lost its first value".to_owned(),
        };
        verdict.damage.push(format!("{cell}: {words}"));
    }
}
