//! Content that says what it is: each 512 bytes carry their run, cell, place and version.

/// A block of a cell.
pub(super) const BLOCK_BYTES: usize = 4096;
pub(super) const SECTOR_BYTES: usize = 512;
const HEADER_BYTES: usize = 32;
const CRC_BYTES: usize = 4;
const MAGIC: u64 = u64::from_le_bytes(*b"twinahed");

/// The block of a cell in a version. `place`: its number in the cell.
pub(super) fn block(run: u64, cell: u32, place: u32, version: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    for sector in 0..(BLOCK_BYTES / SECTOR_BYTES) as u32 {
        let begin = bytes.len();
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(run.to_le_bytes());
        bytes.extend(cell.to_le_bytes());
        bytes.extend((place * 8 + sector).to_le_bytes());
        bytes.extend(version.to_le_bytes());
        bytes.resize(begin + SECTOR_BYTES - CRC_BYTES, version as u8);
        let crc = crc32c::crc32c(bytes.get(begin..).unwrap_or_default());
        bytes.extend(crc.to_le_bytes());
    }
    bytes
}

/// The versions that the sectors of a block show; in words what is no content of this block.
pub(super) fn versions(
    bytes: &[u8],
    run: u64,
    cell: u32,
    place: u32,
) -> Result<Vec<u64>, &'static str> {
    if bytes.len() != BLOCK_BYTES {
        return Err("is not whole");
    }
    let mut found = Vec::new();
    for (sector, bytes) in bytes.chunks(SECTOR_BYTES).enumerate() {
        found.push(self::sector(bytes, run, cell, place * 8 + sector as u32)?);
    }
    Ok(found)
}

/// The version that a sector shows, by its number in the cell; in words what is no content of it.
pub(super) fn sector(bytes: &[u8], run: u64, cell: u32, sector: u32) -> Result<u64, &'static str> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Err("shows zeros");
    }
    let cut = bytes.split_last_chunk::<CRC_BYTES>();
    let Some((content, crc)) = cut else {
        return Err("is not whole");
    };
    if crc32c::crc32c(content) != u32::from_le_bytes(*crc) {
        return Err("is damaged");
    }
    let header = content.first_chunk::<HEADER_BYTES>();
    let words: Vec<u64> = header
        .map(|header| {
            let words = header.chunks_exact(8);
            words
                .filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)))
                .collect()
        })
        .unwrap_or_default();
    let place = u64::from(cell) | u64::from(sector) << 32;
    match words.as_slice() {
        [MAGIC, of, at, version] if *of == run && *at == place => Ok(*version),
        _ => Err("shows what belongs elsewhere"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_shows_its_version_and_nothing_else_passes_for_one() {
        let mut bytes = block(3, 7, 1, 12);
        assert_eq!(versions(&bytes, 3, 7, 1), Ok(vec![12; 8]));
        assert!(versions(&bytes, 4, 7, 1).is_err());
        assert!(versions(&bytes, 3, 6, 1).is_err());
        assert!(versions(&bytes, 3, 7, 0).is_err());
        bytes[512..1024].copy_from_slice(&block(3, 7, 1, 11)[512..1024]);
        let torn = versions(&bytes, 3, 7, 1).expect("a torn block");
        assert_eq!(torn[..3], [12, 11, 12]);
        bytes[700] ^= 1;
        assert_eq!(versions(&bytes, 3, 7, 1), Err("is damaged"));
        bytes[512..1024].fill(0);
        assert_eq!(versions(&bytes, 3, 7, 1), Err("shows zeros"));
    }
}
