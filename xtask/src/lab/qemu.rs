//! The command line of a machine. All paths but the image's are relative to the lab's directory,
//! which is the daemon's working directory: socket names have a length limit.

use std::ffi::OsString;

use super::config::{DiskKind, LabConfig, NodeName, Options};

const MEMORY_MIB: &str = "1536";
const PROCESSORS: &str = "2";

/// Files of one machine, relative to the lab's directory.
pub(super) struct Files {
    node: NodeName,
}

impl Files {
    pub(super) const fn of(node: NodeName) -> Self {
        Self { node }
    }

    fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.node)
    }

    pub(super) fn console(&self) -> String {
        self.file("console.log")
    }

    pub(super) fn qemu_log(&self) -> String {
        self.file("qemu.log")
    }

    pub(super) fn monitor(&self) -> String {
        self.file("monitor.sock")
    }

    pub(super) fn command_port(&self) -> String {
        self.file("command.sock")
    }

    pub(super) fn fence_port(&self) -> String {
        self.file("fence.sock")
    }

    pub(super) fn wire(&self) -> String {
        self.file("wire.sock")
    }

    pub(super) fn local_disk(&self) -> String {
        self.file("local.raw")
    }

    /// Where this machine reaches the shared disks if they are volatile.
    pub(super) fn disks(&self) -> String {
        self.file("disks.sock")
    }

    pub(super) fn share(&self) -> String {
        self.file("share")
    }

    /// What QEMU makes anew at each start and would trip over.
    pub(super) fn stale_at_boot(&self) -> [String; 6] {
        let ready = format!("{}/ready", self.share());
        let problem = format!("{}/problem", self.share());
        [
            self.monitor(),
            self.command_port(),
            self.fence_port(),
            self.wire(),
            ready,
            problem,
        ]
    }
}

/// A shared disk's file, relative to the lab's directory.
pub(super) fn disk_file(name: &str) -> String {
    format!("{name}.raw")
}

/// Program and arguments that start the machine `node`. `setpriv` makes the kernel end QEMU with
/// the thread that started it, and replaces itself by QEMU.
pub(super) fn command_line(config: &LabConfig, node: NodeName) -> Vec<OsString> {
    let files = Files::of(node);
    let mut line = Line::default();
    line.words("setpriv --pdeathsig KILL --");
    line.0.extend(config.emulator.words());
    line.pair("-name", format!("twinwrite-{node}"));
    line.words("-machine q35 -nodefaults -no-user-config -no-reboot -display none");
    line.0
        .extend(config.accelerator.arguments().map(OsString::from));
    line.pair("-smp", PROCESSORS.to_owned());
    line.pair("-m", MEMORY_MIB.to_owned());
    line.pair("-serial", format!("file:{}", files.console()));
    line.pair(
        "-monitor",
        format!("unix:{},server=on,wait=off", files.monitor()),
    );
    line.pair("-kernel", config.kernel.display().to_string());
    line.pair("-initrd", config.initrd.display().to_string());
    line.pair("-append", kernel_line(node, &config.options));
    line.disk("root", &config.root.display().to_string(), "readonly=on");
    // No host cache: what the guest was told is on the disk outlives the machine, and the other
    // machine sees it.
    const DIRECT: &str = "cache=none";
    for name in config.options.shared_disks() {
        match config.options.disks {
            DiskKind::Plain => line.disk(&name, &disk_file(&name), DIRECT),
            DiskKind::Volatile => line.served_disk(&name, &files.disks()),
        }
    }
    line.disk("local", &files.local_disk(), DIRECT);
    line.pair(
        "-fsdev",
        format!("local,id=host,path={},security_model=none", files.share()),
    );
    line.words("-device virtio-9p-pci,fsdev=host,mount_tag=host");
    line.words("-device virtio-serial-pci");
    line.port("command", &files.command_port());
    line.port("fence", &files.fence_port());
    line.words("-device virtio-rng-pci");
    line.pair(
        "-netdev",
        format!(
            "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            files.wire(),
            Files::of(node.peer()).wire()
        ),
    );
    let mac = if node == NodeName::A {
        "52:54:00:77:00:01"
    } else {
        "52:54:00:77:00:02"
    };
    // 9000 gives soft-RoCE its largest packets.
    line.pair(
        "-device",
        format!("virtio-net-pci,netdev=n0,mac={mac},romfile=,host_mtu=9000"),
    );
    line.0
}

fn kernel_line(node: NodeName, options: &Options) -> String {
    format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check \
         lsm=landlock,lockdown,yama,integrity,apparmor,bpf net.ifnames=0 \
         lab.node={node} lab.ip={} lab.filesystem={} {}",
        node.address(),
        options.filesystem,
        options.kernel_parameters.join(" ")
    )
}

#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn words(&mut self, words: &str) {
        self.0.extend(words.split(' ').map(OsString::from));
    }

    fn pair(&mut self, option: &str, value: String) {
        self.0.extend([option.into(), value.into()]);
    }

    fn disk(&mut self, name: &str, file: &str, more: &str) {
        self.pair(
            "-drive",
            format!("if=none,id={name},file={file},format=raw,file.locking=off,{more}"),
        );
        self.pair(
            "-device",
            format!("virtio-blk-pci,drive={name},serial={name}"),
        );
    }

    fn served_disk(&mut self, name: &str, socket: &str) {
        self.pair(
            "-drive",
            format!(
                "if=none,id={name},file=nbd:unix:{socket}:exportname={name},format=raw,cache=none"
            ),
        );
        self.pair(
            "-device",
            format!("virtio-blk-pci,drive={name},serial={name}"),
        );
    }

    fn port(&mut self, name: &str, socket: &str) {
        self.pair(
            "-chardev",
            format!("socket,id={name},path={socket},server=on,wait=off"),
        );
        self.pair(
            "-device",
            format!("virtserialport,chardev={name},name=twinwrite.{name}"),
        );
    }
}
