//! What is told of a sound and of a damaged region.

use zerocopy::IntoBytes;

use super::*;
use crate::ids::{Epoch, RingPos};
use crate::mirror::core::{Action, MirrorCore, PostBody};
use crate::record::{NameBody, RecordHeader, RecordMeta, RecordView, encode};
use crate::region::layout::{LOG_BYTES_MIN, LOG_OFFSET, REGION_MAGIC, REGION_VERSION, Sealed};
use crate::region::scan::Tail;

fn name(text: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A region as the sender writes it.
fn region() -> Vec<u8> {
    let header = RegionHeader {
        magic: REGION_MAGIC,
        version: REGION_VERSION,
        state: region_state::OPEN,
        epoch: 4,
        log_bytes: LOG_BYTES_MIN,
        cluster: name("home"),
        volume: name("vol"),
        owner: name("a"),
        mirror: name("b"),
        filesystem_uuid: [1; 16],
        reserved: 0,
        crc32c: 0,
    }
    .seal();
    let mut region = vec![0; (LOG_OFFSET + LOG_BYTES_MIN) as usize];
    region[..size_of::<RegionHeader>()].copy_from_slice(header.as_bytes());
    let mut ring = Vec::new();
    let file = RecordHeader {
        op: op::CREATE,
        ino: 12,
        generation: 3,
        pos: 2,
        ..Default::default()
    };
    encode::push_name(
        &mut ring,
        file,
        NameBody::default(),
        b"bad\x1b[2Jname",
        b"",
        b"",
    );
    encode::push_write(
        &mut ring,
        RecordHeader {
            size_after: 5,
            ..file
        },
        b"hello",
    );
    let tail = Tail::of_epoch(Epoch(4), LOG_BYTES_MIN, RingPos(0));
    let mut core = MirrorCore::new(&tail, 16, 0).expect("fresh");
    let mut at = 0;
    while let Ok(view) = RecordView::parse(&ring[at..], at) {
        core.captured(&[RecordMeta::of(&view, RingPos(at as u64))], 0)
            .expect("in order");
        at += view.span();
    }
    while let Some(action) =
        core.next_action(|pos, len| crc32c::crc32c(&ring[pos.0 as usize..][..len as usize]))
    {
        if let Action::Post {
            id,
            offset,
            head,
            body,
            ..
        } = action
        {
            let from = offset as usize;
            region[from..from + 64].copy_from_slice(&head);
            if let PostBody::Ring { pos, len } = body {
                let bytes = &ring[pos.0 as usize..][..len as usize];
                region[from + 64..from + 64 + bytes.len()].copy_from_slice(bytes);
            }
            core.completed(id, 0).expect("in order");
        }
    }
    region
}

fn dump(region: &[u8]) -> (String, String) {
    let verdict = verify(region);
    let (mut human, mut json) = (Vec::new(), Vec::new());
    write_text(&mut human, region, &verdict).expect("memory");
    write_json(&mut json, region, &verdict).expect("memory");
    (
        String::from_utf8(human).expect("text"),
        String::from_utf8(json).expect("text"),
    )
}

#[test]
fn a_sound_region_is_told_record_by_record() {
    let (human, json) = dump(&region());
    assert!(
        human.contains("region of volume vol (cluster home), owner a, mirror b: open, epoch 4")
    );
    assert!(
        human.contains("create   12.3  2/bad\\u{1b}[2Jname"),
        "{human}"
    );
    assert!(
        human.contains("5 bytes at 2, size 5") && human.contains("valid: records 1 to 2, cut 2")
    );
    let lines: Vec<Value> = json
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    let kinds: Vec<_> = lines
        .iter()
        .filter_map(|line| line["type"].as_str())
        .collect();
    assert_eq!(kinds, ["region", "frame", "record", "record", "log"]);
    assert_eq!(
        (&lines[3]["op"], &lines[3]["bytes_in_log"]),
        (&json!("write"), &json!(5))
    );
    assert_eq!(
        (&lines[4]["valid"], &lines[4]["mirrored_seq"]),
        (&json!(true), &json!(2))
    );
}

#[test]
fn a_damaged_region_is_told_with_the_place() {
    let mut damaged = region();
    damaged[LOG_OFFSET as usize + 100] ^= 1;
    let (human, json) = dump(&damaged);
    assert!(
        human.contains("not usable: the region's log is damaged at lsn 0"),
        "{human}"
    );
    assert!(human.contains("body's checksum is wrong"));
    assert!(
        json.lines()
            .last()
            .is_some_and(|line| line.contains("\"valid\":false"))
    );
    assert!(!json.contains("\"type\":\"record\""));
    assert!(dump(b"").0.contains("this is not a region"));
}
