//! What waits for a person, and the words that a person gives.
//!
//! A word answers the questions that wait when it is given, each volume's once, for the boot of the
//! peer that it was given for, and for [`WORD_LIMIT`]: a word given in vain, or for what ran on the
//! peer before it rebooted, must never fence anybody later. Pure; time comes from the caller.

use std::collections::BTreeMap;
use std::time::Duration;

use thiserror::Error;

use super::claim::BootId;

#[cfg(test)]
mod tests;

/// How long a word counts.
pub const WORD_LIMIT: Duration = Duration::from_secs(60);

/// What a volume waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Is the peer dead, and will it stay so until the volume was taken over?
    IsPeerDead,
    /// Is what the region holds to be given up?
    IsRegionVoid,
}

/// Why a word was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NotTaken {
    /// No volume waits for it.
    #[error(
        "no volume waits for this word now: it is taken only while `twinwrite status` asks for it"
    )]
    NobodyWaits,
    /// That volume does not wait for it.
    #[error(
        "volume {0} does not wait for this word now: it is taken only while `twinwrite status` asks for it"
    )]
    DoesNotWait(String),
}

#[derive(Clone, Copy, Debug)]
struct Word {
    peer_boot: Option<BootId>,
    given: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    question: Question,
    word: Option<Word>,
}

/// The questions of one node's volumes.
#[derive(Clone, Debug, Default)]
pub struct Questions {
    waiting: BTreeMap<String, Waiting>,
}

impl Questions {
    /// This volume waits for a person; `None`: for nobody (any more). A word that was given for another
    /// question is dropped.
    pub fn ask(&mut self, volume: &str, question: Option<Question>) {
        let Some(question) = question else {
            self.waiting.remove(volume);
            return;
        };
        let new = Waiting {
            question,
            word: None,
        };
        let waiting = self.waiting.entry(volume.to_owned()).or_insert(new);
        if waiting.question != question {
            *waiting = new;
        }
    }

    /// A person says that the peer, whose boot is known as this, is dead. Answers the volumes that the
    /// word is for.
    ///
    /// # Errors
    /// [`NotTaken::NobodyWaits`].
    pub fn peer_is_dead(
        &mut self,
        peer_boot: Option<BootId>,
        now: Duration,
    ) -> Result<Vec<String>, NotTaken> {
        let mut volumes = Vec::new();
        for (volume, waiting) in &mut self.waiting {
            if waiting.question == Question::IsPeerDead {
                waiting.word = Some(Word {
                    peer_boot,
                    given: now,
                });
                volumes.push(volume.clone());
            }
        }
        if volumes.is_empty() {
            return Err(NotTaken::NobodyWaits);
        }
        Ok(volumes)
    }

    /// A person gives up what the region of this volume holds.
    ///
    /// # Errors
    /// [`NotTaken::DoesNotWait`].
    pub fn region_is_void(
        &mut self,
        volume: &str,
        peer_boot: Option<BootId>,
        now: Duration,
    ) -> Result<(), NotTaken> {
        let waiting = self
            .waiting
            .get_mut(volume)
            .filter(|waiting| waiting.question == Question::IsRegionVoid)
            .ok_or_else(|| NotTaken::DoesNotWait(volume.to_owned()))?;
        waiting.word = Some(Word {
            peer_boot,
            given: now,
        });
        Ok(())
    }

    /// Whether a word answers this question now; it is used up by that.
    pub fn take(
        &mut self,
        volume: &str,
        question: Question,
        peer_boot: Option<BootId>,
        now: Duration,
    ) -> bool {
        let Some(waiting) = self
            .waiting
            .get_mut(volume)
            .filter(|waiting| waiting.question == question)
        else {
            return false;
        };
        waiting.word.take().is_some_and(|word| {
            let fresh = now.saturating_sub(word.given) <= WORD_LIMIT;
            fresh && word.peer_boot == peer_boot
        })
    }
}
