//! The mirror's side of one volume: keeping the region, letting its one owner write to it, and
//! shutting the owner out before a takeover.
//!
//! The mirror's processor takes no part in mirroring: this room is entered when a link is made, an
//! epoch begins or ends, and at a takeover. It must never let two writers in, nor overwrite a
//! region whose epoch is open without the owner's word that a later one begins.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::config::Volume;
use crate::ids::{Epoch, NodeId};
use crate::link::{Endpoint, Exposed, LinkError, SharedMemory, Transport, WINDOW_POSTS};
use crate::mirror::core::PUBLISH_BYTES;
use crate::region::backing::{BackingError, RegionFile, RegionIdentity};
use crate::region::layout::{
    FRAME_BODY_BYTES_MAX, LOG_OFFSET, RegionHeader, STATUS_OFFSET, region_state,
};
use crate::region::scan::{self, Scan, ScanError, Tail};

/// Most bytes a frame takes in the log.
const FRAME_STRIDE_MAX: u64 = FRAME_BODY_BYTES_MAX as u64 + 64;
/// How far frames reach beyond what was published, all but always: what is not yet worth a line, and two
/// windows of frames, since the line that publishes one window travels behind it.
const BEYOND_PUBLISHED_BYTES: u64 =
    PUBLISH_BYTES + 2 * (WINDOW_POSTS as u64 + 1) * FRAME_STRIDE_MAX;

/// Why the region cannot be used.
#[derive(Debug, Error)]
pub enum HostError {
    /// Its file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The transport.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Its contents.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The owner asked for something that the region's state forbids.
    #[error("{0}")]
    Refused(String),
}

/// What the owner learns when its link to the region is made.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Where to write.
    pub endpoint: Endpoint,
    /// The region's epoch; 0 if there is none.
    pub epoch: Epoch,
    /// State of its header, one of `region_state`.
    pub state: u32,
    /// Where its log ends, if it is open and whole.
    pub tail: Option<Tail>,
}

/// One volume's region on its mirror.
pub struct RegionHost {
    cluster: String,
    volume: Volume,
    own: NodeId,
    transport: Arc<dyn Transport>,
    file: Option<RegionFile>,
    exposed: Option<Box<dyn Exposed>>,
    /// Of the file system whose owner opened the region last.
    filesystem_uuid: [u8; 16],
    /// Why a former writer may still reach the memory.
    not_shut_out: Option<String>,
    /// Set once this node takes the volume over: nobody may write from then on.
    sealed: bool,
}

impl RegionHost {
    /// A host for this volume; touches nothing yet.
    pub fn new(
        cluster: &str,
        volume: &Volume,
        own: &NodeId,
        transport: Arc<dyn Transport>,
    ) -> Self {
        Self {
            cluster: cluster.to_owned(),
            volume: volume.clone(),
            own: own.clone(),
            transport,
            file: None,
            exposed: None,
            filesystem_uuid: [0; 16],
            not_shut_out: None,
            sealed: false,
        }
    }

    fn identity(&self, owner: &NodeId, filesystem_uuid: Option<[u8; 16]>) -> RegionIdentity {
        RegionIdentity {
            cluster: self.cluster.clone(),
            volume: self.volume.name.clone(),
            owner: owner.0.clone(),
            mirror: self.own.0.clone(),
            filesystem_uuid,
        }
    }

    fn file(&mut self) -> Result<&RegionFile, HostError> {
        if self.file.is_none() {
            let identity = self.identity(&self.volume.owner, None);
            let log_bytes = self.volume.region_bytes.as_u64();
            let directory = &self.volume.region_dir;
            self.file = Some(RegionFile::open_or_create(directory, &identity, log_bytes)?.0);
        }
        self.file
            .as_ref()
            .ok_or_else(|| HostError::Refused("the region has no file".to_owned()))
    }

    /// The region's header; `None` if it is damaged, which a new epoch mends.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn header(&mut self) -> Result<Option<RegionHeader>, HostError> {
        Ok(self.file()?.header().ok())
    }

    /// Lets the owner in (and the writer before it out), and tells it where the log ends.
    ///
    /// # Errors
    /// [`HostError::Refused`] once the volume was taken over, else what failed.
    pub fn open(
        &mut self,
        writer: &Endpoint,
        filesystem_uuid: [u8; 16],
    ) -> Result<Opened, HostError> {
        if self.sealed {
            let text = format!("{} was taken over by {}", self.volume.name, self.own);
            return Err(HostError::Refused(text));
        }
        // The old queue pair goes first: its late writes must not land behind the tail told below.
        self.shut_out()?;
        let header = self.header()?;
        let epoch = Epoch(header.map_or(0, |h| h.epoch));
        let state = header.map_or(region_state::EMPTY, |h| h.state);
        let open = state == region_state::OPEN;
        let tail = if open {
            self.scan().ok().map(|s| s.tail())
        } else {
            None
        };
        let memory = self.file()?.memory();
        let mut exposed = self.transport.expose(memory)?;
        exposed.accept(writer)?;
        let endpoint = exposed.endpoint();
        self.exposed = Some(exposed);
        self.filesystem_uuid = filesystem_uuid;
        Ok(Opened {
            endpoint,
            epoch,
            state,
            tail,
        })
    }

    /// Empties the region for a new epoch of `owner`.
    ///
    /// # Errors
    /// [`HostError::Refused`] for an epoch that is not later than the region's.
    pub fn begin_epoch(&mut self, owner: &NodeId, epoch: Epoch) -> Result<(), HostError> {
        if self.sealed {
            return Err(HostError::Refused(format!(
                "{} was taken over",
                self.volume.name
            )));
        }
        if let Some(old) = self.header()?
            && old.epoch >= epoch.0
        {
            let text = format!(
                "the region of {} holds epoch {}, which is not before {epoch}",
                self.volume.name, old.epoch
            );
            return Err(HostError::Refused(text));
        }
        let identity = self.identity(owner, Some(self.filesystem_uuid));
        let file = self.file()?;
        // Not open while the status page still speaks of the epoch before.
        file.write_header(&identity.header(region_state::EMPTY, epoch.0, file.log_bytes())?)?;
        let memory = file.memory();
        memory
            .zero(STATUS_OFFSET, LOG_OFFSET - STATUS_OFFSET)
            .map_err(BackingError::from)?;
        // An old frame at the log's start can never be this epoch's, but zero says so plainly.
        memory.zero(LOG_OFFSET, 64).map_err(BackingError::from)?;
        file.write_header(&identity.header(region_state::OPEN, epoch.0, file.log_bytes())?)?;
        Ok(())
    }

    /// Makes the region void: the owner ended this epoch on purpose.
    ///
    /// # Errors
    /// When the header cannot be written.
    pub fn close_epoch(&mut self, epoch: Epoch) -> Result<(), HostError> {
        let Some(mut header) = self.header()? else {
            return Ok(());
        };
        if header.epoch == epoch.0 && header.state == region_state::OPEN {
            header.state = region_state::CLOSED;
            self.file()?.write_header(&header)?;
        }
        Ok(())
    }

    /// Shuts the present writer out; another may be let in later.
    ///
    /// # Errors
    /// When it cannot be proven that no late write can land; no later try proves it either.
    pub fn shut_out(&mut self) -> Result<(), HostError> {
        if let Some(reason) = &self.not_shut_out {
            return Err(HostError::Refused(reason.clone()));
        }
        if let Some(exposed) = self.exposed.take()
            && let Err(error) = exposed.revoke()
        {
            self.not_shut_out = Some(format!(
                "the writer before may still reach the region of {} ({error}); restart this agent, \
                 which ends its access",
                self.volume.name
            ));
            return Err(error.into());
        }
        Ok(())
    }

    /// Shuts the writer out for good, for a takeover.
    ///
    /// # Errors
    /// As [`Self::shut_out`]; the takeover must then not go on.
    pub fn seal(&mut self) -> Result<(), HostError> {
        self.sealed = true;
        self.shut_out()
    }

    /// Allows a writer again, after this node gave the volume up.
    pub fn unseal(&mut self) {
        self.sealed = false;
    }

    /// Copies the region to `path` on a local disk, flushed.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn save_to(&mut self, path: &Path) -> Result<PathBuf, HostError> {
        self.file()?.save_to(path)?;
        Ok(path.to_owned())
    }

    /// Scans a copy of the region. Only the part of the log that can hold frames is copied: from the
    /// head to a good way behind what was published, which is all but always the log's end.
    fn scan(&mut self) -> Result<Scan, HostError> {
        let memory = self.file()?.memory();
        let mut bytes = vec![0; usize::try_from(memory.len()).unwrap_or(usize::MAX)];
        copy(&memory, &mut bytes, 0, LOG_OFFSET)?;
        let (header, status, log) = scan::split(&bytes)?;
        let log_bytes = log.len() as u64;
        let published = scan::published(&header, status)?;
        let reach = (published.end.0 - published.head.0).saturating_add(BEYOND_PUBLISHED_BYTES);
        if reach < log_bytes {
            let first = published.head.0 % log_bytes;
            let whole = reach.min(log_bytes - first);
            copy(&memory, &mut bytes, LOG_OFFSET + first, whole)?;
            copy(&memory, &mut bytes, LOG_OFFSET, reach - whole)?;
            let (header, status, log) = scan::split(&bytes)?;
            let found = scan::scan(&header, status, log)?;
            if found.end.lsn.0 + FRAME_STRIDE_MAX < published.head.0 + reach {
                return Ok(found);
            }
        }
        copy(&memory, &mut bytes, LOG_OFFSET, log_bytes)?;
        let (header, status, log) = scan::split(&bytes)?;
        Ok(scan::scan(&header, status, log)?)
    }
}

fn copy(memory: &SharedMemory, to: &mut [u8], offset: u64, len: u64) -> Result<(), HostError> {
    let range = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(offset + len).ok());
    let part = range
        .and_then(|(from, end)| to.get_mut(from..end))
        .unwrap_or_default();
    Ok(memory.read_at(offset, part).map_err(BackingError::from)?)
}
