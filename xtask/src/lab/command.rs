//! Commands and files: into a machine and back.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::Lab;
use super::config::NodeName;
use super::protocol::{Reply, Request};

/// How often a running command's output is looked at.
const OUTPUT_INTERVAL: Duration = Duration::from_millis(40);
const COPY_LIMIT: Duration = Duration::from_secs(600);

/// Exit status of a command that its limit ended.
const STATUS_TIMEOUT: i32 = 124;

/// Which of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What a command left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 124 if its limit ended it.
    pub status: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the last line's end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

impl Lab {
    /// Runs a shell command line in a machine and gives what came out, whatever its exit status.
    ///
    /// # Errors
    /// If the machine is dead, dies meanwhile or does not answer.
    pub fn exec(&self, node: NodeName, command: &str, limit: Duration) -> Result<Output> {
        let mut output = Output::default();
        output.status = self.exec_streamed(node, command, limit, |stream, bytes| match stream {
            Stream::Out => output.stdout.extend_from_slice(bytes),
            Stream::Err => output.stderr.extend_from_slice(bytes),
        })?;
        Ok(output)
    }

    /// Runs a shell command line that must succeed within a minute; gives its standard output.
    ///
    /// # Errors
    /// As [`Lab::exec`], and if the exit status is not 0.
    pub fn run(&self, node: NodeName, command: &str) -> Result<String> {
        self.run_within(node, command, Duration::from_secs(60))
    }

    /// As [`Lab::run`] with another limit.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn run_within(&self, node: NodeName, command: &str, limit: Duration) -> Result<String> {
        let output = self.exec(node, command, limit)?;
        if output.status != 0 {
            let why = if output.status == STATUS_TIMEOUT {
                " (its limit)"
            } else {
                ""
            };
            bail!(
                "on {node}, `{command}` ended with status {}{why}: {}{}",
                output.status,
                output.text(),
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        Ok(output.text())
    }

    /// Runs a shell command line and hands its output over as it comes. Gives the exit status.
    ///
    /// # Errors
    /// As [`Lab::exec`].
    pub fn exec_streamed(
        &self,
        node: NodeName,
        command: &str,
        limit: Duration,
        mut sink: impl FnMut(Stream, &[u8]),
    ) -> Result<i32> {
        let script = Script::write(self, node, command)?;
        let request = Request::Exec {
            node,
            id: script.id.clone(),
            timeout_s: limit.as_secs().max(1),
        };
        let reply = thread::scope(|scope| {
            let asked = scope.spawn(|| self.request(&request));
            while !asked.is_finished() {
                script.pass_on(&mut sink)?;
                thread::sleep(OUTPUT_INTERVAL.min(script.age() / 8));
            }
            asked
                .join()
                .unwrap_or_else(|_| bail!("the request's thread panicked"))
        });
        script.pass_on(&mut sink)?;
        match reply.with_context(|| format!("on {node}, `{}`", shortened(command)))? {
            Reply::Ended { status } => Ok(status),
            other => bail!("the daemon answered {other:?}"),
        }
    }

    /// Copies a file of the host into a machine, with its mode.
    ///
    /// # Errors
    /// If it cannot be read here or written there.
    pub fn put(&self, node: NodeName, local: &Path, remote: &str) -> Result<()> {
        let passage = self.passage(node)?;
        fs::copy(local, &passage.host)
            .with_context(|| format!("cannot read {}", local.display()))?;
        let copy = format!("cp -p {} {}", passage.guest, shell_quoted(remote));
        self.run_within(node, &copy, COPY_LIMIT).map(drop)
    }

    /// Copies a file out of a machine.
    ///
    /// # Errors
    /// If it cannot be read there or written here.
    pub fn get(&self, node: NodeName, remote: &str, local: &Path) -> Result<()> {
        let passage = self.passage(node)?;
        let copy = format!("cp {} {}", shell_quoted(remote), passage.guest);
        self.run_within(node, &copy, COPY_LIMIT)?;
        fs::copy(&passage.host, local)
            .with_context(|| format!("cannot write {}", local.display()))?;
        Ok(())
    }

    fn passage(&self, node: NodeName) -> Result<Passage> {
        let name = format!("file-{}", unique());
        let host = self.share(node).join("cmd").join(&name);
        if !host.parent().is_some_and(Path::is_dir) {
            bail!("lab {} is not up", self.name());
        }
        Ok(Passage {
            host,
            guest: format!("/host/cmd/{name}"),
        })
    }
}

/// A file on its way, removed when it has arrived.
struct Passage {
    host: std::path::PathBuf,
    guest: String,
}

impl Drop for Passage {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.host);
    }
}

/// A command's script and its two outputs in the machine's share, removed at the end.
struct Script {
    id: String,
    path: std::path::PathBuf,
    out: File,
    err: File,
    began: std::time::Instant,
}

impl Script {
    fn write(lab: &Lab, node: NodeName, command: &str) -> Result<Self> {
        let id = unique();
        let path = lab.share(node).join("cmd").join(&id);
        let create = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .with_context(|| {
                    format!("cannot write {}: is lab {} up?", path.display(), lab.name())
                })
        };
        fs::write(&path, format!("cd /root\n{command}\n")).with_context(|| {
            format!("cannot write {}: is lab {} up?", path.display(), lab.name())
        })?;
        let out = create(&path.with_extension("out"))?;
        let err = create(&path.with_extension("err"))?;
        Ok(Self {
            id,
            path,
            out,
            err,
            began: std::time::Instant::now(),
        })
    }

    fn age(&self) -> Duration {
        self.began.elapsed().max(Duration::from_millis(8))
    }

    /// Hands over what was written since the last time.
    fn pass_on(&self, sink: &mut impl FnMut(Stream, &[u8])) -> Result<()> {
        let mut bytes = vec![0; 64 * 1024];
        for (stream, mut file) in [(Stream::Out, &self.out), (Stream::Err, &self.err)] {
            loop {
                let got = file
                    .read(&mut bytes)
                    .context("cannot read a command's output")?;
                if got == 0 {
                    break;
                }
                sink(stream, bytes.get(..got).unwrap_or_default());
            }
        }
        Ok(())
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        for path in [
            self.path.clone(),
            self.path.with_extension("out"),
            self.path.with_extension("err"),
        ] {
            let _ = fs::remove_file(path);
        }
    }
}

fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

fn shortened(command: &str) -> String {
    let line = command.lines().next().unwrap_or_default();
    if line.chars().count() <= 80 && line.len() == command.trim_end().len() {
        line.to_owned()
    } else {
        line.chars().take(77).chain("...".chars()).collect()
    }
}

/// One word for the shell, whatever is in it.
#[must_use]
pub fn shell_quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::{shell_quoted, shortened};

    #[test]
    fn words_reach_the_shell_unchanged() {
        for word in ["plain", "", "a b", "it's", "$HOME", "a\nb", "\"", "\\"] {
            let line = format!("printf %s {}", shell_quoted(word));
            let output = std::process::Command::new("sh")
                .args(["-c", &line])
                .output();
            let output = output.expect("sh can be started");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }

    #[test]
    fn only_long_commands_are_shortened() {
        assert_eq!(shortened("ls -la"), "ls -la");
        assert_eq!(shortened("a\nb"), "a...");
        assert_eq!(shortened(&"x".repeat(200)).len(), 80);
    }
}
