//! What happens to the mirroring before the power goes.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::lab::{Lab, NodeName};
use crate::random::Random;

/// A disturbance of the owner's mirroring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Disturbance {
    /// None.
    Nothing,
    /// The wire is cut.
    LinkCut,
    /// Every packet of the owner is late.
    LinkDelayed {
        /// By so much.
        delay_ms: u64,
    },
    /// The owner's packets crawl.
    LinkSlow {
        /// So many kilobits a second.
        rate_kbit: u64,
    },
    /// The owner's agent gets SIGSTOP.
    AgentStopped,
    /// The owner's agent gets SIGKILL.
    AgentKilled,
}

/// When what happens in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// What happens.
    pub disturbance: Disturbance,
    /// The applications go on so long before it.
    pub before_ms: u64,
    /// The power goes so long after both.
    pub after_ms: u64,
}

impl Schedule {
    /// A seeded one. The peer of a stopped or killed agent fences its node after three seconds.
    #[must_use]
    pub fn any(random: &mut Random) -> Self {
        let (disturbance, most_ms) = match random.below(100) {
            0..=8 => (Disturbance::Nothing, 2000),
            9..=38 => (Disturbance::LinkCut, 3500),
            39..=48 => {
                let delay_ms = 50 + random.below(900);
                (Disturbance::LinkDelayed { delay_ms }, 3000)
            }
            49..=58 => {
                let rate_kbit = 40 + random.below(400);
                (Disturbance::LinkSlow { rate_kbit }, 3000)
            }
            59..=79 => (Disturbance::AgentStopped, 2500),
            _ => (Disturbance::AgentKilled, 2500),
        };
        // Mostly all that is confirmed is confirmed after the disturbance.
        let before_ms = match random.below(3) {
            0 => random.below(600),
            _ => 0,
        };
        Self {
            disturbance,
            before_ms,
            after_ms: 150 + random.below(most_ms),
        }
    }

    /// The wire is cut for so long that the epoch has ended since long.
    #[must_use]
    pub fn exposed_for(time: Duration) -> Self {
        Self {
            disturbance: Disturbance::LinkCut,
            before_ms: 0,
            after_ms: time.as_millis() as u64,
        }
    }
}

impl Disturbance {
    /// Brings it about.
    pub(super) fn begin(self, lab: &Lab, owner: NodeName) -> Result<()> {
        let agent = "$(cat /run/twinwrite-agent.pid)";
        let command = match self {
            Self::Nothing => return Ok(()),
            Self::LinkCut => return lab.cut_link().map(drop),
            Self::LinkDelayed { delay_ms } => {
                format!("tc qdisc replace dev eth0 root netem delay {delay_ms}ms limit 100000")
            }
            Self::LinkSlow { rate_kbit } => {
                format!("tc qdisc replace dev eth0 root netem rate {rate_kbit}kbit limit 100000")
            }
            Self::AgentStopped => format!("kill -STOP {agent}"),
            Self::AgentKilled => format!("kill -KILL {agent}"),
        };
        lab.run(owner, &command).map(drop)
    }

    /// Mends what does not end with the owner.
    pub(super) fn end(self, lab: &Lab) -> Result<()> {
        match self {
            Self::LinkCut => lab.heal_link().map(drop),
            _ => Ok(()),
        }
    }
}
