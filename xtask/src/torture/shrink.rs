//! Looking for the smallest case that fails: shorter ones, and such with fewer threads, side by side.
//!
//! Each power cut carries as many candidates as it can; the smallest that fails is the next to be shrunk. Threads
//! race, so one that passes may have been lucky: a case that fails is what is looked for, not the least.

use std::collections::BTreeSet;

use anyhow::Result;

use super::{Case, Pair, Turn, round};
use crate::progress;

/// Lengths tried at once: these many eighths.
const EIGHTHS: std::ops::RangeInclusive<u64> = 1..=7;

/// The command that runs the smallest failing case, after as many power cuts as the plan allows.
pub(super) fn run(pair: &mut Pair<'_>, case: &Case, turn: &Turn) -> Result<Option<String>> {
    let mut smallest = *case;
    for crash in 1..=pair.plan.shrink_crashes {
        let mut candidates = candidates(&smallest);
        candidates.retain(|case| !pair.ran.contains(case));
        if candidates.is_empty() {
            break;
        }
        let names: Vec<String> = candidates.iter().map(Case::to_string).collect();
        progress::note(&format!(
            "shrinking {smallest}, power cut {crash} of at most {}: trying {}",
            pair.plan.shrink_crashes,
            names.join(", ")
        ));
        let round = round::run(pair, turn, &candidates, false)?;
        for line in round.lines() {
            progress::note(&line);
        }
        let failed = round
            .failed()
            .min_by_key(|case| (case.threads * case.length, case.threads));
        match failed {
            Some(failed) => smallest = failed,
            None => {
                progress::note("none of them fails: it is not the length, or it takes luck");
                break;
            }
        }
    }
    let command = pair.plan.command(&smallest, turn);
    Ok(Some(format!("the smallest that failed: {command}")))
}

fn candidates(case: &Case) -> Vec<Case> {
    let shorter = EIGHTHS.map(|eighths| Case {
        length: case.length * eighths / 8,
        ..*case
    });
    let fewer = (1..case.threads).map(|threads| Case { threads, ..*case });
    let all: BTreeSet<Case> = shorter
        .chain(fewer)
        .filter(|case| case.length > 0)
        .collect();
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_smaller_and_end() {
        let mut case = Case {
            seed: 7,
            length: 150,
            threads: 4,
        };
        let mut steps = 0;
        while let Some(first) = candidates(&case).first().copied() {
            let is_smaller =
                |other: &Case| (other.length, other.threads) < (case.length, case.threads);
            assert!(candidates(&case).iter().all(is_smaller), "{case}");
            assert!(candidates(&case).len() <= 10);
            case = first;
            steps += 1;
        }
        assert!(
            steps < 10 && case.length == 1 && case.threads == 1,
            "{case} after {steps}"
        );
    }
}
