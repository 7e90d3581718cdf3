//! What a pump works with.

use std::sync::Arc;
use std::time::Duration;

use crate::agent::checkpointer::Checkpointer;
use crate::agent::filler::Filler;
use crate::agent::gatekeeper::Gatekeeper;
use crate::agent::mapper::Mapper;
use crate::agent::mending::LeftUnproven;
use crate::board::VolumeBoard;
use crate::capture::{Control, RingConsumer};

/// Limits from the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Unflushed records older than this ask for a checkpoint.
    pub checkpoint_age: Duration,
    /// Lag beyond this is `exposed`.
    pub lag: Duration,
}

/// What a pump works with; borrowed from the owner for one epoch.
pub struct Parts<'a> {
    /// The capture ring.
    pub ring: &'a mut RingConsumer,
    /// The control words.
    pub control: &'a Control,
    /// For bytes that eBPF could not copy.
    pub filler: &'a mut Filler,
    /// For pages that are changed through mappings; `None` where the programs cannot be asked for snapshots.
    pub mapper: Option<&'a Mapper>,
    /// For checkpoints.
    pub checkpointer: &'a mut Checkpointer,
    /// Continues who may pass the gate.
    pub gatekeeper: &'a Gatekeeper,
    /// This kernel can skip a program, which its counters tell.
    pub may_skip_hooks: bool,
    /// Where the bytes that are not proven at the end are put.
    pub left_unproven: LeftUnproven,
    /// Where progress is shown.
    pub board: Arc<VolumeBoard>,
}
