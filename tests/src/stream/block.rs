//! The 4 KiB that one write of the stream puts down: it says whose it is and carries its checksum,
//! so that a mixture of two writes is seen.
//!
//! ```text
//!  0 magic [8] | 8 seed u64 | 16 number u64 | 24 file u64 | 32 index u32 | 36 crc32c u32 | 40 filler
//! ```

use crate::random::Random;

/// Bytes of a block: one page, written at a multiple of its size.
pub const BLOCK_BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"TWSTREAM";
const HEAD_BYTES: usize = 40;

/// Which write a block is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Seed of the stream.
    pub seed: u64,
    /// Number of the operation.
    pub number: u64,
    /// File it belongs to.
    pub file: u64,
    /// Its place in the file, in blocks.
    pub index: u32,
}

/// What lies in a block's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing was written there, or what was has not arrived: all zero.
    Zero,
    /// A whole block.
    Whole(Block),
    /// Neither.
    Torn,
}

impl Block {
    /// The bytes to write.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BLOCK_BYTES);
        bytes.extend_from_slice(&MAGIC);
        for word in [self.seed, self.number, self.file] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.index.to_le_bytes());
        let filler = Random::new(self.seed ^ self.number).bytes(BLOCK_BYTES - HEAD_BYTES);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &filler);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&filler);
        bytes
    }
}

/// Reads what lies in a block's place.
#[must_use]
pub fn read(bytes: &[u8]) -> Place {
    if bytes.iter().all(|byte| *byte == 0) {
        return Place::Zero;
    }
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let block = Block {
        seed: word(8),
        number: word(16),
        file: word(24),
        index: (word(32) & u64::from(u32::MAX)) as u32,
    };
    if bytes == block.bytes() {
        Place::Whole(block)
    } else {
        Place::Torn
    }
}
