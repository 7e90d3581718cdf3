//! A kernel package, unpacked: the uncompressed kernel, the modules, the initial ramdisk.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::KernelRelease;
use crate::progress::{output, run_logged};
use crate::setup::update_lists_if_absent;

/// What is needed to reach the root and the host's share.
pub(super) const INITRD_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "erofs",
    "overlay",
    "9pnet_virtio",
    "9p",
];

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// Where it was unpacked.
    root: PathBuf,
    /// Its full version, as `uname -r` prints it.
    version: String,
}

/// Downloads and unpacks the package that the meta package of `release` stands for.
pub(super) fn download(release: KernelRelease, work: &Path, log: &Path) -> Result<Tree> {
    let meta = release.debian_package();
    update_lists_if_absent(meta, log)?;
    let depends = output(Command::new("apt-cache").args(["depends", "--important", meta]))?;
    let package = String::from_utf8_lossy(&depends)
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: ").map(str::to_owned))
        .with_context(|| format!("Debian package {meta} names no kernel: run apt-get update"))?;
    let debs = work.join(format!("deb-{release}"));
    fs::create_dir_all(&debs)?;
    run_logged(
        Command::new("apt-get").current_dir(&debs).args([
            "-o",
            "APT::Sandbox::User=root",
            "download",
            &package,
        ]),
        log,
    )?;
    let root = work.join(format!("kernel-{release}"));
    let deb = only_entry(&debs)?;
    run_logged(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root), log)?;
    fs::remove_file(deb)?;
    let modules = only_entry(&root.join("lib/modules"))?;
    let version = modules
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    run_logged(
        Command::new("depmod").arg("-b").arg(&root).arg(&version),
        log,
    )?;
    Ok(Tree { root, version })
}

/// Takes the compressed kernel out of the boot image, as its header says, and unpacks it.
pub(super) fn extract_vmlinux(tree: &Tree, to: &Path) -> Result<()> {
    let path = tree.root.join(format!("boot/vmlinuz-{}", tree.version));
    let image = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let payload =
        payload(&image).with_context(|| format!("{} is not a Linux boot image", path.display()))?;
    let (mut command, payload) = if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        // The kernel's build appends the unpacked length, which zstd would take for damage.
        let mut command = Command::new("zstd");
        command.arg("-dc");
        (
            command,
            payload
                .get(..payload.len().saturating_sub(4))
                .unwrap_or_default(),
        )
    } else if payload.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        let mut command = Command::new("xz");
        command.args(["-dc", "--single-stream"]);
        (command, payload)
    } else {
        bail!("{}: compressed by neither zstd nor xz", path.display());
    };
    let out = fs::File::create(to)?;
    let mut child = command.stdin(Stdio::piped()).stdout(out).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // xz stops reading at the end of its stream and closes the pipe: not an error.
        let _ = stdin.write_all(payload);
    }
    let status = child.wait()?;
    let begins = fs::read(to)?;
    if !status.success() || !begins.starts_with(b"\x7fELF") {
        bail!("{} could not be unpacked ({status})", path.display());
    }
    Ok(())
}

/// The boot protocol's `payload_offset` and `payload_length`, from the end of the setup sectors.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let from = (sectors + 1) * 512 + word(0x248)?;
    image.get(from..from.checked_add(word(0x24c)?)?)
}

/// A busybox, the modules in the order they must be loaded, and the first stage.
pub(super) fn make_initrd(tree: &Tree, work: &Path, to: &Path) -> Result<()> {
    for directory in [
        "bin",
        "dev",
        "proc",
        "sys",
        "lib/modules",
        "ro",
        "rw",
        "new",
    ] {
        fs::create_dir_all(work.join(directory))?;
    }
    fs::copy("/bin/busybox", work.join("bin/busybox"))?;
    for applet in [
        "sh",
        "mount",
        "insmod",
        "mkdir",
        "switch_root",
        "sleep",
        "cat",
        "cp",
        "echo",
    ] {
        symlink("busybox", work.join("bin").join(applet))?;
    }
    let init = work.join("init");
    fs::write(&init, include_str!("../../../guest/initrd-init"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let modules = tree.with_dependencies(INITRD_MODULES)?;
    let copied = copy_modules(&modules, |module| {
        work.join("lib/modules")
            .join(module.file_name().unwrap_or_default())
    })?;
    let mut order = String::new();
    for module in copied {
        order += &module.file_name().unwrap_or_default().to_string_lossy();
        order.push('\n');
    }
    fs::write(work.join("lib/modules/order"), order)?;
    // Not compressed: unpacking under emulation takes longer than reading.
    let script = r#"cd "$1" && find . | cpio --quiet -o -H newc > "$2""#;
    output(
        Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(work)
            .arg(to),
    )?;
    Ok(())
}

impl Tree {
    /// Copies `names` and what they need into the root being made at `root`.
    pub(super) fn install_modules(&self, names: &[&str], root: &Path) -> Result<()> {
        let from = self.root.join("lib/modules").join(&self.version);
        let to = root.join("lib/modules").join(&self.version);
        fs::create_dir_all(&to)?;
        for list in [
            "modules.order",
            "modules.builtin",
            "modules.builtin.modinfo",
        ] {
            fs::copy(from.join(list), to.join(list))?;
        }
        copy_modules(&self.with_dependencies(names)?, |module| {
            to.join(module.strip_prefix(&from).unwrap_or(module))
        })?;
        output(
            Command::new("depmod")
                .arg("-b")
                .arg(root)
                .arg(&self.version),
        )?;
        Ok(())
    }

    /// Module files in the order they must be loaded; what is built in needs none.
    fn with_dependencies(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let mut command = Command::new("modprobe");
            command
                .arg("-d")
                .arg(&self.root)
                .args(["-S", &self.version, "--show-depends", name]);
            let text = output(&mut command)
                .with_context(|| format!("kernel {} has no module {name}", self.version))?;
            for line in String::from_utf8_lossy(&text).lines() {
                // What follows the path are the module's parameters.
                let mut words = line.split_ascii_whitespace();
                let (Some("insmod"), Some(path)) = (words.next(), words.next()) else {
                    continue;
                };
                let path = PathBuf::from(path);
                if !files.contains(&path) {
                    files.push(path);
                }
            }
        }
        Ok(files)
    }
}

/// Copies modules, unpacked and without debug information; gives the new paths in the same order.
fn copy_modules(modules: &[PathBuf], to: impl Fn(&Path) -> PathBuf) -> Result<Vec<PathBuf>> {
    let mut packed = Vec::new();
    let mut plain = Vec::new();
    for module in modules {
        let target = to(module);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(module, &target)
            .with_context(|| format!("cannot copy the module {}", module.display()))?;
        if target
            .extension()
            .is_some_and(|extension| extension == "xz")
        {
            plain.push(target.with_extension(""));
            packed.push(target);
        } else {
            plain.push(target);
        }
    }
    if !packed.is_empty() {
        output(Command::new("xz").arg("-d").args(&packed))?;
    }
    output(Command::new("strip").arg("-g").args(&plain))?;
    Ok(plain)
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    match entries.pop() {
        Some(entry) if entries.is_empty() => Ok(entry.path()),
        _ => bail!("{} does not hold exactly one entry", directory.display()),
    }
}
