//! The negative control of everything else: without twinwrite, a crash loses what was not flushed.
//! What was fsynced is there. A test bed that loses nothing proves nothing.

use anyhow::{Result, ensure};

use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{CrashKind, Filesystem, KernelRelease, Lab, NodeName, Options, Programs, Service};

/// 512 KiB of `F` are fsynced; then one block of them is overwritten with `N` and 512 KiB of `U`
/// are written to another file. Background writeback is off, or a slow host would flush them.
const WRITE: &str = r#"
import os
def put(name, data, at=0):
    file = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(file, data, at)
    return file
os.fsync(put("synced", b"F" * 524288))
directory = os.open(".", os.O_RDONLY)
os.fsync(directory)
put("synced", b"N" * 4096, 8192)
put("unsynced", b"U" * 524288)
print(open("synced", "rb").read().count(b"N"), os.path.getsize("unsynced"), "written")
"#;

const READ: &str = r#"
import os
synced = open("synced", "rb").read()
unsynced = open("unsynced", "rb").read() if os.path.exists("unsynced") else b""
print(len(synced), synced.count(b"F"), unsynced.count(b"U"))
"#;

pub(super) fn run() -> Result<()> {
    for (filesystem, kernel, crash) in [
        (Filesystem::Ext4, KernelRelease::V6_12, CrashKind::Kill),
        (Filesystem::Xfs, KernelRelease::V6_1, CrashKind::SysrqB),
    ] {
        let options = Options {
            filesystem,
            kernel,
            service: Service::PlainMount,
            programs: Programs::AsBuilt,
            ..Options::default()
        };
        let name = format!("control_loses_unflushed_{filesystem}");
        with_lab(&name, options, |lab| crash_and_look(lab, crash))?;
    }
    Ok(())
}

fn crash_and_look(lab: &Lab, crash: CrashKind) -> Result<()> {
    lab.run(
        NodeName::A,
        "echo 0 >/proc/sys/vm/dirty_writeback_centisecs",
    )?;
    let told = python(lab, NodeName::A, WRITE)?;
    ensure!(
        told == "4096 524288 written",
        "A's workload did not finish: {told}"
    );
    lab.crash(NodeName::A, crash)?;
    lab.mount_plainly(NodeName::B)?;
    let found = python(lab, NodeName::B, READ)?;
    ensure!(
        found == "524288 524288 0",
        "B should find all that was fsynced and nothing else (bytes, F, U): {found}"
    );
    Ok(())
}

fn python(lab: &Lab, node: NodeName, program: &str) -> Result<String> {
    lab.run(
        node,
        &format!("cd {MOUNT_POINT} && python3 - <<'PROGRAM'\n{program}PROGRAM"),
    )
}
