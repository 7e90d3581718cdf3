//! A short walk through the seeds: nothing breaks, and what is broken on purpose is seen.

use twinwrite_simulator::fault::Fault;
use twinwrite_simulator::run::Plan;
use twinwrite_simulator::world::Counts;

/// Seeds that are enough for them.
const SOON_SEEDS: u64 = 500;
/// Steps of a run.
const STEPS: usize = 300;
/// Faults that few seeds find. `cargo xtask sim --faults` finds all.
const SOON: &[&str] = &[
    "ack-before-completion",
    "ring-released-before-completion",
    "published-ahead-of-memory",
    "entry-position-ignored",
    "closed-replayed",
    "link-silent-means-dead",
    "gate-removed",
    "purge-before-sync",
    "replay-before-fence",
    "closed-sentinel-omitted",
    "gates-before-sentinel",
    "gaps-ignored",
    "protected-too-early",
];

#[test]
fn many_seeds_show_no_violation() {
    let mut counts = Counts::default();
    for seed in 1..=300 {
        let outcome = Plan::of_seed(seed, STEPS).run(None, false);
        assert_eq!(outcome.violation, None, "seed {seed}");
        counts.add(&outcome.counts);
    }
    // Runs in which nothing happens show nothing.
    assert!(
        counts.takeovers > 100 && counts.merges > 50 && counts.confirmed > 300,
        "{counts:?}"
    );
    assert!(
        counts.checkpoints > 100 && counts.closed > 20 && counts.resumed > 0,
        "{counts:?}"
    );
}

#[test]
fn faults_are_found_by_few_seeds() {
    for name in SOON {
        let fault = Fault::named(name);
        assert!(fault.is_some(), "{name}");
        let found = (1..=SOON_SEEDS).any(|seed| {
            Plan::of_seed(seed, STEPS)
                .run(fault, false)
                .violation
                .is_some()
        });
        assert!(found, "{name} is not found by {SOON_SEEDS} seeds");
    }
}

#[test]
fn a_run_is_a_function_of_its_seed_alone() {
    for seed in 1..=10 {
        let first = Plan::of_seed(seed, STEPS).run(None, true);
        let second = Plan::of_seed(seed, STEPS).run(None, true);
        assert_eq!(first.trace, second.trace, "seed {seed}");
    }
}

#[test]
fn a_failing_run_is_made_smaller_and_still_fails() {
    let fault = Fault::named("gate-removed");
    let plan = (1..400)
        .map(|seed| Plan::of_seed(seed, STEPS))
        .find(|plan| plan.run(fault, false).violation.is_some());
    let Some(plan) = plan else {
        panic!("the gate's removal is not found");
    };
    let small = plan.shrink(fault, 400);
    assert!(
        small.steps.len() < plan.steps.len() / 2,
        "{} steps",
        small.steps.len()
    );
    assert!(small.run(fault, false).violation.is_some());
}
