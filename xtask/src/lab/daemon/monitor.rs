//! QEMU's human monitor: one command, one answer.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result};

const PROMPT: &[u8] = b"(qemu) ";
const LIMIT: Duration = Duration::from_secs(20);

/// Says `command` and gives what QEMU answered.
pub(super) fn say(socket: &str, command: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket).context("cannot reach QEMU's monitor")?;
    stream.set_read_timeout(Some(LIMIT))?;
    until_prompt(&mut stream)?;
    stream.write_all(format!("{command}\n").as_bytes())?;
    let answer = until_prompt(&mut stream)?;
    // The first line is the echo of the command, with the editing of a terminal in it.
    let text = String::from_utf8_lossy(&answer).into_owned();
    let said = text.split_once('\n').map_or("", |(_, said)| said);
    Ok(said.trim_end_matches("(qemu) ").trim().to_owned())
}

fn until_prompt(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut bytes = [0; 512];
    while !text.ends_with(PROMPT) {
        let got = stream
            .read(&mut bytes)
            .context("QEMU's monitor does not answer")?;
        anyhow::ensure!(got > 0, "QEMU's monitor closed the connection");
        text.extend_from_slice(bytes.get(..got).unwrap_or_default());
    }
    Ok(text)
}
