//! Building records in user space: for tests, tools and the simulator. Live records are written
//! by the eBPF programs alone; both must agree with the drawing in `twinwrite_abi`.

use twinwrite_abi::{AttrBody, NameBody, RECORD_ALIGN, RING_HEADER_BYTES, RecordHeader, flag, op};
use zerocopy::IntoBytes;

/// Appends a record with this header and body; the length word is computed.
pub fn push(out: &mut Vec<u8>, mut header: RecordHeader, body: &[u8]) {
    let span = (size_of::<RecordHeader>() + body.len()).next_multiple_of(RECORD_ALIGN as usize);
    header.len_word = span as u32 - RING_HEADER_BYTES;
    let end = out.len() + span;
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(body);
    out.resize(end, 0);
}

/// Appends a WRITE that carries its bytes.
pub fn push_write(out: &mut Vec<u8>, header: RecordHeader, bytes: &[u8]) {
    push(
        out,
        RecordHeader {
            op: op::WRITE,
            data_len: bytes.len() as u32,
            ..header
        },
        bytes,
    );
}

/// Appends a WRITE of `len` bytes without them; a FILL frame must follow.
pub fn push_write_without_bytes(out: &mut Vec<u8>, header: RecordHeader, len: u32) {
    let flags = header.flags | flag::NO_BYTES;
    push(
        out,
        RecordHeader {
            op: op::WRITE,
            flags,
            data_len: len,
            ..header
        },
        &[],
    );
}

/// Appends a name operation; `name2` is empty but for RENAME and EXCHANGE, `target` but for SYMLINK.
pub fn push_name(
    out: &mut Vec<u8>,
    header: RecordHeader,
    names: NameBody,
    name: &[u8],
    name2: &[u8],
    target: &[u8],
) {
    let names = NameBody {
        name2_len: name2.len() as u32,
        ..names
    };
    let body = [names.as_bytes(), name, name2, target].concat();
    let header = RecordHeader {
        name_len: name.len() as u16,
        data_len: target.len() as u32,
        ..header
    };
    push(out, header, &body);
}

/// Appends a SETATTR.
pub fn push_setattr(out: &mut Vec<u8>, header: RecordHeader, attributes: AttrBody) {
    push(
        out,
        RecordHeader {
            op: op::SETATTR,
            ..header
        },
        attributes.as_bytes(),
    );
}
