//! The agents in the machines: starting, stopping, and waiting for what they report.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use super::config::{NodeName, VOLUME};
use super::{Lab, clock};
use crate::progress::tail;

const POLL_INTERVAL: Duration = Duration::from_millis(100);
const STATUS_LIMIT: Duration = Duration::from_secs(20);

/// What to do with an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AgentAction {
    /// Start it.
    Start,
    /// Ask it to end, and wait for that.
    Stop,
    /// SIGKILL, and wait until it is gone.
    Kill,
}

/// What to wait for in an agent's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AwaitedState {
    /// Protection: every change is captured and the lag is within its limit.
    Protected,
    /// Protection: a crash now may lose unflushed writes.
    Exposed,
    /// Protection: there is no mirror.
    Alone,
    /// Protection: the volume is not served until the cluster's question is answered.
    Suspended,
    /// Role: it has the volume mounted and serves it.
    Owner,
    /// Role: it holds the volume's region.
    Mirror,
    /// Role: neither.
    None,
    /// A takeover is complete and the volume is served.
    Serving,
}

impl AwaitedState {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// Whether an agent's status says so of the volume.
    fn is_in(self, status: &Value, volume: &str) -> bool {
        let volumes = status["volumes"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let Some(volume) = volumes.iter().find(|each| each["name"] == volume) else {
            return false;
        };
        let field = match self {
            Self::Protected | Self::Exposed | Self::Alone | Self::Suspended => "protection",
            Self::Owner | Self::Mirror | Self::None => "role",
            Self::Serving => return volume["takeover"]["serving"] == true,
        };
        volume[field] == self.name()
    }
}

impl Lab {
    /// Starts, stops or kills the agent of a machine.
    ///
    /// # Errors
    /// If it runs already, or does not run.
    pub fn agent(&self, node: NodeName, action: AgentAction) -> Result<()> {
        let verb = match action {
            AgentAction::Start => "start",
            AgentAction::Stop => "stop",
            AgentAction::Kill => "kill",
        };
        self.run(node, &format!("twinwrite-agent {verb}")).map(drop)
    }

    /// Whether the agent's process runs.
    ///
    /// # Errors
    /// If the machine is dead.
    pub fn agent_is_alive(&self, node: NodeName) -> Result<bool> {
        Ok(self
            .exec(node, "twinwrite-agent alive", STATUS_LIMIT)?
            .status
            == 0)
    }

    /// What `twinwrite status --json` says in a machine. Its exit status tells health, so only the
    /// text decides whether there was an answer.
    ///
    /// # Errors
    /// If there is none.
    pub fn agent_status(&self, node: NodeName) -> Result<Value> {
        let output = self.exec(node, "twinwrite status --json", STATUS_LIMIT)?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            format!("the agent of {node} gives no status: {said}")
        })
    }

    /// Waits until the agent of `node` reports `state`; gives the host's time then, milliseconds
    /// since 1970.
    ///
    /// # Errors
    /// At once if the machine dies, else after `limit`; the error holds what both nodes say.
    pub fn wait(&self, node: NodeName, state: AwaitedState, limit: Duration) -> Result<i64> {
        let deadline = Instant::now() + limit;
        loop {
            match self.agent_status(node) {
                Ok(status) if state.is_in(&status, VOLUME) => return Ok(clock::now_ms()),
                _ => {}
            }
            let ended = self.machine(node)?.ended;
            if let Some(end) = ended {
                bail!(
                    "machine {node} died ({}) before it was {}\n{}",
                    end.how,
                    state.name(),
                    self.explain()
                );
            }
            if Instant::now() >= deadline {
                let seconds = limit.as_secs();
                bail!(
                    "{node} is not {} after {seconds} s\n{}",
                    state.name(),
                    self.explain()
                );
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// What both nodes say, for a person who must find out why something did not happen.
    #[must_use]
    pub fn explain(&self) -> String {
        let mut text = String::new();
        for node in NodeName::ALL {
            let machine = match self.machine(node) {
                Ok(machine) => machine.ended.map_or("alive".to_owned(), |end| end.how),
                Err(error) => format!("{error:#}"),
            };
            let status = match self.agent_status(node) {
                Ok(status) => serde_json::to_string_pretty(&status).unwrap_or_default(),
                Err(error) => format!("{error:#}"),
            };
            let _ = write!(
                text,
                "--- {node}: machine {machine}; status:\n{status}\n--- {node}: end of {}:\n{}\n\
                 --- {node}: end of the console:\n{}\n",
                self.agent_log(node).display(),
                tail(&self.agent_log(node), 25),
                tail(&self.console_log(node), 8)
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::AwaitedState;
    use serde_json::json;

    #[test]
    fn a_state_is_found_in_its_own_field_only() {
        let status = json!({ "volumes": [
            { "name": "other", "role": "owner", "protection": "protected", "takeover": null },
            { "name": "vol0", "role": "mirror", "protection": "alone", "takeover": null },
        ]});
        assert!(AwaitedState::Mirror.is_in(&status, "vol0"));
        assert!(AwaitedState::Alone.is_in(&status, "vol0"));
        assert!(!AwaitedState::Owner.is_in(&status, "vol0"));
        assert!(!AwaitedState::Protected.is_in(&status, "vol0"));
        assert!(!AwaitedState::Serving.is_in(&status, "vol0"));
        assert!(!AwaitedState::Alone.is_in(&status, "missing"));
    }

    #[test]
    fn serving_is_a_complete_takeover() {
        let status = |serving: bool| json!({ "volumes": [{ "name": "vol0", "takeover": { "serving": serving } }] });
        assert!(AwaitedState::Serving.is_in(&status(true), "vol0"));
        assert!(!AwaitedState::Serving.is_in(&status(false), "vol0"));
    }
}
