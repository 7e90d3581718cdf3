//! Bytes stored through a shared mapping.

use std::io;
use std::num::NonZeroUsize;
use std::path::Path;

use super::{BASE_BYTES, Group, Probe, Work, base, nothing, pattern};
use crate::mapping::Mapping;

const fn probe(name: &'static str, act: Work) -> Probe {
    Probe {
        name,
        group: Group::Mappings,
        prepare: nothing,
        act,
    }
}

pub(super) const PROBES: &[Probe] = &[
    probe("store", |dir| store(dir, 5_000, 300).map(drop)),
    probe("store-in-many-pages", |dir| {
        let mut mapping = map(dir)?;
        for page in 0..BASE_BYTES / 4096 {
            put(&mut mapping, page * 4096 + 17, 5)?;
        }
        Ok(())
    }),
    probe("store-and-msync", |dir| {
        let mapping = store(dir, 5_000, 300)?;
        Ok(mapping.sync(4096, 4096)?)
    }),
    probe("store-and-truncate", |dir| {
        let _mapping = store(dir, 5_000, 300)?;
        base(dir)?.set_len(5_100)
    }),
    probe("write-beside-a-store", |dir| {
        let _mapping = store(dir, 5_000, 300)?;
        super::overwrite(&base(dir)?, 7, 100, 5_100)
    }),
];

fn map(directory: &Path) -> io::Result<Mapping> {
    let bytes = NonZeroUsize::new(BASE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Mapping::new(&base(directory)?, bytes)?)
}

fn put(mapping: &mut Mapping, at: usize, bytes: usize) -> io::Result<()> {
    if mapping.store(at, &pattern(3, bytes)) {
        Ok(())
    } else {
        Err(io::Error::other("the mapping is too short"))
    }
}

fn store(directory: &Path, at: usize, bytes: usize) -> io::Result<Mapping> {
    let mut mapping = map(directory)?;
    put(&mut mapping, at, bytes)?;
    Ok(mapping)
}
