//! Comparing what an application was told with what is there.

use crate::escape::PathBytes;
use crate::manifest::{BLOCK_BYTES, Entry};
use crate::walk::Tree;

/// Differences told in words; the rest is only counted.
pub const WORDS_MAX: usize = 20;

/// What a comparison found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Paths that should be there.
    pub expected: u64,
    /// Paths that are not.
    pub missing: u64,
    /// Paths that are there and are not as they should be.
    pub different: u64,
    /// Paths that nobody made.
    pub extra: u64,
    /// Content bytes that are not as they should be, counted in whole blocks, each inode once.
    pub bytes_lost: u64,
    /// The first differences in words.
    pub words: Vec<String>,
}

impl Differences {
    /// Whether all is as it should be.
    #[must_use]
    pub const fn none(&self) -> bool {
        self.missing == 0 && self.different == 0 && self.extra == 0
    }

    /// Notes one difference in words, if there is still room.
    pub fn say(&mut self, words: String) {
        if self.words.len() < WORDS_MAX {
            self.words.push(words);
        }
    }

    /// Counts and tells a path that should be there and is not.
    fn missing(&mut self, expected: &Entry) {
        self.missing += 1;
        if counts_bytes(expected) {
            self.bytes_lost += expected.size;
        }
        self.say(format!("{}: missing", expected.path));
    }

    /// Counts and tells a path that nobody made.
    pub fn extra(&mut self, path: &PathBytes) {
        self.extra += 1;
        self.say(format!("{path}: nobody made it"));
    }

    /// Adds another comparison's result to this one.
    pub fn add(&mut self, other: Self) {
        self.expected += other.expected;
        self.missing += other.missing;
        self.different += other.different;
        self.extra += other.extra;
        self.bytes_lost += other.bytes_lost;
        for words in other.words {
            self.say(words);
        }
    }
}

/// Compares every path, both ways.
#[must_use]
pub fn compare(expected: &[Entry], found: &Tree) -> Differences {
    let mut result = Differences {
        expected: expected.len() as u64,
        ..Differences::default()
    };
    let known: std::collections::BTreeSet<&PathBytes> =
        expected.iter().map(|entry| &entry.path).collect();
    let unreadable: std::collections::BTreeMap<_, _> = found
        .unreadable
        .iter()
        .map(|(path, error)| (path, error))
        .collect();
    for entry in expected {
        match (found.entries.get(&entry.path), unreadable.get(&entry.path)) {
            (Some(there), _) => compare_entry(entry, there, &mut result),
            (None, Some(error)) => {
                result.different += 1;
                result.bytes_lost += if counts_bytes(entry) { entry.size } else { 0 };
                result.say(format!("{}: cannot be read: {error}", entry.path));
            }
            (None, None) => result.missing(entry),
        }
    }
    for path in found.entries.keys().chain(unreadable.keys().copied()) {
        if !known.contains(path) {
            result.extra(path);
        }
    }
    result
}

/// Of several names of one inode only the first counts bytes.
fn counts_bytes(entry: &Entry) -> bool {
    entry.crc32c.is_some()
        && entry
            .link_group
            .as_ref()
            .is_none_or(|first| *first == entry.path)
}

fn compare_entry(expected: &Entry, found: &Entry, result: &mut Differences) {
    let words = differences(expected, found);
    if words.is_empty() {
        return;
    }
    result.different += 1;
    if counts_bytes(expected) {
        result.bytes_lost += bytes_lost(expected, found);
    }
    result.say(format!("{}: {}", expected.path, words.join(", ")));
}

/// Bytes in the blocks that are not as expected.
fn bytes_lost(expected: &Entry, found: &Entry) -> u64 {
    let block_bytes = BLOCK_BYTES as u64;
    let mut lost = 0;
    for (index, block) in expected.blocks.iter().enumerate() {
        if found.blocks.get(index) != Some(block) {
            let start = index as u64 * block_bytes;
            lost += expected.size.saturating_sub(start).min(block_bytes);
        }
    }
    lost
}

/// Each field that is not as expected, in words.
fn differences(expected: &Entry, found: &Entry) -> Vec<String> {
    let mut words = Vec::new();
    let mut field = |name: &str, expected: String, found: String| {
        if expected != found {
            words.push(format!("{name} {found} instead of {expected}"));
        }
    };
    field(
        "type",
        format!("{:?}", expected.kind),
        format!("{:?}", found.kind),
    );
    field(
        "mode",
        format!("{:o}", expected.mode),
        format!("{:o}", found.mode),
    );
    field("uid", expected.uid.to_string(), found.uid.to_string());
    field("gid", expected.gid.to_string(), found.gid.to_string());
    field("size", expected.size.to_string(), found.size.to_string());
    field(
        "mtime_ns",
        expected.mtime_ns.to_string(),
        found.mtime_ns.to_string(),
    );
    field("links", expected.links.to_string(), found.links.to_string());
    field(
        "rdev",
        format!("{:x}", expected.rdev),
        format!("{:x}", found.rdev),
    );
    field(
        "extended attributes",
        format!("{:x?}", expected.xattrs),
        format!("{:x?}", found.xattrs),
    );
    field(
        "inode flags",
        format!("{:x}", expected.inode_flags),
        format!("{:x}", found.inode_flags),
    );
    let optional = |bytes: &Option<PathBytes>| {
        bytes
            .as_ref()
            .map_or_else(|| "none".to_owned(), |bytes| format!("\"{bytes}\""))
    };
    field(
        "target",
        optional(&expected.target),
        optional(&found.target),
    );
    field(
        "hard link to",
        optional(&expected.link_group),
        optional(&found.link_group),
    );
    if expected.crc32c != found.crc32c || expected.blocks != found.blocks {
        let first = (0..expected.blocks.len().max(found.blocks.len()))
            .find(|index| expected.blocks.get(*index) != found.blocks.get(*index))
            .unwrap_or(0);
        words.push(format!(
            "content differs in the block at {}",
            first * BLOCK_BYTES
        ));
    }
    words
}

#[cfg(test)]
mod tests;
