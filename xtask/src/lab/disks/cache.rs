//! What one machine wrote to a disk and never flushed: every page with all the contents it was given
//! since it was last durable.
//!
//! It never makes anything durable by itself, as a disk whose cache happens to last until the power
//! goes; what a real one may have written back by then is decided at the cut.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::random::Random;

/// The disk writes so many bytes whole or not at all.
pub(super) const PAGE_BYTES: usize = 4096;

/// Of 1000 unflushed pages so many get to the disk all the same; which of these, each cut decides.
const KEPT_OF_1000: [u64; 4] = [0, 100, 500, 900];

type Page = Box<[u8]>;

/// How many unflushed writes a cut kept and lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) kept: u64,
    pub(super) lost: u64,
}

/// The unflushed pages of one machine on one disk.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// By page number; contents oldest first, never none.
    pages: BTreeMap<u64, Vec<Page>>,
}

/// A part of a request that lies in one page.
struct Piece {
    page: u64,
    in_page: std::ops::Range<usize>,
    in_request: std::ops::Range<usize>,
}

fn pieces(offset: u64, length: usize) -> impl Iterator<Item = Piece> {
    let page_bytes = PAGE_BYTES as u64;
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= length {
            return None;
        }
        let at = offset.checked_add(done as u64)?;
        let begin = (at % page_bytes) as usize;
        let count = (PAGE_BYTES - begin).min(length - done);
        let piece = Piece {
            page: at / page_bytes,
            in_page: begin..begin + count,
            in_request: done..done + count,
        };
        done += count;
        Some(piece)
    })
}

impl Cache {
    /// Reads what this machine sees: its own writes over the durable content.
    pub(super) fn read(&self, disk: &File, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        disk.read_exact_at(bytes, offset)?;
        if self.pages.is_empty() {
            return Ok(());
        }
        for piece in pieces(offset, bytes.len()) {
            let latest = self.pages.get(&piece.page).and_then(|all| all.last());
            let seen = latest.and_then(|page| page.get(piece.in_page));
            if let (Some(seen), Some(to)) = (seen, bytes.get_mut(piece.in_request)) {
                to.copy_from_slice(seen);
            }
        }
        Ok(())
    }

    /// Takes a write; the disk does not change.
    pub(super) fn write(&mut self, disk: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for piece in pieces(offset, bytes.len()) {
            let at = piece.page * PAGE_BYTES as u64;
            let mut page = match self.pages.get(&piece.page).and_then(|all| all.last()) {
                Some(latest) => latest.clone(),
                None => {
                    let mut page = vec![0; PAGE_BYTES].into_boxed_slice();
                    if piece.in_page.len() < PAGE_BYTES {
                        disk.read_exact_at(&mut page, at)?;
                    }
                    page
                }
            };
            if let (Some(to), Some(from)) =
                (page.get_mut(piece.in_page), bytes.get(piece.in_request))
            {
                to.copy_from_slice(from);
            }
            self.pages.entry(piece.page).or_default().push(page);
        }
        Ok(())
    }

    /// Makes every write durable.
    pub(super) fn flush(&mut self, disk: &File) -> io::Result<()> {
        for (page, contents) in &self.pages {
            if let Some(latest) = contents.last() {
                disk.write_all_at(latest, page * PAGE_BYTES as u64)?;
            }
        }
        self.pages.clear();
        Ok(())
    }

    /// Makes the pages of one write durable, and no others.
    pub(super) fn flush_range(
        &mut self,
        disk: &File,
        offset: u64,
        length: usize,
    ) -> io::Result<()> {
        for piece in pieces(offset, length) {
            if let Some(latest) = self.pages.get(&piece.page).and_then(|all| all.last()) {
                disk.write_all_at(latest, piece.page * PAGE_BYTES as u64)?;
                self.pages.remove(&piece.page);
            }
        }
        Ok(())
    }

    /// The power goes: of each page one of its contents since the last flush may have reached the
    /// disk, or none, whatever was written before or after it elsewhere.
    pub(super) fn cut(self, disk: &File, random: &mut Random) -> io::Result<Cut> {
        let share = random.pick(&KEPT_OF_1000).unwrap_or_default();
        let mut cut = Cut::default();
        for (page, contents) in self.pages {
            let kept = (random.below(1000) < share)
                .then(|| random.below(contents.len() as u64) as usize)
                .and_then(|which| contents.get(which).map(|page| (which as u64 + 1, page)));
            if let Some((count, content)) = kept {
                disk.write_all_at(content, page * PAGE_BYTES as u64)?;
                cut.kept += count;
                cut.lost += contents.len() as u64 - count;
            } else {
                cut.lost += contents.len() as u64;
            }
        }
        Ok(cut)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const PAGES: usize = 64;

    fn disk() -> File {
        let disk = tempfile::tempfile().expect("a file");
        disk.set_len((PAGES * PAGE_BYTES) as u64).expect("a size");
        disk
    }

    fn first_bytes(disk: &File) -> Vec<u8> {
        let mut all = vec![0; PAGES * PAGE_BYTES];
        disk.read_exact_at(&mut all, 0).expect("the disk");
        all.chunks(PAGE_BYTES).map(|page| page[0]).collect()
    }

    fn write_all(cache: &mut Cache, disk: &File, value: u8) {
        let bytes = vec![value; PAGES * PAGE_BYTES];
        cache.write(disk, 0, &bytes).expect("a write");
    }

    #[test]
    fn what_was_flushed_survives_every_cut_and_what_was_not_may_be_lost() {
        let mut lost_at_all = 0;
        let mut kept_at_all = 0;
        let mut seen = BTreeSet::new();
        for seed in 0..64 {
            let disk = disk();
            let mut cache = Cache::default();
            write_all(&mut cache, &disk, 1);
            cache.flush(&disk).expect("a flush");
            write_all(&mut cache, &disk, 2);
            write_all(&mut cache, &disk, 3);
            let cut = cache.cut(&disk, &mut Random::new(seed)).expect("a cut");
            assert_eq!(cut.kept + cut.lost, 2 * PAGES as u64);
            lost_at_all += cut.lost;
            kept_at_all += cut.kept;
            seen.extend(first_bytes(&disk));
        }
        assert!(lost_at_all > 0 && kept_at_all > 0);
        // Never 0: that was flushed over.
        assert_eq!(seen, BTreeSet::from([1, 2, 3]));
    }

    #[test]
    fn a_flush_leaves_nothing_to_lose() {
        let disk = disk();
        let mut cache = Cache::default();
        write_all(&mut cache, &disk, 7);
        cache.flush(&disk).expect("a flush");
        let cut = cache.cut(&disk, &mut Random::new(0)).expect("a cut");
        assert_eq!(cut, Cut::default());
        assert_eq!(first_bytes(&disk), [7; PAGES]);
    }

    #[test]
    fn only_the_writer_sees_what_is_not_durable() {
        let disk = disk();
        let (mut writer, reader) = (Cache::default(), Cache::default());
        // Across a page's border, and not whole pages.
        writer.write(&disk, 4000, &[9; 200]).expect("a write");
        let mut own = [0; 300];
        let mut other = [0; 300];
        writer.read(&disk, 3950, &mut own).expect("a read");
        reader.read(&disk, 3950, &mut other).expect("a read");
        assert_eq!(own[..50], [0; 50]);
        assert_eq!(own[50..250], [9; 200]);
        assert_eq!(own[250..], [0; 50]);
        assert_eq!(other, [0; 300]);
    }

    #[test]
    fn a_forced_write_makes_its_own_page_durable_and_no_other() {
        let disk = disk();
        let mut cache = Cache::default();
        write_all(&mut cache, &disk, 5);
        cache
            .flush_range(&disk, 3 * PAGE_BYTES as u64, 512)
            .expect("a flush");
        let durable = first_bytes(&disk);
        assert_eq!(durable.iter().filter(|byte| **byte == 5).count(), 1);
        assert_eq!(durable[3], 5);
    }
}
