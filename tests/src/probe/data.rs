//! Bytes written, by every way into the kernel.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use io_uring::{IoUring, opcode, types};
use nix::fcntl::{SpliceFFlags, splice, vmsplice};
use nix::sys::sendfile::sendfile;
use rustix::io::{ReadWriteFlags, pwritev2};

use super::{BASE, Group, Probe, Work, base, nothing, overwrite, pattern};

/// Where a direct write may begin, and how much it may write.
const SECTOR: usize = 4096;
/// More than one record takes.
const LARGE_BYTES: usize = 8 << 20;
/// Less than a pipe holds.
const PIPED_BYTES: usize = 20_001;

const fn probe(name: &'static str, prepare: Work, act: Work) -> Probe {
    Probe {
        name,
        group: Group::Data,
        prepare,
        act,
    }
}

pub(super) const PROBES: &[Probe] = &[
    probe("write", nothing, |dir| {
        File::create_new(dir.join("new"))?.write_all(&pattern(2, 9_000))
    }),
    probe("pwrite-overwrite", nothing, |dir| {
        overwrite(&base(dir)?, 2, 10_000, 5_001)
    }),
    probe("pwrite-one-byte", nothing, |dir| {
        overwrite(&base(dir)?, 2, 1, 4_095)
    }),
    probe("pwrite-beyond-the-end", nothing, |dir| {
        overwrite(&base(dir)?, 2, 777, 3 << 20)
    }),
    probe("write-large", nothing, |dir| {
        overwrite(&base(dir)?, 2, LARGE_BYTES, 100)
    }),
    probe("writev", nothing, |dir| {
        let (one, two) = (pattern(2, 3_000), pattern(3, 5_000));
        let slices = [IoSlice::new(&one), IoSlice::new(&two)];
        let written = base(dir)?.write_vectored(&slices)?;
        whole(written, 8_000)
    }),
    probe("pwritev2", nothing, |dir| {
        flagged(&base(dir)?, 700, ReadWriteFlags::empty())
    }),
    probe("pwritev2-append", nothing, |dir| {
        flagged(&base(dir)?, 0, ReadWriteFlags::APPEND)
    }),
    probe("pwritev2-dsync", nothing, |dir| {
        flagged(&base(dir)?, 700, ReadWriteFlags::DSYNC)
    }),
    probe("pwritev2-sync", nothing, |dir| {
        flagged(&base(dir)?, 700, ReadWriteFlags::SYNC)
    }),
    probe("append", nothing, |dir| {
        let mut file = OpenOptions::new().append(true).open(dir.join(BASE))?;
        file.write_all(&pattern(2, 4_321))
    }),
    probe("append-by-four-threads", nothing, append_by_threads),
    probe("open-dsync", nothing, |dir| {
        overwrite(&open_with(dir, libc::O_DSYNC)?, 2, 6_000, 10)
    }),
    probe("open-sync", nothing, |dir| {
        overwrite(&open_with(dir, libc::O_SYNC)?, 2, 6_000, 10)
    }),
    probe("direct", nothing, |dir| {
        let file = open_with(dir, libc::O_DIRECT)?;
        let content = Aligned::new(2);
        file.write_all_at(content.sectors(), SECTOR as u64)
    }),
    probe("direct-beyond-the-end", nothing, |dir| {
        let file = open_with(dir, libc::O_DIRECT)?;
        let content = Aligned::new(2);
        file.write_all_at(content.sectors(), 1 << 20)
    }),
    probe("uring", nothing, |dir| {
        by_ring(&base(dir)?, &Aligned::new(2), 4_097, false)
    }),
    probe("uring-fixed-buffer", nothing, |dir| {
        by_ring(&base(dir)?, &Aligned::new(2), 4_097, true)
    }),
    probe("uring-direct", nothing, |dir| {
        let file = open_with(dir, libc::O_DIRECT)?;
        by_ring(&file, &Aligned::new(2), SECTOR as u64, false)
    }),
    probe("sendfile", source, |dir| {
        let from = File::open(dir.join("source"))?;
        let sent = sendfile(base(dir)?, from, None, PIPED_BYTES)?;
        whole(sent, PIPED_BYTES)
    }),
    probe("splice", source, |dir| {
        let (read, write) = io::pipe()?;
        let from = File::open(dir.join("source"))?;
        let flags = SpliceFFlags::empty();
        whole(
            splice(from, None, &write, None, PIPED_BYTES, flags)?,
            PIPED_BYTES,
        )?;
        drain(&read, &base(dir)?)
    }),
    probe("vmsplice", nothing, |dir| {
        let (read, write) = io::pipe()?;
        let content = pattern(4, PIPED_BYTES);
        let slices = [IoSlice::new(&content)];
        whole(
            vmsplice(&write, &slices, SpliceFFlags::empty())?,
            PIPED_BYTES,
        )?;
        drain(&read, &base(dir)?)
    }),
    probe("copy-file-range", source, |dir| {
        let from = File::open(dir.join("source"))?;
        let mut at = 3_000;
        let copied =
            rustix::fs::copy_file_range(from, None, base(dir)?, Some(&mut at), PIPED_BYTES)?;
        whole(copied, PIPED_BYTES)
    }),
    probe("write-then-rename-over", nothing, |dir| {
        std::fs::write(dir.join("fresh"), pattern(2, 5_000))?;
        std::fs::rename(dir.join("fresh"), dir.join(BASE))
    }),
    probe("open-truncate-and-write", nothing, |dir| {
        std::fs::write(dir.join(BASE), pattern(2, 5_000))
    }),
    probe("write-over-the-size-limit", nothing, over_the_limit),
];

fn whole(got: usize, wanted: usize) -> io::Result<()> {
    if got == wanted {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "{got} of {wanted} bytes were taken"
        )))
    }
}

fn open_with(directory: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(directory.join(BASE))
}

fn flagged(file: &File, at: u64, flags: ReadWriteFlags) -> io::Result<()> {
    let content = pattern(2, 5_555);
    whole(
        pwritev2(file, &[IoSlice::new(&content)], at, flags)?,
        content.len(),
    )
}

fn source(directory: &Path) -> io::Result<()> {
    std::fs::write(directory.join("source"), pattern(9, PIPED_BYTES))
}

fn drain(from: &io::PipeReader, to: &File) -> io::Result<()> {
    let mut left = PIPED_BYTES;
    while left > 0 {
        match splice(from, None, to, None, left, SpliceFFlags::empty())? {
            0 => return whole(PIPED_BYTES - left, PIPED_BYTES),
            taken => left = left.saturating_sub(taken),
        }
    }
    Ok(())
}

/// Each thread's records have a letter of their own, so that two in one place would show.
fn append_by_threads(directory: &Path) -> io::Result<()> {
    let threads = (b'a'..=b'd').map(|letter| {
        let path = directory.join(BASE);
        std::thread::spawn(move || {
            let mut file = OpenOptions::new().append(true).open(path)?;
            (0..50).try_for_each(|_| file.write_all(&[letter; 333]))
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        let ended = thread
            .join()
            .map_err(|_| io::Error::other("a thread died"))?;
        ended?;
    }
    Ok(())
}

/// A write that the limit on a file's size cuts short.
fn over_the_limit(directory: &Path) -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigSet, Signal};
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGXFSZ);
    blocked.thread_block()?;
    let end = super::BASE_BYTES as u64;
    let (soft, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
    setrlimit(Resource::RLIMIT_FSIZE, end + 1_000, hard)?;
    let written = base(directory).and_then(|file| file.write_at(&pattern(2, 5_000), end));
    setrlimit(Resource::RLIMIT_FSIZE, soft, hard)?;
    whole(written?, 1_000)
}

/// Bytes where a direct write may begin.
struct Aligned {
    bytes: Vec<u8>,
    at: usize,
}

impl Aligned {
    fn new(seed: u64) -> Self {
        let bytes = pattern(seed, 4 * SECTOR);
        let at = bytes.as_ptr().align_offset(SECTOR);
        Self { bytes, at }
    }

    /// Two of them.
    fn sectors(&self) -> &[u8] {
        self.bytes
            .get(self.at..self.at + 2 * SECTOR)
            .unwrap_or_default()
    }
}

fn by_ring(file: &File, content: &Aligned, at: u64, is_fixed: bool) -> io::Result<()> {
    let mut ring = IoUring::new(4)?;
    let bytes = content.sectors();
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let descriptor = types::Fd(file.as_raw_fd());
    let entry = if is_fixed {
        let buffer = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the bytes live, unchanged, until the ring is gone.
        unsafe { ring.submitter().register_buffers(&[buffer]) }?;
        opcode::WriteFixed::new(descriptor, bytes.as_ptr(), length, 0)
            .offset(at)
            .build()
    } else {
        opcode::Write::new(descriptor, bytes.as_ptr(), length)
            .offset(at)
            .build()
    };
    // SAFETY: the bytes live, unchanged, until the completion was seen.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let completion = ring.completion().next();
    let result = completion.ok_or_else(|| io::Error::other("no completion"))?;
    match result.result() {
        error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        written => whole(written.unsigned_abs() as usize, bytes.len()),
    }
}
