//! Every way in which an owner may die while it begins and closes epochs, judged by the real cores.
//!
//! A run is a tape of choices: which step fails, how, where the agent is restarted. All tapes with at
//! most [`DEVIATIONS`] choices other than "it works" are played. After every step of the run the
//! machine is thought dead, and the words it leaves are judged.

use super::*;
use crate::durability::closing::{Closing, Next, Proven, Step};
use crate::ids::RingPos;
use crate::mirror::gate::{Gate, OpenTo};

const DEVIATIONS: usize = 3;

/// A core that is wrong on purpose, or rather a driver that uses it wrongly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// The gates are opened as soon as the mailbox knows.
    GatesBeforeSentinel,
    /// A checkpoint that failed is reported as done.
    FailureTakenForProof,
    /// The mirror is told first of all.
    MirrorFirst,
    /// What is captured opens the gates, not what is mirrored.
    CapturedOpens,
    /// A new epoch begins although the one before is not closed.
    NotClosedBefore,
}

/// The choices of one run.
struct Tape {
    choices: Vec<usize>,
    widths: Vec<usize>,
    at: usize,
}

impl Tape {
    /// Choice 0 is "it works".
    fn choose(&mut self, width: usize) -> usize {
        if self.at == self.choices.len() {
            self.choices.push(0);
            self.widths.push(width);
        }
        let chosen = self.choices[self.at];
        self.at += 1;
        chosen
    }

    /// The next tape in order; `None` after the last.
    fn next(mut self) -> Option<Self> {
        while let Some(last) = self.choices.pop() {
            let width = self.widths.pop().unwrap();
            let deviations = self.choices.iter().filter(|choice| **choice > 0).count();
            if last + 1 < width && deviations < DEVIATIONS {
                self.choices.push(last + 1);
                self.widths.push(width);
                return Some(Self { at: 0, ..self });
            }
        }
        None
    }
}

/// What survives the owner, and what is asked of it.
struct World {
    mailbox: OwnerWord,
    sentinel: Option<Sentinel>,
    /// Written and not proven: after a crash it is there or not.
    sentinel_unproven: Option<Sentinel>,
    /// Epoch, state, last record.
    region: Option<(u64, bool, u64)>,
    gate: Gate,
    /// 64 bytes each; `captured` has a mark at its end that waits at the gate.
    captured: u64,
    mirrored: u64,
    /// The epoch whose region lacks a mark that was confirmed.
    lacks_confirmed: Option<u64>,
    epoch: u64,
    checks: u64,
}

impl World {
    fn new() -> Self {
        let mut gate = Gate::left(OpenTo::of_word(0));
        gate.open(&Proven::without_sentinel());
        Self {
            mailbox: owner(0, EpochState::None),
            sentinel: None,
            sentinel_unproven: None,
            region: None,
            gate,
            captured: 64,
            mirrored: 0,
            lacks_confirmed: None,
            epoch: 0,
            checks: 0,
        }
    }

    /// The mark at the end of the ring waits; the gate may let it pass.
    fn see_gate(&mut self) {
        let end = RingPos(self.captured);
        if self.captured > self.mirrored && self.gate.open_to().admits(end) {
            self.lacks_confirmed = self.region.map(|(epoch, ..)| epoch);
        }
    }

    /// The machine dies here: judged with every state that its disks may show.
    fn dies(&mut self, mailbox_in_write: bool) -> Vec<Ruling> {
        self.see_gate();
        let here = self
            .region
            .map_or(RegionWord::Missing, |(epoch, closed, last)| {
                region(epoch, closed, last)
            });
        let mut rulings = Vec::new();
        let shown = [self.sentinel.clone(), self.sentinel_unproven.clone()];
        let unproven = usize::from(self.sentinel_unproven.is_some());
        for on_volume in &shown[..=unproven] {
            for (owner, region) in [
                (Some(self.mailbox.clone()), here.clone()),
                (Some(self.mailbox.clone()), RegionWord::Missing),
                (None, here.clone()),
            ] {
                if owner.is_none() && !mailbox_in_write {
                    continue;
                }
                let words = Words {
                    owner,
                    sentinel: on_volume
                        .clone()
                        .map_or(SentinelWord::Missing, SentinelWord::Says),
                    region,
                    merging: None,
                    mounted_uuid: None,
                    unmounted: false,
                };
                let ruling = words.ruling();
                let of_region = words.region_epoch();
                let merged = matches!(ruling, Ruling::Merge { .. });
                assert!(
                    !(merged && self.lacks_confirmed == Some(of_region.0)),
                    "a confirmed write is undone: {words}"
                );
                assert!(
                    !matches!(ruling, Ruling::Ask(_) | Ruling::Refuse(_)),
                    "a crash leaves words that contradict each other: {words}: {ruling:?}"
                );
                self.checks += 1;
                rulings.push(ruling);
            }
        }
        rulings
    }

    fn write_sentinel(&mut self, tape: &mut Tape, written: Sentinel) -> Result<(), String> {
        self.sentinel_unproven = Some(written.clone());
        self.dies(false);
        match tape.choose(3) {
            0 => {
                (self.sentinel, self.sentinel_unproven) = (Some(written), None);
                Ok(())
            }
            // The sync failed, before the sentinel or at it.
            1 => {
                self.sentinel_unproven = None;
                Err("EIO".into())
            }
            _ => Err("EIO".into()),
        }
    }

    fn write_mailbox(
        &mut self,
        tape: &mut Tape,
        epoch: u64,
        state: EpochState,
    ) -> Result<(), String> {
        self.dies(true);
        let chosen = tape.choose(3);
        // An error may be told although the device has it.
        if chosen != 1 {
            (self.mailbox.epoch, self.mailbox.state) = (Epoch(epoch), state);
        }
        if chosen == 0 {
            Ok(())
        } else {
            Err("EIO".into())
        }
    }

    /// Begins an epoch and mirrors for a while; what has opened is to be closed in any case.
    fn run_epoch(&mut self, tape: &mut Tape, fault: Fault) {
        self.gate.shut(RingPos(self.captured));
        self.see_gate();
        // What passed until here is nobody's record: the epoch begins behind it.
        self.mirrored = self.captured;
        self.epoch += 1;
        let epoch = self.epoch;
        self.region = Some((epoch, false, 0));
        self.captured += 64;
        self.dies(false);
        self.mirrored = self.captured;
        self.gate.begin(RingPos(self.captured));
        self.captured += 64;
        self.dies(false);
        if self
            .write_sentinel(tape, sentinel(epoch, 0, false))
            .is_err()
        {
            return;
        }
        self.dies(false);
        if self.write_mailbox(tape, epoch, EpochState::Open).is_err() {
            return;
        }
        let rulings = self.dies(false);
        assert!(rulings.contains(&Ruling::Nothing(
            "everything up to record 0 is durable, the region ends with 0".into()
        )));
        for record in 1..=2 {
            self.mirrored = self.captured;
            self.captured += 64;
            if let Some((_, _, last)) = &mut self.region {
                *last = record;
            }
            let shown = if fault == Fault::CapturedOpens {
                self.captured
            } else {
                self.mirrored
            };
            self.gate.mirrored(RingPos(shown), RingPos(0));
            let rulings = self.dies(false);
            assert!(rulings.contains(&Ruling::Merge { after: Seq(0) }));
        }
    }

    /// Closes it; whether it came to its end. The agent may be restarted at any step.
    fn close(&mut self, tape: &mut Tape, fault: Fault) -> bool {
        let epoch = self.epoch;
        self.gate.hold();
        let last = self.region.map_or(0, |(_, _, last)| last);
        let mut closing = Closing::new(Epoch(epoch), Seq(last), "test");
        if fault == Fault::MirrorFirst {
            self.region = Some((epoch, true, last));
            self.dies(false);
        }
        let (mut now_us, mut late) = (0, Vec::new());
        for _ in 0..12 {
            self.dies(false);
            if tape.choose(2) == 1 {
                self.gate = Gate::left(self.gate.open_to());
                return false;
            }
            match closing.next(now_us) {
                Next::Begin(step) => {
                    let result = match step {
                        Step::Mailbox => self.write_mailbox(tape, epoch, EpochState::Closed),
                        Step::Checkpoint => self.write_sentinel(tape, sentinel(epoch, last, true)),
                        Step::Mirror => match tape.choose(2) {
                            0 => {
                                self.region = Some((epoch, true, last));
                                Ok(())
                            }
                            _ => Err("silent".into()),
                        },
                    };
                    let is_late = result.is_ok() && step == Step::Mailbox && tape.choose(2) == 1;
                    if fault == Fault::GatesBeforeSentinel {
                        self.gate.open(&Proven::without_sentinel());
                    }
                    if is_late {
                        late.push(step);
                    } else if fault == Fault::FailureTakenForProof {
                        closing.ended(step, Ok(()), now_us);
                    } else {
                        closing.ended(step, result, now_us);
                    }
                }
                Next::OpenGates(proven) => self.gate.open(&proven),
                Next::Wait { until_us } if until_us == u64::MAX => {
                    for step in late.drain(..) {
                        closing.ended(step, Ok(()), now_us);
                    }
                }
                Next::Wait { until_us } => now_us = until_us,
                Next::Closed => return true,
            }
        }
        false
    }
}

/// Plays one tape: two epochs, the second begun only after the first is closed.
fn play(tape: &mut Tape, fault: Fault) -> u64 {
    let mut world = World::new();
    for _ in 0..2 {
        world.run_epoch(tape, fault);
        let tries = if fault == Fault::NotClosedBefore {
            1
        } else {
            4
        };
        let closed = (0..tries).any(|_| world.close(tape, fault));
        if !closed && fault != Fault::NotClosedBefore {
            // Everything failed for ever: then the gates are shut, or a closed sentinel is proven.
            let proven = world.sentinel.as_ref().is_some_and(|s| s.closed);
            assert!(proven || world.gate.open_to() != OpenTo::All);
            return world.checks;
        }
        if fault == Fault::None {
            assert_eq!(world.gate.open_to(), OpenTo::All, "closed and still shut");
        }
    }
    world.checks
}

fn play_all(fault: Fault) -> (u64, u64) {
    let mut tape = Some(Tape {
        choices: Vec::new(),
        widths: Vec::new(),
        at: 0,
    });
    let (mut runs, mut checks) = (0, 0);
    while let Some(mut playing) = tape {
        checks += play(&mut playing, fault);
        runs += 1;
        tape = playing.next();
    }
    (runs, checks)
}

#[test]
fn no_crash_at_any_step_undoes_what_was_confirmed_nor_asks_a_person() {
    let (runs, checks) = play_all(Fault::None);
    println!("{runs} runs, {checks} crashes judged");
    assert!(
        runs > 5_000 && checks > 100_000,
        "{runs} runs, {checks} crashes"
    );
}

#[test]
fn each_wrong_order_is_found() {
    let undone = "a confirmed write is undone";
    let contradict = "words that contradict each other";
    for (fault, seen_as) in [
        (Fault::GatesBeforeSentinel, undone),
        (Fault::FailureTakenForProof, contradict),
        (Fault::MirrorFirst, contradict),
        (Fault::CapturedOpens, undone),
        (Fault::NotClosedBefore, contradict),
    ] {
        let panic = std::panic::catch_unwind(|| play_all(fault)).unwrap_err();
        let told = panic.downcast_ref::<String>().unwrap();
        assert!(told.contains(seen_as), "{fault:?}: {told}");
    }
}
