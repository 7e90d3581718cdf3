//! A workload that asks for durability through an io_uring: it overwrites one block with higher and higher
//! numbers, and notes each before it asks and once it has seen the completion.
//!
//! A survivor must show the last number seen, or one tried later. The block is that of [`crate::overwrite`].
//! Unsafe code hands buffers to the kernel: there is no safe way to submit to a ring. Each of them must
//! live, unchanged, until its completion was seen.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use crate::error::Error;
use crate::overwrite::{BLOCK_BYTES, block, file_error, found};

const ENTRIES: u32 = 8;
/// The kernel's thread that submits goes to sleep when nothing came for this long.
const SUBMITTER_IDLE_MS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// How the block is written, confirmed, and the confirmation awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// An fsync, awaited in `io_uring_enter`.
    Wait,
    /// The same on a ring whose completions are posted only there.
    Deferred,
    /// An fsync, awaited by reading the ring in user mode, without any system call.
    Poll,
    /// A write and an fsync linked behind it.
    Linked,
    /// A write with `RWF_DSYNC`.
    Dsync,
    /// The same, submitted by the kernel's thread and awaited in user mode.
    Submitter,
    /// A direct write, awaited in user mode.
    Direct,
}

impl Way {
    fn polls(self) -> bool {
        matches!(self, Self::Poll | Self::Submitter | Self::Direct)
    }

    fn ring(self) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        match self {
            Self::Deferred => builder.setup_single_issuer().setup_defer_taskrun(),
            Self::Submitter => builder.setup_sqpoll(SUBMITTER_IDLE_MS),
            _ => &mut builder,
        };
        builder.build(ENTRIES)
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How.
    pub way: Way,
    /// How many numbers.
    pub count: u64,
    /// Nothing new is tried while this file is there.
    pub pause: Option<PathBuf>,
}

/// A block's bytes where a direct write may begin.
struct Aligned {
    bytes: Vec<u8>,
    at: usize,
}

impl Aligned {
    fn new(number: u64) -> Self {
        let mut bytes = vec![0; 2 * BLOCK_BYTES];
        let at = bytes.as_ptr().align_offset(BLOCK_BYTES);
        for (to, from) in bytes.iter_mut().skip(at).zip(block(number)) {
            *to = from;
        }
        Self { bytes, at }
    }

    fn block(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
}

/// Overwrites, and notes each number twice on lines of their own: `tried`, then `seen`.
///
/// # Errors
/// The first call or request that fails.
pub fn run(path: &Path, log: &Path, options: &Options) -> Result<(), Error> {
    let open = |flags: i32| {
        let mut open = OpenOptions::new();
        let open = open.read(true).write(true).create(true).truncate(false);
        open.custom_flags(flags).open(path)
    };
    let plain = open(0).map_err(file_error("open", path))?;
    if plain.metadata().map_err(file_error("look at", path))?.len() < BLOCK_BYTES as u64 {
        plain
            .write_all_at(&block(1), 0)
            .and_then(|()| plain.sync_all())
            .map_err(file_error("write", path))?;
    }
    let direct = if options.way == Way::Direct {
        libc::O_DIRECT
    } else {
        0
    };
    let file = open(direct).map_err(file_error("open", path))?;
    let mut log_file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(log)
        .map_err(file_error("open", log))?;
    let mut note = |word: &str, number: u64| {
        // One write, so that a line is there or not.
        let line = format!("{word} {number}\n");
        log_file
            .write_all(line.as_bytes())
            .map_err(file_error("write", log))
    };
    let mut ring = options
        .way
        .ring()
        .map_err(file_error("make an io_uring for", path))?;
    for _ in 0..options.count {
        while options.pause.as_deref().is_some_and(Path::exists) {
            sleep(PAUSE);
        }
        // Somebody else may have written a higher one meanwhile.
        let number = found(path)? + 1;
        note("tried", number)?;
        confirm(&mut ring, &file, options.way, number)
            .map_err(file_error("write through an io_uring", path))?;
        note("seen", number)?;
        sleep(PAUSE);
    }
    Ok(())
}

/// Writes a number and returns once its completion was seen.
fn confirm(ring: &mut IoUring, file: &File, way: Way, number: u64) -> io::Result<()> {
    let content = Aligned::new(number);
    let descriptor = types::Fd(file.as_raw_fd());
    let bytes = content.block();
    let write = opcode::Write::new(descriptor, bytes.as_ptr(), BLOCK_BYTES as u32);
    let fsync = opcode::Fsync::new(descriptor).build();
    let entries = match way {
        Way::Wait | Way::Deferred | Way::Poll => {
            file.write_all_at(bytes.get(..BLOCK_BYTES).unwrap_or_default(), 0)?;
            vec![fsync]
        }
        Way::Linked => vec![write.build().flags(squeue::Flags::IO_LINK), fsync],
        Way::Dsync | Way::Submitter => vec![write.rw_flags(libc::RWF_DSYNC).build()],
        Way::Direct => vec![write.build()],
    };
    for entry in &entries {
        // SAFETY: `content` and `file` outlive the wait for all completions below.
        unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    }
    let mut missing = entries.len();
    submit(ring, if way.polls() { 0 } else { missing })?;
    while missing > 0 {
        let Some(completion) = ring.completion().next() else {
            if !way.polls() {
                submit(ring, missing)?;
            }
            continue;
        };
        missing -= 1;
        let result = completion.result();
        if result < 0 {
            // A stop of the process can interrupt a request, as it can interrupt a call.
            return Err(io::Error::from_raw_os_error(-result));
        }
    }
    drop(content);
    Ok(())
}

/// Submits, and waits for so many completions.
fn submit(ring: &IoUring, wait_for: usize) -> io::Result<()> {
    loop {
        match ring.submit_and_wait(wait_for) {
            // The stop at the gate interrupts the wait.
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_leaves_the_last_number_seen() {
        let directory = tempfile::tempdir().expect("a directory");
        for way in [Way::Wait, Way::Deferred, Way::Poll, Way::Linked, Way::Dsync] {
            let (path, log) = (directory.path().join("block"), directory.path().join("log"));
            let options = Options {
                way,
                count: 2,
                pause: None,
            };
            match way.ring() {
                // Not every kernel that builds this lets a process have one.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => continue,
                other => other.expect("a ring"),
            };
            run(&path, &log, &options).expect("all requests succeed");
            let noted = std::fs::read_to_string(&log).expect("a log");
            let last = noted.lines().next_back().expect("a line");
            assert_eq!(last, format!("seen {}", found(&path).expect("whole")));
        }
    }
}
