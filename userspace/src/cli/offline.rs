//! `replay` and `region`: working with a region file without an agent.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};

use crate::agent::filesystem_uuid::mounted_uuid;
use crate::agent::merge::SavedRegion;
use crate::ids::{Epoch, Seq};
use crate::region::dump;
use crate::replay::{self, Sentinel, SentinelFile, Verdict, reserve};

/// `twinwrite replay`
#[derive(Debug, Args)]
pub(super) struct ReplayArguments {
    /// The region file, a copy that nobody writes to
    #[arg(long)]
    region: PathBuf,
    /// Where the volume is mounted
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Print what would be done and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// `twinwrite region`
#[derive(Debug, Subcommand)]
pub(super) enum RegionCommand {
    /// Print a region's header, frames and records
    Dump {
        /// The region file
        file: PathBuf,
        /// Print JSON lines
        #[arg(long)]
        json: bool,
    },
    /// Check a region: exit status 0 only if all that its owner published is there
    Verify {
        /// The region file
        file: PathBuf,
    },
}

/// Behind which record the region is to be merged; `None`, said aloud, if there is nothing to merge.
fn judged(
    saved: &SavedRegion,
    mount: &Path,
    new_epoch: Epoch,
    uuid: [u8; 16],
) -> anyhow::Result<Option<Seq>> {
    match saved.judge(mount, new_epoch, Some(uuid)) {
        Verdict::Merge { after } => Ok(Some(after)),
        Verdict::Nothing(why) => {
            println!("nothing to merge: {why:?}");
            Ok(None)
        }
        Verdict::Refuse(refusal) => anyhow::bail!("refused: {refusal}"),
    }
}

pub(super) fn replay(arguments: &ReplayArguments) -> anyhow::Result<ExitCode> {
    let saved = SavedRegion::load(&arguments.region)?;
    let (mount, new_epoch) = (&arguments.to, Epoch(saved.header.epoch).next());
    let uuid = mounted_uuid(mount)?;
    // A volume that is refused must not even be given a sentinel file, so the first look is without hold.
    let Some(after) = judged(&saved, mount, new_epoch, uuid)? else {
        return Ok(ExitCode::SUCCESS);
    };
    if arguments.dry_run {
        print!("{}", saved.plan(after)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut held = SentinelFile::open(mount)?;
    // Whoever held it until now may have written to it.
    let Some(after) = judged(&saved, mount, new_epoch, uuid)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let outcome = replay::apply(&saved.plan(after)?, mount, &mut |_| ())?;
    let claim = saved.claim();
    let sentinel = Sentinel {
        cluster: claim.cluster,
        volume: claim.volume,
        epoch: new_epoch,
        seq: Seq(0),
        closed: true,
        time_ns: jiff::Timestamp::now()
            .as_nanosecond()
            .try_into()
            .unwrap_or(0),
    };
    replay::finish_held(mount, &mut held, &sentinel)?;
    replay::tidy(mount, &outcome)?;
    println!("{outcome}");
    if let Err(error) = reserve::make(mount) {
        eprintln!("nothing is set aside on the volume for another merge: {error}");
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn region(command: &RegionCommand) -> anyhow::Result<ExitCode> {
    let (RegionCommand::Dump { file, .. } | RegionCommand::Verify { file }) = command;
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let verdict = dump::verify(&bytes);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match command {
        RegionCommand::Dump { json: true, .. } => dump::write_json(&mut out, &bytes, &verdict)?,
        RegionCommand::Dump { json: false, .. } => dump::write_text(&mut out, &bytes, &verdict)?,
        RegionCommand::Verify { .. } => {}
    }
    out.flush()?;
    let scan = verdict.result?;
    if matches!(command, RegionCommand::Verify { .. }) {
        println!(
            "whole: epoch {}, records up to {}, cut {}",
            scan.epoch, scan.last_seq, scan.cut
        );
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests;
