//! Showing how far an epoch has come.

use std::time::{Duration, Instant};

use twinwrite_abi::op;

use super::Pump;
use crate::board::VolumeBoard;
use crate::record::RecordView;

/// The peak of the lag is kept for this long, so that a scrape every few seconds sees it.
const PEAK_WINDOW: Duration = Duration::from_secs(10);

impl Pump<'_> {
    pub(super) fn show_progress(&mut self) {
        let board = &self.board;
        let (lag_records, lag_bytes) = (self.core.lag_records(), self.core.lag_bytes());
        board.captured_seq.set(self.core.captured_seq().0);
        board.mirrored_seq.set(self.core.mirrored_seq().0);
        board.purged_seq.set(self.core.purged_seq().0);
        board.lag_records.set(lag_records);
        board.lag_bytes.set(lag_bytes);
        let (records, us) = self.peak.see(lag_records, self.core.lag_us());
        board.lag_records_peak.set(records);
        board.lag_us_peak.set(us);
    }

    pub(super) fn refresh(&mut self) {
        self.refreshed = Instant::now();
        self.show_progress();
        let board = &self.board;
        board.lag_us.set(self.core.lag_us());
        board.unpurged_bytes.set(self.core.unpurged_bytes());
        board
            .oldest_unflushed_age_us
            .set(self.core.oldest_unflushed_age_us());
        board.drops.set(self.control.drops());
        let [passed, polled, holds] = self.control.gate_counts();
        board.gate_passed.set(passed);
        board.gate_polled.set(polled);
        board.gate_holds.set(holds);
        board
            .gate_replies_refused
            .set(self.control.replies_refused());
        for (reason, (shown, count)) in board.gaps.iter().zip(self.control.gaps()).enumerate() {
            if !self.is_snapshotted(reason) {
                shown.set(count);
            }
        }
        self.show_mapped();
    }
}

/// The largest lag of the running and of the last full window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peak {
    since: Instant,
    running: (u64, u64),
    before: (u64, u64),
}

impl Peak {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            running: (0, 0),
            before: (0, 0),
        }
    }

    fn see(&mut self, records: u64, us: u64) -> (u64, u64) {
        if self.since.elapsed() > PEAK_WINDOW {
            *self = Self {
                since: Instant::now(),
                running: (0, 0),
                before: self.running,
            };
        }
        self.running = (self.running.0.max(records), self.running.1.max(us));
        (
            self.running.0.max(self.before.0),
            self.running.1.max(self.before.1),
        )
    }
}

/// Counts one record.
pub(super) fn count(board: &VolumeBoard, view: &RecordView<'_>) {
    let index = usize::from(view.header.op);
    let bytes = match view.header.op {
        op::WRITE => u64::from(view.header.data_len),
        _ => view.span() as u64,
    };
    if let (Some(records), Some(total)) = (board.records.get(index), board.bytes.get(index)) {
        records.add(1);
        total.add(bytes);
    }
}
