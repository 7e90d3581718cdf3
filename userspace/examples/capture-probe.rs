//! Tries capture on a mounted volume: `features`, `calibrate`, `dump`, and a stress run that
//! compares every captured byte with what was written, across a restart of the consumer.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{IoSlice, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use twinwrite::capture::{
    CacheRead, Capture, CaptureOptions, Filesystem, PageCache, RingConsumer, calibrate, features,
    kernel_device,
};
use twinwrite::ids::RingPos;
use twinwrite::record::{RecordView, Records, op};

const VOLUME: &str = "capture-probe";
const THREADS: u64 = 4;

fn main() -> Result<()> {
    tracing_subscriber::fmt().init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["features"] => {
            for feature in features() {
                let word = if feature.ok { "ok" } else { "MISSING" };
                println!(
                    "{word:8} {} {}",
                    feature.name,
                    if feature.ok { "" } else { &feature.remedy }
                );
            }
            Ok(())
        }
        ["calibrate", mount, filesystem] => attach(mount, filesystem, 1 << 22).map(drop),
        ["dump", mount, filesystem, seconds] => dump(mount, filesystem, seconds.parse()?),
        ["detach"] => Ok(Capture::detach(VOLUME)?),
        ["writer", mount, operations] => writer(Path::new(mount), operations.parse()?),
        ["stress", mount, filesystem, operations] => stress(mount, filesystem, operations.parse()?),
        ["consume", mount, filesystem, operations, stop_at] => {
            consume(mount, filesystem, operations.parse()?, stop_at.parse()?)
        }
        _ => bail!(
            "usage: capture-probe features | calibrate MOUNT FS | dump MOUNT FS SECONDS | \
             stress MOUNT FS OPERATIONS | detach"
        ),
    }
}

fn attach(mount: &str, filesystem: &str, ring_bytes: u32) -> Result<Capture> {
    let mount = Path::new(mount);
    let began = Instant::now();
    let capture = Capture::attach(&CaptureOptions {
        volume_name: VOLUME.to_owned(),
        device: kernel_device(mount)?,
        ring_bytes,
        filesystem: Filesystem::from_name(filesystem)?,
        subtree: None,
    })?;
    println!(
        "attached in {:?}, resumed {}",
        began.elapsed(),
        capture.resumed()
    );
    for disabled in capture.disabled() {
        println!("disabled: {} ({})", disabled.hook.function, disabled.reason);
    }
    if !capture.resumed() {
        let began = Instant::now();
        let calibration = calibrate(&capture, mount)?;
        println!("calibrated in {:?}: {calibration:?}", began.elapsed());
    }
    Ok(capture)
}

fn describe(view: &RecordView<'_>) -> String {
    let h = view.header;
    let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "op {} flags {} {} mode {:o} pos {} size {} arg {:#x} data {} name {:?} name2 {:?} target {:?}",
        h.op,
        h.flags,
        view.identity(),
        h.mode,
        h.pos,
        h.size_after,
        h.arg,
        h.data_len,
        name(view.name()),
        name(view.name2()),
        name(view.target()),
    )
}

fn dump(mount: &str, filesystem: &str, seconds: u64) -> Result<()> {
    let capture = attach(mount, filesystem, 1 << 22)?;
    let mut consumer = capture.consumer()?;
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let mut next = None;
        if let Some(run) = consumer.peek(1 << 20)? {
            for record in Records::new(run.bytes) {
                println!("{}", describe(&record?.1));
            }
            next = Some(RingPos(run.start.0 + run.bytes.len() as u64));
        }
        match next {
            Some(next) => {
                consumer.advance_to(next)?;
                consumer.release_to(next)?;
            }
            None => drop(consumer.sleep(Duration::from_millis(100))?),
        }
    }
    let control = capture.control();
    println!(
        "records {} drops {} faults {} gaps {:?} misses {} missed wake-ups {}",
        control.records(),
        control.drops(),
        control.faults(),
        control.gaps(),
        capture.recursion_misses()?,
        consumer.missed_wakeups()
    );
    Ok(())
}

/// The `index`-th write of a thread: where, and the segments.
fn planned(thread: u64, index: u64) -> (Option<u64>, Vec<Vec<u8>>) {
    let mut state = (thread << 40 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) % below
    };
    let pos = (next(4) != 0).then(|| next(1 << 20));
    let segments = if next(3) == 0 { 2 + next(7) } else { 1 };
    let largest = [100, 5000, 70_000, 300_000][next(4) as usize];
    // Sizes that the programs copy at once, beside any others.
    let block = (next(3) == 0).then(|| 1 << next(18));
    let bytes = (0..segments)
        .map(|segment| {
            let len = block.unwrap_or_else(|| next(largest) / segments + 1);
            (0..len)
                .map(|at| (at * 31 + index * 7 + thread + segment * 13 + (at >> 8)) as u8)
                .collect()
        })
        .collect();
    (pos, bytes)
}

fn stress_file(mount: &Path, thread: u64) -> PathBuf {
    mount.join(format!("stress-{thread}"))
}

fn writer(mount: &Path, operations: u64) -> Result<()> {
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let path = stress_file(mount, thread);
            thread::spawn(move || -> Result<()> {
                let mut file = File::options().write(true).open(&path)?;
                let mut append = File::options().append(true).open(&path)?;
                for index in 0..operations {
                    let (pos, segments) = planned(thread, index);
                    let slices: Vec<_> = segments.iter().map(|bytes| IoSlice::new(bytes)).collect();
                    let want: usize = segments.iter().map(Vec::len).sum();
                    let wrote = match (pos, slices.as_slice()) {
                        (Some(pos), [one]) => file.write_at(one, pos)?,
                        (Some(pos), many) => {
                            file.seek(SeekFrom::Start(pos))?;
                            file.write_vectored(many)?
                        }
                        (None, many) => append.write_vectored(many)?,
                    };
                    ensure!(wrote == want, "short write");
                    if index % 64 == 63 {
                        file.set_len(1 << 20)?;
                    }
                    thread::sleep(Duration::from_micros(300));
                }
                Ok(())
            })
        })
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a writer panicked"))??;
    }
    Ok(())
}

fn stress(mount: &str, filesystem: &str, operations: u64) -> Result<()> {
    let path = Path::new(mount);
    Capture::detach(VOLUME)?;
    for thread in 0..THREADS {
        File::create(stress_file(path, thread))?;
    }
    drop(attach(mount, filesystem, 1 << 27)?);
    let me = std::env::current_exe()?;
    let mut writer = Command::new(&me)
        .args(["writer", mount, &operations.to_string()])
        .stdin(Stdio::null())
        .spawn()?;
    for stop_at in [
        operations * THREADS / 3,
        operations * THREADS / 2,
        operations * THREADS,
    ] {
        let status = Command::new(&me)
            .args([
                "consume",
                mount,
                filesystem,
                &operations.to_string(),
                &stop_at.to_string(),
            ])
            .status()?;
        ensure!(status.success(), "consumer failed");
    }
    ensure!(writer.wait()?.success(), "writer failed");
    Ok(())
}

const PROGRESS: &str = "/tmp/capture-probe-progress";

/// Verifies records until `stop_at` writes have been seen in all, then dies without any clean-up.
fn consume(mount: &str, filesystem: &str, operations: u64, stop_at: u64) -> Result<()> {
    let path = Path::new(mount);
    let capture = attach(mount, filesystem, 1 << 27)?;
    ensure!(capture.resumed(), "the pinned programs were not taken over");
    let mut threads = HashMap::new();
    for thread in 0..THREADS {
        threads.insert(fs::metadata(stress_file(path, thread))?.ino(), thread);
    }
    let mut done = vec![0u64; THREADS as usize];
    if let Ok(text) = fs::read_to_string(PROGRESS)
        && stop_at != operations * THREADS / 3
    {
        done = text
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
    }
    let mut consumer = capture.consumer()?;
    let mut cache = PageCache::open(path)?;
    let (mut without, mut filled) = (0, 0);
    let limit = Instant::now() + Duration::from_secs(300);
    while done.iter().sum::<u64>() < stop_at {
        ensure!(
            Instant::now() < limit,
            "timed out at {done:?}, {}",
            state(&capture, &consumer)?
        );
        let mut next = None;
        if let Some(run) = consumer.peek(1 << 18)? {
            for record in Records::new(run.bytes) {
                let (_, view) = record?;
                let Some(thread) = threads.get(&view.header.ino) else {
                    continue;
                };
                if view.header.op != op::WRITE {
                    continue;
                }
                let index = &mut done[*thread as usize];
                let (pos, segments) = planned(*thread, *index);
                let bytes = segments.concat();
                if let Some(pos) = pos {
                    ensure!(
                        view.header.pos == pos,
                        "thread {thread} write {index}: pos {}",
                        view.header.pos
                    );
                }
                ensure!(
                    view.header.data_len as usize == bytes.len(),
                    "thread {thread} write {index}: length"
                );
                if view.needs_fill() {
                    without += 1;
                    let mut buffer = vec![0; bytes.len()];
                    match cache.read(view.identity(), view.header.pos, &mut buffer)? {
                        CacheRead::Bytes(_) => filled += 1,
                        CacheRead::Gone => bail!("the file is gone"),
                    }
                } else {
                    ensure!(
                        view.data() == bytes,
                        "thread {thread} write {index}: bytes differ"
                    );
                }
                *index += 1;
            }
            next = Some(RingPos(run.start.0 + run.bytes.len() as u64));
        }
        match next {
            Some(next) => {
                consumer.advance_to(next)?;
                let text: Vec<String> = done.iter().map(ToString::to_string).collect();
                fs::write(PROGRESS, text.join(" ")).context("progress")?;
                consumer.release_to(next)?;
            }
            None => drop(consumer.sleep(Duration::from_millis(100))?),
        }
    }
    println!(
        "verified {done:?} writes, {without} without bytes, {filled} filled; {}",
        state(&capture, &consumer)?
    );
    ensure!(capture.control().drops() == 0, "drops");
    ensure!(capture.recursion_misses()? == 0, "recursion misses");
    Ok(())
}

fn state(capture: &Capture, consumer: &RingConsumer) -> Result<String> {
    let control = capture.control();
    Ok(format!(
        "records {} drops {} faults {} gaps {:?} misses {} missed wake-ups {} ring {}..{}",
        control.records(),
        control.drops(),
        control.faults(),
        control.gaps(),
        capture.recursion_misses()?,
        consumer.missed_wakeups(),
        consumer.consumer(),
        consumer.producer(),
    ))
}
