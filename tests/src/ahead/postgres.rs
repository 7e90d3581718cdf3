//! PostgreSQL on the volume. The server is the distribution's; it is started where it does not run
//! and left running. Its data directory must be there, and the next run uses it again.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Options;
use super::database::{Database, ROWS};
use crate::error::{Error, Told as _};
use crate::random::Random;

const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";
const SOCKETS: &str = "/tmp";
const START_LIMIT: Duration = Duration::from_secs(90);
/// Small, and quiet between the commits.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_directories=/tmp",
    "shared_buffers=16MB",
    "max_connections=8",
    "autovacuum=off",
    "jit=off",
    "max_wal_size=8MB",
    "min_wal_size=2MB",
    "checkpoint_timeout=30min",
    "max_wal_senders=0",
    "wal_level=minimal",
];

/// A client's session.
pub(super) struct Postgres {
    client: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    directory: PathBuf,
    run: u64,
    syncs: bool,
}

fn data(directory: &Path) -> PathBuf {
    directory.join("data")
}

fn as_server(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
            "--",
        ])
        .arg(format!("{PROGRAMS}/{program}"))
        .current_dir("/");
    command
}

fn output_of(command: &mut Command, path: &Path) -> Result<String, Error> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .told("start a program on", path)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(std::io::Error::other(format!("{command:?}: {said}"))).told("use", path)
}

/// Starts the server on what the directory holds, which it recovers if it was interrupted.
fn serve(directory: &Path) -> Result<(), Error> {
    let mut ready = as_server("pg_isready");
    ready.args(["-q", "-h", SOCKETS]);
    let mut is_ready = || ready.status().is_ok_and(|status| status.success());
    if is_ready() {
        return Ok(());
    }
    let data = data(directory);
    // It would be taken for a running server's if its process number is in use.
    let _ = std::fs::remove_file(data.join("postmaster.pid"));
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open("/tmp/postgres.log")
        .told("open the server's log for", directory)?;
    let mut server = as_server("postgres");
    server.arg("-D").arg(&data);
    for setting in SETTINGS {
        server.args(["-c", setting]);
    }
    let mut server = server
        .stdin(Stdio::null())
        .stdout(
            log.try_clone()
                .told("open the server's log for", directory)?,
        )
        .stderr(log)
        .spawn()
        .told("start the server on", &data)?;
    let deadline = Instant::now() + START_LIMIT;
    while !is_ready() {
        let ended = server.try_wait().told("wait for the server on", &data)?;
        if ended.is_some() || Instant::now() >= deadline {
            let log = std::fs::read_to_string("/tmp/postgres.log").unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(6).collect();
            let reason = format!("the server does not come up: {tail:?}");
            return Err(std::io::Error::other(reason)).told("start the server on", &data);
        }
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn client() -> Command {
    let mut client = as_server("psql");
    client.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-h", SOCKETS, "postgres"]);
    client
}

impl Postgres {
    pub(super) fn create(options: &Options, _: &mut Random) -> Result<Self, Error> {
        let directory = &options.directory;
        serve(directory)?;
        let mut client = client()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .told("start a client of", directory)?;
        let (Some(input), Some(output)) = (client.stdin.take(), client.stdout.take()) else {
            let error = std::io::Error::other("the client has no pipes");
            return Err(error).told("start a client of", directory);
        };
        let mut postgres = Self {
            client,
            input,
            output: BufReader::new(output),
            directory: directory.clone(),
            run: options.seed,
            syncs: true,
        };
        let run = options.seed.cast_signed();
        postgres.ask(&format!(
            "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();
             CREATE TABLE IF NOT EXISTS cells(run bigint, id int, version bigint, body text);
             DELETE FROM cells; CHECKPOINT;
             INSERT INTO cells SELECT {run}, id, 0, repeat('x', 300) FROM generate_series(0, {}) AS id;
             SELECT pg_switch_wal() IS NULL; CHECKPOINT;",
            ROWS - 1
        ))?;
        Ok(postgres)
    }

    /// Runs statements and gives what they said.
    fn ask(&mut self, statements: &str) -> Result<String, Error> {
        const END: &str = "-- that was all";
        let path = &self.directory;
        writeln!(self.input, "{statements}\n\\echo {END}").told("ask the server on", path)?;
        let mut said = String::new();
        loop {
            let mut line = String::new();
            let got = self.output.read_line(&mut line);
            if got.told("hear the server on", path)? == 0 {
                let status = self.client.wait().told("hear the server on", path)?;
                let error = std::io::Error::other(format!("psql ended with {status}"));
                return Err(error).told("ask the server on", path);
            }
            if line.trim_end() == END {
                return Ok(said);
            }
            said += &line;
        }
    }

    /// Whether the server asks the disk for durability, which it learns a moment after it was told.
    fn set_syncs(&mut self, syncs: bool) -> Result<(), Error> {
        if self.syncs == syncs {
            return Ok(());
        }
        let word = if syncs { "on" } else { "off" };
        self.ask(&format!(
            "ALTER SYSTEM SET fsync = {word}; SELECT pg_reload_conf();"
        ))?;
        let deadline = Instant::now() + START_LIMIT;
        while self.ask("SHOW fsync;")?.trim() != word {
            if Instant::now() >= deadline {
                let error = std::io::Error::other("it does not take its settings");
                return Err(error).told("ask the server on", &self.directory);
            }
            sleep(Duration::from_millis(20));
        }
        self.syncs = syncs;
        Ok(())
    }
}

impl Database for Postgres {
    fn commit(&mut self, version: u64, rows: &[u32], durable: bool) -> Result<(), Error> {
        self.set_syncs(durable)?;
        let rows: Vec<String> = rows.iter().map(u32::to_string).collect();
        let run = self.run.cast_signed();
        self.ask(&format!(
            "UPDATE cells SET version = {version} WHERE run = {run} AND id IN ({});",
            rows.join(",")
        ))?;
        Ok(())
    }
}

/// Rows and versions after the server has recovered what a crash interrupted, or what it complains of.
pub(super) fn read(directory: &Path, run: u64) -> Result<Vec<(u32, u64)>, String> {
    let rows = || -> Result<String, Error> {
        serve(directory)?;
        let run = run.cast_signed();
        let ask = format!("SELECT id, version FROM cells WHERE run = {run} ORDER BY id");
        output_of(client().args(["-c", &ask]), directory)
    };
    let said = rows().map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    })?;
    let row = |line: &str| {
        let (row, version) = line.split_once('|')?;
        Some((row.parse().ok()?, version.parse().ok()?))
    };
    let rows: Option<Vec<_>> = said.lines().map(row).collect();
    rows.ok_or_else(|| format!("the server gave {said}"))
}
