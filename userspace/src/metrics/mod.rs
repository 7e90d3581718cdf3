//! The Prometheus endpoint: the board, in the exposition format, at `/metrics`.
//!
//! Metrics are encoded at scrape time by a collector; nothing is counted twice. `docs/operations.md`
//! lists every metric, and a test holds that list equal to what is registered.

mod collector;
mod server;
#[cfg(test)]
mod tests;

pub use collector::registry;
pub use server::{MetricsError, serve, text};
