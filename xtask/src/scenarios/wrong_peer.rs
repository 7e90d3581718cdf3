//! A node that answers at the peer's address and is not the peer.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::bench::{LIMIT, log_mark, logged, options, throughout, until, volume};
use super::with_lab;
use crate::lab::{AgentAction, AwaitedState, Lab, NodeName, Options, Service};

use NodeName::{A, B};

const WATCHED_FOR: Duration = Duration::from_secs(6);
const CONFIG: &str = "/etc/twinwrite/twinwrite.toml";

/// What is wrong with B, how it is brought about, and what both must say of it.
struct Wrong {
    what: &'static str,
    make: &'static str,
    words: &'static [&'static str],
}

const WRONGS: &[Wrong] = &[
    Wrong {
        what: "another cluster's name",
        make: "sed -i 's/^name = \"lab\"/name = \"elsewhere\"/'",
        words: &["cluster", "elsewhere"],
    },
    Wrong {
        what: "another node's name",
        make: "hostname c; sed -i 's/^name = \"b\"/name = \"c\"/; s/^mirror = \"b\"/mirror = \"c\"/'",
        words: &["`c`", "not the peer"],
    },
];

pub(super) fn run() -> Result<()> {
    let options = Options {
        service: Service::Nothing,
        ..options(&[], &[])
    };
    with_lab("wrong_peer", options, |lab| {
        lab.agent(A, AgentAction::Start)?;
        lab.wait(A, AwaitedState::Owner, LIMIT)?;
        for wrong in WRONGS {
            refused(lab, wrong).with_context(|| format!("B has {}", wrong.what))?;
        }
        // The control: what was refused was the name and nothing else.
        lab.agent(B, AgentAction::Start)?;
        lab.wait(A, AwaitedState::Protected, LIMIT).map(drop)
    })
}

fn refused(lab: &Lab, wrong: &Wrong) -> Result<()> {
    // A mailbox of its own, or the slots in the shared one would stop it before it is asked.
    lab.run(
        B,
        &format!(
            "cp {CONFIG} /tmp/right.toml; truncate -s 16M /var/lib/twinwrite/mailbox; {} {CONFIG}; \
             sed -i 's|^mailbox = .*|mailbox = \"/var/lib/twinwrite/mailbox\"|' {CONFIG}",
            wrong.make
        ),
    )?;
    let marks = NodeName::ALL.map(|node| log_mark(lab, node));
    lab.agent(B, AgentAction::Start)?;
    for (node, mark) in NodeName::ALL.into_iter().zip(marks) {
        until(
            lab,
            &format!("the log of {node} names {:?}", wrong.words),
            LIMIT,
            || logged(lab, node, mark, wrong.words),
        )?;
    }
    // Between two attempts the way to the peer rests for a moment.
    let exposed_for_it = || {
        let volume = volume(lab, A)?;
        let reason = volume["reason"].as_str().unwrap_or_default();
        Ok(volume["role"] == "owner"
            && volume["protection"] == "exposed"
            && wrong.words.iter().all(|word| reason.contains(word)))
    };
    until(lab, "A serves exposed and says why", LIMIT, exposed_for_it)?;
    throughout(
        lab,
        "A serves exposed and says why",
        WATCHED_FOR,
        exposed_for_it,
    )?;
    let regions = lab.run(B, "rdma resource show mr; find /dev/shm -type f")?;
    ensure!(
        !regions.contains("twinwrite") && !regions.contains(".region"),
        "B has memory open to a peer it refuses:\n{regions}"
    );
    lab.agent(B, AgentAction::Kill)?;
    lab.run(
        B,
        &format!("hostname b; cp /tmp/right.toml {CONFIG}; rm -rf /var/lib/twinwrite/*"),
    )?;
    Ok(())
}
