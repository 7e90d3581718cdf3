//! Telling people and programs what a region holds, and whether it is sound.
//!
//! Text for people, one JSON object a line for programs. It reads what [`scan`](super::scan::scan)
//! accepted and must never show a frame or a record that the scan refused.

#[cfg(test)]
mod tests;

use std::io::{self, Write};

use serde_json::{Value, json};

use super::layout::{FILL_GONE, FILL_LAST, RegionHeader, kind, region_state};
use super::scan::{FrameRef, Scan, ScanError, ScannedRecord, scan, split};
use crate::record::{flag, gap, op};

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The header, if it is one.
    pub header: Option<RegionHeader>,
    /// The log, or why it cannot be used.
    pub result: Result<Scan, ScanError>,
}

/// Reads a whole region, from its header page on.
#[must_use]
pub fn verify(region: &[u8]) -> Verdict {
    match split(region) {
        Ok((header, status_page, log)) => Verdict {
            header: Some(header),
            result: scan(&header, status_page, log),
        },
        Err(error) => Verdict {
            header: None,
            result: Err(error),
        },
    }
}

/// The name of a header's state.
#[must_use]
pub fn state_name(state: u32) -> &'static str {
    match state {
        region_state::EMPTY => "empty",
        region_state::OPEN => "open",
        region_state::CLOSED => "closed",
        _ => "unknown",
    }
}

fn kind_name(value: u8) -> &'static str {
    match value {
        kind::RUN => "run",
        kind::FILL => "fill",
        kind::MARK => "mark",
        kind::PAD => "pad",
        _ => "unknown",
    }
}

fn op_name(value: u8) -> &'static str {
    match value {
        op::WRITE => "write",
        op::CREATE => "create",
        op::LINK => "link",
        op::UNLINK => "unlink",
        op::RENAME => "rename",
        op::EXCHANGE => "exchange",
        op::SETATTR => "setattr",
        op::TMPFILE => "tmpfile",
        op::SYMLINK => "symlink",
        op::FSYNC => "fsync",
        op::GAP => "gap",
        op::EXTENDED => "extended",
        _ => "unknown",
    }
}

/// A zero-padded name of the header; anything but printable characters is escaped.
fn padded(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    text(bytes.get(..end).unwrap_or(&[]))
}

/// Names are bytes; people and JSON get them escaped, so that no name can play tricks on a terminal.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .flat_map(|c| {
            let escaped = c.is_control() || c == '\\';
            let plain = (!escaped).then_some(c);
            plain
                .into_iter()
                .chain(escaped.then(|| c.escape_default()).into_iter().flatten())
        })
        .collect()
}

fn flags(frame: &FrameRef) -> Vec<&'static str> {
    [(FILL_LAST, "last"), (FILL_GONE, "gone")]
        .into_iter()
        .filter(|(bit, _)| frame.flags & bit != 0)
        .map(|(_, name)| name)
        .collect()
}

fn header_json(header: &RegionHeader) -> Value {
    json!({
        "type": "region",
        "state": state_name(header.state),
        "epoch": header.epoch,
        "log_bytes": header.log_bytes,
        "cluster": padded(&header.cluster),
        "volume": padded(&header.volume),
        "owner": padded(&header.owner),
        "mirror": padded(&header.mirror),
    })
}

fn summary_json(scan: &Scan) -> Value {
    json!({
        "type": "log",
        "valid": true,
        "head_lsn": scan.head.lsn,
        "head_seq": scan.head.seq,
        "end_lsn": scan.end.lsn,
        "last_seq": scan.last_seq,
        "cut": scan.cut,
        "checkpoint_seq": scan.checkpoint_seq,
        "frames": scan.frames.len(),
        "mirrored_lsn": scan.mirrored.map(|m| m.lsn),
        "mirrored_seq": scan.mirrored.map(|m| m.seq),
        "pending_fill": scan.pending_fill,
        "stop": scan.stop,
    })
}

fn frame_json(frame: &FrameRef) -> Value {
    json!({
        "type": "frame",
        "lsn": frame.lsn,
        "kind": kind_name(frame.kind),
        "flags": flags(frame),
        "first_seq": frame.first_seq,
        "count": frame.count,
        "body_bytes": frame.body_len,
        "ring_pos": (frame.kind == kind::RUN).then_some(frame.ring_pos),
        "safe_at": (frame.kind == kind::FILL).then_some(frame.ring_pos),
    })
}

fn record_json(record: &ScannedRecord<'_>) -> Value {
    let h = &record.view.header;
    let mut value = json!({
        "type": "record",
        "seq": record.seq,
        "ring_pos": record.ring_pos,
        "op": op_name(h.op),
        "ino": h.ino,
        "generation": h.generation,
        "mode": h.mode,
        "size_after": h.size_after,
        "time_ns": h.time_ns,
        "flags": h.flags,
    });
    if let Some(map) = value.as_object_mut() {
        match h.op {
            op::WRITE => {
                map.insert("pos".into(), h.pos.into());
                map.insert("data_bytes".into(), h.data_len.into());
                let bytes: u64 = record.payload().map(|part| u64::from(part.len)).sum();
                map.insert("bytes_in_log".into(), bytes.into());
            }
            op::FSYNC => {
                map.insert("first_byte".into(), h.pos.into());
                map.insert("ring_pos_at_entry".into(), h.arg.into());
                map.insert("datasync".into(), (h.flags & flag::DATASYNC != 0).into());
            }
            op::GAP => {
                map.insert("reason".into(), gap_name(h.arg).into());
            }
            op::SETATTR => {
                map.insert("valid".into(), h.arg.into());
            }
            op::EXTENDED => {
                let bytes: u64 = record.payload().map(|part| u64::from(part.len)).sum();
                map.insert("bytes_in_log".into(), bytes.into());
            }
            _ => {
                map.insert("parent_ino".into(), record.view.parent().ino.into());
                map.insert("name".into(), text(record.view.name()).into());
                if matches!(h.op, op::RENAME | op::EXCHANGE) {
                    map.insert("new_parent_ino".into(), record.view.new_parent().ino.into());
                    map.insert("new_name".into(), text(record.view.name2()).into());
                }
                if h.op == op::SYMLINK {
                    map.insert("target".into(), text(record.view.target()).into());
                }
            }
        }
    }
    value
}

fn gap_name(reason: u64) -> &'static str {
    usize::try_from(reason)
        .ok()
        .and_then(|at| gap::NAMES.get(at))
        .copied()
        .unwrap_or("unknown")
}

/// Writes one JSON object a line: the region, its frames and records, then the log or the error.
///
/// # Errors
/// What writing to `out` gives.
pub fn write_json(out: &mut dyn Write, region: &[u8], verdict: &Verdict) -> io::Result<()> {
    if let Some(header) = &verdict.header {
        writeln!(out, "{}", header_json(header))?;
    }
    match &verdict.result {
        Ok(scan) => {
            for frame in &scan.frames {
                writeln!(out, "{}", frame_json(frame))?;
            }
            for record in records(region, scan) {
                writeln!(out, "{}", record_json(&record))?;
            }
            writeln!(out, "{}", summary_json(scan))
        }
        Err(error) => {
            writeln!(
                out,
                "{}",
                json!({ "type": "log", "valid": false, "error": error.to_string() })
            )
        }
    }
}

fn records<'a>(region: &'a [u8], scan: &'a Scan) -> impl Iterator<Item = ScannedRecord<'a>> {
    split(region)
        .ok()
        .into_iter()
        .flat_map(|(_, _, log)| scan.records(log))
}

/// Writes what a person wants to know, record by record.
///
/// # Errors
/// What writing to `out` gives.
pub fn write_text(out: &mut dyn Write, region: &[u8], verdict: &Verdict) -> io::Result<()> {
    if let Some(h) = &verdict.header {
        writeln!(
            out,
            "region of volume {} (cluster {}), owner {}, mirror {}: {}, epoch {}, log of {} bytes",
            padded(&h.volume),
            padded(&h.cluster),
            padded(&h.owner),
            padded(&h.mirror),
            state_name(h.state),
            h.epoch,
            h.log_bytes
        )?;
    }
    let scan = match &verdict.result {
        Ok(scan) => scan,
        Err(error) => return writeln!(out, "not usable: {error}"),
    };
    for record in records(region, scan) {
        writeln!(out, "{}", record_line(&record))?;
    }
    writeln!(
        out,
        "valid: records {} to {}, cut {}, checkpoint mark {}, {} frames, lsn {} to {}; it ends there because {}",
        scan.head.seq,
        scan.last_seq,
        scan.cut,
        scan.checkpoint_seq,
        scan.frames.len(),
        scan.head.lsn,
        scan.end.lsn,
        scan.stop
    )?;
    if let Some(fill) = &scan.pending_fill {
        let (seq, filled, len) = (fill.seq, fill.filled, fill.len);
        writeln!(
            out,
            "record {seq} is incomplete: {filled} of its {len} bytes had arrived"
        )?;
    }
    Ok(())
}

fn record_line(record: &ScannedRecord<'_>) -> String {
    let (view, h) = (&record.view, &record.view.header);
    let what = match h.op {
        op::WRITE => format!("{} bytes at {}, size {}", h.data_len, h.pos, h.size_after),
        op::FSYNC => format!("bytes {} to {}", h.pos, h.size_after),
        op::GAP => gap_name(h.arg).to_owned(),
        op::EXTENDED => "extended attributes, flags and project".to_owned(),
        op::SETATTR => format!(
            "valid {:#x}, mode {:o}, size {}",
            h.arg, h.mode, h.size_after
        ),
        op::RENAME | op::EXCHANGE => {
            let (from, to) = (view.parent().ino, view.new_parent().ino);
            format!(
                "{from}/{} to {to}/{}",
                text(view.name()),
                text(view.name2())
            )
        }
        _ => format!("{}/{}", view.parent().ino, text(view.name())),
    };
    format!(
        "{:>10}  {:<8} {}  {what}",
        record.seq,
        op_name(h.op),
        view.identity()
    )
}
