//! Repeatable pseudo-random numbers: the same seed gives the same workload on every machine.
//!
//! SplitMix64 (Steele, Lea, Flood 2014). Its sequence is part of the stream's format: a checker
//! must be able to compute what a writer did.

/// A sequence of numbers that a seed decides.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`; 0 if the limit is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number().checked_rem(limit).unwrap_or(0)
    }

    /// One of a slice's elements, `None` if it has none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let at = usize::try_from(self.below(from.len() as u64)).ok()?;
        from.get(at)
    }

    /// Removes and returns one of a vector's elements.
    pub fn take<T>(&mut self, from: &mut Vec<T>) -> Option<T> {
        let at = usize::try_from(self.below(from.len() as u64)).ok()?;
        (at < from.len()).then(|| from.swap_remove(at))
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_the_published_one() {
        let mut random = Random::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.number()).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn nothing_is_picked_from_nothing() {
        let mut random = Random::new(0);
        assert_eq!(random.pick::<u8>(&[]), None);
        assert_eq!(random.take::<u8>(&mut Vec::new()), None);
        assert_eq!(random.bytes(13).len(), 13);
    }
}
