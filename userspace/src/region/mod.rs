//! The region: registered memory on the mirror that holds one owner's records for one volume.
//!
//! `layout` pins the bytes, `scan` reads a region that may be damaged or hostile and finds the
//! cut, `dump` shows one to people, `backing` keeps it in a file that survives the agent. Nothing
//! here writes records: the owner's RDMA writes do.

pub mod backing;
pub mod dump;
pub mod layout;
pub mod scan;
