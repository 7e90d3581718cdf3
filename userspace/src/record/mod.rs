//! The record format: one captured event, as the eBPF programs wrote it into the ring and as it
//! lies in the region.
//!
//! [`RecordView`] reads one record from bytes that may be damaged or hostile: every length is
//! checked before it is trusted. [`encode`] builds records for tests and tools; live records are
//! written by eBPF alone. The layout is drawn in `twinwrite_abi` and in `docs/region-format.md`.

mod decode;
pub mod encode;
pub mod extended;
mod meta;
#[cfg(test)]
mod tests;

pub use decode::{RecordError, RecordView, Records, span_bytes};
pub use meta::RecordMeta;
pub use twinwrite_abi::{AttrBody, NameBody, RecordHeader, flag, gap, op};
