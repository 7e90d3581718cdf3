//! The fence's helper: a machine asks for a node to be powered off, and hears only once that node's
//! process is gone.
//!
//! It never answers `fenced` for a node whose process still exists.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use super::Daemon;
use crate::lab::config::NodeName;

/// Answers the requests of machine `by` until it ends.
pub(super) fn serve(daemon: &Daemon, by: NodeName, port: &UnixStream) {
    let Ok(mut writer) = port.try_clone() else {
        return;
    };
    for line in BufReader::new(port).lines() {
        let Ok(line) = line else { break };
        let answer = answer(daemon, by, &line);
        if writer.write_all(format!("{answer}\n").as_bytes()).is_err() {
            break;
        }
    }
}

/// `fence NODE [TOKEN]` becomes `fenced NODE [TOKEN]`; the token tells answers apart.
fn answer(daemon: &Daemon, by: NodeName, line: &str) -> String {
    let mut words = line.split_ascii_whitespace();
    let (verb, name) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let token = words.next().unwrap_or_default();
    let word = match (verb, NodeName::parse(name)) {
        ("fence", Some(node)) => match daemon.kill(node) {
            Ok(was_alive) => {
                let details = serde_json::json!({ "by": by.name(), "was_alive": was_alive });
                daemon.event("fenced", Some(node), details);
                "fenced"
            }
            Err(error) => {
                eprintln!("fence {node}: {error:#}");
                "failed"
            }
        },
        _ => "unknown",
    };
    format!("{word} {name} {token}").trim_end().to_owned()
}
