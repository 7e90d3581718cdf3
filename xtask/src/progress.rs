//! Tells a person what takes time: a spinner on a terminal, plain lines elsewhere, on standard
//! error either way.
//!
//! It never writes to standard output: that belongs to the command's result.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

thread_local! {
    static NAME: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// From now on this thread's lines begin with a name: others tell of something else at the same time.
pub fn name_lines(name: &'static str) {
    NAME.set(Some(name));
}

fn named(line: &str) -> String {
    NAME.get()
        .map_or_else(|| line.to_owned(), |name| format!("{name}: {line}"))
}

/// Runs one step and says how long it took.
///
/// # Errors
/// Those of the step.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let what = named(what);
    let bar = ProgressBar::new_spinner();
    // Spinners of several threads would write over each other.
    let plain = bar.is_hidden() || NAME.get().is_some();
    if plain {
        eprintln!("{what} ...");
    } else {
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_message(what.clone());
        bar.enable_steady_tick(Duration::from_millis(120));
    }
    let result = work();
    bar.finish_and_clear();
    let took = began.elapsed().as_secs_f32();
    match &result {
        Ok(_) => eprintln!("{what}: {took:.1} s"),
        Err(_) => eprintln!("{what}: failed after {took:.1} s"),
    }
    result
}

/// One line about something that takes no time.
pub fn note(line: &str) {
    eprintln!("{}", named(line));
}

/// Runs a command with its output appended to `log`; the error shows the log's end.
///
/// # Errors
/// If the command cannot be started or fails.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    let out = append(log)?;
    let err = out
        .try_clone()
        .context("cannot duplicate the log's descriptor")?;
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .status()
        .with_context(|| format!("cannot start `{name}`: is it installed?"))?;
    if !status.success() {
        bail!(
            "`{name}` ended with {status}; end of {}:\n{}",
            log.display(),
            tail(log, 15)
        );
    }
    Ok(())
}

/// Runs a command and gives its standard output.
///
/// # Errors
/// If the command cannot be started or fails; the error holds what it wrote to standard error.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{name}`: is it installed?"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{name}` ended with {}: {}", output.status, said.trim());
    }
    Ok(output.stdout)
}

/// The last `lines` lines of a file; a word about it if it cannot be read.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            let from = all.len().saturating_sub(lines);
            all.get(from..).unwrap_or_default().join("\n")
        }
        Err(error) => format!("({}: {error})", path.display()),
    }
}

fn append(log: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the log {}", log.display()))
}
