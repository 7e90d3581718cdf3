//! What operations are made of: lengths, names, values; and operations on bytes, which need nothing else.

use super::super::action::{Acl, Action, AllocateWay, CopyWay, Fill, ResizeWay, Target, WriteWay};
use super::super::bytes::SECTOR_BYTES;
use super::Generator;
use crate::escape::PathBytes;

/// Lengths of writes: single bytes, around a sector, around a page, around a large folio.
const LENGTHS: [u64; 10] = [1, 7, 511, 1_000, 4_095, 4_096, 4_097, 9_000, 20_001, 65_537];
const PIPED_BYTES: u64 = 20_001;

impl Generator {
    pub(super) fn pick<T: Copy>(&mut self, from: &[T], otherwise: T) -> T {
        self.random.pick(from).copied().unwrap_or(otherwise)
    }

    pub(super) fn is_one_in(&mut self, many: u64) -> bool {
        self.random.below(many) == 0
    }

    pub(super) fn fill(&mut self, bytes: u64) -> Fill {
        Fill {
            seed: self.random.number(),
            bytes: usize::try_from(bytes).unwrap_or_default(),
        }
    }

    pub(super) fn length(&mut self) -> u64 {
        self.pick(&LENGTHS, 1)
    }

    pub(super) fn slot(&mut self, slots: usize) -> usize {
        usize::try_from(self.random.below(slots as u64)).unwrap_or_default()
    }

    /// Short ones, and now and then one that is as long as can be or no text.
    pub(super) fn name(&mut self) -> Vec<u8> {
        let number = self.random.below(1_000);
        match self.random.below(12) {
            0 => format!("{number:03}{}", "n".repeat(252)).into_bytes(),
            1 => [b"\xff\xfe\x80", number.to_string().as_bytes()].concat(),
            2 => [b"two\nlines %41 \"\\", number.to_string().as_bytes()].concat(),
            _ => format!("n{number}").into_bytes(),
        }
    }

    pub(super) fn symlink_target(&mut self) -> PathBytes {
        let long = "x/".repeat(400) + "y";
        let targets = ["a", "does/not/exist", "/absolute", "n1", long.as_str()];
        PathBytes(self.pick(&targets, "a").as_bytes().to_vec())
    }

    pub(super) fn mtime_ns(&mut self) -> i64 {
        let number = i64::try_from(self.random.below(2_000_000_000_000_000_000));
        number.unwrap_or_default()
    }

    pub(super) fn acl(&mut self) -> Acl {
        let mut permissions = || u16::try_from(self.random.below(8)).unwrap_or_default();
        Acl {
            named: permissions(),
            group: permissions(),
        }
    }

    pub(super) fn write(&mut self, target: Target, reach: u64, ways: &[WriteWay]) -> Action {
        let way = self.pick(ways, WriteWay::At);
        let (mut at, mut bytes) = (self.random.below(reach + 1), self.length());
        if way == WriteWay::Direct {
            let sector = SECTOR_BYTES as u64;
            at -= at % sector;
            bytes = sector * (1 + self.random.below(4));
        }
        let target = match target {
            // These are flags of an open.
            Target::Open(slot) if way == WriteWay::Append || way.confirms() => {
                return Action::Write {
                    target: Target::Open(slot),
                    way: WriteWay::At,
                    at,
                    fill: self.fill(bytes),
                };
            }
            target => target,
        };
        let fill = self.fill(bytes);
        Action::Write {
            target,
            way,
            at,
            fill,
        }
    }

    pub(super) fn copy(
        &mut self,
        from: PathBytes,
        reach: u64,
        target: Target,
        ways: &[CopyWay],
    ) -> Action {
        let way = self.pick(ways, CopyWay::CopyRange);
        let bytes = 1 + self.random.below(PIPED_BYTES);
        let (mut from_at, mut at) = (self.random.below(9_000), self.random.below(reach));
        if self.is_one_in(2) {
            // A copy of whole pages may be shared with its source.
            (from_at, at) = (0, at - at % SECTOR_BYTES as u64);
        }
        Action::Copy {
            from,
            from_at,
            target,
            at,
            bytes: usize::try_from(bytes).unwrap_or_default(),
            way,
        }
    }

    pub(super) fn resize(&mut self, target: Target, reach: u64) -> Action {
        let ways = [ResizeWay::Descriptor, ResizeWay::Path, ResizeWay::Open];
        let way = match target {
            Target::Open(_) => ResizeWay::Descriptor,
            Target::Path(_) => self.pick(&ways, ResizeWay::Descriptor),
        };
        let bytes = self.random.below(reach + 9_000);
        Action::Resize { target, bytes, way }
    }

    pub(super) fn allocate(&mut self, target: Target, reach: u64) -> Action {
        let ways = [
            AllocateWay::Plain,
            AllocateWay::KeepSize,
            AllocateWay::Punch,
            AllocateWay::Zero,
        ];
        Action::Allocate {
            target,
            at: self.random.below(reach + 1),
            bytes: 1 + self.random.below(30_000),
            way: self.pick(&ways, AllocateWay::Plain),
        }
    }
}
