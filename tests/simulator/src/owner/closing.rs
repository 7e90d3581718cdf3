//! Checkpoints as `agent::checkpointer` makes them, and the closing of an epoch as `agent::closer`
//! drives it.

use twinwrite::cluster::claim::EpochState;
use twinwrite::durability::closing::{Next, Step};

use super::{Ending, Owner, Running, sentinel_of};
use crate::fault::DriverFault;
use crate::say;
use crate::world::{World, name};

impl World {
    /// One part of a checkpoint.
    pub fn checkpoint_step(&mut self, node: usize) {
        self.with_owner(node, |world, owner| world.checkpoint_part(node, owner));
    }

    pub(super) fn checkpoint_part(&mut self, node: usize, owner: &mut Owner) {
        let Some(running) = &mut owner.running else {
            return;
        };
        let lazy = self.setting.lazy_syncfs;
        let skipped = self.has(DriverFault::PurgeBeforeSync);
        let ignored = self.has(DriverFault::WriteErrorIgnored);
        let unflushed = self.has(DriverFault::SentinelBeforeFlush);
        let Some(kernel) = &mut self.machines[node].kernel else {
            return;
        };
        let mut failed = false;
        match running.stage {
            0 if skipped => {}
            0 => {
                failed = self.disk.fails();
                if !failed {
                    kernel.write_back(|_| true, &mut self.disk);
                    running.written_at = self.version;
                }
            }
            1 if skipped => {}
            1 => {
                let to = self.dice.between(running.written_at, self.version);
                failed = self.disk.fails();
                if !failed {
                    self.disk.commit(to);
                    if !lazy {
                        self.disk.flush();
                    }
                }
            }
            2 => {
                // An fsync of the file as it is: what the sentinel will say is on the disk before it.
                failed = self.disk.fails();
                if !failed && !unflushed {
                    self.disk.flush();
                }
                if !failed {
                    self.disk.begin_sentinel(sentinel_of(&running.proof));
                }
            }
            _ => {
                failed = self.disk.fails();
                if !failed {
                    self.disk.end_sentinel();
                    // Before it serves, the volume shows what an earlier kernel left.
                    if running.proof.closed && kernel.served {
                        self.history.settle(running.began_at);
                    }
                }
            }
        }
        let done = running.stage == 3;
        let (proof, behind) = (running.proof, running.behind);
        running.stage += 1;
        if failed && !ignored {
            say!(self, "{}: the checkpoint failed", name(node));
        }
        if done || failed && !ignored {
            owner.running = None;
            owner.outcome = Some((proof, behind, done && (!failed || ignored)));
        }
    }

    /// What the closing core asks for; true once the epoch is closed.
    pub(super) fn close_part(
        &mut self,
        node: usize,
        owner: &mut Owner,
        ending: &mut Ending,
    ) -> bool {
        let now_us = self.now_us;
        self.turn_checkpoint(owner, ending);
        match ending.closing.next(now_us) {
            Next::Begin(Step::Checkpoint) => ending.wanted = true,
            Next::Begin(Step::Mailbox) => {
                let (epoch, mirrored) = (ending.closing.epoch(), ending.closing.last_mirrored());
                let given = self.has(DriverFault::ClosedSentinelOmitted)
                    || self.update_claim(node, |claim| {
                        claim.epoch = claim.epoch.max(epoch);
                        claim.epoch_state = EpochState::Closed;
                        claim.last_mirrored = mirrored;
                    });
                let result = if given {
                    Ok(())
                } else {
                    Err("the mailbox".to_owned())
                };
                ending.closing.ended(Step::Mailbox, result, now_us);
            }
            Next::Begin(Step::Mirror) => {
                let told = self.can_talk() && !self.has(DriverFault::ClosedSentinelOmitted);
                if told && let Some(region) = &mut self.machines[1 - node].region {
                    region.close_epoch(ending.closing.epoch());
                }
                let result = if told {
                    Ok(())
                } else {
                    Err("the link".to_owned())
                };
                ending.closing.ended(Step::Mirror, result, now_us);
            }
            Next::OpenGates(proven) => {
                owner.gate.open(&proven);
                self.tell_gate(node, &owner.gate);
            }
            Next::Closed => {
                self.counts.closed += 1;
                owner.unclosed = None;
                say!(
                    self,
                    "{}: epoch {} is closed",
                    name(node),
                    ending.closing.epoch()
                );
                return true;
            }
            Next::Wait { .. } => self.drain(node),
        }
        false
    }

    /// Begins the checkpoint once an earlier one has ended, and sees its outcome.
    pub(super) fn turn_checkpoint(&mut self, owner: &mut Owner, ending: &mut Ending) {
        if let Some((proof, _, proven)) = owner.outcome.take()
            && proof == ending.proof
        {
            let result = if proven {
                Ok(())
            } else {
                Err("the disk".to_owned())
            };
            ending.closing.ended(Step::Checkpoint, result, self.now_us);
        }
        if ending.wanted && owner.running.is_none() {
            ending.wanted = false;
            owner.running = Some(Running {
                proof: ending.proof,
                behind: 0,
                written_at: self.version,
                stage: 0,
                began_at: self.version,
            });
        }
    }
}
