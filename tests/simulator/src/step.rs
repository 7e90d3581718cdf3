//! A run is a list of steps, each with its own dice: leaving some out makes a smaller run.

use crate::random::Random;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An application's thread goes on.
    Application,
    /// Dirty pages are written back.
    WriteBack,
    /// The journal commits.
    Commit,
    /// The disk's next requests fail.
    FailDisk,
    /// The owner's pump does a part of its turn.
    Pump,
    /// A whole turn.
    Turn,
    /// The filler goes on.
    Fill,
    /// The checkpointer goes on.
    Checkpoint,
    /// Posts land.
    Land,
    /// Completions come back.
    Complete,
    /// The keeper goes on.
    Keep,
    /// Time passes, hearts beat.
    Tick,
    /// The interconnect breaks.
    CutLink,
    /// And works again.
    MendLink,
    /// A node reaches the mailbox no more, or again.
    Mailbox,
    /// An agent dies.
    KillAgent,
    /// An agent is started.
    StartAgent,
    /// A machine loses its power.
    Crash,
    /// A machine boots.
    Boot,
    /// A machine is stopped, or goes on.
    Pause,
    /// Nothing but the cluster's work, until somebody serves.
    Settle,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What.
    pub kind: Kind,
    /// Its dice.
    pub dice: u64,
    /// Where.
    node: u8,
}

/// How often each kind happens, of all; the first column is a quiet run's, the second a rough one's.
const WEIGHTS: &[(Kind, [u32; 2])] = &[
    (Kind::Application, [420, 420]),
    (Kind::WriteBack, [30, 60]),
    (Kind::Commit, [8, 16]),
    (Kind::FailDisk, [0, 3]),
    (Kind::Pump, [110, 110]),
    (Kind::Turn, [60, 40]),
    (Kind::Fill, [50, 40]),
    (Kind::Checkpoint, [60, 60]),
    (Kind::Land, [90, 80]),
    (Kind::Complete, [70, 60]),
    (Kind::Keep, [25, 30]),
    (Kind::Tick, [6, 10]),
    (Kind::CutLink, [0, 3]),
    (Kind::MendLink, [6, 5]),
    (Kind::Mailbox, [0, 2]),
    (Kind::KillAgent, [1, 4]),
    (Kind::StartAgent, [8, 12]),
    (Kind::Crash, [1, 3]),
    (Kind::Boot, [3, 5]),
    (Kind::Pause, [0, 3]),
    (Kind::Settle, [2, 2]),
];

impl Step {
    /// A step.
    pub const fn new(kind: Kind, node: usize, dice: u64) -> Self {
        Self {
            kind,
            dice,
            node: node as u8,
        }
    }

    /// 0: on the node that has the volume; 1: on the other one.
    pub const fn node(&self) -> usize {
        self.node as usize & 1
    }
}

/// The steps of a run.
pub fn steps(random: &mut Random, count: usize) -> Vec<Step> {
    let rough = usize::from(random.chance(60));
    let weights: Vec<(Kind, u32)> = WEIGHTS
        .iter()
        .map(|(kind, weights)| {
            // Each run has its own habits.
            let weight = weights[rough] * (25 + random.below(150) as u32) / 100;
            let never =
                random.chance(15) && !matches!(kind, Kind::Application | Kind::Pump | Kind::Keep);
            (*kind, if never { 0 } else { weight })
        })
        .collect();
    let total: u32 = weights.iter().map(|(_, weight)| weight).sum();
    let mut steps = Vec::with_capacity(count + 2);
    // Nearly every run first comes to a protected volume.
    steps.push(Step::new(Kind::Settle, 0, random.next()));
    for _ in 0..count {
        let mut at = random.below(total as usize) as u32;
        let kind = weights.iter().find(|(_, weight)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        let kind = kind.map_or(Kind::Application, |(kind, _)| *kind);
        let of_owner = matches!(
            kind,
            Kind::Application
                | Kind::WriteBack
                | Kind::Commit
                | Kind::Pump
                | Kind::Turn
                | Kind::Fill
                | Kind::Checkpoint
                | Kind::Land
                | Kind::Complete
        );
        let late = kind == Kind::Land && random.chance(25);
        let other = late || !of_owner && random.chance(45);
        steps.push(Step::new(kind, usize::from(other), random.next()));
    }
    // And ends with its owner's death.
    steps.push(Step::new(Kind::Crash, 0, random.next()));
    steps.push(Step::new(Kind::Settle, 0, random.next()));
    steps
}
