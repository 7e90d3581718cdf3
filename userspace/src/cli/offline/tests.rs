//! `twinwrite replay` on a mounted volume. Needs root, unless `TWINWRITE_NO_LOOP` leaves it out.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use zerocopy::IntoBytes as _;

use super::*;
use crate::capture::handle;
use crate::ids::Identity;
use crate::record::{RecordHeader, encode};
use crate::region::layout::{
    FRAME_MAGIC, FrameHeader, LOG_BYTES_MIN, LOG_OFFSET, MIRRORED_MAGIC, Mirrored, REGION_MAGIC,
    REGION_VERSION, RegionHeader, STATUS_OFFSET, Sealed as _, chain_start, kind, region_state,
};
use crate::replay::sentinel;

const EPOCH: u64 = 7;

/// A mounted ext4 that is protected in epoch 7, with a file `f`.
struct Mounted {
    scratch: TempDir,
    file: Identity,
}

fn run(command: &str, arguments: &[&str]) {
    let output = Command::new(command).args(arguments).output();
    let output = output.expect("the command exists");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {text}");
}

fn padded(name: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

impl Mounted {
    fn new() -> Self {
        let scratch = tempfile::Builder::new()
            .prefix("twinwrite-offline-")
            .tempdir_in("/dev/shm")
            .expect("scratch");
        let image = scratch.path().join("image");
        let image_text = image.to_str().expect("an own path");
        let file = std::fs::File::create(&image).expect("create");
        file.set_len(16 << 20).expect("size");
        run("mkfs.ext4", &["-q", "-F", image_text]);
        let mount = scratch.path().join("mount");
        std::fs::create_dir(&mount).expect("mkdir");
        let mount_text = mount.to_str().expect("an own path");
        run("mount", &["-o", "loop", image_text, mount_text]);
        std::fs::write(mount.join("f"), b"older").expect("write");
        let opened = std::fs::File::open(mount.join("f")).expect("open");
        let file = handle::identity_of(opened).expect("a handle");
        Self { scratch, file }
    }

    fn mount(&self) -> PathBuf {
        self.scratch.path().join("mount")
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.mount().join("f")).expect("read")
    }

    /// A region of one record, which writes `newer` into `f`.
    fn arguments(&self, filesystem_uuid: [u8; 16], dry_run: bool) -> ReplayArguments {
        let region = self.scratch.path().join("region");
        std::fs::write(&region, region_bytes(self.file, filesystem_uuid)).expect("write");
        ReplayArguments {
            region,
            to: self.mount(),
            dry_run,
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..100 {
            match nix::mount::umount(&self.mount()) {
                Err(nix::errno::Errno::EBUSY) => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                _ => break,
            }
        }
    }
}

fn region_bytes(file: Identity, filesystem_uuid: [u8; 16]) -> Vec<u8> {
    let header = RegionHeader {
        magic: REGION_MAGIC,
        version: REGION_VERSION,
        state: region_state::OPEN,
        epoch: EPOCH,
        log_bytes: LOG_BYTES_MIN,
        cluster: padded("test"),
        volume: padded("v"),
        owner: padded("a"),
        mirror: padded("b"),
        filesystem_uuid,
        reserved: 0,
        crc32c: 0,
    }
    .seal();
    let mut body = Vec::new();
    let record = RecordHeader {
        ino: file.ino,
        generation: file.generation,
        mode: 0o100_644,
        size_after: 5,
        time_ns: 1_000_000_000,
        ..Default::default()
    };
    encode::push_write(&mut body, record, b"newer");
    let frame = FrameHeader {
        magic: FRAME_MAGIC,
        version: 1,
        kind: kind::RUN,
        flags: 0,
        epoch: EPOCH,
        lsn: 0,
        first_seq: 1,
        ring_pos: 0,
        count: 1,
        body_len: u32::try_from(body.len()).expect("small"),
        body_crc32c: crc32c::crc32c(&body),
        previous_crc32c: chain_start(EPOCH),
        fill_offset: 0,
        header_crc32c: 0,
    }
    .seal();
    let mirrored = Mirrored {
        magic: MIRRORED_MAGIC,
        reserved: 0,
        epoch: EPOCH,
        lsn: frame.stride(),
        seq: 1,
        time_ns: 1,
        lag_records: 0,
        reserved2: [0; 3],
        crc32c: 0,
    }
    .seal();
    let mut region = vec![0; usize::try_from(LOG_OFFSET + LOG_BYTES_MIN).expect("small")];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).expect("small");
        region[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, header.as_bytes());
    put(STATUS_OFFSET, mirrored.as_bytes());
    put(LOG_OFFSET, frame.as_bytes());
    put(LOG_OFFSET + 64, &body);
    region
}

fn held(mount: &Path) -> SentinelFile {
    let mut held = SentinelFile::open(mount).expect("open");
    let sentinel = Sentinel {
        cluster: "test".into(),
        volume: "v".into(),
        epoch: Epoch(EPOCH),
        seq: Seq(0),
        closed: false,
        time_ns: 1,
    };
    held.write(&sentinel).expect("write");
    held
}

#[test]
fn a_volume_that_an_agent_serves_or_of_another_uuid_is_left_alone() {
    if std::env::var_os("TWINWRITE_NO_LOOP").is_some() {
        println!("SKIPPED, because TWINWRITE_NO_LOOP is set");
        return;
    }
    let mounted = Mounted::new();
    let mount = mounted.mount();
    let uuid = mounted_uuid(&mount).expect("a UUID");
    assert_ne!(uuid, [0; 16]);
    assert!(mounted_uuid(mounted.scratch.path()).is_err());

    let error = replay(&mounted.arguments(uuid, false)).expect_err("it was never protected");
    assert!(error.to_string().contains("no sentinel"), "{error}");
    assert!(!mount.join(".twinwrite").exists());

    let agent = held(&mount);
    let error = replay(&mounted.arguments(uuid, false)).expect_err("an agent serves it");
    assert!(error.to_string().contains("another agent"), "{error}");
    replay(&mounted.arguments(uuid, true)).expect("a dry run disturbs nobody");
    assert_eq!(mounted.bytes(), b"older");
    drop(agent);

    let error = replay(&mounted.arguments([9; 16], false)).expect_err("another file system");
    assert!(error.to_string().contains("09090909-0909-"), "{error}");
    assert_eq!(mounted.bytes(), b"older");

    replay(&mounted.arguments(uuid, false)).expect("nobody else is there");
    assert_eq!(mounted.bytes(), b"newer");
    let told = sentinel::read(&mount).expect("read");
    assert_eq!((told.epoch, told.closed), (Epoch(EPOCH + 1), true));
    std::fs::write(mount.join("f"), b"later").expect("write");
    replay(&mounted.arguments(uuid, false)).expect("nothing to merge");
    assert_eq!(mounted.bytes(), b"later");
}
