//! What a journalling file system may show after a power cut: metadata up to some operation, bytes of any
//! later or earlier write, and at least all that was confirmed.

use std::collections::BTreeSet;

use super::model::Model;
use super::perform::{adopt, perform};
use super::world::{Event, Op, Random};
use crate::ids::Identity;

/// A disk after a power cut.
#[derive(Clone, Debug)]
pub(super) struct Crash {
    pub(super) disk: Model,
    /// Events that reached it, wholly or in part.
    pub(super) landed: BTreeSet<usize>,
}

/// The model after the first `count` events.
pub(super) fn state_after(root: Identity, events: &[Event], count: usize) -> Model {
    let mut model = Model::new(root);
    for event in &events[..count] {
        happen(&mut model, event);
    }
    model
}

fn happen(model: &mut Model, event: &Event) {
    model.now_ns += 1000;
    perform(model, &event.op, event.made);
    adopt(model, event);
}

/// Whether an fsync-class call confirmed (part of) what event `index` wrote.
fn is_forced(events: &[Event], index: usize, file: Identity, at: u64, len: u64) -> bool {
    events.iter().skip(index).any(|event| match &event.op {
        Op::Fsync {
            inode,
            start,
            last,
            entered,
            ..
        } => *inode == file && *entered > index && *start < at + len && at <= *last,
        _ => false,
    })
}

/// Cuts the power after all of `events`.
pub(super) fn crash(root: Identity, events: &[Event], random: &mut Random) -> Crash {
    let is_flush = |event: &Event| matches!(event.op, Op::Flush | Op::Checkpoint);
    let base = events
        .iter()
        .rposition(is_flush)
        .map_or(0, |index| index + 1);
    let confirmed = |event: &Event| match event.op {
        Op::Fsync { entered, .. } => Some(entered),
        _ => None,
    };
    let least = events
        .iter()
        .filter_map(confirmed)
        .max()
        .unwrap_or(0)
        .max(base);
    let journal = match random.below(4) {
        0 => least,
        1 => events.len(),
        _ => least + random.below(events.len() - least + 1),
    };
    let mut disk = state_after(root, events, base);
    let mut landed: BTreeSet<usize> = (0..base).collect();
    let lazy = random.below(101);
    for (index, event) in events.iter().enumerate().skip(base) {
        let (Op::Write {
            file, at, bytes, ..
        }
        | Op::Direct { file, at, bytes }
        | Op::Store { file, at, bytes }) = &event.op
        else {
            if index < journal {
                happen(&mut disk, event);
                landed.insert(index);
            }
            continue;
        };
        let forced = is_forced(events, index, *file, *at as u64, bytes.len() as u64);
        let len = match (forced, random.below(101) < lazy) {
            (true, _) | (false, true) => bytes.len(),
            (false, false) if random.chance(20) => random.below(bytes.len()),
            _ => 0,
        };
        let size = disk.nodes.get(file).map_or(0, |node| node.size() as usize);
        let room = if index < journal {
            len
        } else {
            size.saturating_sub(*at).min(len)
        };
        if room > 0 {
            disk.write_bytes(*file, *at, &bytes[..room]);
            landed.insert(index);
        }
        if index < journal {
            adopt(&mut disk, event);
            landed.insert(index);
        }
    }
    // Recovery removes what has no name.
    disk.held.clear();
    disk.nodes.retain(|_, node| node.links > 0);
    Crash { disk, landed }
}
