//! Pages that somebody may be changing through a shared mapping, without any further record.
//!
//! A page is noted when it becomes writable, which its record tells. From then on it is looked at again and
//! again, and where it differs from what the log holds of it, it is snapshotted: a new record of its bytes.
//! Writing a page back takes the right to write away, so the next store is noted anew (`folio_mkclean`,
//! mm/rmap.c, Linux 6.1 to 6.12). So a page is forgotten once a checkpoint that began after its last note is
//! proven, and one more look has found in it what the log holds: what was stored between the last snapshot and
//! the write-back is on the disk, but a file without a name is not, should its name come only after that.
//!
//! Pure. It must never forget a page that can be changed unseen.

use std::collections::{BTreeMap, HashSet};

use twinwrite_abi::MAPPED_PAGE_BYTES;

use crate::ids::{Identity, Seq};

/// Longest run of pages that is read at once.
pub const RUN_BYTES_MAX: u32 = 1 << 20;

const PAGE_BYTES: u32 = MAPPED_PAGE_BYTES as u32;

/// Neighbouring pages of one inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The inode.
    pub identity: Identity,
    /// Offset of the first page in the file.
    pub pos: u64,
    /// Bytes.
    pub bytes: u32,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    /// The record that told of it last.
    noted: Seq,
    /// The record that changed last what the log holds of it.
    changed: Seq,
    /// What the log holds of it, as a hash, where that is known.
    logged: Option<u64>,
    /// It was written back since.
    is_proven: bool,
}

/// The pages of one volume.
#[derive(Clone, Debug, Default)]
pub struct MappedPages {
    /// By inode and page number.
    pages: BTreeMap<(Identity, u64), Page>,
}

fn numbers(pos: u64, bytes: u64) -> std::ops::Range<u64> {
    pos / MAPPED_PAGE_BYTES..pos.saturating_add(bytes).div_ceil(MAPPED_PAGE_BYTES)
}

impl MappedPages {
    /// A record tells that the pages of a range have become writable.
    pub fn note(&mut self, identity: Identity, pos: u64, bytes: u64, seq: Seq) {
        let page = Page {
            noted: seq,
            changed: seq,
            logged: None,
            is_proven: false,
        };
        for number in numbers(pos, bytes) {
            self.pages.insert((identity, number), page);
        }
    }

    /// A record changes what the log holds of a range; with what may be told later.
    pub fn rewritten(&mut self, identity: Identity, pos: u64, bytes: u64, seq: Seq) {
        let numbers = numbers(pos, bytes);
        let range = (identity, numbers.start)..(identity, numbers.end);
        for (_, page) in self.pages.range_mut(range) {
            page.changed = seq;
            page.logged = None;
        }
    }

    /// The record `seq` was filled with this for the page at `pos`, as a hash. Records behind it are laid over
    /// that.
    pub fn logged(&mut self, identity: Identity, pos: u64, hash: u64, seq: Seq) {
        let page = self.pages.get_mut(&(identity, pos / MAPPED_PAGE_BYTES));
        if let Some(page) = page.filter(|page| page.changed <= seq) {
            page.logged = Some(hash);
        }
    }

    /// A checkpoint of everything up to `seq` is proven.
    pub fn proven(&mut self, seq: Seq) {
        for page in self.pages.values_mut().filter(|page| page.noted <= seq) {
            page.is_proven = true;
        }
    }

    /// How many pages may be changed unseen.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing can be changed unseen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Whose pages these are.
    #[must_use]
    pub fn identities(&self) -> HashSet<Identity> {
        self.pages.keys().map(|(identity, _)| *identity).collect()
    }

    /// All of them, neighbours together.
    #[must_use]
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (identity, number) in self.pages.keys() {
            let pos = number * MAPPED_PAGE_BYTES;
            if let Some(last) = runs.last_mut()
                && last.identity == *identity
                && last.pos + u64::from(last.bytes) == pos
                && last.bytes + PAGE_BYTES <= RUN_BYTES_MAX
            {
                last.bytes += PAGE_BYTES;
                continue;
            }
            runs.push(Run {
                identity: *identity,
                pos,
                bytes: PAGE_BYTES,
            });
        }
        runs
    }

    /// What stands in a page now, as a hash; `None` if the file no longer has it. Whether it must be
    /// snapshotted. One that need not, and was written back since its last note, is forgotten.
    pub fn seen(&mut self, identity: Identity, pos: u64, hash: Option<u64>) -> bool {
        let key = (identity, pos / MAPPED_PAGE_BYTES);
        let Some(page) = self.pages.get(&key) else {
            return false;
        };
        let is_logged = hash.is_none() || page.logged == hash;
        if is_logged && page.is_proven {
            self.pages.remove(&key);
        }
        !is_logged
    }

    /// Forgets all: another epoch begins, whose first checkpoint covers them.
    pub fn clear(&mut self) {
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{MappedPages, PAGE_BYTES, RUN_BYTES_MAX, Run};
    use crate::ids::{Identity, Seq};

    fn identity(ino: u64) -> Identity {
        Identity { ino, generation: 1 }
    }

    fn noted(pages: &[(u64, u64, u64)]) -> MappedPages {
        let mut mapped = MappedPages::default();
        for (ino, page, seq) in pages {
            let pos = page * u64::from(PAGE_BYTES);
            mapped.note(identity(*ino), pos, PAGE_BYTES.into(), Seq(*seq));
        }
        mapped
    }

    #[test]
    fn a_page_stays_until_a_checkpoint_that_began_after_its_last_note_and_a_look_after_that() {
        let one = identity(1);
        let mut mapped = noted(&[(1, 0, 5), (1, 1, 6), (1, 0, 9)]);
        mapped.logged(one, 0, 77, Seq(9));
        mapped.logged(one, 4096, 78, Seq(9));
        mapped.proven(Seq(8));
        assert_eq!(mapped.len(), 2);
        assert!(!mapped.seen(one, 0, Some(77)));
        assert!(!mapped.seen(one, 4096, Some(78)));
        assert_eq!(mapped.len(), 1, "page 0 was noted again at 9");
        mapped.proven(Seq(9));
        assert!(
            mapped.seen(one, 0, Some(79)),
            "stored after the last snapshot, before the write-back"
        );
        mapped.logged(one, 0, 79, Seq(10));
        assert!(!mapped.seen(one, 0, Some(79)));
        assert!(mapped.is_empty());
    }

    #[test]
    fn neighbours_are_read_together_and_no_more_than_at_once() {
        let run = |ino, page: u64, pages: u32| Run {
            identity: identity(ino),
            pos: page * u64::from(PAGE_BYTES),
            bytes: pages * PAGE_BYTES,
        };
        let mapped = noted(&[(1, 3, 1), (1, 0, 2), (1, 1, 3), (2, 2, 4)]);
        assert_eq!(mapped.runs(), [run(1, 0, 2), run(1, 3, 1), run(2, 2, 1)]);
        let mut many = MappedPages::default();
        many.note(identity(1), 0, 300 * u64::from(PAGE_BYTES), Seq(1));
        let pages_max = RUN_BYTES_MAX / PAGE_BYTES;
        let (first, rest) = (
            run(1, 0, pages_max),
            run(1, pages_max.into(), 300 - pages_max),
        );
        assert_eq!(many.runs(), [first, rest]);
    }

    #[test]
    fn what_the_log_holds_decides_not_what_was_seen() {
        let mut mapped = noted(&[(1, 0, 5)]);
        let one = identity(1);
        assert!(mapped.seen(one, 0, Some(77)));
        // Another store came between the look and the snapshot.
        mapped.rewritten(one, 0, 4096, Seq(6));
        mapped.logged(one, 0, 78, Seq(6));
        assert!(mapped.seen(one, 0, Some(77)));
        mapped.rewritten(one, 0, 4096, Seq(7));
        mapped.logged(one, 0, 77, Seq(7));
        assert!(!mapped.seen(one, 0, Some(77)));
        // A write changed the log, a store changed the page back.
        mapped.rewritten(one, 4000, 100, Seq(8));
        assert!(mapped.seen(one, 0, Some(77)));
        // The snapshot's bytes were read after the write's, which is laid over them all the same.
        mapped.logged(one, 0, 77, Seq(7));
        assert!(mapped.seen(one, 0, Some(77)));
        // Written back and made writable anew.
        mapped.logged(one, 0, 77, Seq(8));
        mapped.note(one, 0, PAGE_BYTES.into(), Seq(9));
        assert!(mapped.seen(one, 0, Some(77)));
        assert!(!mapped.seen(identity(2), 0, Some(1)));
    }

    #[test]
    fn a_page_that_the_file_no_longer_has_is_forgotten_when_proven() {
        let mut mapped = noted(&[(1, 0, 5)]);
        assert!(!mapped.seen(identity(1), 0, None));
        assert_eq!(mapped.len(), 1, "the file may grow again under the mapping");
        mapped.proven(Seq(5));
        assert!(!mapped.seen(identity(1), 0, None));
        assert!(mapped.is_empty());
    }
}
