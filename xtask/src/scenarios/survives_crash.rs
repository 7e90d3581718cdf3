//! The whole of it, in short: protect, write without a flush, cut the power, take over, look.

use anyhow::{Result, ensure};

use super::bench::{
    LIMIT, NO_CHECKPOINT, Stream, all_mirrored, await_takeover, crash_and_copy, log_mark, metric,
    number, options, require_start, until,
};
use super::with_lab;
use crate::lab::config::{MOUNT_POINT, VOLUME_DEVICE};
use crate::lab::shell_quoted;
use crate::lab::{AgentAction, AwaitedState, Filesystem, KernelRelease, Lab, NodeName, Options};

const OPERATIONS: u64 = 600;

pub(super) fn run() -> Result<()> {
    with_lab("survives_crash", options(&[], &[NO_CHECKPOINT]), crash)
}

pub(super) fn on_btrfs() -> Result<()> {
    with_lab("survives_crash_btrfs", btrfs(KernelRelease::V6_12), |lab| {
        crash(lab)?;
        tells_other_trees(lab)
    })
}

pub(super) fn on_btrfs_of_6_1() -> Result<()> {
    with_lab(
        "survives_crash_btrfs_6_1",
        btrfs(KernelRelease::V6_1),
        crash,
    )
}

fn btrfs(kernel: KernelRelease) -> Options {
    Options {
        filesystem: Filesystem::Btrfs,
        kernel,
        ..options(&[], &[NO_CHECKPOINT])
    }
}

/// Makes a subvolume, deletes it with a file of it open, and writes to that once it is told to. The calls are
/// `BTRFS_IOC_SUBVOL_CREATE` and `BTRFS_IOC_SNAP_DESTROY`.
const OTHER_TREE: &str = r#"
import fcntl, os, struct, sys, time
top = os.open(sys.argv[1], os.O_RDONLY)
name = bytearray(struct.pack("q4088s", 0, b"other"))
# What is no longer pinned goes on refusing for a moment.
for attempt in range(100):
    try:
        fcntl.ioctl(top, 0x5000940E, name)
        break
    except OSError:
        time.sleep(0.1)
file = os.open(sys.argv[1] + "/other/file", os.O_CREAT | os.O_WRONLY)
fcntl.ioctl(top, 0x5000940F, name)
print("deleted", flush=True)
while not os.path.exists("/run/go"):
    time.sleep(0.1)
os.write(file, b"bytes")
"#;

/// A subvolume that was deleted lives on while somebody has a file of it open, and no look at the volume shows it. Its
/// files' identities are those of other files, so what is written there must end the protection.
fn tells_other_trees(lab: &Lab) -> Result<()> {
    let owner = NodeName::B;
    lab.boot(owner.peer(), true)?;
    lab.wait(owner, AwaitedState::Protected, LIMIT)?;
    lab.agent(owner, AgentAction::Stop)?;
    // The programs stay when the agent ends, and go on to refuse it.
    let script = shell_quoted(OTHER_TREE);
    lab.run(
        owner,
        &format!(
            "rm -r /sys/fs/bpf/twinwrite; \
             mountpoint -q {MOUNT_POINT} || mount {VOLUME_DEVICE} {MOUNT_POINT}; \
             setsid python3 -c {script} {MOUNT_POINT} </dev/null >/run/other 2>&1 & \
             for i in $(seq 200); do grep -q deleted /run/other && exit; sleep 0.1; done; \
             cat /run/other >&2; exit 1"
        ),
    )?;
    lab.agent(owner, AgentAction::Start)?;
    lab.wait(owner, AwaitedState::Protected, LIMIT)?;
    let told = || metric(lab, owner, "twinwrite_gaps_total", "other-subvolume");
    ensure!(told()? == 0.0, "a change in another tree is told before it");
    let mark = log_mark(lab, owner);
    lab.run(owner, "touch /run/go")?;
    until(lab, "the change in another tree is told", LIMIT, || {
        let log = std::fs::read_to_string(lab.agent_log(owner))?;
        let log = log.get(mark..).unwrap_or_default();
        Ok(told()? > 0.0 && log.contains("Exposed") && log.contains("other-subvolume"))
    })
}

fn crash(lab: &Lab) -> Result<()> {
    require_start(lab)?;
    let stream = Stream::start(lab, NodeName::A, OPERATIONS, 0)?;
    stream.finish()?;
    let records = all_mirrored(lab, NodeName::A)?;
    let disk = crash_and_copy(lab, NodeName::A)?;
    let takeover = await_takeover(lab, NodeName::B)?;
    ensure!(
        number(&takeover, "records_replayed")? >= OPERATIONS
            && number(&takeover, "cut_seq")? >= records,
        "{records} records were mirrored and not all were replayed: {takeover}"
    );
    stream.require_all(NodeName::B)?;
    stream.require_loss(&disk)
}
