//! What a run of the suite found.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::Plan;
use super::round::Round;

/// The file systems of a part, checked at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Volumes that were checked.
    pub volumes: u64,
    /// What the checker said of those that are not clean.
    pub unclean: Vec<String>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Decides the run, together with the commit.
    pub seed: u64,
    /// The negative control.
    pub gate_off: bool,
    /// Seconds of the whole run, with the machines' boot.
    pub seconds: f64,
    /// What ended the run before its end.
    pub error: Option<String>,
    /// All rounds.
    pub rounds: Vec<Round>,
    /// The file systems at the end of each part.
    pub checked: Vec<Checked>,
}

#[derive(Default)]
struct Sum {
    crashes: u64,
    confirmations: u64,
    failed: u64,
}

impl Report {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            seed: plan.seed,
            gate_off: plan.gate_off,
            seconds: 0.0,
            error: None,
            rounds: Vec::new(),
            checked: Vec::new(),
        }
    }

    /// Crashes of a volume.
    #[must_use]
    pub fn crashes(&self) -> u64 {
        let crashes = self.rounds.iter().map(|round| round.judgements.len());
        crashes.sum::<usize>() as u64
    }

    /// Crashes of a volume after which something was missing, and file systems that are not clean.
    #[must_use]
    pub fn failures(&self) -> usize {
        let unclean = self.checked.iter().map(|checked| checked.unclean.len());
        self.rounds.iter().map(Round::failures).sum::<usize>() + unclean.sum::<usize>()
    }

    /// Crashes of a volume up to and with the first after which something confirmed was missing.
    #[must_use]
    pub fn first_confirmed_loss(&self) -> Option<u64> {
        let all = self.rounds.iter().flat_map(|round| &round.judgements);
        all.zip(1..)
            .find(|(found, _)| found.confirmed_lost > 0)
            .map(|(_, crash)| crash)
    }

    /// Nothing is missing after any crash, or, with the gate off, something confirmed is.
    #[must_use]
    pub fn is_as_it_should_be(&self) -> bool {
        let sound = self.error.is_none() && self.doubts().is_empty();
        if self.gate_off {
            sound && self.first_confirmed_loss().is_some()
        } else {
            sound && self.failures() == 0
        }
    }

    /// What makes a run worthless although it failed nowhere.
    #[must_use]
    pub fn doubts(&self) -> Vec<&'static str> {
        let mut doubts = Vec::new();
        if self.rounds.iter().all(|round| round.witness_lost == 0) {
            doubts.push("no cut took an unflushed page: the disk is not what it should be");
        }
        let all = || self.rounds.iter().flat_map(|round| &round.judgements);
        if all().map(|found| found.confirmations).sum::<u64>() == 0 {
            doubts.push("nothing was confirmed");
        }
        if self.rounds.iter().all(|round| round.records_replayed == 0) {
            doubts.push("no takeover merged anything");
        }
        doubts
    }

    /// For people.
    #[must_use]
    pub fn told(&self) -> String {
        let mut text = String::new();
        let cuts = self.rounds.len();
        let crashes = self.crashes();
        let each = self.seconds / (crashes.max(1) as f64);
        let _ = writeln!(
            text,
            "{crashes} crashes of a volume in {cuts} power cuts, {:.0} s: {each:.1} s a crash; seed {}{}",
            self.seconds,
            self.seed,
            if self.gate_off { ", gate off" } else { "" }
        );
        let mut cases: BTreeMap<String, Sum> = BTreeMap::new();
        let mut disturbances: BTreeMap<String, Sum> = BTreeMap::new();
        for round in &self.rounds {
            let disturbance = round.schedule.disturbance.name();
            for found in &round.judgements {
                for sum in [
                    cases.entry(found.case.clone()).or_default(),
                    disturbances.entry(disturbance.clone()).or_default(),
                ] {
                    sum.crashes += 1;
                    sum.confirmations += found.confirmations;
                    sum.failed += u64::from(!found.pass);
                }
            }
        }
        for (name, sum) in cases.iter().chain(&disturbances) {
            let _ = writeln!(
                text,
                "  {name}: {} crashes, {} operations confirmed, {} failed",
                sum.crashes, sum.confirmations, sum.failed
            );
        }
        let checked: u64 = self.checked.iter().map(|checked| checked.volumes).sum();
        let unclean: Vec<&String> = self.checked.iter().flat_map(|c| &c.unclean).collect();
        let _ = writeln!(
            text,
            "  file systems checked {checked}, not clean {}: {unclean:?}",
            unclean.len()
        );
        let lost: u64 = self.rounds.iter().map(|round| round.unflushed_lost).sum();
        let _ = writeln!(text, "  unflushed writes lost by the disks: {lost}");
        match (self.first_confirmed_loss(), self.gate_off) {
            (Some(crash), _) => {
                let _ = writeln!(
                    text,
                    "  something confirmed was lost, first by crash {crash}"
                );
            }
            (None, true) => {
                let _ = writeln!(text, "  the gate was off and nothing confirmed was lost");
            }
            (None, false) => {}
        }
        for doubt in self.doubts() {
            let _ = writeln!(text, "  worthless: {doubt}");
        }
        if let Some(error) = &self.error {
            let _ = writeln!(text, "  ended early: {error}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::disturbance::Disturbance;
    use super::super::judgement::Judgement;
    use super::*;
    use crate::random::Random;

    fn report(gate_off: bool, confirmed_lost: &[u64]) -> Report {
        let judgements = confirmed_lost.iter().map(|lost| Judgement {
            case: "fsync".to_owned(),
            pass: *lost == 0,
            confirmations: 3,
            confirmed_lost: *lost,
            ..Judgement::default()
        });
        Report {
            seed: 1,
            gate_off,
            seconds: 1.0,
            error: None,
            rounds: vec![Round {
                number: 1,
                dead: "a",
                schedule: Disturbance::LinkCut.schedule(&mut Random::new(1)),
                fenced_first: false,
                judgements: judgements.collect(),
                unflushed_lost: 5,
                witness_lost: 5,
                asked: 0,
                records_replayed: 5,
                seconds: [0.0; 4],
            }],
            checked: Vec::new(),
        }
    }

    #[test]
    fn a_run_passes_without_a_loss_and_its_control_with_one() {
        assert!(report(false, &[0, 0]).is_as_it_should_be());
        assert!(!report(false, &[0, 2]).is_as_it_should_be());
        assert!(report(true, &[0, 2]).is_as_it_should_be());
        assert!(!report(true, &[0, 0]).is_as_it_should_be());
        assert_eq!(report(true, &[0, 2]).first_confirmed_loss(), Some(2));
        assert_eq!(report(true, &[0, 2]).crashes(), 2);
    }

    #[test]
    fn a_run_that_could_not_have_failed_does_not_pass() {
        let sound = report(false, &[0]);
        let mut kind_disk = sound.clone();
        let mut idle = sound.clone();
        let mut unclean = sound.clone();
        for round in &mut kind_disk.rounds {
            round.witness_lost = 0;
        }
        for round in &mut idle.rounds {
            round.records_replayed = 0;
        }
        unclean.checked.push(Checked {
            volumes: 1,
            unclean: vec!["vol0".to_owned()],
        });
        let mut ended = sound.clone();
        ended.error = Some("no machine".to_owned());
        for wrong in [kind_disk, idle, unclean, ended, report(false, &[])] {
            assert!(!wrong.is_as_it_should_be(), "{}", wrong.told());
        }
    }
}
