//! What cannot work: each is refused in words that name the thing and the remedy, with an exit
//! status, and leaves volume and region as they were.

mod environment;
mod regions;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::bench::{NO_CHECKPOINT, options};
use super::with_lab;
use crate::lab::{AgentAction, AwaitedState, Lab, NodeName, Options, Service};

use super::bench::LIMIT;
use NodeName::{A, B};

/// Small, so that copies and checksums of it are quick.
const REGION: &str = "region_bytes = \"16MiB\"";
const CONFIG: &str = "/etc/twinwrite/twinwrite.toml";
/// An agent that is still there then was not refused.
const REFUSED_WITHIN_S: u64 = 30;

pub(super) fn run() -> Result<()> {
    let options = Options {
        service: Service::Nothing,
        ..options(&[], &[NO_CHECKPOINT, REGION])
    };
    with_lab("bad_input", options, |lab| {
        environment::configurations(lab)?;
        environment::hosts(lab)?;
        // The control: with nothing wrong the same configuration protects the volume.
        for node in NodeName::ALL {
            lab.agent(node, AgentAction::Start)?;
        }
        lab.wait(A, AwaitedState::Protected, LIMIT)?;
        lab.wait(B, AwaitedState::Mirror, LIMIT)?;
        regions::run(lab)
    })
}

/// A command that must fail by itself and say all of `words`; gives what it said.
fn refused(lab: &Lab, node: NodeName, command: &str, words: &[&str]) -> Result<String> {
    let output = lab.exec(node, command, Duration::from_secs(REFUSED_WITHIN_S))?;
    let said = format!(
        "{}\n{}",
        output.text(),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(
        output.status != 124,
        "`{command}` on {node} goes on instead of failing: {said}"
    );
    ensure!(
        output.status != 0 && output.status < 126,
        "`{command}` on {node} has the status {}: {said}",
        output.status
    );
    for word in words {
        ensure!(
            said.contains(word),
            "`{command}` on {node} does not say `{word}`: {said}"
        );
    }
    ensure!(
        !said.contains("panicked"),
        "`{command}` on {node} panics: {said}"
    );
    Ok(said)
}

/// As [`refused`], for each case by its name.
fn each(
    cases: &[(&str, &str, &[&str])],
    mut try_it: impl FnMut(&str, &[&str]) -> Result<()>,
) -> Result<()> {
    for (name, case, words) in cases {
        try_it(case, words).with_context(|| (*name).to_owned())?;
    }
    Ok(())
}
