//! The shared disks of a lab whose disks lose what was not flushed: served to the machines over NBD,
//! with a volatile cache of their own for each machine.
//!
//! A machine sees its own writes at once; on the disk, and for the other machine, they are once the
//! machine has flushed. When a machine's power is cut, some of what it had not flushed gets to the disk
//! all the same, in no order, and the rest is gone.

mod cache;
mod wire;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::config::NodeName;
use super::qemu::{self, Files};
use crate::random::Random;
use cache::{Cache, Cut};
use wire::{Answer, Command};

/// What a cut of a machine's power did to all disks together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Losses {
    /// Unflushed writes of pages that reached a disk all the same.
    pub(super) kept: u64,
    /// Those that are gone.
    pub(super) lost: u64,
}

/// All disks.
pub(super) struct Disks {
    exports: BTreeMap<String, Export>,
    random: Mutex<Random>,
    /// A flush takes at least so long.
    flush_us: AtomicU64,
}

struct Export {
    disk: File,
    bytes: u64,
    state: Mutex<State>,
}

/// By machine: its cache, and how often its power was cut. What an earlier run of the machine left in
/// a socket is not the present run's.
#[derive(Default)]
struct State {
    caches: BTreeMap<NodeName, Cache>,
    cuts: BTreeMap<NodeName, u64>,
}

impl Disks {
    /// Serves these disks, named without their ending, to both machines until the process ends.
    pub(super) fn serve(names: &[String], seed: u64) -> Result<Arc<Self>> {
        let mut exports = BTreeMap::new();
        for name in names {
            exports.insert(name.clone(), Export::open(&qemu::disk_file(name))?);
        }
        let disks = Arc::new(Self {
            exports,
            random: Mutex::new(Random::new(seed)),
            flush_us: AtomicU64::new(0),
        });
        for node in NodeName::ALL {
            let path = Files::of(node).disks();
            let _ = fs::remove_file(&path);
            let listener =
                UnixListener::bind(&path).with_context(|| format!("cannot listen on {path}"))?;
            let disks = Arc::clone(&disks);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let disks = Arc::clone(&disks);
                    thread::spawn(move || {
                        if let Err(error) = disks.converse(node, stream) {
                            eprintln!("a disk of {node}: {error:#}");
                        }
                    });
                }
            });
        }
        Ok(disks)
    }

    /// From now on a flush takes at least this long, as that of a disk with moving parts or cheap flash.
    pub(super) fn flush_takes(&self, time: Duration) {
        let time_us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.flush_us.store(time_us, Ordering::Relaxed);
    }

    fn converse(&self, node: NodeName, mut stream: UnixStream) -> Result<()> {
        let bytes_of = |name: &str| self.exports.get(name).map(|export| export.bytes);
        let Some(name) = wire::handshake(&mut stream, bytes_of)? else {
            return Ok(());
        };
        let export = self.exports.get(&name).context("an export went away")?;
        let run = export.state().cuts.get(&node).copied().unwrap_or_default();
        let mut reader = std::io::BufReader::with_capacity(256 << 10, stream.try_clone()?);
        loop {
            // A killed machine hangs up in the middle of anything.
            let Ok(request) = wire::request(&mut reader) else {
                return Ok(());
            };
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let mut read = Vec::new();
            let flushed_at = (request.command == Command::Flush).then(|| {
                Instant::now() + Duration::from_micros(self.flush_us.load(Ordering::Relaxed))
            });
            let answer = match export.carry_out(node, run, request.command, &mut read) {
                Ok(true) => Answer::Done(&read),
                Ok(false) => Answer::NotUnderstood,
                Err(error) => {
                    eprintln!("disk {name}: {error:#}");
                    Answer::Failed
                }
            };
            // The machine's other requests wait too, as they do behind one slow queue.
            if let Some(at) = flushed_at {
                thread::sleep(at.saturating_duration_since(Instant::now()));
            }
            if wire::answer(&mut stream, request.cookie, &answer).is_err() {
                return Ok(());
            }
        }
    }

    /// The power of `node` is gone: nothing of it arrives any more, and its caches are lost but for
    /// what the seed decides.
    pub(super) fn power_cut(&self, node: NodeName) -> Result<Losses> {
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        let mut losses = Losses::default();
        for (name, export) in &self.exports {
            let Cut { kept, lost } = export
                .power_cut(node, &mut random)
                .with_context(|| format!("disk {name}"))?;
            losses.kept += kept;
            losses.lost += lost;
        }
        Ok(losses)
    }
}

impl Export {
    fn open(path: &str) -> Result<Self> {
        let disk = File::options()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open {path}"))?;
        let bytes = disk.metadata()?.len();
        ensure!(
            bytes.is_multiple_of(cache::PAGE_BYTES as u64),
            "{path} does not end with a page"
        );
        Ok(Self {
            disk,
            bytes,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if there is no such command.
    fn carry_out(
        &self,
        node: NodeName,
        run: u64,
        command: Command,
        read: &mut Vec<u8>,
    ) -> Result<bool> {
        let mut state = self.state();
        ensure!(
            state.cuts.get(&node).copied().unwrap_or_default() == run,
            "{node}'s power is cut"
        );
        let cache = state.caches.entry(node).or_default();
        match command {
            Command::Read { offset, length } => {
                read.resize(length, 0);
                cache.read(&self.disk, offset, read)?;
            }
            Command::Write {
                offset,
                bytes,
                forced,
            } => {
                let end = offset.checked_add(bytes.len() as u64);
                ensure!(
                    end.is_some_and(|end| end <= self.bytes),
                    "a write behind the disk's end"
                );
                cache.write(&self.disk, offset, &bytes)?;
                if forced {
                    cache.flush_range(&self.disk, offset, bytes.len())?;
                }
            }
            Command::Flush => cache.flush(&self.disk)?,
            Command::Disconnect | Command::Unknown => return Ok(false),
        }
        Ok(true)
    }

    fn power_cut(&self, node: NodeName, random: &mut Random) -> Result<Cut> {
        let mut state = self.state();
        *state.cuts.entry(node).or_default() += 1;
        let cache = state.caches.remove(&node).unwrap_or_default();
        Ok(cache.cut(&self.disk, random)?)
    }
}

#[cfg(test)]
mod tests;
