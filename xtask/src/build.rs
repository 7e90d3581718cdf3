//! Compiles the eBPF programs, the agent that embeds them, and the workloads.
//!
//! It never runs what it built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::setup::{self, Purpose};
use crate::{paths, progress};

const EBPF_TARGET: &str = "bpfel-unknown-none";
const EBPF_PACKAGE: &str = "twinwrite-ebpf";

/// How user space is compiled. The eBPF programs are always optimised: the verifier wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Optimised: the agent also runs under emulation.
    #[default]
    Release,
    /// Quick to compile.
    Debug,
}

impl Profile {
    /// The directory cargo uses for it.
    #[must_use]
    pub const fn directory(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "debug",
        }
    }
}

/// What a build leaves.
#[derive(Clone, Debug)]
pub struct Built {
    /// The agent.
    pub twinwrite: PathBuf,
    /// The workloads of the `tests` package.
    pub workloads: Vec<PathBuf>,
}

impl Built {
    /// All programs that go into a virtual machine.
    pub fn programs(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.twinwrite.as_path()).chain(self.workloads.iter().map(PathBuf::as_path))
    }
}

/// Sets the host up, then compiles everything.
///
/// # Errors
/// If the host lacks something or a compiler fails.
pub fn build(profile: Profile) -> Result<Built> {
    setup::ensure(Purpose::Build)?;
    ebpf()?;
    userspace(profile)
}

/// Compiles the eBPF programs into one object.
///
/// # Errors
/// If there is no usable compiler or it fails.
pub fn ebpf() -> Result<PathBuf> {
    let toolchain = setup::toolchain::find()?.context("no compiler for eBPF: cargo xtask setup")?;
    let linker = setup::bpf_linker()?;
    let target = paths::ebpf_target();
    // std::env::consts::ARCH is what the kernel's structures (pt_regs) are compiled for.
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        "-Ctarget-cpu=v3".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    let mut command = Command::new(&toolchain.cargo);
    for name in [
        "RUSTUP_TOOLCHAIN",
        "RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
    ] {
        command.env_remove(name);
    }
    for name in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTDOC"] {
        command.env_remove(name);
    }
    command
        .current_dir(paths::root())
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1") // does nothing on a nightly
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args([
            "build",
            "--release",
            "--package",
            EBPF_PACKAGE,
            "--bin",
            EBPF_PACKAGE,
        ])
        .args(["--target", EBPF_TARGET, "-Zbuild-std=core", "--target-dir"])
        .arg(&target);
    cargo("Compiling the eBPF programs", &mut command)?;
    let built = target.join(EBPF_TARGET).join("release").join(EBPF_PACKAGE);
    let object = paths::ebpf_object();
    copy_if_changed(&built, &object)?;
    Ok(object)
}

/// Cargo for this host, in the workspace; user space embeds what [`ebpf`] leaves.
#[must_use]
pub fn cargo_command() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(paths::root())
        .env("TWINWRITE_EBPF_OBJECT", paths::ebpf_object());
    command
}

fn userspace(profile: Profile) -> Result<Built> {
    let mut command = cargo_command();
    command.args([
        "build",
        "--package",
        "twinwrite",
        "--package",
        "twinwrite-tests",
        "--bins",
    ]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    cargo("Compiling twinwrite and its workloads", &mut command)?;
    installed(profile)
}

/// What an earlier build left.
///
/// # Errors
/// If the agent is not there.
pub fn installed(profile: Profile) -> Result<Built> {
    let directory = paths::cargo_target().join(profile.directory());
    let twinwrite = directory.join("twinwrite");
    if !twinwrite.is_file() {
        bail!(
            "{} is not there: run `cargo xtask build`",
            twinwrite.display()
        );
    }
    let workloads = workload_names()?
        .into_iter()
        .map(|name| directory.join(name))
        .collect();
    Ok(Built {
        twinwrite,
        workloads,
    })
}

/// Binaries of the `tests` package, as cargo sees them.
fn workload_names() -> Result<Vec<String>> {
    let mut command = cargo_command();
    command.args(["metadata", "--format-version=1", "--no-deps", "--offline"]);
    let metadata: serde_json::Value = serde_json::from_slice(&progress::output(&mut command)?)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata names no packages")?;
    let tests = packages
        .iter()
        .filter(|package| package["name"] == "twinwrite-tests");
    let targets = tests
        .filter_map(|package| package["targets"].as_array())
        .flatten();
    let binaries = targets.filter(|target| {
        target["kind"]
            .as_array()
            .is_some_and(|k| k.contains(&"bin".into()))
    });
    Ok(binaries
        .filter_map(|target| target["name"].as_str().map(str::to_owned))
        .collect())
}

/// Cargo shows its own progress, so its output is not hidden.
fn cargo(what: &str, command: &mut Command) -> Result<()> {
    progress::note(what);
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{what}: cargo ended with {status}");
    }
    Ok(())
}

/// An unchanged object keeps its time, so that cargo does not compile user space again.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}
