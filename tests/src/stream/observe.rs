//! Looking at what is there of a stream after a crash, cell by cell.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::PREFIX;
use super::block::{BLOCK_BYTES, Place, read};
use super::operation::{Action, CURRENT, Cell, Operation};
use crate::walk::fill;

/// A cell's value, as far as it can be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// This value.
    Value(u64),
    /// No value that an operation leaves behind; the words say what.
    Torn(String),
}

/// What was found.
#[derive(Debug, Default)]
pub struct Observed {
    /// The cells that could be looked at; one that is not in here has its first value, unless it
    /// belongs to a file that has no name left.
    pub cells: BTreeMap<Cell, Seen>,
    /// What no operation can have left behind.
    pub damage: Vec<String>,
}

/// Which file each name belongs to.
#[must_use]
pub fn owners(operations: &[Operation]) -> HashMap<String, u64> {
    let mut owners = HashMap::new();
    for operation in operations {
        match &operation.action {
            Action::Create { path } => owners.insert(path.clone(), operation.number),
            Action::Rename { file, to, .. } | Action::Link { file, to, .. } => {
                owners.insert(to.clone(), *file)
            }
            _ => None,
        };
    }
    owners
}

/// Looks at the stream's directory below `root`.
#[must_use]
pub fn observe(root: &Path, seed: u64, operations: &[Operation]) -> Observed {
    let owners = owners(operations);
    let mut observed = Observed::default();
    let mut inodes = HashMap::new();
    let mut pending = vec![String::new()];
    while let Some(name) = pending.pop() {
        let path = if name.is_empty() {
            root.join(PREFIX)
        } else {
            root.join(PREFIX).join(&name)
        };
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if name.is_empty() && error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                observed.damage.push(format!("{name}: {error}"));
                continue;
            }
        };
        if metadata.is_dir() {
            observed
                .cells
                .insert(Cell::Name(name.clone()), Seen::Value(1));
            match children(&path, &name) {
                Ok(names) => pending.extend(names),
                Err(error) => observed.damage.push(format!("{name}: {error}")),
            }
        } else if !metadata.is_file() {
            observed
                .damage
                .push(format!("{name}: neither a file nor a directory"));
        } else {
            observed.file(&path, name, &metadata, seed, &owners, &mut inodes);
        }
    }
    observed
}

fn children(path: &Path, name: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for child in fs::read_dir(path)? {
        let child = child?.file_name().to_string_lossy().into_owned();
        names.push(if name.is_empty() {
            child
        } else {
            format!("{name}/{child}")
        });
    }
    Ok(names)
}

impl Observed {
    fn file(
        &mut self,
        path: &Path,
        name: String,
        metadata: &fs::Metadata,
        seed: u64,
        owners: &HashMap<String, u64>,
        inodes: &mut HashMap<u64, u64>,
    ) {
        let places = match places(path) {
            Ok(places) => places,
            Err(error) => {
                self.damage.push(format!("{name}: {error}"));
                return;
            }
        };
        let owner = if name == CURRENT {
            self.current(&places)
        } else {
            owners.get(&name).copied()
        };
        let Some(file) = owner else {
            if name != CURRENT {
                self.damage
                    .push(format!("{name}: no operation made this name"));
            }
            return;
        };
        if name != CURRENT {
            self.cells.insert(Cell::Name(name.clone()), Seen::Value(1));
        }
        if inodes
            .insert(file, metadata.ino())
            .is_some_and(|other| other != metadata.ino())
        {
            self.damage.push(format!(
                "{name}: another file than file {file}'s other name"
            ));
        }
        self.cells.insert(Cell::Alive(file), Seen::Value(1));
        let mode = u64::from(metadata.mode() & 0o7777);
        self.cells.insert(Cell::Mode(file), Seen::Value(mode));
        self.content(file, seed, &places);
    }

    /// Whose file has the name that is replaced again and again: its first block says it.
    fn current(&mut self, places: &[Place]) -> Option<u64> {
        let (seen, file) = match places.first() {
            Some(Place::Whole(block)) => (Seen::Value(block.file), Some(block.file)),
            Some(Place::Torn) => (Seen::Torn("its block is torn".into()), None),
            Some(Place::Zero) => (Seen::Torn("its block is zero".into()), None),
            None => (Seen::Torn("it is empty".into()), None),
        };
        self.cells.insert(Cell::Current, seen);
        file
    }

    fn content(&mut self, file: u64, seed: u64, places: &[Place]) {
        for (index, place) in (0_u32..).zip(places) {
            let seen = match place {
                Place::Zero => continue,
                Place::Whole(block)
                    if (block.seed, block.file, block.index) == (seed, file, index) =>
                {
                    Seen::Value(block.number)
                }
                Place::Whole(block) => {
                    Seen::Torn(format!("holds a block of another place: {block:?}"))
                }
                Place::Torn => Seen::Torn("not one whole block".into()),
            };
            self.cells.insert(Cell::Block(file, index), seen);
        }
    }
}

/// What lies in each block's place of a file.
fn places(path: &Path) -> io::Result<Vec<Place>> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut places = Vec::new();
    loop {
        let got = fill(&mut file, &mut buffer)?;
        let bytes = buffer.get(..got).unwrap_or_default();
        match got {
            0 => return Ok(places),
            BLOCK_BYTES => places.push(read(bytes)),
            _ => places.push(Place::Torn),
        }
    }
}
