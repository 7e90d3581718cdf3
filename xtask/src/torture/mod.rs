//! Torture: random operations of every kind from several threads and processes, a power cut, a takeover,
//! and a comparison of the whole tree, seed by seed.
//!
//! One power cut carries many cases side by side. After each the roles change: the dead machine comes back
//! as the mirror. A case that shows a difference is run again, shorter and with fewer threads, many
//! candidates to a power cut.

mod report;
mod round;
mod shrink;

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context as _, Result};

use crate::lab::{Filesystem, KernelRelease, Lab, NodeName, Options};
use crate::progress;
use crate::random::Random;
use crate::scenarios::bench::{self, NO_CHECKPOINT};
use crate::scenarios::with_lab;

pub use report::Report;

/// What reproduces a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// Decides the operations.
    pub seed: u64,
    /// Operations of each thread.
    pub length: u64,
    /// Threads.
    pub threads: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seed, length, threads) = (self.seed, self.length, self.threads);
        write!(f, "{seed}-{length}-{threads}")
    }
}

/// When the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regime {
    /// Once all operations have returned and the volume is protected: all must be there.
    Settled,
    /// In the middle of the operations: what was mirrored or confirmed must be there.
    Running,
}

/// What is done before a power cut, and when it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// When.
    pub regime: Regime,
    /// Only these kinds of operations, by the names that `twinwrite-workload` knows; none: all.
    pub only: Vec<String>,
}

/// What a run does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The first seed.
    pub seed: u64,
    /// How many.
    pub seeds: u64,
    /// Operations of each thread.
    pub length: u64,
    /// Threads of each seed.
    pub threads: u64,
    /// The volume's file system.
    pub filesystem: Filesystem,
    /// The machines' kernel.
    pub kernel: KernelRelease,
    /// What comes before a power cut, one after the other, and again.
    pub turns: Vec<Turn>,
    /// So many seeds at the most to a power cut.
    pub seeds_per_crash: usize,
    /// Power cuts to find a shorter case that fails, at the most.
    pub shrink_crashes: u64,
    /// Name of the lab.
    pub lab: String,
}

impl Plan {
    fn cases(&self) -> Vec<Case> {
        let seeds = self.seed..self.seed.saturating_add(self.seeds);
        let case = |seed| Case {
            seed,
            length: self.length,
            threads: self.threads,
        };
        seeds.map(case).collect()
    }

    /// The command that runs one case again.
    fn command(&self, case: &Case, turn: &Turn) -> String {
        let (seed, length, threads) = (case.seed, case.length, case.threads);
        let mut command = format!(
            "cargo xtask torture --seeds 1 --seed {seed} --length {length} --threads {threads} --fs {} \
             --kernel {}",
            self.filesystem, self.kernel
        );
        if turn.regime == Regime::Running {
            command += " --running";
        }
        if !turn.only.is_empty() {
            command += &format!(" --only {}", turn.only.join(","));
        }
        command
    }
}

/// The machines, and who owns the volume.
struct Pair<'a> {
    lab: &'a Lab,
    plan: &'a Plan,
    owner: NodeName,
    /// What the volume holds directories of: none of them can run a second time.
    ran: BTreeSet<Case>,
    /// Decides when the power is cut.
    random: Random,
}

/// Runs it. What was found is in the report also where the run itself could not go on.
#[must_use]
pub fn run(plan: &Plan) -> Report {
    let mut report = Report::default();
    let options = Options {
        filesystem: plan.filesystem,
        kernel: plan.kernel,
        ..bench::options(&[], &[NO_CHECKPOINT])
    };
    let result = with_lab(&plan.lab, options, |lab| crash_all(lab, plan, &mut report));
    report.error = result.err().map(|error| format!("{error:#}"));
    report
}

fn crash_all(lab: &Lab, plan: &Plan, report: &mut Report) -> Result<()> {
    bench::require_start(lab)?;
    let mut pair = Pair {
        lab,
        plan,
        owner: NodeName::A,
        ran: BTreeSet::new(),
        random: Random::new(plan.seed),
    };
    let cases = plan.cases();
    let mut failed = Vec::new();
    let parts = cases.chunks(plan.seeds_per_crash.max(1));
    for (cases, turn) in parts.zip(plan.turns.iter().cycle()) {
        let mut cases = cases.to_vec();
        // An even seed flushes nothing, and one after it would.
        cases.sort_by_key(|case| case.seed.is_multiple_of(2));
        let number = report.rounds.len() + 1;
        let round = (round::run(&mut pair, turn, &cases, true))
            .with_context(|| format!("in power cut {number}"))?;
        for line in round.lines() {
            progress::note(&line);
        }
        failed.extend(round.failed().map(|case| (case, turn)));
        report.rounds.push(round);
    }
    // One explains the others more often than not.
    if let Some((case, turn)) = failed.first() {
        report.shrunk = shrink::run(&mut pair, case, turn)?;
    }
    Ok(())
}
