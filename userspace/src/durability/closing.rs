//! The closing of an epoch: its steps, in their only order.
//!
//! ```text
//! mailbox (epoch, last mirrored, closed) -> checkpoint with a closed sentinel, proven
//!         -> the mirror is told, so that it voids the region -> the gates open
//! ```
//!
//! From the beginning the gates are held: nothing is confirmed that was not mirrored. What each step
//! does when it fails, or takes longer than its limit:
//!
//! | step | limit | then |
//! |---|---|---|
//! | mailbox | 2 s | the checkpoint begins all the same; tried again until it succeeds; no new epoch before |
//! | checkpoint | none; loud after 10 s | tried again, later each time; the gates stay shut |
//! | mirror | 1 s | the gates open all the same: the sentinel voids the region |
//! | gates | | |
//!
//! If the machine dies, its successor judges by three words: the owner's in the mailbox, the volume's
//! sentinel, the region's header. Why nothing confirmed is undone (guarantee 0), wherever it dies:
//!
//! | it died | mailbox | sentinel | region | gates | the successor | because |
//! |---|---|---|---|---|---|---|
//! | before the first step | open | open | open | held | merges | every confirmed mark is in the region and clips |
//! | the mailbox was not written | open | open | open | held | merges | as above: nothing passed since |
//! | the mailbox is torn | torn | open | open | held | merges | as above |
//! | the mailbox is written | closed | open | open | held | voids | nothing is replayed over anything |
//! | the checkpoint failed | either | open | open | held | as above | a failed sentinel is an open or a closed one |
//! | the sentinel is written, not proven | either | open or closed | open | held | merges or voids | both are right while the gates are held |
//! | the sentinel is proven | either | closed | open | held | voids | a proven sentinel is read after any crash |
//! | the mirror is told | either | closed | closed | held | voids | |
//! | the gates are open | either | closed | either | all | voids | the sentinel was proven before the first one passed |
//! | the mailbox was never told | open | closed | either | all | voids | a closed sentinel outweighs an open mailbox |
//!
//! The region is void from a proven sentinel on; the mailbox's word voids it already before, for an
//! epoch whose log must not be replayed because of a gap. While only the mailbox says so the region
//! is kept, since until the disk has everything it is what a person might still want.
//!
//! If the agent dies, the next one begins again at the first step; every step may be repeated.
//!
//! Input is the reason, the results and the time, output is [`Next`]. This core must never tell the
//! mirror, nor open the gates, before the closed sentinel is proven; and an epoch that it has not
//! called closed must never be followed by another one.

use crate::ids::{Epoch, Seq};

#[cfg(test)]
mod tests;

/// Longest wait for the mailbox before the checkpoint begins.
pub const MAILBOX_LIMIT_US: u64 = 2_000_000;
/// A checkpoint that runs for longer than this is told as trouble; nothing else can be done.
pub const CHECKPOINT_LIMIT_US: u64 = 10_000_000;
/// Longest wait for the mirror's answer before the gates open.
pub const MIRROR_LIMIT_US: u64 = 1_000_000;
/// Wait before the first retry; it doubles with each failure.
const RETRY_MIN_US: u64 = 100_000;
/// Longest wait before a retry.
const RETRY_MAX_US: u64 = 10_000_000;

/// The proof that no region can be merged into the volume: a closed sentinel whose fsync succeeded.
#[derive(Debug)]
pub struct Proven(());

impl Proven {
    /// The volume has no sentinel that can be read: it was never protected, and nothing is merged
    /// into it before a person has looked.
    ///
    /// A closed sentinel that was merely read is no proof: it may stand in the page cache only,
    /// because the fsync of an earlier agent failed. Close its epoch again.
    #[must_use]
    pub const fn without_sentinel() -> Self {
        Self(())
    }
}

/// A step that the driver carries out and whose result it reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Write (epoch, last mirrored, closed) into the mailbox, direct and synchronous.
    Mailbox,
    /// `syncfs`, then the sentinel with (epoch, last mirrored, closed), fsynced.
    Checkpoint,
    /// Tell the mirror that the region is void.
    Mirror,
}

/// What is to be done now.
#[derive(Debug)]
pub enum Next {
    /// Begin this step, and report its result with [`Closing::ended`]. Several may run at a time; one
    /// that is over its limit is not begun again before its result was reported.
    Begin(Step),
    /// Open the gates to all; told once.
    OpenGates(Proven),
    /// Nothing before this time, or before a result is reported.
    Wait {
        /// On the caller's clock.
        until_us: u64,
    },
    /// Every step is done: a new epoch may begin.
    Closed,
}

/// How far a step has come.
#[derive(Clone, Debug, Default)]
enum State {
    /// Not begun.
    #[default]
    Waiting,
    /// Begun, without a result.
    Running {
        /// When.
        since_us: u64,
    },
    /// Failed; to be begun again.
    Failed {
        /// When to begin again.
        retry_us: u64,
    },
    /// Done.
    Succeeded,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    state: State,
    failures: u32,
    error: Option<String>,
}

impl Progress {
    fn is_due(&self, now_us: u64) -> bool {
        match self.state {
            State::Waiting => true,
            State::Failed { retry_us } => now_us >= retry_us,
            State::Running { .. } | State::Succeeded => false,
        }
    }

    fn succeeded(&self) -> bool {
        matches!(self.state, State::Succeeded)
    }

    fn is_over(&self, limit_us: u64, now_us: u64) -> bool {
        matches!(self.state, State::Running { since_us } if now_us >= since_us.saturating_add(limit_us))
    }

    /// Whether the step after this one need not wait for it any longer.
    fn lets_go_on(&self, limit_us: u64, now_us: u64) -> bool {
        self.succeeded() || self.failures > 0 || self.is_over(limit_us, now_us)
    }

    fn begin(&mut self, now_us: u64) {
        self.state = State::Running { since_us: now_us };
    }

    fn end(&mut self, result: Result<(), String>, now_us: u64) {
        match result {
            Ok(()) => {
                self.state = State::Succeeded;
                self.error = None;
            }
            Err(error) => {
                let wait_us = RETRY_MIN_US
                    .saturating_mul(1 << self.failures.min(30))
                    .min(RETRY_MAX_US);
                self.failures = self.failures.saturating_add(1);
                self.error = Some(error);
                let retry_us = now_us.saturating_add(wait_us);
                self.state = State::Failed { retry_us };
            }
        }
    }

    /// When something changes without a result being reported.
    fn changes_us(&self, limit_us: u64, now_us: u64) -> Option<u64> {
        match self.state {
            State::Running { since_us } => {
                Some(since_us.saturating_add(limit_us)).filter(|at| *at > now_us)
            }
            State::Failed { retry_us } => Some(retry_us),
            State::Waiting | State::Succeeded => None,
        }
    }
}

/// The closing of one epoch. To be made when the gates are held already.
#[derive(Clone, Debug)]
pub struct Closing {
    epoch: Epoch,
    last_mirrored: Seq,
    reason: String,
    mailbox: Progress,
    checkpoint: Progress,
    mirror: Progress,
    gates_open: bool,
}

impl Closing {
    /// Nothing done yet.
    #[must_use]
    pub fn new(epoch: Epoch, last_mirrored: Seq, reason: &str) -> Self {
        Self {
            epoch,
            last_mirrored,
            reason: reason.to_owned(),
            mailbox: Progress::default(),
            checkpoint: Progress::default(),
            mirror: Progress::default(),
            gates_open: false,
        }
    }

    /// The epoch.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The last record known in its region.
    #[must_use]
    pub const fn last_mirrored(&self) -> Seq {
        self.last_mirrored
    }

    /// Why it is closed.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether the closed sentinel is proven: the region is void and everything is on the disk.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        self.checkpoint.succeeded()
    }

    /// What to do now. To be called again after each answer but [`Next::Wait`] and [`Next::Closed`].
    pub fn next(&mut self, now_us: u64) -> Next {
        if self.mailbox.is_due(now_us) {
            return self.begin(Step::Mailbox, now_us);
        }
        let told = self.mailbox.lets_go_on(MAILBOX_LIMIT_US, now_us);
        if told && self.checkpoint.is_due(now_us) {
            return self.begin(Step::Checkpoint, now_us);
        }
        if self.is_proven() {
            if matches!(self.mirror.state, State::Waiting) {
                return self.begin(Step::Mirror, now_us);
            }
            let voided = self.mirror.lets_go_on(MIRROR_LIMIT_US, now_us);
            if voided && !std::mem::replace(&mut self.gates_open, true) {
                return Next::OpenGates(Proven(()));
            }
        }
        if self.gates_open && self.mailbox.succeeded() {
            return Next::Closed;
        }
        self.wait(now_us)
    }

    /// A step that was begun has ended; also one that is over its limit.
    pub fn ended(&mut self, step: Step, result: Result<(), String>, now_us: u64) {
        self.progress(step).end(result, now_us);
    }

    /// What keeps the epoch from being closed, for status and log; `None` while all goes well.
    #[must_use]
    pub fn trouble(&self, now_us: u64) -> Option<String> {
        let of_checkpoint = || {
            let gates = "calls that ask for durability wait until then";
            if let Some(error) = &self.checkpoint.error {
                let failures = self.checkpoint.failures;
                return Some(format!(
                    "its checkpoint failed ({failures} times so far: {error}) and is tried again; {gates}"
                ));
            }
            self.checkpoint
                .is_over(CHECKPOINT_LIMIT_US, now_us)
                .then(|| format!("its checkpoint does not come to an end: the disk hangs; {gates}"))
        };
        let of_mailbox = || {
            let until = "no new epoch begins until then";
            if let Some(error) = &self.mailbox.error {
                return Some(format!(
                    "its end cannot be told in the mailbox ({error}); {until}"
                ));
            }
            self.mailbox
                .is_over(MAILBOX_LIMIT_US, now_us)
                .then(|| format!("the mailbox does not answer; {until}"))
        };
        of_checkpoint().or_else(of_mailbox)
    }

    fn progress(&mut self, step: Step) -> &mut Progress {
        match step {
            Step::Mailbox => &mut self.mailbox,
            Step::Checkpoint => &mut self.checkpoint,
            Step::Mirror => &mut self.mirror,
        }
    }

    fn begin(&mut self, step: Step, now_us: u64) -> Next {
        self.progress(step).begin(now_us);
        Next::Begin(step)
    }

    fn wait(&self, now_us: u64) -> Next {
        let changes = [
            self.mailbox.changes_us(MAILBOX_LIMIT_US, now_us),
            self.checkpoint.changes_us(CHECKPOINT_LIMIT_US, now_us),
            // It is not told twice: the next epoch voids the region, too.
            self.mirror
                .changes_us(MIRROR_LIMIT_US, now_us)
                .filter(|_| self.mirror.failures == 0),
        ];
        let until_us = changes.into_iter().flatten().min().unwrap_or(u64::MAX);
        Next::Wait { until_us }
    }
}
