//! A file system's state, in which everything tells by which mutation it came about.
//!
//! Bytes come in blocks of [`BLOCK_BYTES`], each holding the number of the mutation that wrote it, so
//! that whoever finds a block knows whose it is.

use std::collections::BTreeMap;

use twinwrite::ids::Identity;
use twinwrite::replay::volume::Stamp;

/// Number of a mutation: grows with every change that anybody makes to the volume.
pub type Version = u64;
/// A file name.
pub type Name = Vec<u8>;
/// A directory and a name in it.
pub type Place = (Identity, Name);

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4;
/// The root directory.
pub const ROOT: Identity = Identity {
    ino: 2,
    generation: 1,
};
/// The directory `.twinwrite`.
pub const OWN: Identity = Identity {
    ino: 3,
    generation: 1,
};
/// Its name.
pub const OWN_NAME: &[u8] = b".twinwrite";

/// What can happen to a volume, in one step that is there wholly or not at all (bytes aside).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A fresh inode, bound to a name unless it is an `O_TMPFILE`.
    Create {
        /// Who.
        inode: Identity,
        /// A directory, or a file.
        directory: bool,
        /// Permission bits.
        mode: u32,
        /// Where.
        place: Option<Place>,
    },
    /// A further name.
    Link {
        /// Of whom.
        inode: Identity,
        /// Where.
        place: Place,
    },
    /// A name removed.
    Unlink {
        /// Whose.
        inode: Identity,
        /// Where.
        place: Place,
    },
    /// A name moved, over what is there.
    Rename {
        /// Whose.
        inode: Identity,
        /// From.
        from: Place,
        /// To.
        to: Place,
        /// Who was there.
        victim: Option<Identity>,
    },
    /// Two names exchanged.
    Exchange {
        /// At `from`.
        inode: Identity,
        /// At `to`.
        other: Identity,
        /// One.
        from: Place,
        /// The other.
        to: Place,
    },
    /// Blocks written, and the size with them.
    Write {
        /// Into whom.
        inode: Identity,
        /// First block.
        first: usize,
        /// Their contents.
        blocks: Vec<u32>,
        /// Whether the modification time changes.
        stamped: bool,
    },
    /// The size set, in blocks.
    Truncate {
        /// Of whom.
        inode: Identity,
        /// To what.
        size: usize,
    },
    /// The owner.
    Chown {
        /// Of whom.
        inode: Identity,
        /// Who.
        uid: u32,
    },
    /// Permission bits.
    Chmod {
        /// Of whom.
        inode: Identity,
        /// Which.
        mode: u32,
    },
    /// Modification time.
    Times {
        /// Of whom.
        inode: Identity,
        /// When.
        mtime_ns: i64,
    },
    /// Replay's stamp.
    Stamp {
        /// Of whom.
        inode: Identity,
        /// Which.
        stamp: Option<Stamp>,
    },
}

impl Mutation {
    /// The inodes whose metadata it changes.
    pub fn touches(&self, whom: Identity) -> bool {
        match self {
            Self::Create { inode, place, .. } => {
                *inode == whom || place.as_ref().is_some_and(|p| p.0 == whom)
            }
            Self::Link { inode, place } | Self::Unlink { inode, place } => {
                *inode == whom || place.0 == whom
            }
            Self::Rename {
                inode,
                from,
                to,
                victim,
            } => *inode == whom || from.0 == whom || to.0 == whom || *victim == Some(whom),
            Self::Exchange {
                inode,
                other,
                from,
                to,
            } => *inode == whom || *other == whom || from.0 == whom || to.0 == whom,
            Self::Write { inode, .. }
            | Self::Truncate { inode, .. }
            | Self::Chown { inode, .. }
            | Self::Chmod { inode, .. }
            | Self::Times { inode, .. }
            | Self::Stamp { inode, .. } => *inode == whom,
        }
    }
}

/// A value and the mutation that set it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set<T> {
    /// The value.
    pub value: T,
    /// The mutation.
    pub at: Version,
}

impl<T> Set<T> {
    /// Set by this mutation.
    pub fn by(value: T, at: Version) -> Self {
        Self { value, at }
    }
}

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Whom it stands for: itself, or the inode that replay made it in place of.
    pub origin: Identity,
    /// Whether it is a directory.
    pub directory: bool,
    /// Link count.
    pub links: u32,
    /// The mutation that made it.
    pub made: Version,
    /// The mutation that gave it its first name.
    pub born: Version,
    /// Permission bits.
    pub mode: Set<u32>,
    /// Owner.
    pub uid: Set<u32>,
    /// Modification time.
    pub mtime_ns: Set<i64>,
    /// Contents; as many as the size is.
    pub blocks: Vec<Set<u32>>,
    /// The mutation that set the size.
    pub size_at: Version,
    /// Names; `None`: there was one.
    pub entries: BTreeMap<Name, Set<Option<Identity>>>,
    /// Replay's stamp.
    pub stamp: Option<Stamp>,
}

impl Inode {
    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        (self.blocks.len() * BLOCK_BYTES) as u64
    }

    /// Type and permission bits.
    pub fn full_mode(&self) -> u32 {
        let format = if self.directory { 0o040_000 } else { 0o100_000 };
        format | self.mode.value
    }

    /// Its names, but for those that are gone.
    pub fn names(&self) -> impl Iterator<Item = (&Name, Identity)> {
        self.entries
            .iter()
            .filter_map(|(name, child)| Some((name, child.value?)))
    }
}

/// A file system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// By identity; also those without a link that something holds open.
    pub inodes: BTreeMap<Identity, Inode>,
    /// Inodes whose last link went, and by which mutation.
    pub removed: BTreeMap<Identity, Version>,
}

fn inode(origin: Identity, directory: bool, mode: u32, at: Version) -> Inode {
    Inode {
        origin,
        directory,
        links: 0,
        made: at,
        born: at,
        mode: Set::by(mode, at),
        uid: Set::by(0, at),
        mtime_ns: Set::by(at as i64, at),
        blocks: Vec::new(),
        size_at: at,
        entries: BTreeMap::new(),
        stamp: None,
    }
}

impl Image {
    /// An empty volume with its `.twinwrite`.
    pub fn fresh() -> Self {
        let mut image = Self::default();
        let mut root = inode(ROOT, true, 0o755, 0);
        root.links = 1;
        root.entries
            .insert(OWN_NAME.to_vec(), Set::by(Some(OWN), 0));
        image.inodes.insert(ROOT, root);
        let mut own = inode(OWN, true, 0o700, 0);
        own.links = 1;
        image.inodes.insert(OWN, own);
        image
    }

    /// Who has this name.
    pub fn lookup(&self, directory: Identity, name: &[u8]) -> Option<Identity> {
        self.inodes.get(&directory)?.entries.get(name)?.value
    }

    fn bind(&mut self, place: &Place, child: Option<Identity>, at: Version) {
        if let Some(directory) = self.inodes.get_mut(&place.0) {
            directory
                .entries
                .insert(place.1.clone(), Set::by(child, at));
            directory.mtime_ns = Set::by(at as i64, at);
        }
    }

    fn drop_link(&mut self, whom: Identity, at: Version) {
        if let Some(node) = self.inodes.get_mut(&whom) {
            node.links = node.links.saturating_sub(1);
            if node.links == 0 {
                self.removed.insert(node.origin, at);
            }
        }
    }

    /// Lets one mutation happen.
    pub fn apply(&mut self, mutation: &Mutation, at: Version) {
        match mutation {
            Mutation::Create {
                inode: whom,
                directory,
                mode,
                place,
            } => {
                let mut node = inode(*whom, *directory, *mode, at);
                if let Some(place) = place {
                    node.links = 1;
                    self.bind(place, Some(*whom), at);
                }
                self.inodes.insert(*whom, node);
            }
            Mutation::Link { inode, place } => {
                if let Some(node) = self.inodes.get_mut(inode) {
                    if node.links == 0 {
                        node.born = at;
                    }
                    node.links += 1;
                    self.removed.remove(&node.origin);
                }
                self.bind(place, Some(*inode), at);
            }
            Mutation::Unlink { inode, place } => {
                self.bind(place, None, at);
                self.drop_link(*inode, at);
            }
            Mutation::Rename {
                inode,
                from,
                to,
                victim,
            } => {
                self.bind(from, None, at);
                self.bind(to, Some(*inode), at);
                if let Some(victim) = victim {
                    self.drop_link(*victim, at);
                }
            }
            Mutation::Exchange {
                inode,
                other,
                from,
                to,
            } => {
                self.bind(from, Some(*other), at);
                self.bind(to, Some(*inode), at);
            }
            other => self.change(other, at),
        }
    }

    fn change(&mut self, mutation: &Mutation, at: Version) {
        let (Mutation::Write { inode, .. }
        | Mutation::Truncate { inode, .. }
        | Mutation::Chown { inode, .. }
        | Mutation::Chmod { inode, .. }
        | Mutation::Times { inode, .. }
        | Mutation::Stamp { inode, .. }) = mutation
        else {
            return;
        };
        let Some(node) = self.inodes.get_mut(inode) else {
            return;
        };
        match mutation {
            Mutation::Write {
                first,
                blocks,
                stamped,
                ..
            } => {
                let end = first + blocks.len();
                if node.blocks.len() < end {
                    node.blocks.resize(end, Set::by(0, at));
                    node.size_at = at;
                }
                for (place, block) in node.blocks.iter_mut().skip(*first).zip(blocks) {
                    *place = Set::by(*block, at);
                }
                if *stamped {
                    node.mtime_ns = Set::by(at as i64, at);
                }
            }
            Mutation::Truncate { size, .. } => {
                node.blocks.resize(*size, Set::by(0, at));
                node.size_at = at;
                node.mtime_ns = Set::by(at as i64, at);
            }
            Mutation::Chown { uid, .. } => node.uid = Set::by(*uid, at),
            Mutation::Chmod { mode, .. } => node.mode = Set::by(*mode, at),
            Mutation::Times { mtime_ns, .. } => node.mtime_ns = Set::by(*mtime_ns, at),
            Mutation::Stamp { stamp, .. } => {
                node.stamp = *stamp;
                if let Some(stamp) = stamp {
                    node.origin = stamp.identity;
                }
            }
            _ => {}
        }
    }

    /// Every inode that a path leads to.
    pub fn reachable(&self) -> Vec<Identity> {
        let mut seen = vec![ROOT];
        let mut next = 0;
        while let Some(directory) = seen.get(next).copied() {
            next += 1;
            let Some(node) = self.inodes.get(&directory) else {
                continue;
            };
            for (_, child) in node.names() {
                if !seen.contains(&child) {
                    seen.push(child);
                }
            }
        }
        seen
    }

    /// Whether `below` lies in `directory` or is it.
    pub fn contains(&self, directory: Identity, below: Identity) -> bool {
        directory == below
            || self.inodes.get(&directory).is_some_and(|node| {
                node.names().any(|(_, child)| {
                    self.inodes.get(&child).is_some_and(|c| c.directory)
                        && self.contains(child, below)
                })
            })
    }

    /// Where a directory is.
    pub fn place_of(&self, directory: Identity) -> Option<Place> {
        self.inodes.iter().find_map(|(parent, node)| {
            let (name, _) = node.names().find(|(_, child)| *child == directory)?;
            Some((*parent, name.clone()))
        })
    }
}
