//! The sequence of operations that a seed decides, and what each one's effect is.
//!
//! Every name but `current` belongs to one file for ever: a name that is there says which file's
//! it is. This module makes no system call: writer and checker compute the same sequence.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// The name that is replaced again and again by a rename, as careful applications save a file.
pub const CURRENT: &str = "d0/current";
const DIRECTORIES: u64 = 4;
/// Places in the file whose blocks are overwritten.
const SLOTS: u64 = 256;
/// Blocks after which a log file is full, and log files that are kept.
const LOG_BLOCKS: u32 = 256;
const LOGS_MAX: usize = 48;
/// Small files kept at most, their blocks, and their names.
const SMALL_MAX: usize = 64;
const SMALL_BLOCKS: u32 = 8;
const SMALL_NAMES: usize = 3;
/// Modes that no usual umask touches differently on writer and checker: they are set by chmod.
const MODES: [u32; 4] = [0o640, 0o644, 0o660, 0o700];
/// Mode of a fresh file.
pub const CREATE_MODE: u32 = 0o600;

/// One system call. Paths are below the stream's directory; `file` is the number of the operation
/// that created the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// `mkdir`
    MakeDirectory {
        /// Its path; empty for the stream's directory itself.
        path: String,
    },
    /// `open(O_CREAT | O_EXCL)`
    Create {
        /// Its path.
        path: String,
    },
    /// `write` of one block to a descriptor opened with `O_APPEND`.
    Append {
        /// The file.
        file: u64,
        /// One of its names.
        path: String,
        /// Where the block comes to lie.
        index: u32,
    },
    /// `pwrite` of one block.
    Overwrite {
        /// The file.
        file: u64,
        /// One of its names.
        path: String,
        /// Where the block lies.
        index: u32,
    },
    /// `rename` to a name that was never there.
    Rename {
        /// The file.
        file: u64,
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// `rename` to [`CURRENT`], over the file that has that name.
    Replace {
        /// The file.
        file: u64,
        /// Its only name.
        from: String,
        /// The file that loses its name.
        victim: Option<u64>,
    },
    /// `link` to a name that was never there.
    Link {
        /// The file.
        file: u64,
        /// One of its names.
        from: String,
        /// Its further name.
        to: String,
    },
    /// `unlink`
    Unlink {
        /// The file.
        file: u64,
        /// The name that goes.
        path: String,
        /// Whether it is the last one.
        last: bool,
    },
    /// `chmod`
    ChangeMode {
        /// The file.
        file: u64,
        /// One of its names.
        path: String,
        /// The new mode.
        mode: u32,
    },
}

impl Action {
    /// The word for its kind in reports.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::MakeDirectory { .. } => "mkdir",
            Self::Create { .. } => "create",
            Self::Append { .. } | Self::Overwrite { .. } => "write",
            Self::Rename { .. } | Self::Replace { .. } => "rename",
            Self::Link { .. } => "link",
            Self::Unlink { .. } => "unlink",
            Self::ChangeMode { .. } => "chmod",
        }
    }
}

/// A numbered [`Action`]; numbers are 1, 2, 3 ... without holes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Its number.
    pub number: u64,
    /// What it does.
    pub action: Action,
}

/// Something that has one value at any time, which an operation changes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cell {
    /// Whether a name is there: 0 or 1.
    Name(String),
    /// Whether a file has any name: 0 or 1.
    Alive(u64),
    /// Number of the operation that wrote a file's block; 0 for a hole.
    Block(u64, u32),
    /// A file's mode.
    Mode(u64),
    /// The file that [`CURRENT`] names; 0 for none.
    Current,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "name {name}"),
            Self::Alive(file) => write!(f, "file {file}"),
            Self::Block(file, index) => write!(f, "block {index} of file {file}"),
            Self::Mode(file) => write!(f, "mode of file {file}"),
            Self::Current => write!(f, "name {CURRENT}"),
        }
    }
}

impl Operation {
    /// The cells it changes and their new values.
    #[must_use]
    pub fn effects(&self) -> Vec<(Cell, u64)> {
        let name = |path: &String, there: u64| (Cell::Name(path.clone()), there);
        match &self.action {
            Action::MakeDirectory { path } => vec![name(path, 1)],
            Action::Create { path } => vec![
                name(path, 1),
                (Cell::Alive(self.number), 1),
                (Cell::Mode(self.number), CREATE_MODE.into()),
            ],
            Action::Append { file, index, .. } | Action::Overwrite { file, index, .. } => {
                vec![(Cell::Block(*file, *index), self.number)]
            }
            Action::Rename { from, to, .. } => vec![name(from, 0), name(to, 1)],
            Action::Replace { file, from, victim } => {
                let victim = victim.map(|victim| (Cell::Alive(victim), 0));
                [name(from, 0), (Cell::Current, *file)]
                    .into_iter()
                    .chain(victim)
                    .collect()
            }
            Action::Link { to, .. } => vec![name(to, 1)],
            Action::Unlink { file, path, last } => {
                let gone = last.then_some((Cell::Alive(*file), 0));
                [name(path, 0)].into_iter().chain(gone).collect()
            }
            Action::ChangeMode { file, mode, .. } => vec![(Cell::Mode(*file), (*mode).into())],
        }
    }
}

#[derive(Clone, Debug, Default)]
struct FileState {
    names: Vec<String>,
    blocks: u32,
}

/// Gives one operation after the other.
#[derive(Clone, Debug)]
pub struct Generator {
    random: Random,
    number: u64,
    slots: u64,
    logs: BTreeMap<u64, FileState>,
    small: BTreeMap<u64, FileState>,
    /// The file that [`CURRENT`] names.
    current: Option<u64>,
    /// What is already decided: actions that take the file of the `Create` before them.
    decided: VecDeque<Decided>,
}

/// The steps of a careful save after its `Create`.
#[derive(Clone, Debug)]
enum Decided {
    Fill(u64),
    Replace(u64),
}

impl Generator {
    /// The sequence of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            number: 0,
            slots: 0,
            logs: BTreeMap::new(),
            small: BTreeMap::new(),
            current: None,
            decided: VecDeque::new(),
        }
    }

    /// The next operation.
    #[expect(clippy::should_implement_trait, reason = "the sequence never ends")]
    pub fn next(&mut self) -> Operation {
        self.number += 1;
        let action = self
            .opening()
            .or_else(|| self.decided())
            .unwrap_or_else(|| self.choose());
        Operation {
            number: self.number,
            action,
        }
    }

    /// The first operations make the directories and the file of slots.
    fn opening(&mut self) -> Option<Action> {
        match self.number {
            1 => Some(Action::MakeDirectory {
                path: String::new(),
            }),
            n if n <= 1 + DIRECTORIES => Some(Action::MakeDirectory {
                path: format!("d{}", n - 2),
            }),
            n if n == 2 + DIRECTORIES => {
                self.slots = n;
                Some(Action::Create {
                    path: "d0/slots".into(),
                })
            }
            _ => None,
        }
    }

    fn decided(&mut self) -> Option<Action> {
        match self.decided.pop_front()? {
            Decided::Fill(file) => Some(Action::Append {
                file,
                path: format!("d0/next-{file}"),
                index: 0,
            }),
            Decided::Replace(file) => {
                let victim = self.current.replace(file);
                Some(Action::Replace {
                    file,
                    from: format!("d0/next-{file}"),
                    victim,
                })
            }
        }
    }

    fn choose(&mut self) -> Action {
        if self.small.len() > SMALL_MAX {
            return self.unlink_small().unwrap_or_else(|| self.append_to_log());
        }
        if self.logs.len() > LOGS_MAX {
            return self.unlink_log();
        }
        let action = match self.random.below(100) {
            0..40 => None,
            40..60 => Some(self.overwrite_slot()),
            60..68 => Some(self.create_small()),
            68..76 => self.append_to_small(),
            76..84 => self.rename_small(),
            84..88 => self.link_small(),
            88..93 => self.unlink_small(),
            93..96 => self.change_mode(),
            _ => Some(self.save_carefully()),
        };
        action.unwrap_or_else(|| self.append_to_log())
    }

    fn directory(&mut self) -> u64 {
        self.random.below(DIRECTORIES)
    }

    fn append_to_log(&mut self) -> Action {
        if let Some((file, state)) = self
            .logs
            .last_entry()
            .map(|entry| (*entry.key(), entry.into_mut()))
            && state.blocks < LOG_BLOCKS
        {
            state.blocks += 1;
            let path = state.names.first().cloned().unwrap_or_default();
            return Action::Append {
                file,
                path,
                index: state.blocks - 1,
            };
        }
        let path = format!("d{}/log-{}", self.directory(), self.number);
        self.logs.insert(
            self.number,
            FileState {
                names: vec![path.clone()],
                blocks: 0,
            },
        );
        Action::Create { path }
    }

    fn unlink_log(&mut self) -> Action {
        let Some((file, state)) = self.logs.pop_first() else {
            return self.overwrite_slot();
        };
        let path = state.names.into_iter().next().unwrap_or_default();
        Action::Unlink {
            file,
            path,
            last: true,
        }
    }

    fn overwrite_slot(&mut self) -> Action {
        let index = self.random.below(SLOTS) as u32;
        Action::Overwrite {
            file: self.slots,
            path: "d0/slots".into(),
            index,
        }
    }

    fn create_small(&mut self) -> Action {
        let path = format!("d{}/small-{}", self.directory(), self.number);
        self.small.insert(
            self.number,
            FileState {
                names: vec![path.clone()],
                blocks: 0,
            },
        );
        Action::Create { path }
    }

    /// One of the small files, and which of its names.
    fn pick_small(&mut self) -> Option<(u64, usize)> {
        let files: Vec<u64> = self.small.keys().copied().collect();
        let file = *self.random.pick(&files)?;
        let names = self.small.get(&file)?.names.len();
        Some((file, usize::try_from(self.random.below(names as u64)).ok()?))
    }

    fn append_to_small(&mut self) -> Option<Action> {
        let (file, name) = self.pick_small()?;
        let state = self
            .small
            .get_mut(&file)
            .filter(|state| state.blocks < SMALL_BLOCKS)?;
        state.blocks += 1;
        let path = state.names.get(name)?.clone();
        Some(Action::Append {
            file,
            path,
            index: state.blocks - 1,
        })
    }

    fn rename_small(&mut self) -> Option<Action> {
        let (file, name) = self.pick_small()?;
        let to = format!("d{}/small-{file}-{}", self.directory(), self.number);
        let place = self.small.get_mut(&file)?.names.get_mut(name)?;
        let from = std::mem::replace(place, to.clone());
        Some(Action::Rename { file, from, to })
    }

    fn link_small(&mut self) -> Option<Action> {
        let (file, name) = self.pick_small()?;
        let to = format!("d{}/small-{file}-{}", self.directory(), self.number);
        let state = self
            .small
            .get_mut(&file)
            .filter(|state| state.names.len() < SMALL_NAMES)?;
        let from = state.names.get(name)?.clone();
        state.names.push(to.clone());
        Some(Action::Link { file, from, to })
    }

    fn unlink_small(&mut self) -> Option<Action> {
        let (file, name) = self.pick_small()?;
        let state = self.small.get_mut(&file)?;
        let path = state.names.swap_remove(name);
        let last = state.names.is_empty();
        if last {
            self.small.remove(&file);
        }
        Some(Action::Unlink { file, path, last })
    }

    fn change_mode(&mut self) -> Option<Action> {
        let (file, name) = self.pick_small()?;
        let path = self.small.get(&file)?.names.get(name)?.clone();
        let mode = *self.random.pick(&MODES)?;
        Some(Action::ChangeMode { file, path, mode })
    }

    /// Create, fill, rename over: without fsync between, as it should not be done.
    fn save_carefully(&mut self) -> Action {
        self.decided
            .extend([Decided::Fill(self.number), Decided::Replace(self.number)]);
        Action::Create {
            path: format!("d0/next-{}", self.number),
        }
    }
}
