//! The link: posts land in order, completions come later or never, a break tears the post under way.

use std::collections::VecDeque;

use twinwrite::link::PostId;

/// A post on its way.
#[derive(Clone, Debug)]
pub struct Flying {
    /// Its name.
    pub id: PostId,
    /// Where it goes.
    pub offset: u64,
    /// The first line.
    pub head: [u8; 64],
    /// What follows: read from the ring when it leaves, unless it has bytes of its own.
    pub body: Payload,
    /// It is in the peer's memory.
    pub landed: bool,
}

/// What follows a post's head.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Own bytes.
    Bytes(Vec<u8>),
    /// A stretch of the ring.
    Ring {
        /// Where.
        at: u64,
        /// Bytes.
        len: u32,
    },
}

/// One connected link from an owner to a region.
#[derive(Clone, Debug)]
pub struct Wire {
    /// Names the registration that it writes to.
    pub registration: u64,
    /// Posts without a completion.
    pub flying: VecDeque<Flying>,
    /// Completions that the owner has not polled.
    pub completions: VecDeque<PostId>,
    /// It will not work again; the owner learns it at its next poll.
    pub broken: bool,
}

impl Wire {
    /// A fresh one.
    pub fn new(registration: u64) -> Self {
        Self {
            registration,
            flying: VecDeque::new(),
            completions: VecDeque::new(),
            broken: false,
        }
    }
}
