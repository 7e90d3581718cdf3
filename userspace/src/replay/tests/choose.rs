//! Which operation comes next: dice, loaded so that names and inodes meet often.

use super::attributes::{ACL, CAPABILITY, HARMLESS_FLAGS, IMMUTABLE, acl, capability};
use super::model::{ATTRIBUTE_BYTES_MAX, Body, attribute_bytes};
use super::world::{Name, NewKind, Op, World};
use crate::ids::Identity;
use crate::replay::sentinel::OWN_DIRECTORY;

impl World<'_> {
    fn name(&mut self) -> Name {
        vec![b'a' + self.random.below(5) as u8]
    }

    fn directories(&self) -> Vec<Identity> {
        let model = &self.model;
        let usable = |inode: &Identity| model.nodes[inode].is_directory() && !model.is_own(*inode);
        model.nodes.keys().copied().filter(usable).collect()
    }

    fn files(&self) -> Vec<Identity> {
        let live =
            |(_, node): &(&Identity, &super::model::Node)| matches!(node.body, Body::File(_));
        self.model
            .nodes
            .iter()
            .filter(live)
            .map(|(identity, _)| *identity)
            .collect()
    }

    fn bound(&self) -> Vec<(Identity, Name)> {
        let mut names = Vec::new();
        for directory in self.directories() {
            names.extend(
                self.model
                    .entries(directory)
                    .into_keys()
                    .map(|n| (directory, n)),
            );
        }
        names.retain(|(_, name)| name != OWN_DIRECTORY.as_bytes());
        names
    }

    /// One random operation that will succeed; `None` if the dice chose an impossible one.
    pub(super) fn choose(&mut self) -> Option<Op> {
        let op = match self.random.below(100) {
            0..=14 => self.choose_write(),
            15..=20 => self.choose_unlocked(),
            21..=25 => {
                let size = self.random.below(self.file_bytes_max);
                self.random
                    .pick(&self.files())
                    .map(|file| Op::Truncate { file, size })
            }
            26..=40 => self.choose_create(),
            41..=43 => Some(Op::Tmpfile),
            44..=50 => self.choose_link(),
            51..=59 => self.choose_unlink(),
            60..=72 => self.choose_rename(),
            73..=75 => self.choose_exchange(),
            76..=81 => self.choose_attributes(),
            82..=86 => self.choose_extended(),
            87..=90 => self.choose_flags(),
            91..=98 => self.choose_fsync(),
            _ => Some(Op::Flush),
        };
        op.filter(|op| !self.is_refused(op))
    }

    /// Whether the kernel refuses it because something is immutable or append-only.
    fn is_refused(&self, op: &Op) -> bool {
        let model = &self.model;
        let locked = |inode: &Identity| model.locks(*inode) != 0;
        let immutable = |inode: &Identity| model.is_immutable(*inode);
        let child = |(directory, name): &(Identity, Name)| {
            model.entries(*directory).get(name).is_some_and(locked)
        };
        match op {
            Op::Write { file, at, .. } if *at as u64 == model.nodes[file].size() => immutable(file),
            Op::Write { file: inode, .. }
            | Op::Direct { file: inode, .. }
            | Op::Store { file: inode, .. }
            | Op::Zero { file: inode, .. }
            | Op::Truncate { file: inode, .. }
            | Op::Chmod { inode, .. }
            | Op::Chown { inode, .. }
            | Op::Utimes { inode, .. }
            | Op::SetAttribute { inode, .. } => locked(inode),
            Op::Create { directory, .. } => immutable(directory),
            Op::Link {
                file, directory, ..
            } => locked(file) || immutable(directory),
            Op::Unlink { directory, name } => {
                locked(directory) || child(&(*directory, name.clone()))
            }
            Op::Rename { from, to } => {
                let replaces = model.entries(to.0).contains_key(&to.1);
                locked(&from.0)
                    || child(from)
                    || child(to)
                    || immutable(&to.0)
                    || replaces && locked(&to.0)
            }
            Op::Exchange { from, to } => {
                locked(&from.0) || locked(&to.0) || child(from) || child(to)
            }
            Op::SetFlags { inode, flags, .. } => immutable(inode) && flags & IMMUTABLE != 0,
            Op::Tmpfile | Op::Fsync { .. } | Op::Flush | Op::Checkpoint => false,
        }
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mark = self.events.len() as u8 | 1;
        (0..len)
            .map(|i| mark.wrapping_add((i / 7) as u8).max(1))
            .collect()
    }

    /// What is captured without the inode's lock.
    fn choose_unlocked(&mut self) -> Option<Op> {
        let file = self.random.pick(&self.files())?;
        let size = self.model.nodes[&file].size() as usize;
        let mut at = self.random.below(size.max(1));
        let mut len = 1 + self.random.below(self.file_bytes_max / 3);
        if self.random.chance(40) {
            let grows = self.random.chance(40);
            if self.random.chance(30) {
                at = self.random.below(self.file_bytes_max);
            }
            return Some(Op::Zero {
                file,
                at,
                len,
                grows,
            });
        }
        let is_direct = self.random.chance(50);
        if is_direct && self.live.is_some() {
            (at, len) = (at / 512 * 512, len.next_multiple_of(512));
            len = len.min((size - at) / 512 * 512);
        }
        len = len.min(size - at);
        if len == 0 {
            return None;
        }
        let bytes = self.bytes(len);
        Some(if is_direct {
            Op::Direct { file, at, bytes }
        } else {
            Op::Store { file, at, bytes }
        })
    }

    fn choose_extended(&mut self) -> Option<Op> {
        let (directory, name) = self.random.pick(&self.bound())?;
        let inode = self.model.entries(directory)[&name];
        let node = &self.model.nodes[&inode];
        let (is_file, is_directory) = (matches!(node.body, Body::File(_)), node.is_directory());
        let number = self.random.below(8) as u16;
        let (name, value) = match self.random.below(6) {
            0 | 1 if is_file || is_directory => {
                let name = [&b"user.a"[..], b"user.b", b"user.c"][self.random.below(3)];
                (name, vec![number as u8; self.random.below(70)])
            }
            2 if is_file || is_directory => (ACL, acl(6, number, number / 2)),
            3 if is_file => (CAPABILITY, capability(number as u8)),
            _ => (&b"trusted.x"[..], vec![number as u8; 3]),
        };
        let value = (!self.random.chance(25)).then_some(value);
        let mut then = self.model.nodes[&inode].attributes.clone();
        let is_there = then.contains_key(name);
        then.insert(name.to_vec(), value.clone().unwrap_or_default());
        let fits = attribute_bytes(&then) <= ATTRIBUTE_BYTES_MAX;
        let name = name.to_vec();
        (fits && (is_there || value.is_some())).then_some(Op::SetAttribute { inode, name, value })
    }

    fn choose_flags(&mut self) -> Option<Op> {
        let mut bound = self.bound();
        if self.random.chance(50) {
            // Not for long: a locked inode takes no further operations.
            let is_locked = |(directory, name): &(Identity, Name)| {
                self.model.locks(self.model.entries(*directory)[name]) != 0
            };
            bound.retain(is_locked);
        }
        let (directory, name) = self.random.pick(&bound)?;
        let inode = self.model.entries(directory)[&name];
        let node = &self.model.nodes[&inode];
        if !matches!(node.body, Body::File(_) | Body::Directory(_)) {
            return None;
        }
        let (now, project) = (node.flags, node.flags.project);
        let locks = match self.random.below(3) {
            _ if now.locks() != 0 => 0,
            0 => 0,
            1 => IMMUTABLE,
            _ => 0x20,
        };
        let others = self.random.next() as u32 & HARMLESS_FLAGS;
        let is_moved = self.has_projects && self.random.chance(40);
        let project = if is_moved {
            self.random.below(3) as u32
        } else {
            project
        };
        Some(Op::SetFlags {
            inode,
            flags: locks | others,
            project,
        })
    }

    fn choose_write(&mut self) -> Option<Op> {
        let file = self.random.pick(&self.files())?;
        let append = self.random.chance(30);
        let size = self.model.nodes[&file].size() as usize;
        let at = if append {
            size
        } else {
            self.random.below(self.file_bytes_max)
        };
        let len = 1 + self.random.below(self.file_bytes_max / 3);
        let bytes = self.bytes(len);
        Some(Op::Write {
            file,
            at,
            bytes,
            bytes_in_ring: self.random.chance(80),
        })
    }

    fn choose_create(&mut self) -> Option<Op> {
        let directory = self.random.pick(&self.directories())?;
        let name = self.name();
        if self.model.entries(directory).contains_key(&name) {
            return None;
        }
        let kind = match self.random.below(20) {
            0..=5 if self.directories().len() < 7 => NewKind::Directory,
            6 | 7 => NewKind::Symlink(b"../some/where".to_vec()),
            8 => NewKind::Fifo,
            9 => NewKind::Device(8 << 20 | 3),
            _ => NewKind::File,
        };
        let mode = match kind {
            NewKind::Symlink(_) => 0o777,
            _ => *[0o600, 0o644, 0o755, 0o700].get(self.random.below(4))?,
        };
        Some(Op::Create {
            directory,
            name,
            kind,
            mode,
        })
    }

    fn choose_link(&mut self) -> Option<Op> {
        let held: Vec<Identity> = self.model.held.iter().copied().collect();
        let file = match self.random.pick(&held).filter(|_| self.random.chance(60)) {
            Some(file) => file,
            None => {
                let (directory, name) = self.random.pick(&self.bound())?;
                self.model.entries(directory)[&name]
            }
        };
        let directory = self.random.pick(&self.directories())?;
        let name = self.name();
        let taken = self.model.entries(directory).contains_key(&name);
        (!taken && !self.model.nodes[&file].is_directory()).then_some(Op::Link {
            file,
            directory,
            name,
        })
    }

    fn choose_unlink(&mut self) -> Option<Op> {
        let (directory, name) = self.random.pick(&self.bound())?;
        let child = self.model.entries(directory)[&name];
        self.model
            .entries(child)
            .is_empty()
            .then_some(Op::Unlink { directory, name })
    }

    fn choose_rename(&mut self) -> Option<Op> {
        let from = self.random.pick(&self.bound())?;
        let to = (self.random.pick(&self.directories())?, self.name());
        let child = self.model.entries(from.0)[&from.1];
        let node = &self.model.nodes[&child];
        if node.is_directory() && self.model.contains_directory(child, to.0) {
            return None;
        }
        if let Some(victim) = self.model.entries(to.0).get(&to.1) {
            let victim_node = &self.model.nodes[victim];
            let fits = node.is_directory() == victim_node.is_directory()
                && self.model.entries(*victim).is_empty();
            if !fits || from == to {
                return None;
            }
        }
        Some(Op::Rename { from, to })
    }

    fn choose_exchange(&mut self) -> Option<Op> {
        let from = self.random.pick(&self.bound())?;
        let to = self.random.pick(&self.bound())?;
        let one = self.model.entries(from.0)[&from.1];
        let two = self.model.entries(to.0)[&to.1];
        let fits = one != two
            && !self.model.contains_directory(one, to.0)
            && !self.model.contains_directory(two, from.0);
        fits.then_some(Op::Exchange { from, to })
    }

    fn choose_attributes(&mut self) -> Option<Op> {
        let (directory, name) = self.random.pick(&self.bound())?;
        let inode = self.model.entries(directory)[&name];
        let node = &self.model.nodes[&inode];
        let is_file = matches!(node.body, Body::File(_));
        let is_symlink = matches!(node.body, Body::Symlink(_));
        let number = self.random.below(1000) as u32;
        Some(match self.random.below(3) {
            0 if is_symlink => return None,
            0 if is_file => Op::Chmod {
                inode,
                mode: 0o4711 - (number % 2) * 0o4000,
            },
            0 => Op::Chmod { inode, mode: 0o711 },
            1 => Op::Chown {
                inode,
                uid: number,
                gid: number + 1,
            },
            _ => {
                let mtime_ns = 1_000_000_000 * i64::from(number + 1) + 77;
                Op::Utimes {
                    inode,
                    atime_ns: mtime_ns + 5,
                    mtime_ns,
                }
            }
        })
    }

    fn choose_fsync(&mut self) -> Option<Op> {
        let back = self.random.below(3);
        let entered = self.events.len().saturating_sub(back);
        let datasync = self.random.chance(50);
        if self.random.chance(15) {
            let inode = self.random.pick(&self.directories())?;
            return Some(Op::Fsync {
                inode,
                start: 0,
                last: i64::MAX as u64,
                datasync,
                entered,
            });
        }
        let inode = self.random.pick(&self.files())?;
        let (start, last) = if self.random.chance(50) {
            let start = self.random.below(self.file_bytes_max) as u64;
            (
                start,
                start + self.random.below(self.file_bytes_max / 2) as u64,
            )
        } else {
            (
                0,
                if self.random.chance(50) {
                    i64::MAX as u64
                } else {
                    u64::MAX
                },
            )
        };
        Some(Op::Fsync {
            inode,
            start,
            last,
            datasync,
            entered,
        })
    }
}
