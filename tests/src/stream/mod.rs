//! The writer that is cut off in the middle: numbered operations, one after the other from one
//! thread, each exactly one system call that changes the volume.
//!
//! One system call is one record of twinwrite's log, so operations lost and records lost can be
//! compared. [`operation`] computes the sequence from its seed, [`block`] is what a written block
//! looks like, [`mod@write`] carries the operations out and logs each after it returned, [`observe`]
//! looks at what is there after the crash, [`judge`] says up to which operation all is there, and [`kinds`]
//! counts what is lost.
//! Where it is asked to, the stream also asks for durability, and [`confirmed`] notes what it was told.
//!
//! The log lies outside the volume and never claims an operation that did not return.

pub mod block;
pub mod confirmed;
pub mod judge;
pub mod kinds;
pub mod log;
pub mod observe;
pub mod operation;
#[cfg(test)]
mod tests;
pub mod write;

/// Where the writer works, below the volume's root.
pub const PREFIX: &str = "stream";
