//! `twinwrite-sim`: see `--help`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use comfy_table::Table;
use twinwrite_simulator::fault::Fault;
use twinwrite_simulator::run::Plan;
use twinwrite_simulator::world::Counts;

/// Runs twinwrite's cores against models of kernel, disk, link, mailbox and crash.
#[derive(Parser)]
#[command(name = "cargo xtask sim", version)]
struct Arguments {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Steps of a run.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Inject this fault: the run must fail.
    #[arg(long, value_name = "NAME")]
    fault: Option<String>,
    /// Name the faults.
    #[arg(long)]
    list_faults: bool,
    /// Inject each fault in turn; each must be found.
    #[arg(long)]
    faults: bool,
    /// With `--faults`: write the table into this page, between its two marks.
    #[arg(long, value_name = "PAGE")]
    write: Option<PathBuf>,
    /// Threads, each with runs of its own.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Go on behind violations, and count them by what they break.
    #[arg(long)]
    go_on: bool,
    /// Send so many records through the cores, and print the memory that they take.
    #[arg(long, value_name = "RECORDS")]
    endurance: Option<u64>,
    /// Print the trace of a single run even if nothing is wrong.
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    std::panic::set_hook(Box::new(|_| ()));
    if arguments.list_faults {
        for fault in Fault::all() {
            println!("{}", fault.name());
        }
        return ExitCode::SUCCESS;
    }
    let fault = match arguments
        .fault
        .as_deref()
        .map(|name| (name, Fault::named(name)))
    {
        Some((name, None)) => {
            eprintln!("error: there is no fault {name}: see --list-faults");
            return ExitCode::FAILURE;
        }
        Some((_, fault)) => fault,
        None => None,
    };
    if let Some(records) = arguments.endurance {
        return endurance(records);
    }
    if arguments.faults {
        return all_faults(&arguments);
    }
    if arguments.go_on {
        return census(&arguments, fault);
    }
    let began = Instant::now();
    let (found, counts) = search(&arguments, fault, arguments.seed, arguments.seeds);
    let seconds = began.elapsed().as_secs_f64();
    if let Some(seed) = found {
        explain(seed, &arguments, fault);
        return ExitCode::FAILURE;
    }
    if arguments.trace && arguments.seeds == 1 {
        for line in Plan::of_seed(arguments.seed, arguments.steps)
            .run(fault, true)
            .trace
        {
            println!("{line}");
        }
    }
    println!(
        "{} runs of {} steps without a violation, {:.0} a second\n{counts:?}",
        arguments.seeds,
        arguments.steps,
        arguments.seeds as f64 / seconds
    );
    ExitCode::SUCCESS
}

fn endurance(records: u64) -> ExitCode {
    let began = Instant::now();
    let samples = match twinwrite_simulator::endurance::run(records) {
        Ok(samples) => samples,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    for sample in samples {
        println!(
            "{} records: {} KiB resident, {} records and {} inodes held",
            sample.records,
            sample.resident_bytes / 1024,
            sample.live_records,
            sample.live_inodes
        );
    }
    println!(
        "{records} records in {:.1} s",
        began.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

/// The smallest failing seed of these, if any.
fn search(
    arguments: &Arguments,
    fault: Option<Fault>,
    first: u64,
    count: u64,
) -> (Option<u64>, Counts) {
    let next = AtomicU64::new(first);
    let least = AtomicU64::new(u64::MAX);
    let counts = Mutex::new(Counts::default());
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.max(1) {
            scope.spawn(|| {
                let mut own = Counts::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count || seed > least.load(Ordering::Relaxed) {
                        break;
                    }
                    let outcome = Plan::of_seed(seed, arguments.steps).run(fault, false);
                    own.add(&outcome.counts);
                    if outcome.violation.is_some() {
                        least.fetch_min(seed, Ordering::Relaxed);
                    }
                }
                if let Ok(mut counts) = counts.lock() {
                    counts.add(&own);
                }
            });
        }
    });
    let least = least.into_inner();
    let counts = counts.into_inner().unwrap_or_default();
    ((least != u64::MAX).then_some(least), counts)
}

/// All violations of these seeds, one line each.
fn census(arguments: &Arguments, fault: Option<Fault>) -> ExitCode {
    let next = AtomicU64::new(arguments.seed);
    let end = arguments.seed + arguments.seeds;
    let found = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    let outcome = Plan::of_seed(seed, arguments.steps).run(fault, false);
                    if let Some((step, violation)) = outcome.violation {
                        found.fetch_add(1, Ordering::Relaxed);
                        println!(
                            "seed {seed}, step {step}: {}: {}",
                            violation.guarantee, violation.what
                        );
                    }
                }
            });
        }
    });
    let found = found.into_inner();
    println!("{found} of {} runs with a violation", arguments.seeds);
    if found == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Prints what a seed shows, in full and made smaller.
fn explain(seed: u64, arguments: &Arguments, fault: Option<Fault>) {
    let plan = Plan::of_seed(seed, arguments.steps);
    let told = fault.map_or(String::new(), |fault| format!(" --fault {}", fault.name()));
    if let Some((step, violation)) = plan.run(fault, false).violation {
        println!(
            "seed {seed}, step {step}: guarantee {}: {}",
            violation.guarantee, violation.what
        );
    }
    let small = plan.shrink(fault, 3000);
    println!(
        "made smaller: {} steps of {}",
        small.steps.len(),
        plan.steps.len()
    );
    println!("{:?}", small.setting);
    for line in small.run(fault, true).trace {
        println!("{line}");
    }
    println!(
        "again: cargo xtask sim --seed {seed} --steps {}{told}",
        arguments.steps
    );
}

/// Seeds within which a fault must be found, unless `--seeds` says more.
const FAULT_SEEDS: u64 = 200_000;
/// Before and behind the table in a page.
const MARKS: [&str; 2] = [
    "<!-- written by `cargo xtask sim --faults --write PAGE` -->\n",
    "<!-- end of what was written -->",
];

/// Writes the table into a page.
fn write_table(page: &Path, rows: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(page)?;
    let [begin, end] = MARKS;
    let parts = text.split_once(begin);
    let parts = parts.and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let Some((before, after)) = parts else {
        anyhow::bail!("{} has not both marks: {begin}{end}", page.display());
    };
    let head = "\n| fault | seeds needed | breaks guarantee |\n|---|---|---|\n";
    std::fs::write(page, format!("{before}{begin}{head}{rows}\n{end}{after}"))?;
    Ok(())
}

fn all_faults(arguments: &Arguments) -> ExitCode {
    let mut table = Table::new();
    table.set_header(["fault", "seeds needed", "guarantee", "what"]);
    let seeds = arguments.seeds.max(FAULT_SEEDS);
    let mut missed = Vec::new();
    let mut rows = String::new();
    for fault in Fault::all() {
        let name = fault.name();
        let (found, _) = search(arguments, Some(fault), arguments.seed, seeds);
        let Some(seed) = found else {
            eprintln!("{name}: not found by {seeds} seeds");
            table.add_row([name.as_str(), "not found", "", ""]);
            let _ = writeln!(rows, "| {name} | not found by {seeds} | |");
            missed.push(name);
            continue;
        };
        let needed = seed - arguments.seed + 1;
        eprintln!("{name}: {needed}");
        let outcome = Plan::of_seed(seed, arguments.steps).run(Some(fault), false);
        let told = outcome.violation.as_ref().map_or("", |(_, v)| v.guarantee);
        let _ = writeln!(rows, "| {name} | {needed} | {told} |");
        let (guarantee, mut what) = outcome
            .violation
            .map_or_else(Default::default, |(_, v)| (v.guarantee.to_owned(), v.what));
        what.truncate(90);
        table.add_row([name, needed.to_string(), guarantee, what]);
    }
    println!("{table}");
    if let Some(page) = &arguments.write
        && let Err(error) = write_table(page, &rows)
    {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    if missed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("not found: {}", missed.join(", "));
    ExitCode::FAILURE
}
