//! Keeping the reserve of a volume that this node owns: made before it is called protected, looked at
//! after every checkpoint, and told where there is none.
//!
//! What the agent itself does on the volume before an epoch begins needs some blocks, too: while none is
//! open it borrows them there. It must never give the reserve back while an epoch is open.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::board::VolumeBoard;
use crate::replay::reserve;

/// With less than this free, calibration and the proof of the gate may not find what they need.
const WORK_BYTES: u64 = 8 << 20;

/// The reserve of one volume.
#[derive(Clone, Debug)]
pub struct Reserve {
    mount_point: PathBuf,
    board: Arc<VolumeBoard>,
}

impl Reserve {
    /// Of the volume mounted here.
    pub fn of(mount_point: &Path, board: Arc<VolumeBoard>) -> Self {
        Self {
            mount_point: mount_point.to_owned(),
            board,
        }
    }

    /// Makes it, if it is not there or is too small, and shows what there is.
    pub fn keep(&self) {
        let made = reserve::make(&self.mount_point);
        self.board.keep_reserve(made.map_err(|e| e.to_string()));
    }

    /// Runs what needs a little room on the volume while no epoch is open.
    pub fn lent_to<T>(&self, work: impl FnOnce() -> T) -> T {
        let is_short = reserve::free_bytes(&self.mount_point).is_ok_and(|free| free < WORK_BYTES);
        if is_short && let Err(error) = reserve::release(&self.mount_point) {
            tracing::warn!(volume = %self.board.name, %error, "the reserve cannot be borrowed");
        }
        let done = work();
        self.keep();
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;
    use crate::ids::NodeId;
    use crate::replay::SentinelFile;

    #[test]
    fn what_there_is_is_shown_and_what_is_missing_is_told() {
        let mount = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let volumes = [("data".to_owned(), "tcp")];
        let board = Board::new(NodeId("a".into()), &[], &volumes);
        let board = board.volume("data").unwrap();
        let reserve = Reserve::of(mount.path(), Arc::clone(&board));
        assert_eq!(board.missing_reserve(), None, "nothing is known");
        reserve.keep();
        assert!(board.missing_reserve().is_some() && board.reserve_bytes.get() == 0);
        drop(SentinelFile::open(mount.path()).unwrap());
        assert_eq!(reserve.lent_to(|| 5), 5);
        assert!(board.missing_reserve().is_none() && board.reserve_bytes.get() > 0);
    }
}
