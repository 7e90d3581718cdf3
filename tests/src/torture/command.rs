//! `twinwrite-workload torture` and `torture-check`.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};

use super::action::Kind;
use super::judge::{Verdict, judge};
use super::{Case, Options, Part, Regime, Summary, prepare, run};
use crate::error::{Error, Told as _};
use crate::walk;

/// What both commands are about.
#[derive(Clone, Debug, clap::Args)]
struct Chosen {
    /// The volume's mount point
    #[arg(long)]
    root: PathBuf,
    /// What to run, or was run: SEED-LENGTH-THREADS
    #[arg(long = "case", required = true, value_delimiter = ',')]
    cases: Vec<Case>,
    /// Only these kinds of operations
    #[arg(long, value_delimiter = ',')]
    only: Vec<Kind>,
}

/// Arguments of `torture`.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    chosen: Chosen,
    /// Run the cases one after the other and write a manifest of each into this directory (not on the volume)
    #[arg(long, required_unless_present = "logs")]
    manifests: Option<PathBuf>,
    /// Run them all at once, each thread in its own directory, and log each operation that returned into
    /// this directory (not on the volume)
    #[arg(long, conflicts_with = "manifests")]
    logs: Option<PathBuf>,
    /// Which threads, of prepared cases; for the process that runs the others
    #[arg(long, default_value = "all", hide = true)]
    part: Part,
}

/// Arguments of `torture-check`.
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArguments {
    #[command(flatten)]
    chosen: Chosen,
    /// The logs' directory
    #[arg(long)]
    logs: PathBuf,
    /// Their copies from a moment when all in them was known to be mirrored
    #[arg(long)]
    mirrored: Option<PathBuf>,
}

/// What one case did, or what was found of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told<T> {
    /// The case.
    pub case: String,
    /// What is told of it.
    #[serde(flatten)]
    pub what: T,
}

/// What was found of one case.
#[derive(Debug, Serialize)]
pub struct Judged {
    /// Nothing is wrong.
    pub pass: bool,
    /// Of each thread.
    pub threads: Vec<Verdict>,
}

impl Arguments {
    fn options(&self, case: Case, part: Part) -> Options {
        let regime = match &self.logs {
            Some(directory) => Regime::Running(directory.clone()),
            None => Regime::Settled,
        };
        Options {
            root: self.chosen.root.clone(),
            case,
            kinds: self.chosen.only.clone(),
            regime,
            part,
        }
    }

    /// Runs them, and says what each did.
    ///
    /// # Errors
    /// The first operation that fails and must not.
    pub fn run(&self) -> Result<Vec<Told<Summary>>, Error> {
        if self.part != Part::All {
            wait_for_go()?;
            return self.together();
        }
        for case in &self.chosen.cases {
            prepare(&self.chosen.root, case)?;
        }
        let Some(manifests) = &self.manifests else {
            let others = Others::start(self, &self.chosen.cases)?;
            let done = self.together();
            return Ok(merged(done?, others.end()?));
        };
        let each = self.chosen.cases.iter().map(|case| {
            let others = Others::start(self, &[*case])?;
            let what = run(&self.options(*case, Part::Even))?;
            let told = Told {
                case: case.to_string(),
                what,
            };
            let done = merged(vec![told], others.end()?);
            let described = walk::describe(&self.chosen.root, &case.directory())?;
            described.save(&manifests.join(case.to_string()))?;
            Ok(done)
        });
        Ok(each.collect::<Result<Vec<_>, Error>>()?.concat())
    }

    /// All cases at once.
    fn together(&self) -> Result<Vec<Told<Summary>>, Error> {
        let part = match self.part {
            Part::All => Part::Even,
            part => part,
        };
        std::thread::scope(|scope| {
            let start = |case: &Case| {
                let (case, options) = (*case, self.options(*case, part));
                (case, scope.spawn(move || run(&options)))
            };
            let started: Vec<_> = self.chosen.cases.iter().map(start).collect();
            let ended = started.into_iter().map(|(case, thread)| {
                let died =
                    |_| Err(io::Error::other("a thread died")).told("work in", &self.chosen.root);
                let what = thread.join().unwrap_or_else(died)?;
                let case = case.to_string();
                Ok(Told { case, what })
            });
            ended.collect()
        })
    }
}

impl CheckArguments {
    /// Judges each case.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn run(&self) -> Result<Vec<Told<Judged>>, Error> {
        let each = self.chosen.cases.iter().map(|case| {
            let threads = (0..case.threads).map(|thread| {
                let mirrored = self.mirrored.as_deref();
                judge(
                    &self.chosen.root,
                    case,
                    thread,
                    &self.chosen.only,
                    &self.logs,
                    mirrored,
                )
            });
            let threads = threads.collect::<Result<Vec<Verdict>, Error>>()?;
            let pass = threads.iter().all(|verdict| verdict.differences.is_empty());
            let what = Judged { pass, threads };
            let case = case.to_string();
            Ok(Told { case, what })
        });
        each.collect()
    }
}

/// The process that runs every second thread, so that several processes work on the volume.
struct Others(Option<Child>);

impl Others {
    /// Starts it, and returns when it begins to work.
    fn start(arguments: &Arguments, cases: &[Case]) -> Result<Self, Error> {
        if cases.iter().all(|case| case.threads < 2) {
            return Ok(Self(None));
        }
        let program = std::env::current_exe().told("find", "/proc/self/exe".as_ref())?;
        let mut command = Command::new(&program);
        command.arg("torture").arg("--part").arg("odd");
        command.arg("--root").arg(&arguments.chosen.root);
        for case in cases {
            command.arg("--case").arg(case.to_string());
        }
        for kind in &arguments.chosen.only {
            let value = clap::ValueEnum::to_possible_value(kind);
            let name = value.map(|value| value.get_name().to_owned());
            command.arg("--only").arg(name.unwrap_or_default());
        }
        for (flag, directory) in [
            ("--manifests", &arguments.manifests),
            ("--logs", &arguments.logs),
        ] {
            if let Some(directory) = directory {
                command.arg(flag).arg(directory);
            }
        }
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().told("start", &program)?;
        let begin = |child: &mut Child| -> io::Result<()> {
            let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
            let mut line = String::new();
            // Nothing follows before the word is given, so that the reader takes nothing else away.
            BufReader::new(child.stdout.as_mut().ok_or_else(gone)?).read_line(&mut line)?;
            child.stdin.take().ok_or_else(gone)?.write_all(b"go\n")
        };
        begin(&mut child).told("speak with", &program)?;
        Ok(Self(Some(child)))
    }

    /// What it did.
    fn end(self) -> Result<Vec<Told<Summary>>, Error> {
        let Some(child) = self.0 else {
            return Ok(Vec::new());
        };
        let program = "the process of the other threads".as_ref();
        let output = child.wait_with_output().told("wait for", program)?;
        if output.status.success() {
            let told = serde_json::from_slice(&output.stdout);
            return told.told("understand", program);
        }
        Err(io::Error::other(output.status.to_string())).told("be served by", program)
    }
}

/// What both processes did, case by case.
fn merged(mut done: Vec<Told<Summary>>, others: Vec<Told<Summary>>) -> Vec<Told<Summary>> {
    for other in others {
        if let Some(each) = done.iter_mut().find(|each| each.case == other.case) {
            each.what.add(other.what);
        }
    }
    done
}

fn wait_for_go() -> Result<(), Error> {
    let mut line = String::new();
    let waited = writeln!(io::stdout().lock(), "ready")
        .and_then(|()| io::stdin().lock().read_line(&mut line));
    waited.map(drop).told("speak through", "stdin".as_ref())
}
