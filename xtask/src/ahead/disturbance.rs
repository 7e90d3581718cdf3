//! What happens to the mirroring before the power goes.

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use crate::lab::{AgentAction, Lab, NodeName};
use crate::random::Random;

/// Kinds of disturbance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disturbance {
    /// None.
    Nothing,
    /// The wire is cut.
    LinkCut,
    /// The wire is cut for so long that the epoch has ended since long.
    LinkCutForLong,
    /// Every packet of the owner is late.
    LinkDelayed,
    /// The owner's packets crawl.
    LinkSlow,
    /// The owner's agent gets SIGSTOP.
    AgentStopped,
    /// The owner's agent gets SIGKILL.
    AgentKilled,
    /// The mirror's agent gets SIGKILL right before the cut, and somebody mounts the volumes by hand and
    /// overwrites what is there, before it comes back with the region it left.
    MountedElsewhere,
}

/// What happens in a round, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// What happens.
    pub disturbance: Disturbance,
    /// How late the packets are, or how many kilobits a second they make.
    pub amount: u64,
    /// The applications go on so long before it.
    pub before_ms: u64,
    /// The power goes so long after both.
    pub after_ms: u64,
}

/// Of 100 rounds so many.
const SHARES: [(Disturbance, u64); 8] = [
    (Disturbance::Nothing, 9),
    (Disturbance::LinkCut, 30),
    (Disturbance::LinkDelayed, 10),
    (Disturbance::LinkSlow, 10),
    (Disturbance::AgentStopped, 21),
    (Disturbance::AgentKilled, 20),
    (Disturbance::LinkCutForLong, 0),
    (Disturbance::MountedElsewhere, 0),
];
/// Every so many rounds, one of each of the kinds that take long.
const LONG_EVERY: u64 = 12;

impl Disturbance {
    /// A seeded kind for the round of that number, of those that are `wanted`.
    #[must_use]
    pub fn any(random: &mut Random, number: u64, wanted: impl Fn(Self) -> bool) -> Self {
        let long = match number % LONG_EVERY {
            4 => Some(Self::LinkCutForLong),
            8 => Some(Self::MountedElsewhere),
            _ => None,
        };
        if let Some(kind) = long.filter(|kind| wanted(*kind)) {
            return kind;
        }
        let of: Vec<(Self, u64)> = SHARES
            .into_iter()
            .filter(|(kind, _)| wanted(*kind))
            .collect();
        let all: u64 = of.iter().map(|(_, share)| share).sum();
        let mut drawn = random.below(all);
        for (kind, share) in &of {
            if drawn < *share {
                return *kind;
            }
            drawn -= share;
        }
        of.first().map_or(Self::Nothing, |(kind, _)| *kind)
    }

    /// When what happens, by seed. The peer of a stopped or killed agent fences its node after three
    /// seconds, so the cut comes before.
    #[must_use]
    pub fn schedule(self, random: &mut Random) -> Schedule {
        let (least_ms, most_ms) = match self {
            Self::Nothing => (100, 2000),
            Self::LinkCut => (150, 3500),
            Self::LinkCutForLong => (60_000, 90_000),
            Self::LinkDelayed | Self::LinkSlow => (150, 3000),
            Self::AgentStopped | Self::AgentKilled => (150, 2500),
            Self::MountedElsewhere => (0, 1),
        };
        // Behind the gate nothing is confirmed after some of the disturbances: what is confirmed right
        // before them is what the mirror lacks.
        let before_ms = match (self, random.below(3)) {
            (Self::MountedElsewhere, _) | (_, 1 | 2) => 200 + random.below(1400),
            _ => 0,
        };
        Schedule {
            disturbance: self,
            amount: match self {
                Self::LinkDelayed => 50 + random.below(900),
                Self::LinkSlow => 40 + random.below(400),
                _ => 0,
            },
            before_ms,
            after_ms: least_ms + random.below(most_ms - least_ms),
        }
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }
}

impl Schedule {
    /// Brings the disturbance about.
    pub(super) fn begin(self, lab: &Lab, owner: NodeName) -> Result<()> {
        let agent = "$(cat /run/twinwrite-agent.pid)";
        let amount = self.amount;
        let netem = "tc qdisc replace dev eth0 root netem limit 100000";
        let command = match self.disturbance {
            Disturbance::Nothing => return Ok(()),
            Disturbance::LinkCut | Disturbance::LinkCutForLong => {
                return lab.cut_link().map(drop);
            }
            Disturbance::MountedElsewhere => return lab.agent(owner.peer(), AgentAction::Kill),
            Disturbance::LinkDelayed => format!("{netem} delay {amount}ms"),
            Disturbance::LinkSlow => format!("{netem} rate {amount}kbit"),
            Disturbance::AgentStopped => format!("kill -STOP {agent}"),
            Disturbance::AgentKilled => format!("kill -KILL {agent}"),
        };
        lab.run(owner, &command).map(drop)
    }

    /// Mends what does not end with the owner.
    pub(super) fn end(self, lab: &Lab) -> Result<()> {
        match self.disturbance {
            Disturbance::LinkCut | Disturbance::LinkCutForLong => lab.heal_link().map(drop),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_comes_and_the_same_seed_brings_the_same() {
        let drawn = || {
            let mut random = Random::new(3);
            (1..=100)
                .map(|number| Disturbance::any(&mut random, number, |_| true).schedule(&mut random))
                .collect::<Vec<_>>()
        };
        let kinds: BTreeSet<Disturbance> = drawn().iter().map(|each| each.disturbance).collect();
        assert_eq!(kinds.len(), Disturbance::value_variants().len());
        assert_eq!(drawn(), drawn());
        for one in [Disturbance::MountedElsewhere, Disturbance::LinkSlow] {
            let mut random = Random::new(4);
            assert!((1..=40).all(|n| Disturbance::any(&mut random, n, |kind| kind == one) == one));
            assert!((1..=40).all(|n| Disturbance::any(&mut random, n, |kind| kind != one) != one));
        }
    }
}
