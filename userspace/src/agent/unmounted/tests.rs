use super::*;

const BLOCKS: u64 = 64;
const BEGIN: u64 = 8192;

/// A device whose log was written once around and `head` blocks more, the last record being this.
fn log(head: u64, header: [u32; 3], flags: u8) -> Log {
    let device = tempfile::tempfile().expect("a file");
    device
        .set_len(BEGIN + BLOCKS * BASIC_BYTES as u64)
        .expect("a size");
    let put = |number: u64, bytes: &[u8]| {
        let at = BEGIN + number * BASIC_BYTES as u64;
        device.write_all_at(bytes, at).expect("a block");
    };
    for number in 0..BLOCKS {
        let round: u32 = if number < head { 8 } else { 7 };
        put(number, &round.to_be_bytes());
    }
    let [operations, length, covers] = header;
    let mut block = [0; BASIC_BYTES];
    for (at, value) in [
        (0, RECORD_MAGIC),
        (RECORD_ROUND_AT, 8),
        (RECORD_LENGTH_AT, length),
        (RECORD_OPERATIONS_AT, operations),
        (RECORD_HEADER_COVERS_AT, covers),
    ] {
        block[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    let headers = u64::from(covers.div_ceil(HEADER_COVERS));
    let number = head - headers - u64::from(length / 512);
    put(number, &block);
    let mut operation = [0; BASIC_BYTES];
    operation[..4].copy_from_slice(&8_u32.to_be_bytes());
    operation[OPERATION_FLAGS_AT] = flags;
    put(number + headers, &operation);
    Log {
        device,
        begin: BEGIN,
        blocks: BLOCKS,
    }
}

fn is_unmounted(head: u64, header: [u32; 3], flags: u8) -> bool {
    log(head, header, flags)
        .ends_with_unmount()
        .expect("the log can be read")
}

#[test]
fn only_an_unmount_record_at_the_very_end_is_one() {
    for head in [2, 17, BLOCKS - 1, BLOCKS] {
        assert!(is_unmounted(head, [1, 512, 32 << 10], UNMOUNT), "{head}");
        assert!(!is_unmounted(head, [1, 512, 32 << 10], 0), "{head}");
    }
    // Padded to a stripe, and with a second block of header.
    assert!(is_unmounted(20, [1, 4096, 32 << 10], UNMOUNT));
    assert!(is_unmounted(20, [1, 512, 64 << 10], UNMOUNT));
    assert!(!is_unmounted(20, [3, 512, 32 << 10], UNMOUNT));
    let longer = log(20, [1, 512, 32 << 10], UNMOUNT);
    let behind = BEGIN + 20 * BASIC_BYTES as u64;
    longer
        .device
        .write_all_at(&8_u32.to_be_bytes(), behind)
        .expect("a block of a further record");
    assert!(!longer.ends_with_unmount().expect("the log can be read"));
}

#[test]
fn an_empty_log_and_a_damaged_super_block_are_no_unmount() {
    let device = tempfile::tempfile().expect("a file");
    device.set_len(1 << 20).expect("a size");
    let log = Log {
        device,
        begin: BEGIN,
        blocks: BLOCKS,
    };
    assert!(!log.ends_with_unmount().expect("the log can be read"));
    for byte in [0, 0xff] {
        let device = tempfile::tempfile().expect("a file");
        assert!(Log::of(&[byte; 4096], device).is_none(), "{byte}");
    }
}
