//! How far the gates are open: up to which ring position a durability mark may answer its caller.
//!
//! An fsync-class call writes its mark into the ring and then waits at the gate until its mark lies
//! before the position told here, or the gates are open to all. Why each state is safe:
//!
//! | state | open to | why a confirmed write cannot be undone |
//! |---|---|---|
//! | at rest | all | the volume's sentinel is closed, or there is none: no region is merged into it |
//! | shut for an epoch | where the ring stood | the epoch's records begin behind everything that passed |
//! | following | what every replay of the region would contain | the mark itself is replayed, and clips |
//! | held | as it was last | nothing passes, so nothing new is confirmed |
//!
//! A record whose bytes were read later may show changes up to some record behind it, so a replay
//! ends before it unless the region holds all of those (the cut). Therefore what is mirrored counts
//! only from the position that the fills demand on.
//!
//! The driver writes [`Gate::open_to`] where the programs look after every change. The gates must
//! never be opened to all while a crash could still merge a region: that takes a
//! [`Proven`], which only a proven closed sentinel gives.

use crate::durability::closing::Proven;
use crate::ids::RingPos;

#[cfg(test)]
mod tests;

/// What may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenTo {
    /// Marks that end at this ring position or before it.
    Position(RingPos),
    /// Every mark.
    All,
}

impl OpenTo {
    /// As one word for the programs: the position, or all ones. A word of zero lets nothing pass,
    /// which is what programs find before an agent has told them anything.
    #[must_use]
    pub const fn word(self) -> u64 {
        match self {
            Self::Position(position) => position.0,
            Self::All => u64::MAX,
        }
    }

    /// What a word says.
    #[must_use]
    pub const fn of_word(word: u64) -> Self {
        match word {
            u64::MAX => Self::All,
            position => Self::Position(RingPos(position)),
        }
    }

    /// Whether a mark whose record ends here may pass.
    #[must_use]
    pub const fn admits(self, record_end: RingPos) -> bool {
        match self {
            Self::Position(position) => record_end.0 <= position.0,
            Self::All => true,
        }
    }
}

/// The gates of one volume, as its agent moves them.
#[derive(Clone, Debug)]
pub struct Gate {
    open_to: OpenTo,
    /// What is mirrored moves them.
    following: bool,
    /// What is mirrored counts only from here on.
    needs: RingPos,
}

impl Gate {
    /// The gates as an earlier agent left them, or as new programs find them: held.
    #[must_use]
    pub const fn left(open_to: OpenTo) -> Self {
        Self {
            open_to,
            following: false,
            needs: RingPos(0),
        }
    }

    /// How far they are open.
    #[must_use]
    pub const fn open_to(&self) -> OpenTo {
        self.open_to
    }

    /// An epoch is about to begin; `producer` is where the ring stands now. To be told to the
    /// programs before the epoch's first position is chosen, so that what passed before lies
    /// before it.
    pub const fn shut(&mut self, producer: RingPos) {
        if matches!(self.open_to, OpenTo::All) {
            self.open_to = OpenTo::Position(producer);
        }
        self.following = false;
    }

    /// The epoch's records begin at `start`, at or behind the position of [`Gate::shut`]. Marks
    /// before it are nobody's record and pass: the epoch's first checkpoint covers what they
    /// confirmed, before which its region is not merged.
    pub fn begin(&mut self, start: RingPos) {
        self.needs = start;
        self.following = true;
        self.pass(start);
    }

    /// An epoch of an earlier agent goes on. What that agent had read for its fills is not known any
    /// more, but was in the ring: so nothing counts before `producer`, where the ring stands now.
    pub fn resume(&mut self, producer: RingPos) {
        self.needs = self.needs.max(producer);
        self.following = true;
    }

    /// Everything before `end` is in the region with all its bytes; a replay contains it if the
    /// region also has everything before `needs` (the largest end of the ring at which a fill was
    /// read).
    pub fn mirrored(&mut self, end: RingPos, needs: RingPos) {
        self.needs = self.needs.max(needs);
        if self.following && end >= self.needs {
            self.pass(end);
        }
    }

    /// The epoch is being closed: nothing more passes.
    pub const fn hold(&mut self) {
        self.following = false;
    }

    /// No region can be merged any more: everything passes.
    pub const fn open(&mut self, _: &Proven) {
        self.open_to = OpenTo::All;
        self.following = false;
    }

    fn pass(&mut self, end: RingPos) {
        if let OpenTo::Position(position) = self.open_to {
            self.open_to = OpenTo::Position(position.max(end));
        }
    }
}
