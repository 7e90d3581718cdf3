//! Running scenarios: as many labs at once as the host carries, then, one after the other, what measures.
//!
//! Machines wait most of the time, for a death to be noticed, or for each other. It must never repeat what has
//! failed, unless there is evidence that the emulator itself ended or broke a machine under it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::Run::{Alone, Quiet, Shared};
use super::{ALL, Choice, EmulatorsFault, Scenario, bench, with_lab};
use crate::lab::Lab;
use crate::progress;

/// Environment variable: how many labs run at once.
const LABS_VARIABLE: &str = "TWINWRITE_LABS";
/// Two machines of two processors each, emulated, are enough for a small host.
const PROCESSORS_PER_LAB: usize = 2;

/// How a run of scenarios went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many passed.
    pub passed: usize,
    /// Names of those that failed.
    pub failed: Vec<&'static str>,
}

impl Outcome {
    fn note(&mut self, scenario: &Scenario, seconds: f32, result: Result<()>) {
        match result {
            Ok(()) => {
                println!("{}: passed, {seconds:.1} s", scenario.name);
                self.passed += 1;
            }
            Err(error) => {
                println!("{}: FAILED, {seconds:.1} s\n{error:#}", scenario.name);
                self.failed.push(scenario.name);
            }
        }
    }

    fn judge(&mut self, scenario: &Scenario, work: impl FnOnce() -> Result<()>) {
        let began = Instant::now();
        let result = work();
        self.note(scenario, began.elapsed().as_secs_f32(), result);
    }
}

/// Runs all scenarios, or one.
///
/// # Errors
/// If the machines' root cannot be made, or the environment names no number of labs: a scenario's failure
/// is part of the outcome.
pub fn run(choice: Choice<'_>) -> Result<Outcome> {
    let chosen = |scenario: &&Scenario| choice.takes(scenario);
    let (together, by_turns): (Vec<&Scenario>, Vec<&Scenario>) = ALL
        .iter()
        .filter(chosen)
        .partition(|scenario| matches!(scenario.run, Alone(_)));
    let mut outcome = run_together(&together, labs_at_once()?)?;
    run_by_turns(&by_turns, &mut outcome);
    Ok(outcome)
}

fn labs_at_once() -> Result<usize> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    match std::env::var(LABS_VARIABLE) {
        Ok(number) => number
            .parse()
            .with_context(|| format!("{LABS_VARIABLE} is {number:?}, which is no number")),
        Err(_) => Ok((processors / PROCESSORS_PER_LAB).max(1)),
    }
}

/// Begins once more on other machines if the emulator fell over under these: that is no verdict on what is
/// tested. A second time it is a failure, so that what makes the emulator fall over is looked at.
fn on_sound_machines(work: fn() -> Result<()>) -> Result<()> {
    let result = work();
    let fault = (result.as_ref().err()).and_then(|error| error.downcast_ref::<EmulatorsFault>());
    let Some(fault) = fault else { return result };
    progress::note(&format!("{fault}: beginning again on new machines"));
    work()
}

/// Those that have machines of their own; each tells whose its lines are.
fn run_together(scenarios: &[&Scenario], at_once: usize) -> Result<Outcome> {
    let outcome = Mutex::new(Outcome::default());
    if scenarios.is_empty() {
        return Ok(Outcome::default());
    }
    // Once, and not by each.
    Lab::prepare()?;
    let queue: Mutex<VecDeque<&Scenario>> = Mutex::new(scenarios.iter().copied().collect());
    let at_once = at_once.clamp(1, scenarios.len());
    if at_once > 1 {
        progress::note(&format!(
            "{} scenarios, {at_once} at once ({LABS_VARIABLE} sets another number)",
            scenarios.len()
        ));
    }
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(scenario) = lock(&queue).pop_front() {
                    let Alone(work) = scenario.run else { continue };
                    if at_once > 1 {
                        progress::name_lines(scenario.name);
                    }
                    let began = Instant::now();
                    let result = on_sound_machines(work);
                    lock(&outcome).note(scenario, began.elapsed().as_secs_f32(), result);
                }
            });
        }
    });
    Ok(outcome.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those that measure, and those that share machines.
fn run_by_turns(scenarios: &[&Scenario], outcome: &mut Outcome) {
    let mut rest = scenarios.iter().copied().peekable();
    while let Some(scenario) = rest.next() {
        match scenario.run {
            Alone(work) | Quiet(work) => {
                outcome.judge(scenario, || on_sound_machines(work));
            }
            Shared(work) => {
                // The first one's time holds the boot.
                let mut next = Some((scenario, work));
                let booted = with_lab("shared", bench::options(&[], &[]), |lab| {
                    while let Some((scenario, work)) = next.take() {
                        outcome.judge(scenario, || {
                            bench::require_start(lab)?;
                            work(lab)
                        });
                        if outcome.failed.last() == Some(&scenario.name) {
                            // It may have left anything behind.
                            break;
                        }
                        if let Some(Shared(work)) = rest.peek().map(|scenario| scenario.run) {
                            next = rest.next().map(|scenario| (scenario, work));
                        }
                    }
                    Ok(())
                });
                if let Err(error) = booted {
                    if let Some((scenario, _)) = next {
                        outcome.judge(scenario, || Err(error));
                    } else {
                        outcome.judge(scenario, || Err(error.context("ending the shared lab")));
                    }
                }
            }
        }
    }
}
