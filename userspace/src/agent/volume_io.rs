//! Whether the volumes' devices answer: what a heartbeat is worth.
//!
//! A node can beat while the disk of its volumes is gone for it. So a thread for each volume reads
//! its device, directly, and notes when that last succeeded; a read that hangs holds up nothing but
//! its own note. It must never write, and never read through the page cache.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use zerocopy::{FromZeros, IntoBytes};

use super::clock::duration;
use super::node::{Node, lock};
use crate::events::Event;

/// One block's worth of memory, aligned for direct I/O.
#[derive(zerocopy::FromBytes, IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// When each volume's device last answered.
#[derive(Debug, Default)]
pub struct VolumeIo {
    answered: Mutex<BTreeMap<String, Instant>>,
    /// Volumes whose device was last told to be silent.
    silent: Mutex<BTreeSet<String>>,
}

impl VolumeIo {
    fn note(&self, volume: &str) {
        lock(&self.answered).insert(volume.to_owned(), Instant::now());
    }

    /// Whether this is another word than the last one on that volume.
    fn is_news(&self, volume: &str, is_silent: bool) -> bool {
        let mut silent = lock(&self.silent);
        if is_silent {
            silent.insert(volume.to_owned())
        } else {
            silent.remove(volume)
        }
    }

    /// How long ago the one of these volumes that is silent for longest answered; `None`: there are none.
    pub fn age<'a>(&self, volumes: impl IntoIterator<Item = &'a str>) -> Option<Duration> {
        let answered = lock(&self.answered);
        let age = |volume: &str| answered.get(volume).map_or(Duration::MAX, Instant::elapsed);
        volumes.into_iter().map(age).max()
    }
}

impl Node {
    fn tell_volume_io(&self, volume: &str, error: Option<String>) {
        if self.volume_io.is_news(volume, error.is_some()) {
            self.events.record(Event::VolumeDevice {
                volume: volume.to_owned(),
                error,
            });
        }
    }

    /// Tells of devices that give no answer at all, on which the threads that read them hang.
    pub fn tell_hanging_volumes(&self, limit: Duration) {
        for volume in &self.config.volumes {
            let name = volume.name.as_str();
            if let Some(age) = self.volume_io.age([name]).filter(|age| *age > limit) {
                let error = format!("no answer for {:.1} s", age.as_secs_f64());
                self.tell_volume_io(name, Some(error));
            }
        }
    }
}

/// Starts a thread for each volume.
///
/// # Errors
/// When a thread cannot be started.
pub fn start(node: &Arc<Node>) -> std::io::Result<()> {
    for volume in &node.config.volumes {
        // What was not asked yet is not silent yet.
        node.volume_io.note(&volume.name);
        let (node, volume) = (Arc::clone(node), volume.clone());
        std::thread::Builder::new()
            .name(format!("io-{}", volume.name))
            .spawn(move || {
                // Every other heartbeat tells of a new answer: a disk is called silent only after more.
                let heartbeat = duration(node.config.cluster.heartbeat_interval);
                let dead_after = duration(node.config.cluster.dead_after);
                let interval = (heartbeat * 2).min(dead_after / 3).max(heartbeat);
                let mut open = None;
                while !node.ended.is_given() {
                    let result = read_once(&volume.device, &mut open);
                    if result.is_ok() {
                        node.volume_io.note(&volume.name);
                    }
                    node.tell_volume_io(&volume.name, result.err().map(|e| e.to_string()));
                    node.ended.wait(interval);
                }
            })?;
    }
    Ok(())
}

/// Reads one block. After an error the device is opened anew: one that went away and came back is
/// another one.
fn read_once(device: &Path, open: &mut Option<File>) -> std::io::Result<()> {
    let file = match open.take() {
        Some(file) => file,
        None => OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(device)?,
    };
    file.read_exact_at(Page::new_zeroed().as_mut_bytes(), 0)?;
    *open = Some(file);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_silence_counts_and_what_never_answered_is_silent_for_ever() {
        let io = VolumeIo::default();
        assert_eq!(io.age([]), None);
        io.note("data");
        assert!(io.age(["data"]).unwrap() < Duration::from_secs(5));
        assert_eq!(io.age(["data", "home"]), Some(Duration::MAX));
    }

    #[test]
    fn silence_is_told_once_and_its_end_once() {
        let io = VolumeIo::default();
        assert!(!io.is_news("data", false), "it was never silent");
        assert!(io.is_news("data", true) && !io.is_news("data", true));
        assert!(io.is_news("home", true), "each volume has its own word");
        assert!(io.is_news("data", false) && !io.is_news("data", false));
    }

    #[test]
    fn a_device_is_read_directly_and_one_that_is_not_there_is_told() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut open = None;
        assert!(read_once(file.path(), &mut open).is_err(), "no block");
        file.as_file().set_len(4096).unwrap();
        read_once(file.path(), &mut open).unwrap();
        assert!(open.is_some(), "it is kept open while it answers");
        file.as_file().set_len(0).unwrap();
        assert!(read_once(file.path(), &mut open).is_err() && open.is_none());
        assert!(read_once(Path::new("/nonexistent"), &mut open).is_err());
    }
}
