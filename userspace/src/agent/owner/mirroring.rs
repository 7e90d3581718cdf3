//! One epoch, from its first turn to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{GATE_IS_OFF, Owner, Session};
use crate::agent::clock::duration;
use crate::agent::door::Opened;
use crate::agent::pump::{Ended, Limits, Parts, Pump, Standing, Turn};
use crate::agent::relink::{self, Relink};
use crate::agent::watch::Watch;
use crate::capture::may_skip_hooks;
use crate::ids::Epoch;
use crate::status::{Protection, Role};

/// How often is looked for the end of this node's time while records flow, and, where the kernel can skip
/// a program, the programs' own counters are asked for.
const LOOK_BUSY: Duration = Duration::from_millis(50);
/// The same while nothing happens, and where none is skipped: that takes a system call for each program.
const LOOK_IDLE: Duration = Duration::from_secs(1);
/// Longest sleep of the pump, and where the kernel can skip a hook, for which only a look helps.
const SLEEP: Duration = Duration::from_millis(500);
const SLEEP_CAUTIOUS: Duration = Duration::from_millis(250);

impl Owner<'_> {
    /// Runs one epoch to its end.
    pub(super) fn mirror(&mut self, session: Session) -> Ended {
        match self.mirror_until(session) {
            Ok(()) => Ended::Stop,
            Err(ended) => ended,
        }
    }

    fn mirror_until(&mut self, session: Session) -> Result<(), Ended> {
        let limits = Limits {
            checkpoint_age: duration(self.volume.checkpoint_age),
            lag: duration(self.volume.lag_limit),
        };
        let door = self.door();
        let epoch = session.tail.epoch;
        self.board.epoch.set(epoch.0);
        self.board
            .region_bytes
            .set(self.volume.region_bytes.as_u64());
        let capture = &self.capture;
        let misses = || capture.recursion_misses();
        // Where the kernel can skip a hook, a mark may not pass before that was looked for.
        let cautious = may_skip_hooks();
        let mut recursion_misses = misses()?;
        let (mut asked_at, mut looked_at) = (Instant::now(), Instant::now());
        let left_unproven = self.closer.left_unproven();
        let parts = Parts {
            ring: &mut self.ring,
            control: capture.control(),
            filler: &mut self.filler,
            mapper: self.mapper.as_ref(),
            checkpointer: self.closer.checkpointer(),
            gatekeeper: &self.gatekeeper,
            may_skip_hooks: cautious,
            left_unproven,
            board: Arc::clone(&self.board),
        };
        let mut pump = Pump::new(
            parts,
            &session.tail,
            session.link,
            limits,
            session.lost_at_start,
            session.gaps_proven,
        )?;
        pump.watch_link()?;
        let mut watch = Watch::start(self.volume, capture);
        let mut opened_epoch = false;
        let mut relink = Relink::new();
        loop {
            let turn = pump.turn(recursion_misses)?;
            if watch.look(self.volume, capture, &self.board)? {
                pump.want_checkpoint();
            }
            let due = if turn == Turn::Worked {
                LOOK_BUSY
            } else {
                LOOK_IDLE
            };
            if cautious && pump.is_gate_behind() {
                recursion_misses = misses()?;
            }
            if asked_at.elapsed() >= if cautious { due } else { LOOK_IDLE } {
                recursion_misses = misses()?;
                asked_at = Instant::now();
                self.board.recursion_misses.set(recursion_misses);
            }
            if looked_at.elapsed() >= due {
                looked_at = Instant::now();
                if door.is_leaving() {
                    return Ok(());
                }
                if let Some(reason) = door.mirror_is_silent() {
                    return Err(Ended::LinkGone(reason));
                }
            }
            if pump.is_linked() {
                relink.is_whole();
            } else {
                if relink.gone_for() > limits.lag {
                    let text = "it could not be made again in time";
                    return Err(Ended::LinkGone(text.to_owned()));
                }
                let door = door.clone();
                match relink.turn(move || door.open()) {
                    Some(Ok(opened)) => go_on_over(&mut pump, opened, epoch)?,
                    Some(Err(error)) => tracing::debug!(%error, "the link is not made again yet"),
                    None => {}
                }
            }
            let standing = watch.weaken(pump.standing());
            let is_blind = !self.blind_spots.is_empty();
            if standing == Standing::Protected && !opened_epoch && !is_blind {
                door.publish_open(epoch)?;
                opened_epoch = true;
            }
            if self.gate_off && standing == Standing::Protected {
                self.board
                    .say(Role::Owner, Protection::Exposed, GATE_IS_OFF);
            } else {
                door.show(&self.board, &self.blind_spots, &standing);
            }
            if turn == Turn::Idle {
                let longest = if !pump.is_linked() {
                    relink::EVERY
                } else if cautious {
                    SLEEP_CAUTIOUS
                } else {
                    SLEEP
                };
                pump.sleep(longest)?;
            }
        }
    }
}

/// Goes on over a link that was made anew.
fn go_on_over(pump: &mut Pump<'_>, opened: Opened, epoch: Epoch) -> Result<(), Ended> {
    match opened {
        Opened {
            link,
            tail: Some(tail),
            epoch: found,
            open: true,
        } if found == epoch => {
            pump.relink(&tail, link)?;
            pump.watch_link()
        }
        _ => {
            let text = "the mirror no longer has the region of this epoch";
            Err(Ended::LinkGone(text.to_owned()))
        }
    }
}
