//! Making a [`Plan`] so on a [`Volume`].
//!
//! The order keeps everything alive that is wanted or not proven dead: survivors get a second foothold
//! under `.twinwrite/staging` before any name is taken from them; what is missing is made there and bound
//! when it exists; bytes come before attributes, and times last. Every step looks at the disk first, so
//! that it can be interrupted anywhere and begun again.
//!
//! It must never destroy what the log does not prove dead: such things go to `.twinwrite/recovered`.

mod ahead;
mod content;
mod extended;
mod names;
mod resolve;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::ReplayError;
use super::plan::{Inode, Place, Plan};
use super::sentinel::OWN_DIRECTORY;
use super::volume::{Step, Volume};
use crate::ids::{Identity, Seq};

const STAGING: &[u8] = b"staging";
const RECOVERED: &[u8] = b"recovered";

/// What apply is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Finding each inode of the log on the disk.
    Resolve,
    /// Giving survivors a foothold, taking names away, making what is missing, binding names.
    Names,
    /// Writing bytes and sizes.
    Content,
    /// Setting owners, modes and times.
    Attributes,
    /// Waiting for the disk.
    Sync,
}

/// How far apply has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Steps of this stage done.
    pub done: u64,
    /// Steps of this stage.
    pub total: u64,
}

/// Something that was in the way and is not proven dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Who it is.
    pub identity: Identity,
    /// The directory it was in.
    pub directory: Identity,
    /// The name it had.
    pub name: Vec<u8>,
    /// Where it is now, from the volume's root.
    pub path: String,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The cut.
    pub last: Seq,
    /// Records merged.
    pub records: u64,
    /// Inodes made anew, as they are now.
    pub created: Vec<Identity>,
    /// Names bound.
    pub names_bound: u64,
    /// Names removed.
    pub names_removed: u64,
    /// Files whose bytes or size were written.
    pub files_written: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Moved out of the way.
    pub recovered: Vec<Recovered>,
    /// Inodes of the log that something after the cut had removed: they stay removed.
    pub deleted_ahead: Vec<Identity>,
    /// Inodes that should be there and cannot be made: lost, in words.
    pub lost: Vec<String>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} records up to {} merged: {} inodes made, {} names bound, {} removed, {} bytes into {} files",
            self.records,
            self.last,
            self.created.len(),
            self.names_bound,
            self.names_removed,
            self.bytes_written,
            self.files_written
        )?;
        for r in &self.recovered {
            write!(
                f,
                "\nmoved {} ({}) to {}",
                r.name.escape_ascii(),
                r.identity,
                r.path
            )?;
        }
        for identity in &self.deleted_ahead {
            write!(
                f,
                "\n{identity} had been deleted after the cut and stays deleted"
            )?;
        }
        for text in self.lost.iter().chain(&self.warnings) {
            write!(f, "\n{text}")?;
        }
        Ok(())
    }
}

/// Where an inode of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// On the disk under its own identity.
    Kept,
    /// This inode, made by replay, stands for it.
    Made(Identity),
    /// Nowhere yet: it will be made.
    ToMake,
    /// Removed by something after the cut.
    Gone,
    /// Nowhere, and it cannot be made.
    Lost,
}

/// One run.
struct Apply<'p, 'a, V> {
    plan: &'p Plan<'a>,
    volume: &'p mut V,
    progress: &'p mut dyn FnMut(Progress),
    outcome: Outcome,
    /// The directory `.twinwrite`.
    own: Identity,
    staging: Identity,
    recovered: Identity,
    found: BTreeMap<Identity, Found>,
    /// The other way round, for what is on the disk.
    planned: BTreeMap<Identity, Identity>,
    /// Final names of each inode of the log, but for those in `left`.
    places: BTreeMap<Identity, Vec<Place<'a>>>,
    /// Names that something after the cut has given away: they stay as the disk has them.
    left: BTreeSet<Place<'a>>,
    /// What was kept aside before this run began.
    aside: Vec<Vec<u8>>,
    /// Modification times that directories had before replay touched them.
    touched: BTreeMap<Identity, i64>,
    written: BTreeSet<Identity>,
    /// What was made and bears no stamp, by its identity on the disk, and what it was made for.
    noted: BTreeMap<Identity, Identity>,
    /// `FS_IMMUTABLE_FL` and `FS_APPEND_FL` of inodes on the disk, as they must be in the end.
    locks: BTreeMap<Identity, u32>,
    /// File capabilities that writing takes away, and that must be there in the end.
    capabilities: BTreeMap<Identity, Vec<u8>>,
}

/// Makes `plan` so on `volume`, and syncs it.
///
/// # Errors
/// [`ReplayError`]: nothing is lost, and it can be run again.
pub fn apply_to<V: Volume>(
    plan: &Plan<'_>,
    volume: &mut V,
    progress: &mut dyn FnMut(Progress),
) -> Result<Outcome, ReplayError> {
    let mut run = Apply::begin(plan, volume, progress)?;
    run.resolve()?;
    run.unlock()?;
    run.names()?;
    run.content()?;
    run.attributes()?;
    run.settle()?;
    run.tell(Stage::Sync, 0, 1);
    run.volume.sync()?;
    run.tell(Stage::Sync, 1, 1);
    Ok(run.outcome)
}

/// Removes stamps, the notes that stand for some, and the staging directory.
///
/// # Errors
/// The first step that failed.
pub fn tidy_on<V: Volume>(volume: &mut V, outcome: &Outcome) -> Step<()> {
    for identity in &outcome.created {
        // What is locked has lost its stamp before it was.
        if volume.stat(*identity)?.is_some_and(|stat| !stat.is_locked) {
            volume.set_stamp(*identity, None)?;
        }
    }
    let root = volume.root()?;
    let Some(own) = volume.lookup(root, OWN_DIRECTORY.as_bytes())? else {
        return Ok(());
    };
    if let Some(staging) = volume.lookup(own, STAGING)? {
        for name in volume.list(staging)? {
            if extended::is_stamp_note(&name) {
                volume.unlink(staging, &name)?;
            }
        }
    }
    for name in [STAGING, RECOVERED] {
        if let Some(directory) = volume.lookup(own, name)?
            && volume.list(directory)?.is_empty()
        {
            volume.remove_directory(own, name)?;
        }
    }
    Ok(())
}

impl<'p, 'a, V: Volume> Apply<'p, 'a, V> {
    fn begin(
        plan: &'p Plan<'a>,
        volume: &'p mut V,
        progress: &'p mut dyn FnMut(Progress),
    ) -> Step<Self> {
        let root = volume.root()?;
        let root_mtime_ns = volume.stat(root)?.map(|stat| stat.mtime_ns);
        let mut directory = |parent, name: &[u8]| match volume.lookup(parent, name)? {
            Some(found) => Ok(found),
            None => volume.create(parent, name, super::plan::Kind::Directory),
        };
        let own = directory(root, OWN_DIRECTORY.as_bytes())?;
        let touched = root_mtime_ns
            .map(|mtime_ns| (root, mtime_ns))
            .into_iter()
            .collect();
        let staging = directory(own, STAGING)?;
        let recovered = directory(own, RECOVERED)?;
        for directory in [staging, recovered] {
            // What the volume's root passes on, or what an interrupted run left, would keep others out.
            volume.pass_on_project(directory, None)?;
            extended::pass_on_no_acl(volume, directory)?;
        }
        let aside = volume.list(recovered)?;
        let outcome = Outcome {
            last: plan.last,
            records: plan.records,
            warnings: plan.told_gaps().into_iter().collect(),
            ..Outcome::default()
        };
        Ok(Self {
            plan,
            volume,
            progress,
            outcome,
            own,
            staging,
            recovered,
            found: BTreeMap::new(),
            planned: BTreeMap::new(),
            places: plan.places(),
            left: BTreeSet::new(),
            aside,
            touched,
            written: BTreeSet::new(),
            noted: BTreeMap::new(),
            locks: BTreeMap::new(),
            capabilities: BTreeMap::new(),
        })
    }

    fn tell(&mut self, stage: Stage, done: u64, total: u64) {
        (self.progress)(Progress { stage, done, total });
    }

    fn inode(&self, identity: Identity) -> Option<&'p Inode<'a>> {
        self.plan.inodes.get(&identity)
    }

    /// Where an inode of the log is on the disk, if it is.
    fn on_disk(&self, identity: Identity) -> Option<Identity> {
        match self.found.get(&identity) {
            Some(Found::Kept) => Some(identity),
            Some(Found::Made(made)) => Some(*made),
            _ => None,
        }
    }

    /// Remembers a directory's modification time before its names change, and opens it to changes.
    fn touch(&mut self, directory: Identity) -> Step<()> {
        if !self.touched.contains_key(&directory)
            && let Some(stat) = self.volume.stat(directory)?
        {
            self.touched.insert(directory, stat.mtime_ns);
            self.unlock_one(directory)?;
        }
        Ok(())
    }

    /// Moves something that is not proven dead out of the way.
    fn recover(&mut self, directory: Identity, name: &[u8], identity: Identity) -> Step<()> {
        let mut target = format!("{}-{}-", identity.ino, identity.generation).into_bytes();
        let room = 255usize.saturating_sub(target.len());
        target.extend(name.iter().take(room));
        self.touch(directory)?;
        self.unlock_one(identity)?;
        let mut free = target.clone();
        let mut number = 0;
        while self.volume.lookup(self.recovered, &free)?.is_some() {
            number += 1;
            free = format!("{}-{}-again-{number}", identity.ino, identity.generation).into_bytes();
        }
        self.volume
            .rename((directory, name), (self.recovered, &free))?;
        let path = format!("{OWN_DIRECTORY}/recovered/{}", free.escape_ascii());
        let name = name.to_vec();
        self.outcome.recovered.push(Recovered {
            identity,
            directory,
            name,
            path,
        });
        Ok(())
    }
}
