//! What a checkpoint must write again before it may be believed, because a write-back failed.
//!
//! The pure rule is `durability::taint`; this is what its drivers share. It never decides by itself that
//! something is durable.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::node::lock;
use crate::capture::Control;
use crate::durability::taint::Rewrite;
use crate::ids::Identity;

/// Where unproven bytes lie, by inode; `None`: there are some of which this agent knows nothing.
pub type Unproven = Option<BTreeMap<Identity, Vec<Range<u64>>>>;

/// The unproven bytes of the epoch that ended last: its closing checkpoint may have to write them again.
#[derive(Clone, Debug, Default)]
pub struct LeftUnproven(Arc<Mutex<Unproven>>);

impl LeftUnproven {
    /// Replaces them.
    pub fn set(&self, unproven: Unproven) {
        *lock(&self.0) = unproven;
    }

    fn get(&self) -> Unproven {
        lock(&self.0).clone()
    }
}

/// The count of failed write-backs, once the volume is captured.
#[derive(Clone, Debug, Default)]
pub struct ErrorCount(Arc<Mutex<Option<Control>>>);

impl ErrorCount {
    /// From here on they are counted there.
    pub fn watch(&self, control: &Control) {
        *lock(&self.0) = Some(control.clone());
    }

    /// How many there are; `None` without capture.
    pub fn now(&self) -> Option<u64> {
        lock(&self.0).as_ref().map(Control::writeback_errors)
    }

    /// So many of them are mended.
    pub fn mended(&self, errors: u64) {
        if let Some(control) = &*lock(&self.0) {
            control.mend_writeback(errors);
        }
    }

    fn is_mended(&self) -> bool {
        let control = lock(&self.0);
        control
            .as_ref()
            .is_none_or(|control| control.writeback_errors() == control.writeback_mended())
    }
}

/// What a checkpoint is to write again first, and for how many failed write-backs it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mending {
    /// As many as were counted when it was decided what to write.
    pub errors: u64,
    /// What to write again.
    pub bytes: BTreeMap<Identity, Vec<Range<u64>>>,
    /// Not all that must be written again is known: nothing can be proven.
    pub unknown: bool,
}

impl Mending {
    /// For what is in doubt, of what is not proven.
    pub fn of(errors: u64, asked: &Rewrite, unproven: impl FnOnce() -> Unproven) -> Self {
        let nothing = Self {
            errors,
            ..Self::default()
        };
        if *asked == Rewrite::Nothing {
            return nothing;
        }
        let Some(mut bytes) = unproven() else {
            return Self {
                unknown: true,
                ..nothing
            };
        };
        if let Rewrite::Inodes(inodes) = asked {
            bytes.retain(|identity, _| inodes.contains(identity));
        }
        Self { bytes, ..nothing }
    }

    /// For the checkpoint that closes an epoch: if anything is in doubt, all that is not proven. What
    /// was closed before and is proven again leaves nothing in doubt.
    pub fn at_close(count: &ErrorCount, left: &LeftUnproven, was_open: bool) -> Self {
        let errors = count.now().unwrap_or(0);
        let asked = if !was_open || count.is_mended() {
            Rewrite::Nothing
        } else {
            Rewrite::Everything
        };
        Self::of(errors, &asked, || left.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(ino: u64) -> Identity {
        Identity { ino, generation: 1 }
    }

    fn unproven() -> Unproven {
        let ranges = || vec![0..10, 20..21];
        Some([(inode(1), ranges()), (inode(2), ranges())].into())
    }

    #[test]
    fn what_is_asked_for_is_taken_of_what_is_unproven() {
        assert!(Mending::of(3, &Rewrite::Nothing, || None).bytes.is_empty());
        assert!(!Mending::of(3, &Rewrite::Nothing, || None).unknown);
        let all = Mending::of(3, &Rewrite::Everything, unproven);
        assert_eq!((all.bytes.len(), all.errors), (2, 3));
        let one = Mending::of(3, &Rewrite::Inodes(vec![inode(2), inode(9)]), unproven);
        assert_eq!(one.bytes.keys().collect::<Vec<_>>(), [&inode(2)]);
        assert!(Mending::of(3, &Rewrite::Everything, || None).unknown);
    }

    #[test]
    fn without_capture_nothing_is_in_doubt() {
        let mending = Mending::at_close(&ErrorCount::default(), &LeftUnproven::default(), true);
        assert_eq!(mending, Mending::default());
    }
}
