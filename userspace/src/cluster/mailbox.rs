//! The mailbox: a small shared block device through which a node is heard when the link is not.
//!
//! Each node owns a slot of two 4096-byte copies, written in turn, and writes nothing else: a power cut
//! in the middle of a write leaves the word before it. Of `n` nodes, copy `c` of node `i` is page
//! `c * n + i`; a reader takes all of them in one read. Direct and synchronous, so that what was written
//! is on the device and what is read comes from it. A slot that is torn, foreign or damaged is an error
//! of that slot, never a panic.
//! This module must never write over anything that is neither blank nor a mailbox of this cluster.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::liveness::{Beat, LastWord, MailboxLook};
use super::ownership::Word;
use crate::ids::NodeId;

mod slot;
#[cfg(test)]
mod tests;

use slot::newest_of;
pub use slot::{
    AgentState, MailboxSlot, NodeReport, RESTART_LIMIT, SlotCopies, SlotError, VolumeEntry, newest,
    told_of, words_of,
};

/// Bytes of a copy of a slot on the device; also the alignment of direct I/O.
pub const COPY_BYTES: u64 = 4096;

/// Copies of a slot.
pub const COPIES: usize = 2;

/// Why the mailbox cannot be used.
#[derive(Debug, Error)]
pub enum MailboxError {
    /// The device cannot be opened.
    #[error(
        "cannot open the mailbox {device} for direct I/O: {source}; `cluster.mailbox` must name a \
         shared block device that both nodes reach"
    )]
    Open {
        /// The device.
        device: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is neither a block device nor a regular file.
    #[error("the mailbox {device} is neither a block device nor a file: set `cluster.mailbox`")]
    WrongKind {
        /// The device.
        device: PathBuf,
    },
    /// It has no room for every node's slot.
    #[error(
        "the mailbox {device} has {bytes} bytes, and the nodes need {needed}: use a larger one"
    )]
    TooSmall {
        /// The device.
        device: PathBuf,
        /// Its size.
        bytes: u64,
        /// What is needed.
        needed: u64,
    },
    /// A read or write failed, or was short.
    #[error("cannot {what} the mailbox {device}: {source}")]
    Io {
        /// The device.
        device: PathBuf,
        /// `read` or `write`.
        what: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// A slot belongs to somebody else: nothing is written.
    #[error(
        "slot {index} of the mailbox {device}: {source}; correct `cluster.mailbox`, or blank the \
         device if nothing needs it any more"
    )]
    Foreign {
        /// The device.
        device: PathBuf,
        /// The slot.
        index: usize,
        /// What is in it.
        source: SlotError,
    },
    /// This node's report cannot be written.
    #[error("the report for the mailbox does not fit: {0}")]
    Report(String),
}

/// One copy's worth of memory, aligned for direct I/O.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// The open device, seen from one node.
#[derive(Debug)]
pub struct Mailbox {
    device: PathBuf,
    file: File,
    cluster: String,
    nodes: Vec<NodeId>,
    own: usize,
    /// The copy to be written next: never the one that holds this node's last whole word.
    next_copy: AtomicUsize,
}

impl Mailbox {
    /// Opens the device and makes sure that its slots are blank, torn, or this cluster's.
    ///
    /// `nodes` in the order of the configuration; `this_node` is one of them.
    ///
    /// # Errors
    /// As told by [`MailboxError`].
    pub fn open(
        device: &Path,
        cluster: &str,
        nodes: &[NodeId],
        this_node: &NodeId,
    ) -> Result<Self, MailboxError> {
        let own = nodes
            .iter()
            .position(|node| node == this_node)
            .ok_or_else(|| {
                MailboxError::Report(format!(
                    "`{this_node}` is none of the nodes of the configuration"
                ))
            })?;
        let mut mailbox = Self {
            device: device.to_owned(),
            file: open_direct(device)?,
            cluster: cluster.to_owned(),
            nodes: nodes.to_vec(),
            own,
            next_copy: AtomicUsize::new(0),
        };
        mailbox.check_size()?;
        let copies = mailbox.read_copies()?;
        for (index, slot) in copies.iter().enumerate() {
            let mut errors = slot.iter().filter_map(|copy| copy.as_ref().err());
            if let Some(source) = errors.find(|error| !error.may_be_overwritten()) {
                return Err(MailboxError::Foreign {
                    device: mailbox.device,
                    index,
                    source: source.clone(),
                });
            }
        }
        let newest = copies.get(own).and_then(newest_of);
        mailbox.next_copy = newest.map_or(0, |copy| (copy + 1) % COPIES).into();
        Ok(mailbox)
    }

    /// Every node's slot, in the order of the nodes, by one read: the last word that was written whole.
    ///
    /// # Errors
    /// If the device cannot be read; damage in a slot is that slot's error.
    pub fn read(&self) -> Result<Vec<Result<NodeReport, SlotError>>, MailboxError> {
        Ok(self.read_copies()?.into_iter().map(newest).collect())
    }

    /// Every node's copies, in the order of the nodes.
    fn read_copies(&self) -> Result<Vec<SlotCopies>, MailboxError> {
        let mut pages = vec![Page::new_zeroed(); COPIES * self.nodes.len()];
        let bytes = pages.as_mut_slice().as_mut_bytes();
        let wanted = bytes.len();
        let got = self
            .file
            .read_at(bytes, 0)
            .map_err(|source| self.io("read", source))?;
        if got != wanted {
            return Err(self.io("read", std::io::ErrorKind::UnexpectedEof.into()));
        }
        let (first, second) = pages.split_at(self.nodes.len());
        let open = |page: &Page, node| NodeReport::open(&page.0, &self.cluster, node);
        let slots = first.iter().zip(second).zip(&self.nodes);
        Ok(slots
            .map(|((first, second), node)| [open(first, node), open(second, node)])
            .collect())
    }

    /// Writes this node's slot; when it returns, the device has it.
    ///
    /// # Errors
    /// If the report does not fit, or the write failed or was short.
    pub fn write(&self, report: &NodeReport) -> Result<(), MailboxError> {
        let slot = report.seal(&self.cluster).map_err(MailboxError::Report)?;
        if self.nodes.get(self.own) != Some(&report.node) {
            return Err(MailboxError::Report(format!(
                "`{}` is not this node",
                report.node
            )));
        }
        let mut page = Page::new_zeroed();
        slot.write_to_prefix(&mut page.0)
            .map_err(|_| MailboxError::Report("the slot is larger than its page".to_owned()))?;
        let copy = self.next_copy.load(Ordering::Relaxed);
        let offset = COPY_BYTES * (copy * self.nodes.len() + self.own) as u64;
        let put = self
            .file
            .write_at(&page.0, offset)
            .map_err(|source| self.io("write", source))?;
        if put != page.0.len() {
            return Err(self.io("write", std::io::ErrorKind::WriteZero.into()));
        }
        // After a failure the same copy again: the other one is the last whole word.
        self.next_copy.store((copy + 1) % COPIES, Ordering::Relaxed);
        Ok(())
    }

    /// The slot index of a node.
    #[must_use]
    pub fn index_of(&self, node: &NodeId) -> Option<usize> {
        self.nodes.iter().position(|known| known == node)
    }

    fn check_size(&self) -> Result<(), MailboxError> {
        use std::io::{Seek, SeekFrom};
        let needed = COPY_BYTES * (COPIES * self.nodes.len()) as u64;
        let bytes = (&self.file)
            .seek(SeekFrom::End(0))
            .map_err(|source| self.io("size", source))?;
        if bytes < needed {
            return Err(MailboxError::TooSmall {
                device: self.device.clone(),
                bytes,
                needed,
            });
        }
        Ok(())
    }

    fn io(&self, what: &'static str, source: std::io::Error) -> MailboxError {
        MailboxError::Io {
            device: self.device.clone(),
            what,
            source,
        }
    }
}

fn open_direct(device: &Path) -> Result<File, MailboxError> {
    let failed = |source| MailboxError::Open {
        device: device.to_owned(),
        source,
    };
    let kind = std::fs::metadata(device).map_err(failed)?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(MailboxError::WrongKind {
            device: device.to_owned(),
        });
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_SYNC | libc::O_CLOEXEC)
        .open(device)
        .map_err(failed)
}

/// What a slot says of one volume.
#[must_use]
pub fn word_of(slot: &Result<NodeReport, SlotError>, volume: &str) -> Word {
    match slot {
        Ok(report) => report
            .volumes
            .get(volume)
            .cloned()
            .map_or(Word::Nothing, Word::Says),
        Err(SlotError::Blank) => Word::Nothing,
        Err(_) => Word::Unreadable,
    }
}

/// What a slot says of its node's life; `None`: the device could not be read.
#[must_use]
pub fn look_at(slot: Option<&Result<NodeReport, SlotError>>) -> MailboxLook {
    let report = match slot {
        Some(Ok(report)) => report,
        Some(Err(_)) => return MailboxLook::Nothing,
        None => return MailboxLook::Unreadable,
    };
    let owns = report
        .volumes
        .values()
        .any(|claim| claim.owner == report.node);
    let word = match report.state {
        AgentState::Stopped => LastWord::Stopped,
        AgentState::Starting | AgentState::Running if owns => LastWord::Owns,
        AgentState::Starting | AgentState::Running => LastWord::OwnsNothing,
    };
    let beat = Beat {
        boot_id: report.boot_id,
        counter: report.counter,
    };
    MailboxLook::Beat { beat, word }
}
