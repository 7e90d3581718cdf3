//! Is the peer dead? Decided from signs of life on two paths and this node's monotonic clock.
//!
//! A path is silent once its counter has not changed for `dead_after`; no clocks of two nodes are
//! compared. What a peer's silence means is worth no more than this node's own attention: time in
//! which this node did not look (it was stopped, or overloaded), or could not (the mailbox was
//! unreadable), restarts the window of what was not seen. So an overloaded pair ends in nobody
//! taking over, never in two owners.
//!
//! At the start nothing was heard, and an old counter in the mailbox is no sign of life: the peer is
//! `Unknown` until it is heard, or until a whole window has passed and its last word in the mailbox
//! was that it owns something; only then is a peer that was never heard called `Dead`. That window
//! begins with the first reading: a peer that boots long after this node is not dead when its first
//! word appears. A peer that said it stops on purpose, with nothing mounted, becomes `Unknown` again.
//!
//! A peer may announce a restart of its agent: then its silence means nothing for the time it asked
//! for, counted from its last sign of life, and as usual after that. And it tells how long its volumes
//! have not answered: where a limit is set for that, a node whose volumes are beyond it while this
//! node reaches them is as good as dead, whatever its counters do.
//!
//! This module must never call a peer dead while either of its counters moves, but for that limit.

use std::time::Duration;

use super::claim::BootId;
use crate::faults::{Fault, injected};
use crate::status::PeerState;

#[cfg(test)]
mod tests;

/// One reading of a peer's sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The peer's boot.
    pub boot_id: BootId,
    /// Differs from the one before while the peer lives.
    pub counter: u64,
}

/// What a peer's slot says beside its sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWord {
    /// It owns a volume.
    Owns,
    /// It owns none.
    OwnsNothing,
    /// It stopped on purpose and has nothing mounted: its silence is no death.
    Stopped,
}

/// What a look at the peer's mailbox slot gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MailboxLook {
    /// A well-formed slot.
    Beat {
        /// Its sign of life.
        beat: Beat,
        /// What else it says.
        word: LastWord,
    },
    /// The device was read; the slot is blank, torn or damaged.
    Nothing,
    /// The device could not be read: this node sees nothing, which says nothing of the peer.
    Unreadable,
}

/// What a peer tells beside its sign of life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Its agent restarts and will be silent for no longer than this; zero: it does not.
    pub restart_within: Duration,
    /// How long ago the volumes it serves last answered; `None`: it serves none, or does not tell.
    pub volume_io_age: Option<Duration>,
}

/// What both paths tell at one look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tidings {
    /// With the heartbeat in this node's memory.
    pub link: Told,
    /// In the peer's mailbox slot.
    pub mailbox: Told,
    /// This node reaches the volumes.
    pub own_volume_io: bool,
}

/// The limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time between heartbeats, and between this node's looks.
    pub heartbeat_interval: Duration,
    /// Silence on both paths after which a peer is dead.
    pub dead_after: Duration,
}

/// What a look changed, beside the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The peer looks different.
    State {
        /// How it looked.
        from: PeerState,
        /// How it looks.
        to: PeerState,
    },
    /// The peer has another boot id: what ran there before is dead, its open epochs with it.
    Rebooted {
        /// The boot that ended.
        from: BootId,
        /// The one that is heard.
        to: BootId,
    },
    /// This node did not look for so long that its windows were restarted.
    OwnStall {
        /// How long it did not look.
        gap: Duration,
    },
}

/// One path on which the peer may be heard.
#[derive(Clone, Copy, Debug)]
struct Path {
    last: Option<Beat>,
    told: Told,
    /// Its counter changed while this node was looking.
    heard: bool,
    /// A whole window passed without a change, and there was none since.
    quiet: bool,
    /// Start of the window: last change, or since when this node looks without a break.
    window_from: Duration,
    /// When it changed last, for people.
    heard_at: Duration,
}

impl Path {
    const fn new(now: Duration) -> Self {
        Self {
            last: None,
            told: Told {
                restart_within: Duration::ZERO,
                volume_io_age: None,
            },
            heard: false,
            quiet: false,
            window_from: now,
            heard_at: now,
        }
    }

    /// Takes a reading and says whether it is a sign of life: the first one is not, it only says
    /// where the counter stands.
    fn look(&mut self, now: Duration, beat: Beat) -> bool {
        let moved = self.last.is_some_and(|last| last != beat);
        if moved {
            *self = Self {
                heard: true,
                ..Self::new(now)
            };
        } else if self.last.is_none() {
            // Whoever is seen for the first time has a whole window to show that it lives.
            self.window_from = now;
            self.quiet = false;
        }
        self.last = Some(beat);
        moved
    }

    const fn lives(&self) -> bool {
        self.heard && !self.quiet
    }

    fn window_is_over(&self, now: Duration, limit: Duration) -> bool {
        now.saturating_sub(self.window_from) >= limit
    }
}

/// One peer, as seen from this node. Times are of this node's monotonic clock.
#[derive(Clone, Debug)]
pub struct Liveness {
    limits: Limits,
    state: PeerState,
    link: Path,
    mailbox: Path,
    looked_at: Duration,
    boot_id: Option<BootId>,
    ended_boot_id: Option<BootId>,
    last_word: LastWord,
    volume_io_limit: Option<Duration>,
    /// How much longer than usual silence means nothing.
    allowance: Duration,
}

impl Liveness {
    /// Nothing is known at `now`.
    #[must_use]
    pub const fn new(limits: Limits, now: Duration) -> Self {
        Self {
            limits,
            state: PeerState::Unknown,
            link: Path::new(now),
            mailbox: Path::new(now),
            looked_at: now,
            boot_id: None,
            ended_boot_id: None,
            last_word: LastWord::OwnsNothing,
            volume_io_limit: None,
            allowance: Duration::ZERO,
        }
    }

    /// A peer whose volumes have not answered for so long is dead, as long as this node reaches them.
    #[must_use]
    pub const fn with_volume_io_limit(mut self, limit: Option<Duration>) -> Self {
        self.volume_io_limit = limit;
        self
    }

    /// What the peer told last.
    #[must_use]
    pub fn told(&self) -> Told {
        match self.link.heard_at.cmp(&self.mailbox.heard_at) {
            std::cmp::Ordering::Greater => self.link.told,
            std::cmp::Ordering::Less => self.mailbox.told,
            // Said on both at the same time: the one that was not written last.
            std::cmp::Ordering::Equal => Told {
                restart_within: self
                    .link
                    .told
                    .restart_within
                    .max(self.mailbox.told.restart_within),
                volume_io_age: self
                    .link
                    .told
                    .volume_io_age
                    .min(self.mailbox.told.volume_io_age),
            },
        }
    }

    /// How the peer looks.
    #[must_use]
    pub const fn state(&self) -> PeerState {
        self.state
    }

    /// The boot that was heard last.
    #[must_use]
    pub const fn boot_id(&self) -> Option<BootId> {
        self.boot_id
    }

    /// Both paths were watched for a whole window and nothing was heard on either since.
    #[must_use]
    pub const fn is_silent(&self) -> bool {
        self.link.quiet && self.mailbox.quiet
    }

    /// Time since the last sign of life on the link, and in the mailbox.
    #[must_use]
    pub fn ages(&self, now: Duration) -> (Duration, Duration) {
        (
            now.saturating_sub(self.link.heard_at),
            now.saturating_sub(self.mailbox.heard_at),
        )
    }

    /// As [`Self::look_and_hear`], of a peer that tells nothing but that it lives.
    pub fn look(&mut self, now: Duration, link: Option<Beat>, mailbox: MailboxLook) -> Vec<Change> {
        self.look_and_hear(now, link, mailbox, &Tidings::default())
    }

    /// Takes what both paths show now (`link`: the last heartbeat in this node's memory) and says
    /// what changed. To be called at least every heartbeat interval.
    pub fn look_and_hear(
        &mut self,
        now: Duration,
        link: Option<Beat>,
        mailbox: MailboxLook,
        tidings: &Tidings,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        self.notice_own_stall(now, &mut changes);
        if let Some(beat) = link {
            self.take(now, beat, |peer| &mut peer.link, &mut changes);
        }
        match mailbox {
            MailboxLook::Beat { beat, word } => {
                self.last_word = word;
                self.take(now, beat, |peer| &mut peer.mailbox, &mut changes);
            }
            MailboxLook::Nothing => {}
            MailboxLook::Unreadable => self.mailbox.window_from = now,
        }
        if link.is_some() {
            self.link.told = tidings.link;
        }
        if matches!(mailbox, MailboxLook::Beat { .. }) {
            self.mailbox.told = tidings.mailbox;
        }
        self.allow(now);
        let to = self.judge(now, tidings.own_volume_io);
        if to != self.state {
            changes.push(Change::State {
                from: self.state,
                to,
            });
            self.state = to;
        }
        changes
    }

    /// Silence over time in which this node did not look does not count.
    fn notice_own_stall(&mut self, now: Duration, changes: &mut Vec<Change>) {
        let gap = now.saturating_sub(self.looked_at);
        self.looked_at = now;
        if gap > self.limits.heartbeat_interval * 2 && !injected(Fault::OwnStallCounts) {
            changes.push(Change::OwnStall { gap });
            self.link.window_from = now;
            self.mailbox.window_from = now;
        }
    }

    /// Takes one path's beat, unless it is a remainder of a boot that is known to have ended.
    fn take(
        &mut self,
        now: Duration,
        beat: Beat,
        path: fn(&mut Self) -> &mut Path,
        changes: &mut Vec<Change>,
    ) {
        if self.ended_boot_id == Some(beat.boot_id) {
            return;
        }
        let moved = path(self).look(now, beat);
        match self.boot_id {
            None => self.boot_id = Some(beat.boot_id),
            // Two boots may be seen side by side: the one whose counter moves is the living one.
            Some(from) if from != beat.boot_id && moved => {
                self.ended_boot_id = Some(from);
                self.boot_id = Some(beat.boot_id);
                changes.push(Change::Rebooted {
                    from,
                    to: beat.boot_id,
                });
            }
            Some(_) => {}
        }
    }

    /// Follows the announcement of a restart. When it is taken back, because the next agent runs, both
    /// paths get a whole window to come back.
    fn allow(&mut self, now: Duration) {
        let allowance = self.told().restart_within;
        if allowance.is_zero() && !self.allowance.is_zero() {
            self.link.window_from = now;
            self.mailbox.window_from = now;
        }
        self.allowance = allowance;
    }

    /// It lives, and its volumes do not, while this node reaches them.
    fn has_lost_its_volumes(&self, own_volume_io: bool) -> bool {
        let age = self.told().volume_io_age;
        own_volume_io
            && self.last_word == LastWord::Owns
            && self
                .volume_io_limit
                .is_some_and(|limit| age.is_some_and(|age| age >= limit))
    }

    fn judge(&mut self, now: Duration, own_volume_io: bool) -> PeerState {
        let limit = self.limits.dead_after.saturating_add(self.allowance);
        let link_over = self.link.window_is_over(now, limit);
        let mailbox_over = self.mailbox.window_is_over(now, limit);
        self.link.quiet |= link_over;
        self.mailbox.quiet |= mailbox_over;
        if self.has_lost_its_volumes(own_volume_io) {
            return PeerState::Dead;
        }
        match (self.link.lives(), self.mailbox.lives()) {
            (true, true) => PeerState::Alive,
            (false, true) if self.link.quiet && injected(Fault::LinkSilentMeansDead) => {
                PeerState::Dead
            }
            (false, true) if self.link.quiet => PeerState::LinkSilent,
            (true, false) if self.mailbox.quiet => PeerState::MailboxSilent,
            (false, false) if link_over && mailbox_over => self.silent_on_both(),
            // A window still runs: one path was not heard yet, or this node did not look.
            _ => self.state,
        }
    }

    const fn silent_on_both(&self) -> PeerState {
        let was_heard = self.link.heard || self.mailbox.heard;
        match self.last_word {
            LastWord::Owns => PeerState::Dead,
            LastWord::OwnsNothing if was_heard => PeerState::Dead,
            LastWord::OwnsNothing | LastWord::Stopped => PeerState::Unknown,
        }
    }
}
