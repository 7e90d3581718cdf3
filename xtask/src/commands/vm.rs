//! `cargo xtask vm`

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;

use crate::lab::{
    AgentAction, AwaitedState, CrashKind, DiskKind, Filesystem, KernelRelease, Lab, Lifetime,
    LinkKind, NodeName, Options, Programs, Service, Stream, shell_quoted,
};
use crate::progress;

/// Its arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which lab; labs of different names run beside each other.
    #[arg(long, global = true, default_value = "default")]
    lab: String,
    #[command(subcommand)]
    command: VmCommand,
}

#[derive(Subcommand)]
enum VmCommand {
    /// Boot both machines with the volume protected, and leave them up.
    Up(Up),
    /// Run a command in a machine: one argument is a shell line, several are taken as they are.
    Exec {
        /// Where.
        node: NodeName,
        /// Its limit, seconds; status 124 if it is reached.
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The command.
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Copy a file into a machine.
    Put {
        /// Where.
        node: NodeName,
        /// File on this host.
        local: PathBuf,
        /// Path in the machine.
        remote: String,
    },
    /// Copy a file out of a machine.
    Get {
        /// Where.
        node: NodeName,
        /// Path in the machine.
        remote: String,
        /// File on this host.
        local: PathBuf,
    },
    /// Crash a machine, check that it died in just this way, and print when (ms since 1970).
    Crash {
        /// Which.
        node: NodeName,
        /// Cut its power, panic, or reset.
        #[arg(long, default_value = "kill")]
        how: CrashKind,
    },
    /// Start a machine again after a crash, with the same disks.
    Boot {
        /// Which.
        node: NodeName,
        /// Do not start its agent.
        #[arg(long)]
        no_agent: bool,
    },
    /// Cut the wire between the machines.
    CutLink,
    /// Mend it.
    HealLink,
    /// Wait until an agent reports a state, and print when (ms since 1970).
    Wait {
        /// Whose agent.
        #[arg(long)]
        node: NodeName,
        /// What to wait for.
        #[arg(long)]
        state: AwaitedState,
        /// Seconds.
        #[arg(long, default_value_t = 60)]
        timeout: u64,
    },
    /// Start, stop or kill the agent of a machine.
    Agent {
        /// Which machine.
        node: NodeName,
        /// What to do.
        action: AgentAction,
    },
    /// Say something to QEMU's monitor.
    #[command(hide = true)]
    Monitor {
        /// Whose.
        node: NodeName,
        /// What.
        command: String,
    },
    /// Tell which machines and agents live.
    Status,
    /// Print an agent's log.
    Log {
        /// Whose.
        node: NodeName,
        /// The machine's console instead.
        #[arg(long)]
        console: bool,
    },
    /// End the machines and everything that belongs to the lab.
    Down,
}

#[derive(clap::Args)]
struct Up {
    /// The volume's file system.
    #[arg(long, default_value = "ext4")]
    fs: Filesystem,
    /// The machines' kernel.
    #[arg(long, default_value = "6.12")]
    kernel: KernelRelease,
    /// How bytes reach the mirror.
    #[arg(long, default_value = "rdma")]
    link: LinkKind,
    /// No agents; A mounts the volume plainly.
    #[arg(long)]
    no_mirror: bool,
    /// No agents and nothing mounted.
    #[arg(long, conflicts_with = "no_mirror")]
    no_agent: bool,
    /// Do not compile; put in what an earlier build left.
    #[arg(long)]
    no_build: bool,
    /// What the shared disks do at a power cut: `volatile` ones lose what was not flushed.
    #[arg(long, default_value = "plain")]
    disks: DiskKind,
    /// A further line for the configuration's [cluster], for example 'dead_after = "5s"'.
    #[arg(long, value_name = "LINE")]
    cluster_setting: Vec<String>,
    /// A further line for its [[volume]], for example 'ring_bytes = "4MiB"'.
    #[arg(long, value_name = "LINE")]
    volume_setting: Vec<String>,
    /// A further word for the kernels' command line, for example preempt=full.
    #[arg(long, value_name = "WORD")]
    kernel_parameter: Vec<String>,
}

impl Up {
    fn options(&self) -> Options {
        let service = match (self.no_mirror, self.no_agent) {
            (true, _) => Service::PlainMount,
            (false, true) => Service::Nothing,
            (false, false) => Service::Agents,
        };
        Options {
            filesystem: self.fs,
            kernel: self.kernel,
            link: self.link,
            service,
            programs: if self.no_build {
                Programs::AsBuilt
            } else {
                Programs::Build
            },
            lifetime: Lifetime::UntilDown,
            cluster_settings: self.cluster_setting.clone(),
            volume_settings: self.volume_setting.clone(),
            kernel_parameters: self.kernel_parameter.clone(),
            disks: self.disks,
            ..Options::default()
        }
    }
}

/// Does what was asked.
///
/// # Errors
/// Those of the lab.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let name = &arguments.lab;
    match &arguments.command {
        VmCommand::Up(up) => {
            Lab::up(name, up.options())?;
            progress::note(&format!("lab {name} is up"));
        }
        VmCommand::Down => {
            Lab::named(name)?.down()?;
            progress::note(&format!("lab {name} is down"));
        }
        VmCommand::Exec {
            node,
            timeout,
            command,
        } => {
            return exec(
                &Lab::open(name)?,
                *node,
                command,
                Duration::from_secs(*timeout),
            );
        }
        VmCommand::Put {
            node,
            local,
            remote,
        } => Lab::open(name)?.put(*node, local, remote)?,
        VmCommand::Get {
            node,
            remote,
            local,
        } => Lab::open(name)?.get(*node, remote, local)?,
        VmCommand::Crash { node, how } => println!("{}", Lab::open(name)?.crash(*node, *how)?),
        VmCommand::Boot { node, no_agent } => Lab::open(name)?.boot(*node, !no_agent)?,
        VmCommand::CutLink => println!("{}", Lab::open(name)?.cut_link()?),
        VmCommand::HealLink => println!("{}", Lab::open(name)?.heal_link()?),
        VmCommand::Wait {
            node,
            state,
            timeout,
        } => {
            let limit = Duration::from_secs(*timeout);
            println!("{}", Lab::open(name)?.wait(*node, *state, limit)?);
        }
        VmCommand::Agent { node, action } => Lab::open(name)?.agent(*node, *action)?,
        VmCommand::Monitor { node, command } => {
            println!("{}", Lab::open(name)?.monitor(*node, command)?);
        }
        VmCommand::Status => status(&Lab::named(name)?)?,
        VmCommand::Log { node, console } => log(&Lab::named(name)?, *node, *console)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn exec(lab: &Lab, node: NodeName, command: &[String], limit: Duration) -> Result<ExitCode> {
    let line = match command {
        [line] => line.clone(),
        words => words
            .iter()
            .map(|word| shell_quoted(word))
            .collect::<Vec<_>>()
            .join(" "),
    };
    let status = lab.exec_streamed(node, &line, limit, |stream, bytes| {
        // Whoever reads may have enough; the command's status still counts.
        let _ = match stream {
            Stream::Out => std::io::stdout().write_all(bytes),
            Stream::Err => std::io::stderr().write_all(bytes),
        };
    })?;
    let _ = std::io::stdout().flush();
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

fn status(lab: &Lab) -> Result<()> {
    if !lab.is_up()? {
        println!("lab {} is down", lab.name());
        return Ok(());
    }
    let options = lab.options()?;
    println!(
        "lab {} is up: {}, kernel {}, link {}",
        lab.name(),
        options.filesystem,
        options.kernel,
        options.link
    );
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["node", "machine", "agent", "boots", "process"]);
    for machine in lab.machines()? {
        let (state, agent) = match &machine.ended {
            Some(end) => (format!("dead ({})", end.how), "-"),
            None => ("alive".to_owned(), agent_word(lab, machine.node)),
        };
        table.add_row([
            machine.node.to_string(),
            state,
            agent.to_owned(),
            machine.boots.to_string(),
            machine.process.pid.to_string(),
        ]);
    }
    println!("{table}\n{}", lab.directory().display());
    Ok(())
}

fn agent_word(lab: &Lab, node: NodeName) -> &'static str {
    match lab.agent_is_alive(node) {
        Ok(true) => "alive",
        Ok(false) => "none",
        Err(_) => "no answer",
    }
}

fn log(lab: &Lab, node: NodeName, console: bool) -> Result<()> {
    let path = if console {
        lab.console_log(node)
    } else {
        lab.agent_log(node)
    };
    let text = std::fs::read(&path).with_context(|| format!("there is no {}", path.display()))?;
    std::io::stdout().write_all(&text).context("cannot write")
}
