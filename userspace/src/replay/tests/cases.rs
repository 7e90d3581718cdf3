//! Random cases on the model.

use std::collections::BTreeSet;

use super::crash::{Crash, crash, state_after};
use super::model::Model;
use super::oracle::{Oracle, Touched, tree};
use super::treelog;
use super::world::{Event, Op, Random, World};
use crate::ids::Identity;
use crate::replay::apply::apply_to;
use crate::replay::plan::Plan;
use crate::replay::{Outcome, ReplayError, plan};

pub(super) const ROOT: Identity = Identity {
    ino: 2,
    generation: 0,
};

pub(super) fn replay(plan: &Plan<'_>, disk: &mut Model) -> Result<Outcome, ReplayError> {
    apply_to(plan, disk, &mut |_| {})
}

/// A history with a cut in it.
pub(super) struct Case<'w> {
    pub(super) world: World<'w>,
    /// Events before the cut.
    pub(super) cut: usize,
    /// The sentinel's S.
    pub(super) durable: usize,
    /// Record at which the region's head is.
    pub(super) head: usize,
}

impl<'w> Case<'w> {
    /// Runs random operations, cuts, and runs some more.
    pub(super) fn random(mut world: World<'w>, before: usize, after: usize) -> Self {
        let checkpoint_at = world.random.below(before + 1);
        while world.events.len() < before {
            if world.events.len() == checkpoint_at {
                world.run(Op::Checkpoint);
            } else if let Some(op) = world.choose() {
                world.run(op);
            }
        }
        let cut = world.events.len();
        while world.events.len() < cut + after {
            if let Some(op) = world.choose() {
                world.run(op);
            }
        }
        Self::with_cut(world, cut)
    }

    /// Cuts the same history elsewhere; not before its last checkpoint.
    pub(super) fn random_cut(self) -> Self {
        let mut world = self.world;
        let is_checkpoint = |event: &Event| event.op == Op::Checkpoint;
        let least = world
            .events
            .iter()
            .rposition(is_checkpoint)
            .map_or(0, |index| index + 1);
        let cut = least + world.random.below(world.events.len() - least + 1);
        Self::with_cut(world, cut)
    }

    /// Takes a finished history apart at `cut`.
    pub(super) fn with_cut(mut world: World<'w>, cut: usize) -> Self {
        let is_checkpoint = |event: &Event| event.op == Op::Checkpoint;
        let checkpoint = world.events[..cut].iter().rposition(is_checkpoint);
        let durable = checkpoint.map_or(0, |index| world.events[index].records);
        // What a checkpoint covers may be purged or not, except what is about nameless inodes.
        let nameless = checkpoint.is_some_and(|index| {
            !state_after(world.model.root, &world.events, index + 1)
                .held
                .is_empty()
        });
        let head = if nameless {
            0
        } else {
            world.random.below(durable + 1)
        };
        Case {
            world,
            cut,
            durable,
            head,
        }
    }

    /// What happened, one operation a line.
    pub(super) fn history(&self) -> String {
        let mut text = format!("S {}, head {}\n", self.durable, self.head);
        for (index, event) in self.world.events.iter().enumerate() {
            if index == self.cut {
                text.push_str("--- cut\n");
            }
            let line = format!("{} {:?} {:?}\n", event.records, event.op, event.made);
            text.push_str(&line.replace("Identity ", ""));
        }
        text
    }

    pub(super) fn records_at_cut(&self) -> usize {
        match self.cut.checked_sub(1) {
            Some(index) => self.world.events[index].records,
            None => 0,
        }
    }

    pub(super) fn plan(&self) -> Plan<'_> {
        let input = self
            .world
            .log
            .input(self.head, self.records_at_cut(), self.durable);
        plan(input).expect("an own log can be planned")
    }

    pub(super) fn state(&self, events: usize) -> Model {
        state_after(self.world.model.root, &self.world.events, events)
    }

    /// What operations after the cut may have left on the disk.
    pub(super) fn touched(&self, until: usize, landed: &dyn Fn(usize) -> bool) -> Touched {
        let events = &self.world.events[..until];
        Touched::by(events, self.cut, landed, &|count| self.state(count))
    }

    /// Directories that an EXCHANGE before the cut swapped in as the other one: XFS changes their
    /// modification time, and the record has no room to tell it.
    pub(super) fn exchanged_directories(&self) -> BTreeSet<Identity> {
        let mut directories = BTreeSet::new();
        for (index, event) in self.world.events[..self.cut].iter().enumerate() {
            if let Op::Exchange { to, .. } = &event.op {
                directories.extend(self.state(index).entries(to.0).get(&to.1));
            }
        }
        let model = self.state(self.cut);
        directories.retain(|inode| {
            model
                .nodes
                .get(inode)
                .is_some_and(|node| node.is_directory())
        });
        directories
    }

    /// Checks a replay's result against the guarantees.
    pub(super) fn check(
        &self,
        before: &Model,
        got: &Model,
        touched: &Touched,
    ) -> Result<(), String> {
        let (head, last) = (self.durable, self.records_at_cut());
        let mut known: BTreeSet<Identity> = BTreeSet::from([self.world.model.root]);
        known.extend(
            self.world.events[..self.cut]
                .iter()
                .filter_map(|event| event.made),
        );
        let can_be_made = self.can_be_made();
        let oracle = Oracle {
            want: &self.state(self.cut),
            before,
            got,
            touched,
            mentioned: &self.world.log.mentioned(head, last),
            can_be_made: &can_be_made,
            known: &known,
        };
        oracle.check()
    }

    /// Inodes that the merged records made, and no full-range mark proved.
    fn can_be_made(&self) -> BTreeSet<Identity> {
        let mut can = BTreeSet::new();
        let mut made_at = std::collections::BTreeMap::new();
        for (index, event) in self.world.events[..self.cut].iter().enumerate() {
            let merged = event.records > self.durable;
            match (&event.op, event.made) {
                (Op::Create { .. }, Some(made)) if merged => {
                    can.insert(made);
                    made_at.insert(made, index);
                }
                (Op::Link { file, .. }, _) if merged && self.was_tmpfile(*file, index) => {
                    can.insert(*file);
                    made_at.insert(*file, index);
                }
                (
                    Op::Fsync {
                        inode,
                        start: 0,
                        last,
                        entered,
                        ..
                    },
                    _,
                ) if *last >= i64::MAX as u64 - 1
                    && made_at.get(inode).is_some_and(|made| made < entered) =>
                {
                    can.remove(inode);
                }
                _ => {}
            }
        }
        can
    }

    fn was_tmpfile(&self, file: Identity, index: usize) -> bool {
        self.state(index).nodes[&file].links == 0
    }
}

/// How many of the disks are such as btrfs leaves.
const TREE_LOG_PERCENT: usize = 30;

fn run_one(seed: u64) -> Result<Ran, String> {
    let mut shape = Random(seed ^ 0x5eed);
    let before = 1 + shape.below(45);
    let after = if shape.chance(40) { 0 } else { shape.below(20) };
    let case = Case::random(World::new(seed, ROOT, None), before, after);
    crash_and_replay(&case, &mut shape)
        .map(|()| Ran::Merged)
        .map_err(|e| format!("{e}\n{}\n{}", case.history(), case.plan()))
}

fn crash_and_replay(case: &Case<'_>, shape: &mut Random) -> Result<(), String> {
    let plan = case.plan();
    for _ in 0..2 {
        let until = case.cut + shape.below(case.world.events.len() - case.cut + 1);
        let events = &case.world.events[..until];
        let Crash { disk, landed } = if shape.chance(TREE_LOG_PERCENT) {
            treelog::crash(ROOT, events, shape)
        } else {
            crash(ROOT, events, shape)
        };
        let touched = case.touched(until, &|index| landed.contains(&index));
        let mut done = disk.clone();
        let outcome = replay(&plan, &mut done).map_err(|e| format!("replay failed: {e}"))?;
        case.check(&disk, &done, &touched)
            .map_err(|e| format!("{e}\n{outcome}"))?;
        if touched.is_empty() && !outcome.recovered.is_empty() {
            return Err(format!("displaced without need:\n{outcome}"));
        }
        twice(&plan, &done)?;
        interrupted(case, &plan, &disk, &done, &touched, shape)?;
    }
    Ok(())
}

/// A second replay changes nothing.
fn twice(plan: &Plan<'_>, done: &Model) -> Result<(), String> {
    let mut again = done.clone();
    replay(plan, &mut again).map_err(|e| format!("second replay failed: {e}"))?;
    same(&tree(done), &tree(&again)).map_err(|e| format!("the second replay changed: {e}"))
}

fn same(one: &[String], two: &[String]) -> Result<(), String> {
    match one.iter().zip(two).find(|(one, two)| one != two) {
        Some((one, two)) => Err(format!("\n  {one}\n  {two}")),
        None if one.len() != two.len() => Err(format!("{} and {} paths", one.len(), two.len())),
        None => Ok(()),
    }
}

/// Interrupted after some step, with all of it or only a part on the disk, and begun again.
fn interrupted(
    case: &Case<'_>,
    plan: &Plan<'_>,
    disk: &Model,
    done: &Model,
    touched: &Touched,
    random: &mut Random,
) -> Result<(), String> {
    let steps = done.steps - disk.steps;
    let all = random.chance(10);
    let stops: Vec<u64> = if all {
        (0..steps).collect()
    } else {
        (0..3).map(|_| random.next() % steps).collect()
    };
    for stop in stops {
        let code = if random.chance(30) {
            libc::ENOSPC
        } else {
            libc::EINTR
        };
        let mut half = disk.clone();
        half.budget = Some((stop, code));
        let error = match replay(plan, &mut half) {
            Ok(_) => return Err(format!("not interrupted at {stop}")),
            Err(error) => error,
        };
        if matches!(error, ReplayError::Full(_)) != (code == libc::ENOSPC) {
            return Err(format!("the wrong error: {error}"));
        }
        half.budget = None;
        let lost_bytes = random.chance(50);
        if lost_bytes {
            lose_unsynced_bytes(disk, &mut half, random);
        }
        let outcome = replay(plan, &mut half)
            .map_err(|e| format!("interrupted at {stop}, begun again: {e}"))?;
        let context = |e| format!("interrupted at {stop} of {steps}, begun again: {e}\n{outcome}");
        case.check(disk, &half, touched).map_err(context)?;
        if touched.is_empty() {
            same(&tree(done), &tree(&half)).map_err(context)?;
        }
    }
    Ok(())
}

/// A power cut in mid-replay: its name operations stay, the bytes it wrote may not.
fn lose_unsynced_bytes(disk: &Model, half: &mut Model, random: &mut Random) {
    for (identity, node) in &mut half.nodes {
        if !random.chance(50) || node.is_directory() {
            continue;
        }
        match disk.nodes.get(identity) {
            Some(old) if matches!(old.body, super::model::Body::File(_)) => {
                node.body = old.body.clone();
                (node.mode, node.uid, node.gid) = (old.mode, old.uid, old.gid);
                node.mtime_ns = old.mtime_ns;
                // An ACL and the mode are one.
                node.attributes.clone_from(&old.attributes);
            }
            None if matches!(node.body, super::model::Body::File(_)) => {
                node.body = super::model::Body::File(Vec::new());
            }
            _ => {}
        }
    }
}

/// What came of a case without a difference.
pub(super) enum Ran {
    Merged,
    /// The kernel's own recovery failed, so there was nothing to merge into.
    NotRecovered,
}

/// Runs as many seeds as the variable says, or the one of `TWINWRITE_SEED`, and tells what came of them.
pub(super) fn run_cases(
    on: &str,
    test: &str,
    variable: &str,
    default: u64,
    mut run: impl FnMut(u64) -> Result<Ran, String>,
) {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let seeds = match number("TWINWRITE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number(variable).unwrap_or(default),
    };
    let (count, began) = (seeds.end - seeds.start, std::time::Instant::now());
    let mut failures = Vec::new();
    let (mut merged, mut differences) = (0, 0);
    for seed in seeds {
        match run(seed) {
            Ok(Ran::Merged) => merged += 1,
            Ok(Ran::NotRecovered) => {}
            Err(text) => {
                differences += 1;
                if failures.len() < 3 {
                    failures.push(format!(
                        "TWINWRITE_SEED={seed} cargo test -p twinwrite --lib {test}: {text}"
                    ));
                }
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let not_recovered = count - merged - differences;
    let others = match not_recovered {
        0 => String::new(),
        _ => format!(", {not_recovered} more that the kernel cannot mount after the power cut"),
    };
    let cases = count - not_recovered;
    println!("merge on {on}: {cases} cases, {seconds:.1} s, {differences} differences{others}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn random_histories_end_as_they_were_at_the_cut() {
    let test = "random_histories_end_as_they_were_at_the_cut";
    run_cases("the model", test, "TWINWRITE_CASES", 1500, run_one);
}
