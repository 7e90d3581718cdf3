//! Workloads and oracles.
