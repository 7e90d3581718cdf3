//! Making a lab: disks, share, configuration, daemon, first boot.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::config::{self, Filesystem, LabConfig, Lifetime, NodeName, Options, Programs, Service};
use super::power::BOOTS_MAX;
use super::process::ProcessId;
use super::protocol::Request;
use super::{AwaitedState, Lab, accel, daemon, emulator, image, lock, qemu};
use crate::build::{self, Profile};
use crate::{paths, progress};

const VOLUME_BYTES: u64 = 1 << 30;
const MAILBOX_BYTES: u64 = 16 << 20;
const SPARE_BYTES: u64 = 16 << 20;
const LOCAL_BYTES: u64 = 1 << 30;
/// The same in every lab, so that two runs differ in nothing they need not differ in.
const VOLUME_UUID: &str = "77777777-0000-4000-8000-";

const PROTECTED_LIMIT: Duration = Duration::from_secs(120);

const GUEST_FILES: &[(&str, &str)] = &[
    ("init", include_str!("../../guest/init")),
    (
        "twinwrite-fence",
        include_str!("../../guest/twinwrite-fence"),
    ),
    (
        "twinwrite-agent",
        include_str!("../../guest/twinwrite-agent"),
    ),
];

impl Lab {
    /// Makes the lab `name` and boots both machines; returns when the service asked for runs.
    ///
    /// # Errors
    /// If it is up already, the host lacks something, a machine does not boot, or the volume does
    /// not become protected in time. Machines that did not boot are not left behind.
    pub fn up(name: &str, options: Options) -> Result<Self> {
        let lab = Self::named(name)?;
        fs::create_dir_all(paths::labs())?;
        let _lock = lock::exclusive(&paths::labs().join(format!("{name}.lock")))?;
        if lab.is_up()? {
            bail!("lab {name} is up already: cargo xtask vm --lab {name} down");
        }
        let image = image::ensure()?;
        let accelerator = accel::probe(&image)?;
        let programs = Self::programs(options.programs)?;
        let release = options.kernel;
        let what = format!("Booting a and b ({}, kernel {release})", options.filesystem);
        let config = LabConfig {
            options,
            accelerator,
            emulator: emulator::ensure(accelerator)?,
            kernel: image.kernel(release),
            initrd: image.initrd(release),
            root: image.root(),
        };
        let mut tries = 1;
        loop {
            lab.make_directory(&config, &programs)?;
            progress::step(&what, || lab.first_boot(&config.options)).inspect_err(|_| {
                let _ = lab.down();
            })?;
            let Err(error) = lab.start_service(&config.options) else {
                return Ok(lab);
            };
            // An agent that attaches makes the kernel patch its code as well, see `wait_ready`.
            match lab.emulators_fault() {
                Some(fault) if tries < BOOTS_MAX => {
                    progress::note(&format!("{fault}: beginning again"));
                }
                _ => return Err(error),
            }
            lab.down()?;
            tries += 1;
        }
    }

    /// Makes what machines are booted from, if that was not done before.
    ///
    /// # Errors
    /// If the host lacks something, or a package cannot be downloaded or unpacked.
    pub fn prepare() -> Result<()> {
        image::ensure().map(drop)
    }

    fn programs(programs: Programs) -> Result<Vec<std::path::PathBuf>> {
        match programs {
            Programs::Build => {
                let built = build::build(Profile::Release)?;
                Ok(built.programs().map(Path::to_path_buf).collect())
            }
            Programs::AsBuilt => {
                let Ok(built) = build::installed(Profile::Release) else {
                    return Ok(Vec::new());
                };
                Ok(built
                    .programs()
                    .filter(|path| path.is_file())
                    .map(Path::to_path_buf)
                    .collect())
            }
        }
    }

    fn make_directory(&self, config: &LabConfig, programs: &[std::path::PathBuf]) -> Result<()> {
        let directory = self.directory();
        if directory.exists() {
            fs::remove_dir_all(directory)
                .with_context(|| format!("cannot remove the old {}", directory.display()))?;
        }
        let toml = config::twinwrite_toml(&config.options);
        for node in NodeName::ALL {
            let share = self.share(node);
            for sub in ["cmd", "bin", "etc", "guest"] {
                fs::create_dir_all(share.join(sub))?;
            }
            for (name, text) in GUEST_FILES {
                let path = share.join("guest").join(name);
                fs::write(&path, text)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
            fs::write(share.join("etc/twinwrite.toml"), &toml)?;
            let local = directory.join(qemu::Files::of(node).local_disk());
            sparse(&local, LOCAL_BYTES)?;
            make_filesystem(Filesystem::Ext4, &local, None)?;
        }
        install_programs(
            programs,
            &NodeName::ALL.map(|node| self.share(node).join("bin")),
        )?;
        sparse(&self.shared_disk(config::MAILBOX_DISK), MAILBOX_BYTES)?;
        if config.options.spare_disk {
            sparse(&self.shared_disk(config::SPARE_DISK), SPARE_BYTES)?;
        }
        for (index, name) in config.options.volume_disks().enumerate() {
            let volume = self.shared_disk(&name);
            sparse(&volume, config.options.volume_bytes.unwrap_or(VOLUME_BYTES))?;
            let uuid = format!("{VOLUME_UUID}{:012}", index + 1);
            make_filesystem(config.options.filesystem, &volume, Some(&uuid))?;
        }
        config.save(directory)
    }

    fn first_boot(&self, options: &Options) -> Result<()> {
        let owner = match options.lifetime {
            Lifetime::UntilDown => None,
            Lifetime::ThisProcess => ProcessId::own(),
        };
        daemon::start(self.directory(), owner)?;
        for node in NodeName::ALL {
            self.done(&Request::Boot { node })?;
        }
        thread::scope(|scope| {
            let waits = NodeName::ALL.map(|node| scope.spawn(move || self.wait_ready(node)));
            for wait in waits {
                wait.join()
                    .unwrap_or_else(|_| bail!("the thread that waits panicked"))?;
            }
            Ok(())
        })
    }

    fn start_service(&self, options: &Options) -> Result<()> {
        match options.service {
            Service::Nothing => Ok(()),
            Service::PlainMount => self.mount_plainly(NodeName::A),
            Service::Agents => progress::step("Waiting until the volume is protected", || {
                for node in NodeName::ALL {
                    self.agent(node, super::AgentAction::Start)?;
                }
                self.wait(NodeName::A, AwaitedState::Protected, PROTECTED_LIMIT)
                    .map(drop)
            }),
        }
    }

    /// Mounts the volume without any agent.
    ///
    /// # Errors
    /// If it cannot be mounted.
    pub fn mount_plainly(&self, node: NodeName) -> Result<()> {
        let (device, mount_point) = (config::VOLUME_DEVICE, config::MOUNT_POINT);
        self.run(node, &format!("mount {device} {mount_point}"))
            .map(drop)
    }
}

/// Debug information stays on the host: the share is slow and the machines' memory small.
fn install_programs(programs: &[std::path::PathBuf], to: &[std::path::PathBuf]) -> Result<()> {
    for program in programs {
        let name = program.file_name().context("a program has no name")?;
        for directory in to {
            let mut command = Command::new("strip");
            command
                .arg("--strip-debug")
                .arg("-o")
                .arg(directory.join(name))
                .arg(program);
            progress::output(&mut command)?;
        }
    }
    Ok(())
}

fn sparse(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(bytes)
        .with_context(|| format!("cannot size {}", path.display()))
}

fn make_filesystem(filesystem: Filesystem, disk: &Path, uuid: Option<&str>) -> Result<()> {
    let mut command = Command::new(format!("/usr/sbin/mkfs.{filesystem}"));
    command.arg("-q");
    match filesystem {
        // Otherwise the kernel goes on making the file system long after the first mount.
        Filesystem::Ext4 => {
            command.args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]);
            command.args(uuid.iter().flat_map(|uuid| ["-U", uuid]));
        }
        Filesystem::Xfs => {
            let option = uuid.map(|uuid| format!("uuid={uuid}"));
            command.args(option.iter().flat_map(|option| ["-m", option]));
        }
        Filesystem::Btrfs => {
            command.args(uuid.iter().flat_map(|uuid| ["-U", uuid]));
        }
    }
    progress::output(command.arg(disk)).map(drop)
}
