//! Running a seed, and making a failing run smaller.

use std::panic::{AssertUnwindSafe, catch_unwind};

use twinwrite::faults::Fault as CoreFault;

use crate::applications::Taste;
use crate::fault::Fault;
use crate::kernel::MAX_BLOCKS;
use crate::random::Random;
use crate::step::{Step, steps};
use crate::world::{Counts, Setting, Violation, World};

/// A run, before it is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How it is.
    pub setting: Setting,
    /// What happens.
    pub steps: Vec<Step>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// What must never be, and the step at which it was.
    pub violation: Option<(usize, Violation)>,
    /// What happened.
    pub counts: Counts,
    /// One line an event.
    pub trace: Vec<String>,
}

impl Plan {
    /// The run of a seed.
    pub fn of_seed(seed: u64, step_count: usize) -> Self {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5eed);
        let mut sometimes = |percent: usize, share: usize| {
            if random.chance(percent) { share } else { 0 }
        };
        let taste = Taste {
            no_bytes: sometimes(50, 25),
            dsync: sometimes(60, 15),
            gaps: sometimes(25, 4),
            syncs: 8 + sometimes(50, 22),
            names: 10 + sometimes(60, 25),
            stores: sometimes(30, 8) + sometimes(15, 20),
            files: 6 - sometimes(30, 4),
            blocks: MAX_BLOCKS - sometimes(30, 4),
        };
        let setting = Setting {
            log_bytes: [1, 2, 4, 8, 12, 16, 32][random.below(7)] * 1024,
            ring_bytes: [1, 4, 16][random.below(3)] * 1024
                + 1024 * u64::from(random.chance(80)) * 8,
            lag_limit_us: [2_000, 500_000, 3_000_000][random.below(3)],
            checkpoint_age_us: [500, 5_000, 1_000_000][random.below(3)],
            lazy_syncfs: random.chance(40),
            births: true,
            has_fence: random.chance(85),
            taste,
        };
        Self {
            setting,
            steps: steps(&mut random, step_count),
        }
    }

    /// Runs it.
    pub fn run(&self, fault: Option<Fault>, listen: bool) -> Outcome {
        Fault::inject(fault);
        // Volumes without times of birth are refused: with them nothing depends on the look at the victim.
        let needs_no_births = fault == Some(Fault::Core(CoreFault::VictimUnchecked));
        let setting = Setting {
            births: self.setting.births && !needs_no_births,
            ..self.setting
        };
        let mut world = World::new(setting, fault, listen);
        let mut violation = None;
        for (index, step) in self.steps.iter().enumerate() {
            let ran = catch_unwind(AssertUnwindSafe(|| world.run_step(step)));
            if let Err(panic) = ran {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                world.violate("a panic", text.unwrap_or_default());
            }
            if let Some(found) = world.violation.take() {
                violation = Some((index, found));
                break;
            }
        }
        Fault::inject(None);
        Outcome {
            violation,
            counts: world.counts,
            trace: world.trace.take().map(Vec::from).unwrap_or_default(),
        }
    }

    /// The smallest run found that breaks the same guarantee.
    pub fn shrink(&self, fault: Option<Fault>, longest: usize) -> Self {
        let mut best = self.clone();
        let Some((at, violation)) = best.run(fault, false).violation else {
            return best;
        };
        best.steps.truncate(at + 1);
        let mut tries = 0;
        let mut chunk = best.steps.len() / 2;
        while chunk > 0 {
            let mut from = 0;
            let mut smaller = false;
            while from < best.steps.len() && tries < longest {
                let mut candidate = best.clone();
                let to = (from + chunk).min(candidate.steps.len());
                candidate.steps.drain(from..to);
                tries += 1;
                match candidate.run(fault, false).violation {
                    Some((at, found)) if found.guarantee == violation.guarantee => {
                        candidate.steps.truncate(at + 1);
                        best = candidate;
                        smaller = true;
                    }
                    _ => from += chunk,
                }
            }
            if !smaller || chunk > 1 {
                chunk /= 2;
            }
        }
        best
    }
}
