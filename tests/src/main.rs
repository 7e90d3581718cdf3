//! `twinwrite-workload`: runs inside a test machine, writes to the volume and judges the survivor.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use serde_json::json;
use twinwrite_tests::check::{Expectations, check};
use twinwrite_tests::stream::write::Options;
use twinwrite_tests::{ahead, overwrite, probe, settled, sqlite, stream, torture, uring, walk};

/// Workloads, and the oracle that says what a crash took from them. Only `overwrite`, `uring`, `ahead`, `torture`, and
/// `stream` with `--confirm-every`, ask for durability.
///
/// Exit status: 0 all is as it should be, 1 a difference was found, 2 it could not be carried out.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Copies a tree onto the volume, changes it in many ways, and writes down what is there
    Settled {
        /// The volume's mount point
        #[arg(long)]
        root: PathBuf,
        /// Tree to copy a part of
        #[arg(long, default_value = "/usr")]
        source: PathBuf,
        /// Where to write the manifest (not on the volume)
        #[arg(long)]
        manifest: PathBuf,
        /// Refuse a source with fewer files that fit
        #[arg(long, default_value_t = settled::FILES_MIN)]
        files_min: usize,
    },
    /// Commits to an SQLite database with synchronous=OFF and a rollback journal
    Sqlite {
        /// The volume's mount point
        #[arg(long)]
        root: PathBuf,
        /// Rows to insert (some are changed and deleted on the way)
        #[arg(long, default_value_t = 2_000)]
        rows: u64,
        /// Rows inserted by one transaction
        #[arg(long, default_value_t = 20)]
        batch: u64,
        /// Where to write the manifest (not on the volume)
        #[arg(long)]
        manifest: PathBuf,
    },
    /// Keeps writing numbered operations until killed, and logs each after it returned
    Stream(StreamArguments),
    /// Overwrites a block with numbers, asks for durability, and notes what was answered
    Overwrite(OverwriteArguments),
    /// Does the same through an io_uring, and notes each number before it and once it saw the answer
    Uring(UringArguments),
    /// Prints the number that such a block holds
    Overwritten {
        /// The file
        #[arg(long)]
        file: PathBuf,
    },
    /// Compares the volume with manifests and a stream's log
    Check {
        /// The volume's mount point
        #[arg(long)]
        root: PathBuf,
        /// Manifests of what must be there
        #[arg(long, num_args = 1..)]
        manifest: Vec<PathBuf>,
        /// The stream's log
        #[arg(long)]
        stream: Option<PathBuf>,
        /// Every operation of the stream up to this one must be there
        #[arg(long, requires = "stream")]
        expect_last_operation: Option<u64>,
        /// Where to write the report as JSON (default: standard output)
        #[arg(long)]
        report: Option<PathBuf>,
    },
    /// Asks the volume for durability again and again, and logs what was confirmed, until killed
    Ahead {
        #[command(flatten)]
        run: AheadArguments,
        /// The file whose appearance ends the wait after the older content
        #[arg(long)]
        go: PathBuf,
        /// Longest pause between two operations, milliseconds
        #[arg(long, default_value_t = 20)]
        pause_ms: u64,
    },
    /// Overwrites all that an interrupted `ahead` left, goes on in its log, and ends
    AheadFollow {
        #[command(flatten)]
        run: AheadArguments,
    },
    /// Holds what the survivor shows against what `ahead` was told; prints a report
    AheadCheck {
        #[command(flatten)]
        run: AheadArguments,
        /// All that was written before the wait had reached the mirror
        #[arg(long)]
        older_mirrored: bool,
    },
    /// Carries out random operations of every kind from several threads and processes
    Torture(torture::command::Arguments),
    /// Holds what the survivor shows against what an interrupted `torture` was told; prints a report
    TortureCheck(torture::command::CheckArguments),
    /// Carries out one step of the probe of one operation; prints what became of it
    Probe {
        /// Which; `probes` lists them
        #[arg(long)]
        name: String,
        /// What to do
        #[arg(long)]
        stage: probe::Stage,
        /// The probe's own directory, on the volume
        #[arg(long)]
        directory: PathBuf,
    },
    /// Lists the probes
    Probes,
    /// Writes down what a directory of the volume shows
    Describe {
        /// The volume's mount point
        #[arg(long)]
        root: PathBuf,
        /// The directory, below it
        #[arg(long)]
        prefix: PathBuf,
        /// Where to write the manifest (not on the volume)
        #[arg(long)]
        manifest: PathBuf,
    },
    /// Prints a manifest of the whole tree
    Inventory {
        /// Top of the tree
        #[arg(long)]
        root: PathBuf,
    },
}

#[derive(Args)]
struct OverwriteArguments {
    /// The file, on the volume
    #[arg(long)]
    file: PathBuf,
    /// Where to note each answered number (not on the volume)
    #[arg(long)]
    log: PathBuf,
    /// The first number
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// How many numbers
    #[arg(long)]
    count: u64,
    /// Do not ask for durability
    #[arg(long)]
    no_sync: bool,
}

#[derive(Args)]
struct UringArguments {
    /// The file, on the volume
    #[arg(long)]
    file: PathBuf,
    /// Where to note the numbers (not on the volume)
    #[arg(long)]
    log: PathBuf,
    /// How to write, and to wait
    #[arg(long)]
    way: uring::Way,
    /// How many numbers
    #[arg(long, default_value_t = u64::MAX)]
    count: u64,
    /// Try nothing while this file is there
    #[arg(long)]
    pause: Option<PathBuf>,
}

#[derive(Args)]
struct AheadArguments {
    /// What to do
    #[arg(long)]
    case: ahead::Case,
    /// A directory on the volume
    #[arg(long)]
    directory: PathBuf,
    /// The log (not on the volume)
    #[arg(long)]
    log: PathBuf,
    /// Decides the sequence of operations
    #[arg(long)]
    seed: u64,
}

#[derive(Args)]
struct StreamArguments {
    /// The volume's mount point
    #[arg(long)]
    root: PathBuf,
    /// Where to write the log (not on the volume)
    #[arg(long)]
    log: PathBuf,
    /// Stop after so many seconds
    #[arg(long)]
    seconds: Option<u64>,
    /// Stop after so many operations
    #[arg(long)]
    operations: Option<u64>,
    /// Pace; 0 for as fast as it goes
    #[arg(long, default_value_t = 500)]
    operations_per_second: u64,
    /// Log lines written at once (1 to 16)
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=16))]
    buffered: u64,
    /// Decides the sequence of operations
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Ask for durability after every so many operations, and note what was confirmed
    #[arg(long)]
    confirm_every: Option<u64>,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("twinwrite-workload: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// `false` if a check found a difference.
fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Settled {
            root,
            source,
            manifest,
            files_min,
        } => {
            let (summary, described) = settled::run(&root, &source, files_min)?;
            described.save(&manifest)?;
            let summary = json!({
                "files_copied": summary.files_copied,
                "bytes_copied": summary.bytes_copied,
                "paths": described.entries.len(),
                "changes": summary.changes,
            });
            say(&summary.to_string())?;
        }
        Command::Sqlite {
            root,
            rows,
            batch,
            manifest,
        } => {
            let described = sqlite::run(&root, rows, batch)?;
            described.save(&manifest)?;
            say(&json!({ "databases": described.databases }).to_string())?;
        }
        Command::Stream(arguments) => {
            let options = Options {
                seed: arguments.seed,
                time_limit: arguments.seconds.map(Duration::from_secs),
                operations_max: arguments.operations,
                operations_per_second: arguments.operations_per_second,
                buffered_max: arguments.buffered,
                confirm_every: arguments.confirm_every,
            };
            let operations = stream::write::run(&arguments.root, &arguments.log, &options)?;
            say(&json!({ "operations": operations }).to_string())?;
        }
        Command::Overwrite(arguments) => {
            let options = overwrite::Options {
                from: arguments.from,
                count: arguments.count,
                sync: !arguments.no_sync,
            };
            let summary = overwrite::run(&arguments.file, &arguments.log, &options)?;
            let summary = json!({
                "answers": summary.answers,
                "median_us": summary.median_us,
                "longest_us": summary.longest_us,
            });
            say(&summary.to_string())?;
        }
        Command::Uring(arguments) => {
            let options = uring::Options {
                way: arguments.way,
                count: arguments.count,
                pause: arguments.pause,
            };
            uring::run(&arguments.file, &arguments.log, &options)?;
        }
        Command::Overwritten { file } => say(&overwrite::found(&file)?.to_string())?,
        Command::Check {
            root,
            manifest,
            stream,
            expect_last_operation,
            report,
        } => {
            anyhow::ensure!(
                !manifest.is_empty() || stream.is_some(),
                "nothing to check against: give --manifest or --stream"
            );
            let expectations = Expectations {
                manifests: manifest,
                stream_log: stream,
                last_operation: expect_last_operation,
            };
            let found = check(&root, &expectations)?;
            let text = serde_json::to_string_pretty(&found)?;
            match report {
                Some(path) => std::fs::write(&path, text + "\n")
                    .with_context(|| format!("cannot write the report {}", path.display()))?,
                None => say(&text)?,
            }
            return Ok(found.pass);
        }
        Command::Ahead { run, go, pause_ms } => ahead::run(&ahead::Options {
            case: run.case,
            directory: run.directory,
            log: run.log,
            go,
            seed: run.seed,
            pause: Duration::from_millis(pause_ms),
        })?,
        Command::AheadFollow { run } => ahead::follow(&ahead::Options {
            case: run.case,
            directory: run.directory,
            log: run.log,
            go: PathBuf::new(),
            seed: run.seed,
            pause: Duration::ZERO,
        })?,
        Command::AheadCheck {
            run,
            older_mirrored,
        } => {
            let (case, seed) = (run.case, run.seed);
            let found = ahead::judge(case, &run.directory, &run.log, seed, older_mirrored)?;
            say(&serde_json::to_string(&found)?)?;
            return Ok(found.pass);
        }
        Command::Torture(arguments) => say(&serde_json::to_string(&arguments.run()?)?)?,
        Command::TortureCheck(arguments) => {
            let found = arguments.run()?;
            say(&serde_json::to_string(&found)?)?;
            return Ok(found.iter().all(|case| case.what.pass));
        }
        Command::Probe {
            name,
            stage,
            directory,
        } => {
            let found = probe::find(&name)
                .with_context(|| format!("no probe `{name}`: `twinwrite-workload probes`"))?;
            say(&serde_json::to_string(&found.run(stage, &directory)?)?)?;
        }
        Command::Probes => {
            for each in probe::all() {
                let (group, is_durable) = (each.group, each.is_durable());
                let line = json!({ "name": each.name, "group": group, "is_durable": is_durable });
                say(&line.to_string())?;
            }
        }
        Command::Describe {
            root,
            prefix,
            manifest,
        } => walk::describe(&root, &prefix)?.save(&manifest)?,
        Command::Inventory { root } => {
            let manifest = walk::describe(&root, "".as_ref())?;
            manifest.write(std::io::BufWriter::new(std::io::stdout().lock()))?;
        }
    }
    Ok(true)
}

fn say(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("cannot write to standard output")
}
