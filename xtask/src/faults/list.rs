//! Faults that a command brings about: each a line of data.

use super::{Course, Ending, Fault, Inject, Sign, Undo, go_on, pause};

const fn fault(
    name: &'static str,
    what: &'static str,
    how: &'static str,
    within_s: u64,
    (inject, sign, ending, undo): (Inject, Sign, Ending, Undo),
) -> Fault {
    Fault {
        name,
        what,
        how,
        within_s,
        course: Course::Plain {
            inject,
            sign,
            ending,
            undo,
        },
    }
}

use Ending::{Fenced, Healed, PowerCut, PowerCutLater};
use Inject::{Host, Mirror, Owner};
use Sign::{OwnerLast, Says, SeenAs, Stays, Weakened};

/// What happens to the agents.
pub(super) const AGENTS: &[Fault] = &[
    fault(
        "agent-killed",
        "the owner's agent dies",
        "SIGKILL, and nobody starts it again",
        15,
        (
            Owner("kill -KILL $(cat /run/twinwrite-agent.pid)"),
            Sign::Mirror("takeover_began"),
            Fenced,
            Undo::Nothing,
        ),
    ),
    fault(
        "agent-frozen",
        "the owner's agent does not run for longer than a death takes to be seen",
        "SIGSTOP",
        15,
        (
            Owner("kill -STOP $(cat /run/twinwrite-agent.pid)"),
            Sign::Mirror("takeover_began"),
            Fenced,
            Undo::Nothing,
        ),
    ),
    fault(
        "agent-out-of-memory",
        "the kernel kills the owner's agent for want of memory",
        "oom_score_adj 1000, then the OOM killer by sysrq f",
        20,
        (
            Owner(
                "pid=$(cat /run/twinwrite-agent.pid); echo 1000 >/proc/$pid/oom_score_adj; \
                 echo f >/proc/sysrq-trigger; \
                 for i in $(seq 60); do twinwrite-agent alive || exit 0; sleep 0.05; done; exit 1",
            ),
            Sign::Mirror("takeover_began"),
            Fenced,
            Undo::Nothing,
        ),
    ),
    fault(
        "both-agents-restarted",
        "both agents die and start again at once",
        "SIGKILL to both, then a start of both",
        10,
        (
            Host(|pair| {
                let begun = pair.now(pair.owner)?;
                for node in crate::lab::NodeName::ALL {
                    pair.lab.agent(node, crate::lab::AgentAction::Kill)?;
                }
                for node in crate::lab::NodeName::ALL {
                    pair.lab.agent(node, crate::lab::AgentAction::Start)?;
                }
                Ok(begun)
            }),
            Weakened,
            PowerCutLater,
            Undo::Nothing,
        ),
    ),
    fault(
        "restart-announced",
        "the owner dies while its agent is being upgraded",
        "`twinwrite stop --restart-within 15s`, and no start",
        10,
        (
            Owner("twinwrite stop --restart-within 15s"),
            OwnerLast("agent_stopped", "restarts"),
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "mirror-agent-killed",
        "the mirror's agent dies",
        "SIGKILL; started again after the owner's power was cut",
        15,
        (
            Mirror("twinwrite-agent kill"),
            Weakened,
            PowerCut,
            Undo::Mirror("twinwrite-agent start"),
        ),
    ),
    fault(
        "mirror-agent-frozen",
        "the mirror's agent does not run",
        "SIGSTOP; SIGCONT after the owner's power was cut",
        15,
        (
            Mirror("kill -STOP $(cat /run/twinwrite-agent.pid)"),
            Weakened,
            PowerCut,
            Undo::Mirror("kill -CONT $(cat /run/twinwrite-agent.pid)"),
        ),
    ),
    fault(
        "wrong-peer",
        "at the mirror's address answers another cluster's node",
        "the mirror's agent is started again with another cluster's name and mailbox",
        20,
        (
            Mirror(
                "twinwrite-agent kill; cd /etc/twinwrite; cp twinwrite.toml /run/right.toml; \
                 truncate -s 16M /run/other-mailbox; \
                 sed -i 's/^name = \"lab\"/name = \"elsewhere\"/; \
                 s|^mailbox = .*|mailbox = \"/var/lib/twinwrite/other-mailbox\"|' twinwrite.toml; \
                 truncate -s 16M /var/lib/twinwrite/other-mailbox; twinwrite-agent start",
            ),
            Says("elsewhere"),
            Healed,
            Undo::Mirror(
                "twinwrite-agent kill; cp /run/right.toml /etc/twinwrite/twinwrite.toml; \
                 rm -f /var/lib/twinwrite/other-mailbox; twinwrite-agent start",
            ),
        ),
    ),
];

/// What happens to the wire.
pub(super) const LINKS: &[Fault] = &[
    fault(
        "link-cut",
        "the link is cut, the mailbox lives",
        "both ends of the wire off; on again after the power cut",
        10,
        (
            Host(|pair| {
                let begun = pair.now(pair.owner)?;
                pair.lab.cut_link()?;
                Ok(begun)
            }),
            Weakened,
            PowerCut,
            Undo::Host(|pair| pair.lab.heal_link().map(drop)),
        ),
    ),
    fault(
        "link-slow",
        "the link answers late",
        "netem: 6 s of delay on the owner's side",
        12,
        (
            Owner("tc qdisc add dev eth0 root netem delay 6000ms limit 100000"),
            Weakened,
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "link-narrow",
        "the link carries less than is written",
        "netem: 128 kbit/s on the owner's side",
        20,
        (
            Owner("tc qdisc add dev eth0 root netem rate 128kbit limit 100000"),
            Weakened,
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "link-lossy",
        "the link loses most of its packets",
        "netem: 70 % loss on the owner's side",
        20,
        (
            Owner("tc qdisc add dev eth0 root netem loss 70%"),
            Weakened,
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "rdma-dropped",
        "RDMA writes and heartbeats are lost, TCP is not",
        "netem on UDP port 4791: all lost on the owner's side",
        15,
        (
            Owner(
                "tc qdisc add dev eth0 root handle 1: prio && \
                 tc qdisc add dev eth0 parent 1:3 handle 30: netem loss 100% && \
                 tc filter add dev eth0 parent 1: protocol ip u32 match ip protocol 17 0xff \
                 match ip dport 4791 0xffff flowid 1:3",
            ),
            Weakened,
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "control-dropped",
        "the control connection is lost, RDMA is not",
        "netem on TCP: all lost on the owner's side; mirroring goes on",
        10,
        (
            Owner(
                "tc qdisc add dev eth0 root handle 1: prio && \
                 tc qdisc add dev eth0 parent 1:3 handle 30: netem loss 100% && \
                 tc filter add dev eth0 parent 1: protocol ip u32 match ip protocol 6 0xff flowid 1:3",
            ),
            Stays(8),
            PowerCut,
            Undo::Nothing,
        ),
    ),
];

/// What happens to capture, ring and region.
pub(super) const CAPTURE: &[Fault] = &[
    fault(
        "ring-full",
        "more is written at once than the ring holds",
        "32 MiB into a ring of 16 MiB while the agent is held by SIGSTOP",
        5,
        (
            Owner(
                "pid=$(cat /run/twinwrite-agent.pid); kill -STOP $pid; \
                 dd if=/dev/zero of=/srv/vol0/burst bs=64k count=512 status=none; kill -CONT $pid",
            ),
            Says("the ring was full"),
            PowerCutLater,
            Undo::Nothing,
        ),
    ),
    fault(
        "record-too-large",
        "one write is larger than the region",
        "a single write of 80 MiB into a region of 64 MiB",
        15,
        (
            Owner("dd if=/dev/zero of=/srv/vol0/large bs=80M count=1 status=none"),
            Weakened,
            PowerCutLater,
            Undo::Nothing,
        ),
    ),
    fault(
        "program-unpinned",
        "the pin of one capture program is removed",
        "rm of its link in bpffs",
        5,
        (
            Owner("rm /sys/fs/bpf/twinwrite/vol0/link-write_generic"),
            Says("removed"),
            PowerCutLater,
            Undo::Nothing,
        ),
    ),
    fault(
        "pins-removed",
        "all pinned programs and maps are removed",
        "rm of the volume's directory in bpffs",
        5,
        (
            Owner("rm -r /sys/fs/bpf/twinwrite/vol0"),
            Says("removed"),
            PowerCutLater,
            Undo::Nothing,
        ),
    ),
    fault(
        "direct-write",
        "a change that is noticed and not captured",
        "a direct write of 64 KiB",
        5,
        (
            Owner("dd if=/dev/zero of=/srv/vol0/direct bs=64k count=1 oflag=direct status=none"),
            Says("direct-io"),
            PowerCutLater,
            Undo::Nothing,
        ),
    ),
];

/// What happens to the disks and the file system.
pub(super) const DISKS: &[Fault] = &[
    fault(
        "mailbox-error",
        "the mailbox's disk fails for the owner",
        "dm: the error target",
        10,
        (
            Owner(
                "dmsetup suspend --noflush lab-mailbox && \
                 dmsetup reload lab-mailbox --table \"0 $(cat /run/size-mailbox) error\" && \
                 dmsetup resume lab-mailbox",
            ),
            Sign::Owner("mailbox"),
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "mailbox-hang",
        "the mailbox's disk does not answer the owner",
        "dm suspend",
        15,
        (
            Owner("dmsetup suspend --noflush lab-mailbox"),
            SeenAs("mailbox_silent"),
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "volume-error",
        "the volume's disk fails for the owner",
        "dm: the error target",
        20,
        (
            Owner(
                "dmsetup suspend --noflush --nolockfs lab-volume && \
                 dmsetup reload lab-volume --table \"0 $(cat /run/size-volume) error\" && \
                 dmsetup resume lab-volume",
            ),
            Weakened,
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "volume-hang",
        "the volume's disk does not answer the owner for longer than `volume_io_limit`",
        "dm suspend",
        30,
        (
            Owner("dmsetup suspend --noflush --nolockfs lab-volume"),
            Sign::MirrorSays("takeover_began", "volume_io_limit"),
            Fenced,
            Undo::Nothing,
        ),
    ),
    fault(
        "remounted-read-only",
        "the volume becomes read-only",
        "ext4 meets an error and is mounted with errors=remount-ro",
        5,
        (
            Owner(
                "mount -o remount,errors=remount-ro /srv/vol0; \
                 for device in /sys/block/dm-*; do \
                 [ \"$(cat $device/dm/name)\" = lab-volume ] && break; done; \
                 echo injected >/sys/fs/ext4/${device##*/}/trigger_fs_error",
            ),
            Says("read-only"),
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "filesystem-shut-down",
        "the file system shuts itself down",
        "FS_IOC_SHUTDOWN without a log flush",
        10,
        (
            Owner("xfs_io -x -c shutdown /srv/vol0"),
            Weakened,
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "unmounted",
        "the volume is unmounted under the agent",
        "umount --lazy",
        5,
        (
            Owner("umount --lazy /srv/vol0"),
            Says("no longer mounted"),
            PowerCut,
            Undo::Nothing,
        ),
    ),
];

/// What happens to whole machines and their clocks.
pub(super) const NODES: &[Fault] = &[
    fault(
        "mirror-paused",
        "the mirror's machine stands still",
        "QEMU stop; it goes on after the owner's power was cut",
        15,
        (
            Host(|pair| {
                let begun = pair.now(pair.owner)?;
                pause(pair.lab, pair.mirror())?;
                Ok(begun)
            }),
            Weakened,
            PowerCut,
            Undo::Host(|pair| go_on(pair.lab, pair.mirror())),
        ),
    ),
    fault(
        "mirror-power-cut",
        "the mirror's power is cut",
        "QEMU is killed; it boots again",
        15,
        (
            Host(|pair| {
                let begun = pair.now(pair.owner)?;
                pair.lab.crash(pair.mirror(), crate::lab::CrashKind::Kill)?;
                Ok(begun)
            }),
            Weakened,
            Healed,
            Undo::Host(|pair| pair.bring_up(pair.mirror())),
        ),
    ),
    fault(
        "owner-panics",
        "the owner's kernel panics",
        "sysrq c",
        15,
        (
            Host(|pair| {
                let begun = pair.now(pair.owner)?;
                pair.lab.crash(pair.owner, crate::lab::CrashKind::SysrqC)?;
                Ok(begun)
            }),
            Sign::Mirror("takeover_began"),
            Fenced,
            Undo::Nothing,
        ),
    ),
    fault(
        "owner-paused",
        "the owner's machine stands still for longer than `dead_after`",
        "QEMU stop",
        15,
        (
            Host(|pair| {
                let begun = pair.now(pair.owner)?;
                pause(pair.lab, pair.owner)?;
                Ok(begun)
            }),
            Sign::Mirror("takeover_began"),
            Fenced,
            Undo::Nothing,
        ),
    ),
    fault(
        "clock-ahead",
        "the owner's clock jumps an hour ahead",
        "date -s; nothing depends on it",
        10,
        (
            Owner("date -s '+1 hour' >/dev/null"),
            Stays(8),
            PowerCut,
            Undo::Nothing,
        ),
    ),
    fault(
        "clock-back",
        "the owner's clock jumps an hour back",
        "date -s; nothing depends on it",
        10,
        (
            Owner("date -s '-1 hour' >/dev/null"),
            Stays(8),
            PowerCut,
            Undo::Nothing,
        ),
    ),
];
