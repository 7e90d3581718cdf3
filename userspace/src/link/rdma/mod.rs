//! Mirroring by one-sided RDMA writes over a reliable connection, and the memory they go between.
//!
//! `memory` holds the region and describes the ring (`probe_ring` stands in for it), `device` opens the adapter, `verbs` and
//! `queue_pair` own the verbs objects, `transport` makes links of them. Nothing outside this
//! module names a verb, and nothing here knows what the bytes are.

mod device;
pub mod memory;
pub mod probe_ring;
mod queue_pair;
mod transport;
mod verbs;
mod wake;

#[cfg(test)]
mod tests;

pub use transport::RdmaTransport;
pub use wake::wait_readable;
