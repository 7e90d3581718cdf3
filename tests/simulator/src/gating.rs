//! What a call of the fsync class waits for: the pure rule that the kernel side follows.
//!
//! The log is a prefix of what happened. If it lacks nothing, a replay that contains everything before
//! the position at which all that anybody could see had its record shows what the call confirms, or
//! what came later. Else older records must be kept off: from bytes and attributes of one inode by the
//! call's own mark, from names and from whole volumes only by a checkpoint.

/// What must have come about before the call answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Every replay contains everything before this ring position.
    Mirrored(u64),
    /// No replay contains anything before this ring position: a checkpoint has proven it.
    Proven(u64),
    /// The epoch is closed.
    Closed,
}

/// What the programs know when a call is about to answer.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Where the ring stood after the call had begun, if everything that anybody could see of the file
    /// by then had its record before that; `None`: somebody was changing it just then.
    pub seen_at_entry: Option<u64>,
    /// The same at its end.
    pub seen_at_exit: Option<u64>,
    /// Where its mark ends: `None`: it found no room, or the call is about the whole volume.
    pub mark_end: Option<u64>,
    /// Where the ring stands now.
    pub producer: u64,
    /// Every change that was noticed and not captured is on the disk, and no record older than it is left.
    pub is_log_whole: bool,
    /// Stores through a mapping are among those of which that is not so.
    pub lacks_stores: bool,
}

/// What is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirms {
    /// Bytes and attributes of a file.
    File,
    /// Names.
    Directory,
    /// Everything.
    Volume,
}

/// The rule.
#[must_use]
pub const fn wait_for(confirms: Confirms, known: Known) -> Wait {
    match (confirms, known.mark_end) {
        // Whoever is changing something just then is not known here.
        (Confirms::Volume, _) => Wait::Proven(known.producer),
        // A mark that is lost is itself something that the log lacks.
        (_, None) => Wait::Closed,
        (_, Some(mark_end)) => {
            match (known.is_log_whole, known.seen_at_entry, known.seen_at_exit) {
                (true, Some(seen), _) | (true, None, Some(seen)) => Wait::Mirrored(seen),
                // A mark keeps nothing off names.
                _ if matches!(confirms, Confirms::Directory) => Wait::Proven(known.producer),
                // The bytes of who was writing then may have been in the page cache before such a
                // store, and their record come after the call's begin, where no mark of it keeps them
                // off. Once that record is there, a proof does.
                (_, None, Some(_)) if known.lacks_stores => Wait::Proven(known.producer),
                (_, None, None) if known.lacks_stores => Wait::Closed,
                _ => Wait::Mirrored(mark_end),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Known = Known {
        seen_at_entry: Some(64),
        seen_at_exit: Some(192),
        mark_end: Some(256),
        producer: 320,
        is_log_whole: true,
        lacks_stores: false,
    };

    #[test]
    fn a_whole_log_is_waited_for_up_to_the_begin_of_the_call() {
        assert_eq!(wait_for(Confirms::File, KNOWN), Wait::Mirrored(64));
        assert_eq!(wait_for(Confirms::Directory, KNOWN), Wait::Mirrored(64));
    }

    #[test]
    fn who_changes_it_at_the_begin_is_waited_for() {
        let known = Known {
            seen_at_entry: None,
            ..KNOWN
        };
        assert_eq!(wait_for(Confirms::File, known), Wait::Mirrored(192));
        let known = Known {
            seen_at_exit: None,
            ..known
        };
        assert_eq!(wait_for(Confirms::File, known), Wait::Mirrored(256));
        assert_eq!(wait_for(Confirms::Directory, known), Wait::Proven(320));
    }

    #[test]
    fn what_the_log_lacks_takes_a_mark_or_a_proof() {
        let known = Known {
            is_log_whole: false,
            ..KNOWN
        };
        assert_eq!(wait_for(Confirms::File, known), Wait::Mirrored(256));
        assert_eq!(wait_for(Confirms::Directory, known), Wait::Proven(320));
        let known = Known {
            mark_end: None,
            ..KNOWN
        };
        assert_eq!(wait_for(Confirms::File, known), Wait::Closed);
    }

    #[test]
    fn who_writes_beside_a_store_takes_a_proof_behind_his_record() {
        let known = Known {
            is_log_whole: false,
            lacks_stores: true,
            seen_at_entry: None,
            ..KNOWN
        };
        assert_eq!(wait_for(Confirms::File, known), Wait::Proven(320));
        let known = Known {
            seen_at_exit: None,
            ..known
        };
        assert_eq!(wait_for(Confirms::File, known), Wait::Closed);
    }

    #[test]
    fn a_volume_takes_a_proof_always() {
        let known = Known {
            mark_end: None,
            ..KNOWN
        };
        assert_eq!(wait_for(Confirms::Volume, known), Wait::Proven(320));
    }
}
