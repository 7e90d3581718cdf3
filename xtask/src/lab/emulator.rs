//! Which QEMU runs the machines.
//!
//! Before 8.1 one emulated processor could translate code while another one was just changing it, and kept
//! running what it had read (QEMU commit deba78709ae8, "accel/tcg: Always lock pages before translation").
//! A kernel patches its own code with every program that is attached, so about one machine in a hundred
//! died of a breakpoint that was long taken back. Debian 12 has 7.2, and a newer one in its backports, which
//! is unpacked into the cache: nothing of it is installed. Where it cannot be had the host's own must do.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::accel::Accelerator;
use super::lock;
use crate::paths;
use crate::progress::{self, output, run_logged};
use crate::setup::is_debian_12;

const PROGRAM: &str = "qemu-system-x86_64";
/// The first release without that fault.
const SOUND_SINCE: (u32, u32) = (8, 1);
const SUITE: &str = "bookworm-backports";
const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const MIRROR: &str = "http://deb.debian.org/debian/";

/// A QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emulator {
    /// The program.
    program: PathBuf,
    /// Where it finds its firmware, if not where it was built for.
    firmware: Vec<PathBuf>,
}

impl Emulator {
    /// The program and the arguments that come before all others.
    pub(super) fn words(&self) -> impl Iterator<Item = OsString> + '_ {
        let firmware = self.firmware.iter();
        std::iter::once(self.program.clone().into_os_string())
            .chain(firmware.flat_map(|path| ["-L".into(), path.clone().into_os_string()]))
    }

    fn host() -> Self {
        Self {
            program: PROGRAM.into(),
            firmware: Vec::new(),
        }
    }

    /// Its release, if it runs at all.
    fn release(&self) -> Option<(u32, u32)> {
        let output = Command::new(&self.program).arg("--version").output().ok()?;
        release_of(&String::from_utf8_lossy(&output.stdout))
    }

    fn is_sound(&self) -> bool {
        self.release().is_some_and(|release| release >= SOUND_SINCE)
    }
}

/// The best one that can be had here; looked for once. Where the processor is not emulated any will do.
///
/// # Errors
/// If the cache cannot be made.
pub(super) fn ensure(accelerator: Accelerator) -> Result<Emulator> {
    static FOUND: OnceLock<Emulator> = OnceLock::new();
    if accelerator == Accelerator::Kvm {
        return Ok(Emulator::host());
    }
    if let Some(found) = FOUND.get() {
        return Ok(found.clone());
    }
    let found = find()?;
    Ok(FOUND.get_or_init(|| found).clone())
}

fn find() -> Result<Emulator> {
    let host = Emulator::host();
    if host.is_sound() {
        return Ok(host);
    }
    let cache = paths::lab_cache();
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let directory = cache.join(format!("qemu-{SUITE}"));
    let newer = Emulator {
        program: directory.join("usr/bin").join(PROGRAM),
        firmware: vec![
            directory.join("usr/share/qemu"),
            PathBuf::from("/usr/share/seabios"),
        ],
    };
    let _lock = lock::exclusive(&cache.join("lock"))?;
    if newer.is_sound() {
        return Ok(newer);
    }
    let what = "Fetching a newer QEMU from Debian's backports (unpacked, not installed)";
    let fetched = progress::step(what, || fetch(&cache, &directory));
    match fetched {
        Ok(()) if newer.is_sound() => return Ok(newer),
        Ok(()) => progress::note("it does not run here"),
        Err(error) => progress::note(&format!("{error:#}")),
    }
    progress::note(
        "going on with this host's QEMU, which now and then breaks a kernel that it emulates: such a \
         machine is started again",
    );
    Ok(host)
}

fn fetch(cache: &Path, directory: &Path) -> Result<()> {
    if !is_debian_12() {
        bail!("this is not Debian 12, so there is no package that would fit");
    }
    let work = tempfile::Builder::new()
        .prefix("making-")
        .tempdir_in(cache)?;
    let log = work.path().join("log");
    let sources = work.path().join("sources.list");
    fs::write(
        &sources,
        format!("deb [signed-by={KEYRING}] {} {SUITE} main\n", mirror()),
    )?;
    let lists = work.path().join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.current_dir(&work);
        let settings = [
            ("Dir::Etc::SourceList", sources.as_path()),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State::Lists", lists.as_path()),
            ("Dir::Cache", work.path()),
        ];
        for (name, path) in settings {
            command.arg("-o").arg(format!("{name}={}", path.display()));
        }
        command.args(["-o", "APT::Sandbox::User=root"]);
        command
    };
    run_logged(apt_get().arg("update"), &log)?;
    let packages = PACKAGES.map(|package| format!("{package}/{SUITE}"));
    run_logged(apt_get().arg("download").args(packages), &log)?;
    // Finished under another name first: a directory of the right name is always whole.
    let root = work.path().join("root");
    for entry in fs::read_dir(&work)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run_logged(
                Command::new("dpkg-deb").arg("-x").arg(&path).arg(&root),
                &log,
            )?;
        }
    }
    let _ = fs::remove_dir_all(directory);
    fs::rename(&root, directory)
        .with_context(|| format!("cannot move QEMU to {}", directory.display()))
}

/// Where this host has Debian from.
fn mirror() -> String {
    let asked = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Codename: bookworm",
    ]));
    let text = asked.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let first = (text.ok()).and_then(|text| text.lines().next().map(str::to_owned));
    first.unwrap_or_else(|| MIRROR.to_owned())
}

fn release_of(version: &str) -> Option<(u32, u32)> {
    let number = version.strip_prefix("QEMU emulator version ")?;
    let mut parts = number.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{SOUND_SINCE, release_of};

    #[test]
    fn releases_are_read_from_what_qemu_says() {
        let old = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(release_of(old), Some((7, 2)));
        let new = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)";
        assert!(release_of(new) >= Some(SOUND_SINCE));
        assert!(release_of(old) < Some(SOUND_SINCE));
        assert_eq!(release_of("qemu: not found"), None);
    }
}
