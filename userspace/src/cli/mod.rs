//! The `twinwrite` command: what an administrator types.
//!
//! Every subcommand prints for people unless `--json` is given, and says with its exit status how
//! things are. Nothing here decides anything about a volume.

mod inspect;
mod offline;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::ids::NodeId;

/// Gives every unflushed write of a file server a twin in a second machine's memory.
#[derive(Debug, Parser)]
#[command(name = "twinwrite", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: protect this node's volumes and mirror its peer's
    Run(NodeArguments),
    /// Show how this node's agent, peers and volumes are (exit status 0 healthy, 1 degraded, 2 down)
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Where the agent's socket lives
        #[arg(long, default_value = "/run/twinwrite")]
        run_dir: PathBuf,
    },
    /// Check a configuration file without running anything
    CheckConfig(NodeArguments),
    /// Tell what this host can do and what is missing, with the remedy
    Doctor {
        /// Also check what this configuration needs
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Merge a saved region into a mounted volume
    Replay(offline::ReplayArguments),
    /// Look at a region file
    Region {
        #[command(subcommand)]
        command: offline::RegionCommand,
    },
    /// Give your word where a takeover waits for it, as `twinwrite status` tells
    Takeover {
        #[command(flatten)]
        word: Word,
        /// Where the agent's socket lives
        #[arg(long, default_value = "/run/twinwrite")]
        run_dir: PathBuf,
    },
    /// End the agent: close its epochs first, or leave them to the next agent
    Stop {
        /// Leave everything running for the next agent, which is started within this time (as in 30s); the
        /// peer waits for it that long before it counts this node's silence
        #[arg(long, value_name = "TIME")]
        restart_within: Option<jiff::SignedDuration>,
        /// Where the agent's socket lives
        #[arg(long, default_value = "/run/twinwrite")]
        run_dir: PathBuf,
    },
    /// Write a file and fsync it: how an agent proves that its gate holds
    #[command(hide = true)]
    GateProbe {
        /// The file
        file: PathBuf,
    },
    /// Remove a volume's capture programs that an agent left attached
    Detach {
        /// The volume's name
        volume: String,
    },
}

/// What only a person may decide.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Word {
    /// This node is powered off, and stays off until it was taken over
    #[arg(long, value_name = "NODE")]
    confirm_dead: Option<String>,
    /// Serve this volume as it is on the disk, and give up what its region holds
    #[arg(long, value_name = "VOLUME")]
    discard_region: Option<String>,
}

/// A configuration, and which of its nodes this is.
#[derive(Debug, clap::Args)]
pub struct NodeArguments {
    /// The configuration file
    #[arg(long, default_value = "/etc/twinwrite/twinwrite.toml")]
    pub config: PathBuf,
    /// This node's name in it; default: the host name
    #[arg(long)]
    pub node: Option<String>,
}

/// Parses the command line and does what it says.
///
/// # Errors
/// Whatever the subcommand failed with, ready to be printed.
pub fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Command::Run(arguments) => {
            crate::agent::run(&arguments.config, arguments.node.as_deref())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status { json, run_dir } => status::status(&run_dir, json),
        Command::CheckConfig(arguments) => inspect::check_config(&arguments),
        Command::Doctor { config } => inspect::doctor(config.as_deref()),
        Command::Replay(arguments) => offline::replay(&arguments),
        Command::Region { command } => offline::region(&command),
        Command::Takeover { word, run_dir } => match (word.confirm_dead, word.discard_region) {
            (Some(node), _) => status::confirm_dead(&run_dir, NodeId(node)),
            (None, Some(volume)) => status::discard_region(&run_dir, volume),
            (None, None) => anyhow::bail!("no word was given"),
        },
        Command::Stop {
            restart_within,
            run_dir,
        } => status::stop(&run_dir, restart_within),
        Command::GateProbe { file } => {
            crate::agent::write_and_fsync(&file)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Detach { volume } => inspect::detach(&volume),
    }
}
