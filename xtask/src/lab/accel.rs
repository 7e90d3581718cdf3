//! Whether the host's processor can run the machines, or it must be emulated.
//!
//! /dev/kvm proves nothing: nested kinds exist that hang or abort on a stock kernel. So a kernel is
//! booted with a short deadline, once per boot of the host.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::config::KernelRelease;
use super::image::Image;
use crate::{paths, progress};

/// Longer than a boot takes with hardware help on a loaded host, shorter than anyone's patience.
const PROBE_LIMIT: Duration = Duration::from_secs(6);

/// How the machines get their processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// The host's processor runs them.
    Kvm,
    /// QEMU translates every instruction.
    Emulation,
}

impl Accelerator {
    /// QEMU's arguments.
    #[must_use]
    pub const fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // Five-level page tables cost time under emulation and bring nothing.
            Self::Emulation => [
                "-accel",
                "tcg,thread=multi,tb-size=256",
                "-cpu",
                "max,la57=off",
            ],
        }
    }
}

/// The best one that works here.
///
/// # Errors
/// If the probe cannot be run at all.
pub(super) fn probe(image: &Image) -> Result<Accelerator> {
    if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(Accelerator::Emulation);
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = paths::lab_cache().join("accelerator.json");
    if let Some(known) = read(&file)
        && known.boot_id == boot_id
    {
        return Ok(known.accelerator);
    }
    let accelerator = progress::step("Trying /dev/kvm", || Ok(boot_with_kvm(image)))?;
    if accelerator == Accelerator::Emulation {
        progress::note("/dev/kvm cannot run a virtual machine here: the processor is emulated");
    }
    fs::write(
        &file,
        serde_json::to_vec(&Known {
            boot_id,
            accelerator,
        })?,
    )?;
    Ok(accelerator)
}

#[derive(Serialize, Deserialize)]
struct Known {
    boot_id: String,
    accelerator: Accelerator,
}

fn read(file: &Path) -> Option<Known> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

fn boot_with_kvm(image: &Image) -> Accelerator {
    let Ok(console) = tempfile::NamedTempFile::new() else {
        return Accelerator::Emulation;
    };
    let release = KernelRelease::default();
    let child = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "q35",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .args(["-display", "none", "-m", "512", "-smp", "2"])
        .args(Accelerator::Kvm.arguments())
        .arg("-serial")
        .arg(format!("file:{}", console.path().display()))
        .arg("-kernel")
        .arg(image.kernel(release))
        .arg("-initrd")
        .arg(image.initrd(release))
        .args(["-append", "console=ttyS0 quiet panic=-1 lab.probe=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        return Accelerator::Emulation;
    };
    let deadline = Instant::now() + PROBE_LIMIT;
    let said_alive = || fs::read(console.path()).is_ok_and(|text| find(&text, b"LABPROBE alive"));
    let mut works = false;
    while Instant::now() < deadline && !works {
        works = said_alive();
        if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
            works = said_alive();
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
    if works {
        Accelerator::Kvm
    } else {
        Accelerator::Emulation
    }
}

fn find(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}
