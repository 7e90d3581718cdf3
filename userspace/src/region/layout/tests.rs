//! The region's structures are pinned by bytes: a change of any of them is a new format version.
//! The checksums come from another implementation of CRC-32C.

use super::*;

/// Little-endian fields side by side.
macro_rules! bytes {
    ($($field:expr),* $(,)?) => {
        [$(&$field.to_le_bytes()[..]),*].concat()
    };
}

fn pinned<T: Sealed + std::fmt::Debug + PartialEq>(value: T, fields: &[u8], crc32c: u32) {
    let sealed = value.seal();
    let golden = [fields, &crc32c.to_le_bytes()].concat();
    assert_eq!(sealed.as_bytes(), golden, "{:02x?}", sealed.as_bytes());
    assert_eq!(T::open(&golden), Some(sealed));
    for at in 0..golden.len() {
        let mut damaged = golden.clone();
        damaged[at] ^= 0x10;
        assert_eq!(T::open(&damaged), None, "byte {at}");
        assert_eq!(T::open(&golden[..at]), None, "cut at {at}");
    }
}

fn name(text: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

#[test]
fn a_region_header_has_these_bytes() {
    let header = RegionHeader {
        magic: REGION_MAGIC,
        version: REGION_VERSION,
        state: region_state::OPEN,
        epoch: 0x0102_0304_0506_0708,
        log_bytes: LOG_BYTES_MIN,
        cluster: name("c"),
        volume: name("v"),
        owner: name("a"),
        mirror: name("b"),
        filesystem_uuid: [9; 16],
        reserved: 0,
        crc32c: 0,
    };
    let mut fields = b"TWREGION".to_vec();
    fields.extend([1, 0, 0, 0, 1, 0, 0, 0]);
    fields.extend([8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0x40, 0, 0, 0, 0, 0]);
    fields.extend([name("c"), name("v"), name("a"), name("b")].concat());
    fields.extend([9; 16]);
    fields.extend([0; 4]);
    pinned(header, &fields, 0x72d3_f2c8);
}

#[test]
fn a_frame_header_has_these_bytes() {
    let header = FrameHeader {
        magic: FRAME_MAGIC,
        version: 1,
        kind: kind::FILL,
        flags: FILL_LAST | FILL_GONE,
        epoch: 2,
        lsn: 3,
        first_seq: 4,
        ring_pos: 5,
        count: 6,
        body_len: 7,
        body_crc32c: 8,
        previous_crc32c: 9,
        fill_offset: 10,
        header_crc32c: 0,
    };
    let mut fields = b"TWFR".to_vec();
    fields.extend([1, 2, 3, 0]);
    fields.extend(bytes!(
        2u64, 3u64, 4u64, 5u64, 6u32, 7u32, 8u32, 9u32, 10u32
    ));
    pinned(header, &fields, 0x86a0_dfc0);
    assert_eq!([kind::RUN, kind::FILL, kind::MARK, kind::PAD], [1, 2, 3, 4]);
    assert_eq!(header.stride(), 128);
    assert_eq!(
        FrameHeader {
            body_len: 64,
            ..header
        }
        .stride(),
        128
    );
    assert_eq!(
        FrameHeader {
            body_len: 0,
            ..header
        }
        .stride(),
        64
    );
    assert_eq!(
        FrameHeader {
            body_len: u32::MAX,
            ..header
        }
        .stride(),
        (1 << 32) + 64
    );
}

#[test]
fn status_lines_have_these_bytes() {
    let mirrored = Mirrored {
        magic: MIRRORED_MAGIC,
        reserved: 0,
        epoch: 1,
        lsn: 2,
        seq: 3,
        time_ns: -4,
        lag_records: 5,
        reserved2: [0; 3],
        crc32c: 0,
    };
    let mut fields = b"TWMI\0\0\0\0".to_vec();
    fields.extend(bytes!(1u64, 2u64, 3u64, -4i64, 5u64, 0u64, 0u32));
    pinned(mirrored, &fields, 0xf02c_5bcb);

    let head = HeadSlot {
        magic: HEAD_MAGIC,
        previous_crc32c: 1,
        epoch: 2,
        lsn: 3,
        seq: 4,
        ring_pos: 5,
        reserved: [0; 2],
        reserved2: 0,
        crc32c: 0,
    };
    let mut fields = b"TWHE".to_vec();
    fields.extend(bytes!(1u32, 2u64, 3u64, 4u64, 5u64, 0u64, 0u64, 0u32));
    pinned(head, &fields, 0x6a74_f3d2);

    let heartbeat = Heartbeat {
        magic: HEARTBEAT_MAGIC,
        restart_ms: 0,
        boot_id: [7; 16],
        counter: 1,
        time_ns: 2,
        volume_io_ms: 0,
        reserved: [0; 4],
        crc32c: 0,
    };
    let mut fields = b"TWHB\0\0\0\0".to_vec();
    fields.extend([7; 16]);
    fields.extend(bytes!(1u64, 2i64, 0u64, 0u64, 0u32));
    pinned(heartbeat, &fields, 0x531e_f7b6);
    let telling = Heartbeat {
        restart_ms: 30_000,
        volume_io_ms: 1_501,
        ..heartbeat
    }
    .seal();
    assert_eq!(telling.as_bytes()[4..8], 30_000u32.to_le_bytes());
    assert_eq!(telling.as_bytes()[40..44], 1_501u32.to_le_bytes());
}

#[test]
fn places_and_chains_are_fixed() {
    assert_eq!(
        (STATUS_OFFSET, MIRRORED_OFFSET, HEAD_OFFSETS, LOG_OFFSET),
        (4096, 4096, [4160, 4224], 8192)
    );
    assert_eq!(chain_start(1), 0xc514_cfad);
    let mark = CheckpointMark {
        seq: 1,
        time_ns: -1,
    };
    assert_eq!(mark.as_bytes(), bytes!(1u64, -1i64));
}
