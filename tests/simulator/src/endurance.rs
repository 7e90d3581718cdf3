//! Whether the memory of the cores stays the same however many records pass through them.
//!
//! The records come from ever new inodes, so whatever a core keeps of what is purged would add up. The link is
//! one that completes at once; a checkpoint is proven now and then.

use std::fs;

use twinwrite::durability::core::LiveLog;
use twinwrite::durability::mapped::MappedPages;
use twinwrite::ids::{Epoch, Identity, RingPos, Seq};
use twinwrite::mirror::core::{Action, MirrorCore};
use twinwrite::record::{RecordMeta, flag, op};
use twinwrite::region::scan::Tail;

const LOG_BYTES: u64 = 64 << 20;
const WINDOW: usize = 64;
/// Records between two turns of the owner.
const BATCH: u64 = 64;
/// Records between two checkpoints.
const CHECKPOINT_EVERY: u64 = 8192;
/// How often the memory is looked at.
const SAMPLES: u64 = 10;

/// The process's memory after so many records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Records that were captured, mirrored and purged.
    pub records: u64,
    /// Memory that is in use, bytes.
    pub resident_bytes: u64,
    /// Records that a checkpoint has yet to prove.
    pub live_records: usize,
    /// Inodes that are held for these.
    pub live_inodes: usize,
}

/// Sends so many records through the cores.
///
/// # Errors
/// What a core refused, or the kernel did not show.
pub fn run(records: u64) -> Result<Vec<Sample>, String> {
    let mut owner = Owner::new()?;
    let mut samples = Vec::new();
    let every = (records / SAMPLES).max(1);
    while owner.seq.0 < records {
        owner.batch()?;
        if owner.seq.0 / every > samples.len() as u64 {
            samples.push(owner.sample()?);
        }
    }
    Ok(samples)
}

struct Owner {
    core: MirrorCore,
    live: LiveLog,
    mapped: MappedPages,
    seq: Seq,
    ring_pos: RingPos,
    now_us: u64,
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Owner {
    fn new() -> Result<Self, String> {
        let tail = Tail::of_epoch(Epoch(1), LOG_BYTES, RingPos(0));
        Ok(Self {
            core: MirrorCore::new(&tail, WINDOW, 0).map_err(told)?,
            live: LiveLog::new(tail.head.seq, tail.end.next_seq),
            mapped: MappedPages::default(),
            seq: Seq(0),
            ring_pos: RingPos(0),
            now_us: 0,
        })
    }

    fn sample(&self) -> Result<Sample, String> {
        Ok(Sample {
            records: self.seq.0,
            resident_bytes: resident_bytes()?,
            live_records: self.live.live_records(),
            live_inodes: self.live.live_inodes(),
        })
    }

    /// The record after `seq`: of each kind some, most of them writes.
    fn next(&mut self) -> RecordMeta {
        let number = self.seq.0;
        let (op, flags, data_len, span) = match number % 16 {
            0 => (op::CREATE, 0, 0, 192),
            1 => (op::SETATTR, 0, 0, 128),
            2 => (op::EXTENDED, flag::NO_BYTES, 4096, 64),
            3 => (op::WRITE, flag::NO_BYTES, 8192, 64),
            4 => (op::WRITE, flag::MAPPED | flag::SIZE_RAISES, 0, 64),
            5 => (op::UNLINK, 0, 0, 192),
            6 => (op::FSYNC, 0, 0, 64),
            _ => (op::WRITE, 0, 512, 576),
        };
        let meta = RecordMeta {
            ring_pos: self.ring_pos,
            span,
            op,
            flags,
            identity: Identity {
                ino: 100 + number / 16,
                generation: 1,
            },
            pos: 0,
            data_len,
            size_after: if op == op::FSYNC { u64::MAX } else { 8192 },
            arg: match op {
                op::FSYNC => self.ring_pos.0,
                op::WRITE => 4096,
                _ => 0,
            },
        };
        self.ring_pos = meta.ring_end();
        self.seq = self.seq.next();
        meta
    }

    fn batch(&mut self) -> Result<(), String> {
        self.now_us += 100;
        self.core.tick(self.now_us, self.now_us as i64 * 1000);
        let metas: Vec<RecordMeta> = (0..BATCH).map(|_| self.next()).collect();
        let mut seq = self.core.captured_seq();
        self.core.captured(&metas, self.now_us).map_err(told)?;
        for meta in &metas {
            seq = seq.next();
            if meta.flags & flag::MAPPED != 0 {
                self.mapped.note(meta.identity, meta.pos, meta.arg, seq);
            }
            self.live.appended(seq, meta).map_err(told)?;
        }
        self.turn()?;
        if self.seq.0.is_multiple_of(CHECKPOINT_EVERY) {
            self.live.checkpoint(seq).map_err(told)?;
            self.mapped.proven(seq);
            for run in self.mapped.runs() {
                self.mapped.seen(run.identity, run.pos, None);
            }
        }
        let purgeable = self.live.purgeable();
        if purgeable > self.core.purged_seq() {
            self.core.purge_to(purgeable).map_err(told)?;
        }
        self.turn()
    }

    /// Carries out all that the core asks for.
    fn turn(&mut self) -> Result<(), String> {
        while let Some(action) = self.core.next_action(|_, _| 0) {
            match action {
                Action::Post { id, .. } => {
                    self.core.completed(id, self.now_us).map_err(told)?;
                }
                Action::NeedFill {
                    seq,
                    len,
                    fill_offset,
                    ..
                } => {
                    let captured = self.core.captured_seq();
                    let bytes = vec![7; len as usize];
                    self.core
                        .filled(seq, fill_offset, bytes, false, captured)
                        .map_err(told)?;
                }
                Action::ReleaseRing(_) | Action::RegionHalf | Action::RegionFull => {}
            }
        }
        Ok(())
    }
}

/// Second word of `/proc/self/statm`, in pages of 4 KiB.
fn resident_bytes() -> Result<u64, String> {
    let statm = fs::read_to_string("/proc/self/statm").map_err(told)?;
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok());
    pages
        .map(|pages| pages * 4096)
        .ok_or_else(|| format!("/proc/self/statm says {statm:?}"))
}

#[cfg(test)]
mod tests {
    use super::{CHECKPOINT_EVERY, run};

    #[test]
    fn memory_does_not_grow_with_the_records() {
        let samples = run(600_000).expect("the cores take the records");
        let bound = CHECKPOINT_EVERY as usize * 2;
        assert!(
            samples
                .iter()
                .all(|s| s.live_records <= bound && s.live_inodes <= bound)
        );
        let (early, last) = (samples[2].resident_bytes, samples[9].resident_bytes);
        assert!(
            last < early + (1 << 20),
            "{early} bytes grew to {last}: {samples:?}"
        );
    }
}
