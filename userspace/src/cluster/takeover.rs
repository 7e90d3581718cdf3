//! A takeover: the steps by which the mirror becomes the owner, in their only order.
//!
//! ```text
//! claim -> fence -> revoke -> save -> mount -> judge -> replay -> epoch -> serve
//! ```
//!
//! The claim stands in the mailbox before anybody is fenced, so that the node which was fenced finds
//! it when it boots. Each step takes the proof of the one before, and only this module makes
//! proofs: nothing can be mounted before the fence, nothing replayed before the region is
//! saved. A step that fails stops the takeover with its reason; it is tried again from that step,
//! and a new agent begins at the first step, so every step must be repeatable. Without a fence
//! command nothing is claimed until a person says that the owner is dead; and where the judge finds
//! words that contradict each other, nothing is merged before a person has decided.
//!
//! Time comes from the driver. This module must never go on after a step that did not succeed.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use super::standing::Fallen;
use crate::events::Event;
use crate::ids::NodeId;
use crate::status::{PeerState, TakeoverStatus, TakeoverStep};

#[cfg(test)]
mod tests;
mod told;

pub use told::{
    Cause, ConfirmError, FencedBy, Judgement, Merged, Progress, Stamp, StepError, WithdrawError,
};

macro_rules! proof {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(());
    };
}

proof! {
    /// This node's claim stands in the mailbox.
    Claimed
}
/// The owner can no longer reach the volume.
#[derive(Debug)]
pub struct Fenced {
    by: FencedBy,
}
proof! {
    /// No late write can land in the region.
    Revoked
}
proof! {
    /// The region is on the local disk.
    Saved
}
proof! {
    /// The volume is mounted here.
    Mounted
}
/// It is known what to merge.
#[derive(Debug)]
pub struct Judged {
    judgement: Judgement,
}
/// The volume shows everything up to the cut.
#[derive(Debug)]
pub struct Replayed {
    merged: Merged,
}
proof! {
    /// The new epoch is on the volume, and this node's ownership is settled.
    Settled
}

impl Fenced {
    /// By what.
    #[must_use]
    pub const fn by(&self) -> FencedBy {
        self.by
    }
}

impl Judged {
    /// What was found.
    #[must_use]
    pub const fn judgement(&self) -> &Judgement {
        &self.judgement
    }
}

impl Replayed {
    /// What was merged.
    #[must_use]
    pub const fn merged(&self) -> &Merged {
        &self.merged
    }
}

/// The result of a step.
pub type StepResult<T = ()> = Result<T, StepError>;

/// What really happens in each step. Every method may be called again after it failed, and after
/// the agent was restarted: what is already done, it leaves.
pub trait TakeoverDriver: Send {
    /// Reads the clocks.
    fn now(&self) -> Stamp;

    /// Tells the event log.
    fn report(&mut self, event: Event);

    /// Writes the claim that [`super::standing::claim_of`] makes: table first, then mailbox. Fails if the
    /// mailbox cannot be written, if the peer's slot was heard meanwhile, or with [`Fallen`].
    fn claim(&mut self) -> impl Future<Output = StepResult> + Send;

    /// Runs the fence command.
    fn fence(&mut self, claimed: &Claimed) -> impl Future<Output = StepResult> + Send;

    /// Looks whether the claim still stands behind this fence, and writes it with `Phase::Merging`:
    /// from here on it is not withdrawn. Fails with [`Fallen`] where it does not stand.
    fn claim_merging(&mut self, fenced: &Fenced) -> impl Future<Output = StepResult> + Send;

    /// Destroys the queue pair and the memory registration.
    fn revoke(&mut self, fenced: &Fenced) -> impl Future<Output = StepResult> + Send;

    /// Copies the region to the local disk, unless a whole copy of it is there.
    fn save_region(&mut self, revoked: &Revoked) -> impl Future<Output = StepResult> + Send;

    /// Mounts the volume, unless the peer has claimed it meanwhile ([`Fallen`]).
    fn mount(&mut self, saved: &Saved) -> impl Future<Output = StepResult> + Send;

    /// Reads the sentinel and scans the saved region.
    fn judge(&mut self, mounted: &Mounted) -> impl Future<Output = StepResult<Judgement>> + Send;

    /// Merges the region into the volume; only called for [`Judgement::Merge`].
    fn replay(&mut self, judged: &Judged) -> impl Future<Output = StepResult<Merged>> + Send;

    /// Writes the sentinel with the new epoch, then settles the claim: table first, then mailbox.
    fn open_epoch(&mut self, replayed: &Replayed) -> impl Future<Output = StepResult> + Send;

    /// Runs the serve hook.
    fn serve(&mut self, settled: &Settled) -> impl Future<Output = StepResult> + Send;

    /// Takes the claim back: a newer table version that names the owner before.
    fn withdraw(&mut self) -> impl Future<Output = StepResult> + Send;
}

/// The step that comes next, with the proof it needs.
#[derive(Debug)]
enum Stage {
    Claim,
    Fence(Claimed),
    Revoke(Fenced),
    Save(Revoked),
    Mount(Saved),
    Judge(Mounted),
    Replay(Judged),
    Epoch(Replayed),
    Serve(Settled),
    Done,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Claim => "claim",
            Self::Fence(_) => "fence",
            Self::Revoke(_) => "revoke",
            Self::Save(_) => "save",
            Self::Mount(_) => "mount",
            Self::Judge(_) => "judge",
            Self::Replay(_) => "replay",
            Self::Epoch(_) => "epoch",
            Self::Serve(_) => "serve",
            Self::Done => "done",
        })
    }
}

/// One volume's takeover.
#[derive(Debug)]
pub struct Takeover {
    volume: String,
    from: NodeId,
    cause: Cause,
    has_fence: bool,
    confirmed: bool,
    told_to_wait: bool,
    /// What the judge asks a person.
    question: Option<String>,
    /// A person said to go on without the region.
    discard: bool,
    told_begin: bool,
    loss_unknown: bool,
    stage: Stage,
    status: TakeoverStatus,
}

impl Takeover {
    /// Nothing has happened yet. `has_fence`: a fence command is configured. `detected`: when the
    /// decision fell, and how long the owner had been silent.
    #[must_use]
    pub fn new(
        volume: &str,
        from: &NodeId,
        cause: Cause,
        has_fence: bool,
        detected: (Stamp, Duration),
    ) -> Self {
        let mut status = TakeoverStatus::default();
        status.steps.push(step("detect", detected.1, detected.0));
        Self {
            volume: volume.to_owned(),
            from: from.clone(),
            cause,
            has_fence,
            confirmed: false,
            told_to_wait: false,
            question: None,
            discard: false,
            told_begin: false,
            loss_unknown: false,
            stage: Stage::Claim,
            status,
        }
    }

    /// A takeover that an earlier agent of this node had brought to `Phase::Merging`: the owner was
    /// fenced then, and the volume may be mounted here, so it is not withdrawn and fences nobody
    /// again. (The fence holds over reboots of this node, too: see `standing`.)
    #[must_use]
    pub fn resumed(volume: &str, from: &NodeId, detected: (Stamp, Duration)) -> Self {
        let mut takeover = Self::new(volume, from, Cause::OwnerDead, true, detected);
        takeover.stage = Stage::Revoke(Fenced {
            by: FencedBy::Command,
        });
        takeover.told_begin = true;
        takeover
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// What happened so far.
    #[must_use]
    pub const fn status(&self) -> &TakeoverStatus {
        &self.status
    }

    /// Whether there was no region to merge.
    #[must_use]
    pub const fn loss_unknown(&self) -> bool {
        self.loss_unknown
    }

    /// The owner is not known to be fenced yet.
    #[must_use]
    pub const fn can_withdraw(&self) -> bool {
        matches!(self.stage, Stage::Claim | Stage::Fence(_))
    }

    /// Takes a person's word that `named` is dead, in place of the fence command.
    ///
    /// # Errors
    /// If another node is the owner, or if it is still heard.
    pub fn confirm_dead(&mut self, named: &NodeId, state: PeerState) -> Result<(), ConfirmError> {
        if *named != self.from {
            let (volume, from) = (self.volume.clone(), self.from.clone());
            return Err(ConfirmError::OtherNode {
                volume,
                from,
                named: named.clone(),
            });
        }
        if !matches!(state, PeerState::Dead | PeerState::Unknown) {
            return Err(ConfirmError::NotDead {
                named: named.clone(),
                state,
            });
        }
        self.confirmed = true;
        Ok(())
    }

    /// Whether a person's word that the owner is dead would help now: no fence command is configured, or
    /// it failed.
    #[must_use]
    pub const fn waits_for_fence(&self) -> bool {
        self.can_withdraw() && self.status.error.is_some()
    }

    /// Whether the judge waits for a person.
    #[must_use]
    pub const fn waits_for_judgement(&self) -> bool {
        self.question.is_some() && matches!(self.stage, Stage::Judge(_))
    }

    /// Takes a person's word to serve the volume as it is on the disk, and to give up what the region
    /// holds. Counts only for the question that waits.
    pub fn discard_region(&mut self) {
        self.discard = self.waits_for_judgement();
    }

    /// Gives up, because the owner lives.
    ///
    /// # Errors
    /// Once the owner is fenced, or if the claim could not be taken back.
    pub async fn withdraw(
        &mut self,
        driver: &mut impl TakeoverDriver,
    ) -> Result<(), WithdrawError> {
        if !self.can_withdraw() {
            return Err(WithdrawError::TooLate(self.volume.clone()));
        }
        driver
            .withdraw()
            .await
            .map_err(|error| WithdrawError::Failed(self.volume.clone(), error))?;
        self.stage = Stage::Claim;
        self.confirmed = false;
        self.told_begin = false;
        driver.report(Event::TakeoverWithdrawn {
            volume: self.volume.clone(),
        });
        Ok(())
    }

    /// Runs until it serves, waits or stops.
    pub async fn run(&mut self, driver: &mut impl TakeoverDriver) -> Progress {
        loop {
            match self.advance(driver).await {
                Progress::Stepped => {}
                end => return end,
            }
        }
    }

    /// Does the next step.
    pub async fn advance(&mut self, driver: &mut impl TakeoverDriver) -> Progress {
        if matches!(self.stage, Stage::Done) {
            return Progress::Serving;
        }
        if self.waits_for_person() {
            return self.tell_to_wait(driver);
        }
        if self.waits_for_judgement() && !self.discard {
            return Progress::WaitsForPerson;
        }
        self.tell_begin(driver);
        let name = self.stage.to_string();
        let began = driver.now();
        let next = self.step(driver).await;
        let ended = driver.now();
        let took = ended.monotonic.saturating_sub(began.monotonic);
        let (took_ms, error) = (millis(took), next.as_ref().err().map(ToString::to_string));
        driver.report(Event::TakeoverStep {
            volume: self.volume.clone(),
            step: name.clone(),
            took_ms,
            error: error.clone(),
        });
        self.status.error = error.map(|error| format!("{name}: {error}"));
        let next = match next {
            Ok(next) => next,
            Err(error) if error.is::<Fallen>() => return Progress::Fallen,
            Err(_) => return Progress::Stopped,
        };
        let Some(next) = next else {
            return self.ask(driver);
        };
        self.status.steps.push(step(&name, took, ended));
        self.stage = next;
        if matches!(self.stage, Stage::Done) {
            self.tell_serving(driver)
        } else {
            Progress::Stepped
        }
    }

    /// The next step's work; the stage changes only when the whole step succeeded. `None`: a person
    /// decides.
    async fn step(&mut self, driver: &mut impl TakeoverDriver) -> StepResult<Option<Stage>> {
        Ok(Some(match &self.stage {
            Stage::Claim => {
                driver.claim().await?;
                Stage::Fence(Claimed(()))
            }
            Stage::Fence(claimed) => {
                let by = self.fenced_by();
                if by == FencedBy::Command {
                    driver.fence(claimed).await?;
                }
                let fenced = Fenced { by };
                driver.claim_merging(&fenced).await?;
                Stage::Revoke(fenced)
            }
            Stage::Revoke(fenced) => {
                driver.revoke(fenced).await?;
                Stage::Save(Revoked(()))
            }
            Stage::Save(revoked) => {
                driver.save_region(revoked).await?;
                Stage::Mount(Saved(()))
            }
            Stage::Mount(saved) => {
                driver.mount(saved).await?;
                Stage::Judge(Mounted(()))
            }
            Stage::Judge(mounted) => {
                let judgement = match driver.judge(mounted).await? {
                    Judgement::Ask { why, .. } if self.discard => Judgement::LossUnknown {
                        why: format!("a person gave up what the region holds: {why}"),
                    },
                    Judgement::Ask { why, evidence } => {
                        self.question = Some(self.put(&why, &evidence));
                        return Ok(None);
                    }
                    judgement => judgement,
                };
                Stage::Replay(Judged { judgement })
            }
            Stage::Replay(judged) => {
                let merged = match judged.judgement {
                    Judgement::Merge => driver.replay(judged).await?,
                    Judgement::Nothing { .. } => Merged::default(),
                    // The one that asks never becomes `Judged`.
                    Judgement::LossUnknown { ref why } | Judgement::Ask { ref why, .. } => {
                        self.loss_unknown = true;
                        Merged {
                            warnings: vec![why.clone()],
                            ..Merged::default()
                        }
                    }
                };
                self.status.records_replayed = merged.records_replayed;
                self.status.cut_seq = merged.cut_seq;
                self.status.warnings.clone_from(&merged.warnings);
                Stage::Epoch(Replayed { merged })
            }
            Stage::Epoch(replayed) => {
                driver.open_epoch(replayed).await?;
                Stage::Serve(Settled(()))
            }
            Stage::Serve(settled) => {
                driver.serve(settled).await?;
                Stage::Done
            }
            Stage::Done => Stage::Done,
        }))
    }

    fn put(&self, why: &str, evidence: &str) -> String {
        let volume = &self.volume;
        format!(
            "waiting for a person: {why}. The evidence: {evidence}. The volume is mounted here and not \
             served; look at it, and mend what is wrong, then start this agent again; or serve it as \
             it is on the disk and give up what was not flushed: \
             `twinwrite takeover --discard-region {volume}`"
        )
    }

    fn ask(&mut self, driver: &mut impl TakeoverDriver) -> Progress {
        let reason = self.question.clone().unwrap_or_default();
        self.status.error = Some(reason.clone());
        let volume = self.volume.clone();
        driver.report(Event::TakeoverWaits { volume, reason });
        Progress::WaitsForPerson
    }

    const fn fenced_by(&self) -> FencedBy {
        match self.cause {
            _ if self.confirmed => FencedBy::Person,
            Cause::OwnerRebooted => FencedBy::Reboot,
            Cause::OwnerDead | Cause::OwnerLostVolumes => FencedBy::Command,
        }
    }

    /// Before the claim, so that nothing stands in the mailbox while a person is looked for.
    const fn waits_for_person(&self) -> bool {
        let fenced_by_command = matches!(self.fenced_by(), FencedBy::Command);
        matches!(self.stage, Stage::Claim) && fenced_by_command && !self.has_fence
    }

    fn tell_to_wait(&mut self, driver: &mut impl TakeoverDriver) -> Progress {
        let reason = format!(
            "waiting for a person: no fence command is configured; make sure that node {} is \
             powered off, then run `twinwrite takeover --confirm-dead {}`",
            self.from, self.from
        );
        if !self.told_to_wait {
            let (volume, reason) = (self.volume.clone(), reason.clone());
            driver.report(Event::TakeoverWaits { volume, reason });
        }
        self.told_to_wait = true;
        self.status.error = Some(reason);
        Progress::WaitsForPerson
    }

    fn tell_begin(&mut self, driver: &mut impl TakeoverDriver) {
        if std::mem::replace(&mut self.told_begin, true) {
            return;
        }
        driver.report(Event::TakeoverBegan {
            volume: self.volume.clone(),
            from: self.from.clone(),
            reason: self.cause.told().to_owned(),
        });
    }

    fn tell_serving(&mut self, driver: &mut impl TakeoverDriver) -> Progress {
        self.status.serving = true;
        driver.report(Event::Serving {
            volume: self.volume.clone(),
            records_replayed: self.status.records_replayed,
            cut_seq: self.status.cut_seq,
            loss_unknown: self.loss_unknown,
            warnings: self.status.warnings.clone(),
        });
        Progress::Serving
    }
}

fn step(name: &str, took: Duration, ended: Stamp) -> TakeoverStep {
    TakeoverStep {
        name: name.to_owned(),
        took_ms: millis(took),
        ended_at_ms: ended.wall_ms,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
