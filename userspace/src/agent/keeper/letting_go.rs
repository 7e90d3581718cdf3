//! Letting go of a volume that is another's: whoever is held is ended, the volume is unmounted, and only then
//! are the capture programs taken away.
//!
//! As long as somebody can change the volume here it must never be without its gate.

use std::sync::Arc;

use super::{DECIDE_EVERY, Keeper};
use crate::agent::successor::run_serve_command;
use crate::capture::{Capture, Continuity};
use crate::cluster::mounts::{self, MountError, MountState};
use crate::config::Volume;
use crate::status::{Protection, Role};

impl Keeper {
    /// The volume is another's: programs that an earlier agent left would hold whoever touches it. Only
    /// where nobody can, any more.
    pub(super) fn abandon_capture(&self) {
        match Capture::abandon(&self.volume.name) {
            Ok(killed) => self.tell_killed(&killed),
            Err(error) => tracing::error!(volume = %self.volume.name, "{error}"),
        }
    }

    /// This node takes over what it may have mounted: as long as it has, the programs of an earlier agent hold
    /// whoever syncs, until nothing can be merged any more. What they capture meanwhile belongs to no epoch.
    pub(super) fn keep_or_abandon_capture(&self) {
        let name = &self.volume.name;
        match (mounts::find(&self.volume), Capture::pinned_control(name)) {
            (Ok(MountState::NotMounted), _) => self.abandon_capture(),
            (_, Some(control)) => Continuity::clear(&control),
            _ => {}
        }
    }

    fn tell_killed(&self, killed: &[u32]) {
        for pid in killed {
            tracing::error!(
                volume = %self.volume.name, pid,
                "a process was killed: it waited for the answer to an fsync that the new owner of the volume \
                 knows nothing of"
            );
        }
    }

    /// The volume is another's, and an earlier agent of this node captured it, or this one: unmounts it and
    /// takes the programs away, in this order, so that as long as somebody can change it here nothing is
    /// confirmed that the new owner may revert. Whether nothing is left; if not, the reason is shown.
    pub(super) fn let_go(&self) -> bool {
        if Capture::has_pins(&self.volume.name) {
            let server_endings = Capture::server_endings();
            let gone = self.let_go_of_pins();
            if Capture::server_endings() != server_endings {
                // Should the volume come back, so must the server.
                self.untold.set(true);
                self.server_ended.set(true);
            }
            if !gone {
                return false;
            }
        }
        // Not before: the server could take hold of the volume again.
        if self.server_ended.take() {
            self.serve_others_again();
        }
        true
    }

    /// The kernel's NFS server was ended for this volume, and with it for whatever else this node serves.
    fn serve_others_again(&self) {
        let node = Arc::clone(&self.node);
        let is_other = |volume: &&Volume| volume.name != self.volume.name;
        let others: Vec<Volume> = node
            .config
            .volumes
            .iter()
            .filter(is_other)
            .cloned()
            .collect();
        self.node.runtime.spawn(async move {
            for volume in others {
                // It may be another's by now.
                if !node.is_serving(&volume.name) {
                    continue;
                }
                if let Err(error) = run_serve_command(&node, &volume).await {
                    tracing::error!(volume = %volume.name, "{error:#}");
                }
            }
        });
    }

    fn let_go_of_pins(&self) -> bool {
        let name = &self.volume.name;
        match Capture::end_held(name) {
            Ok(killed) => self.tell_killed(&killed),
            Err(error) => tracing::error!(volume = %name, "{error}"),
        }
        if let Err(error) = self.unmount_what_is_lost() {
            let reason =
                format!("{error}; until then whoever syncs to volume {name} here gets no answer");
            return self.keep_holding(&reason);
        }
        self.abandon_capture();
        if Capture::has_pins(name) {
            return self.keep_holding("the capture programs of an earlier agent cannot be removed");
        }
        true
    }

    fn keep_holding(&self, reason: &str) -> bool {
        tracing::error!(volume = %self.volume.name, "{reason}");
        self.say(Role::None, Protection::Suspended, reason);
        self.node.pause(DECIDE_EVERY);
        false
    }

    /// Nobody can change the volume from here when it returns.
    fn unmount_what_is_lost(&self) -> Result<(), MountError> {
        let mut result = mounts::unmount(&self.volume);
        if matches!(result, Err(MountError::Busy { .. })) {
            // Who has just been ended takes a moment.
            self.node.pause(DECIDE_EVERY);
            result = mounts::unmount(&self.volume);
        }
        // What the server exports stays mounted as long as it runs.
        if matches!(result, Err(MountError::Busy { .. }))
            && Capture::end_server_of(&self.volume.mount_point)
        {
            result = mounts::unmount(&self.volume);
        }
        result?;
        mounts::require_unused(&self.volume)
    }

    /// The peer claims the volume: stop touching it.
    pub(super) fn leave_the_volume(&self) {
        let peer = &self.node.peer;
        let reason =
            format!("{peer} has taken the volume over: this node must not touch it any more");
        tracing::error!(volume = %self.volume.name, "{reason}");
        self.say(Role::None, Protection::Suspended, &reason);
        self.node.set_serving(&self.volume.name, false);
        if self.let_go()
            && let Err(error) = mounts::unmount(&self.volume)
        {
            tracing::error!(volume = %self.volume.name, %error, "the volume cannot be unmounted");
        }
    }
}
