//! What applications do next: dice, loaded so that names and inodes meet often.

use twinwrite::ids::Identity;
use twinwrite::record::gap;

use crate::history::Scope;
use crate::image::{Mutation, Name, OWN, Place, ROOT};
use crate::kernel::{How, Kernel, Under};
use crate::random::Random;

const DIRECTORIES_MAX: usize = 3;

/// How often what happens, in this run.
#[derive(Clone, Copy, Debug)]
pub struct Taste {
    /// Of 100 writes, those whose bytes do not come with the record.
    pub no_bytes: usize,
    /// Of 100 writes, those with O_DSYNC.
    pub dsync: usize,
    /// Of 100 calls, those that are only noticed.
    pub gaps: usize,
    /// Of 100 calls, fsync-class ones.
    pub syncs: usize,
    /// Of 100 calls, changes of names.
    pub names: usize,
    /// Of 100 calls, stores through mappings.
    pub stores: usize,
    /// Most files.
    pub files: usize,
    /// Most blocks of a file.
    pub blocks: usize,
}

/// Starts a call on an idle thread; nothing if the dice chose something impossible.
pub fn begin(
    kernel: &mut Kernel,
    thread: usize,
    taste: &Taste,
    random: &mut Random,
    under: &mut Under<'_>,
) {
    let dice = random.below(100);
    let files = files(kernel);
    if dice < taste.syncs {
        sync(kernel, thread, &files, (taste, random), under);
    } else if dice < taste.syncs + taste.names {
        if let Some(mutation) = names(kernel, &files, (taste, random)) {
            let how = How {
                bytes_in_ring: true,
                gap: random.chance(taste.gaps).then_some(gap::UNREADABLE),
                ..How::default()
            };
            kernel.begin_change(thread, &mutation, how, under);
        }
    } else if dice < taste.syncs + taste.names + taste.stores {
        let known = random.pick(&kernel.mapped_pages());
        if let Some((file, index)) = known.filter(|_| random.chance(60)) {
            kernel.store(file, index, under);
        } else if let Some(file) = random.pick(&files) {
            kernel.store(file, random.below(taste.blocks), under);
        }
    } else {
        content(kernel, thread, &files, (taste, random), under);
    }
}

fn files(kernel: &Kernel) -> Vec<Identity> {
    let inodes = kernel.live.inodes.iter();
    inodes
        .filter(|(_, n)| !n.directory)
        .map(|(i, _)| *i)
        .collect()
}

fn directories(kernel: &Kernel) -> Vec<Identity> {
    let inodes = kernel.live.inodes.iter();
    let usable = |i: Identity| i != OWN && !kernel.live.contains(OWN, i);
    inodes
        .filter(|(i, n)| n.directory && n.links > 0 && usable(**i))
        .map(|(i, _)| *i)
        .collect()
}

fn sync(
    kernel: &mut Kernel,
    thread: usize,
    files: &[Identity],
    (taste, random): (&Taste, &mut Random),
    under: &mut Under<'_>,
) {
    // Another process saw what somebody is changing just then.
    let seen = random.chance(15).then(|| random.pick(&kernel.locked()));
    if let Some(Some(inode)) = seen {
        kernel.begin_sync(thread, Scope::Full(inode), under);
        return;
    }
    let scope = match random.below(10) {
        0 => Scope::Volume,
        1..=2 => match random.pick(&directories(kernel)) {
            Some(directory) => Scope::Full(directory),
            None => return,
        },
        dice => match (random.pick(files), kernel.stored) {
            (None, _) => return,
            // Whoever stores to a page wants it confirmed.
            (Some(_), Some((file, index))) if random.chance(40) => {
                file_scope(dice, file, index, index + 1)
            }
            (Some(file), _) => {
                let first = random.below(taste.blocks);
                file_scope(dice, file, first, first + 1 + random.below(2))
            }
        },
    };
    kernel.begin_sync(thread, scope, under);
}

fn file_scope(dice: usize, file: Identity, first: usize, end: usize) -> Scope {
    match dice {
        3..=5 => Scope::Full(file),
        6..=7 => Scope::Data(file),
        _ => Scope::Range(file, first, end),
    }
}

fn content(
    kernel: &mut Kernel,
    thread: usize,
    files: &[Identity],
    (taste, random): (&Taste, &mut Random),
    under: &mut Under<'_>,
) {
    // What is stored to is written to as well.
    let mapped = random.pick(&kernel.mapped_pages());
    let mapped = mapped.filter(|_| random.chance(40));
    let Some(inode) = mapped
        .map(|(inode, _)| inode)
        .or_else(|| random.pick(files))
    else {
        return;
    };
    let size = kernel.live.inodes.get(&inode).map_or(0, |n| n.blocks.len());
    let next = *under.version + 1;
    let gap = random.chance(taste.gaps).then(|| {
        if random.chance(50) {
            gap::FALLOCATE
        } else {
            gap::IOCTL
        }
    });
    let mutation = match random.below(12) {
        0 => Mutation::Truncate {
            inode,
            size: random.below(taste.blocks),
        },
        1 => Mutation::Chown {
            inode,
            uid: next as u32,
        },
        2 => Mutation::Chmod {
            inode,
            mode: 0o400 + next as u32 % 0o300,
        },
        _ if mapped.is_some() => Mutation::Write {
            inode,
            first: mapped.map_or(0, |(_, index)| index),
            blocks: vec![next as u32],
            stamped: true,
        },
        _ => {
            let first = random.below(taste.blocks - 1).min(size + 1);
            let count = 1 + random.below((taste.blocks - first).min(3));
            Mutation::Write {
                inode,
                first,
                blocks: vec![next as u32; count],
                stamped: true,
            }
        }
    };
    let how = How {
        bytes_in_ring: !random.chance(taste.no_bytes),
        dsync: random.chance(taste.dsync),
        gap,
    };
    kernel.begin_change(thread, &mutation, how, under);
}

fn name(random: &mut Random) -> Name {
    vec![b'a' + random.below(4) as u8]
}

fn bound(kernel: &Kernel) -> Vec<(Place, Identity)> {
    let mut all = Vec::new();
    for directory in directories(kernel) {
        if let Some(node) = kernel.live.inodes.get(&directory) {
            let names = node.names().filter(|(_, child)| *child != OWN);
            all.extend(names.map(|(name, child)| ((directory, name.clone()), child)));
        }
    }
    all
}

fn names(
    kernel: &mut Kernel,
    files: &[Identity],
    (taste, random): (&Taste, &mut Random),
) -> Option<Mutation> {
    let place = (random.pick(&directories(kernel))?, name(random));
    let there = kernel.live.lookup(place.0, &place.1);
    let node = |kernel: &Kernel, who: Identity| kernel.live.inodes.get(&who).cloned();
    match random.below(20) {
        0..=5 if there.is_none() && files.len() < taste.files => Some(Mutation::Create {
            inode: kernel.allocate(),
            directory: false,
            mode: 0o644,
            place: Some(place),
        }),
        6..=7 if there.is_none() && directories(kernel).len() < DIRECTORIES_MAX => {
            Some(Mutation::Create {
                inode: kernel.allocate(),
                directory: true,
                mode: 0o755,
                place: Some(place),
            })
        }
        8 if files.len() < taste.files => Some(Mutation::Create {
            inode: kernel.allocate(),
            directory: false,
            mode: 0o600,
            place: None,
        }),
        9..=10 if there.is_none() => {
            let inode = random.pick(files)?;
            let node = node(kernel, inode)?;
            let nameless = node.links == 0 && !kernel.live.removed.contains_key(&node.origin);
            (node.links > 0 || nameless).then_some(Mutation::Link { inode, place })
        }
        11..=13 => unlink(kernel, random),
        14..=18 => rename(kernel, place, random),
        _ => {
            close_one(kernel, random);
            None
        }
    }
}

fn unlink(kernel: &Kernel, random: &mut Random) -> Option<Mutation> {
    let (place, inode) = random.pick(&bound(kernel))?;
    let node = kernel.live.inodes.get(&inode)?;
    let empty = node.names().next().is_none();
    (!node.directory || empty).then_some(Mutation::Unlink { inode, place })
}

fn rename(kernel: &Kernel, to: Place, random: &mut Random) -> Option<Mutation> {
    let (from, inode) = random.pick(&bound(kernel))?;
    let node = kernel.live.inodes.get(&inode)?;
    if from == to || node.directory && kernel.live.contains(inode, to.0) {
        return None;
    }
    let Some(there) = kernel.live.lookup(to.0, &to.1) else {
        let victim = None;
        return Some(Mutation::Rename {
            inode,
            from,
            to,
            victim,
        });
    };
    let other = kernel.live.inodes.get(&there)?;
    if there == OWN || there == inode {
        return None;
    }
    if random.chance(30) {
        let into_itself = other.directory && kernel.live.contains(there, from.0);
        return (!into_itself).then_some(Mutation::Exchange {
            inode,
            other: there,
            from,
            to,
        });
    }
    let fits = node.directory == other.directory && other.names().next().is_none();
    let victim = Some(there);
    (fits && from.0 != there).then_some(Mutation::Rename {
        inode,
        from,
        to,
        victim,
    })
}

/// Somebody closes a file without a name.
fn close_one(kernel: &mut Kernel, random: &mut Random) {
    let nameless = |(inode, node): (&Identity, &crate::image::Inode)| {
        (node.links == 0 && *inode != ROOT && !kernel.is_locked(*inode)).then_some(*inode)
    };
    let gone: Vec<Identity> = kernel.live.inodes.iter().filter_map(nameless).collect();
    if let Some(inode) = random.pick(&gone) {
        kernel.live.inodes.remove(&inode);
    }
}
