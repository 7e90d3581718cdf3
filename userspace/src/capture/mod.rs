//! Capture: the eBPF programs of a volume, their ring, and what belongs to it.
//!
//! [`Capture::attach`] loads the programs (or takes over the pinned ones), [`calibrate`] proves
//! that every hook tells what it must on this kernel, [`RingConsumer`] reads and releases the
//! records, [`PageCache`] reads the bytes that eBPF could not copy, [`Continuity`] keeps what the
//! next agent must know. Nothing outside this module names aya or an offset of the kernel.
//!
//! It must never report a volume's changes as captured before they were verified, nor lose a change
//! without a counter that tells.

mod border;
mod btf;
mod calibrate;
mod continuity;
mod control;
mod error;
pub mod ext4;
pub mod extended;
mod gate;
pub mod handle;
mod hooks;
mod host;
mod load;
mod object;
mod page_cache;
mod probe;
mod redirty;
mod ring;
mod server;
mod subtree;
mod subvolumes;
mod sys;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::links::FdLink;

use crate::ids::Epoch;

pub use border::{BorderError, Looked};
pub use calibrate::{Calibration, calibrate};
pub use continuity::Continuity;
pub use control::{Control, GapCounts};
pub use error::CaptureError;
pub use gate::{Gate, Held};
pub use hooks::{HOOKS, Hook, Kind, Need};
pub use load::{DisabledHook, escaped};
pub use page_cache::{CacheRead, PageCache, identity_of, identity_of_file};
pub use probe::{Feature, bpf_lsm_active, features, may_skip_hooks};
pub use redirty::{Redirtied, redirty};
pub use ring::{RingConsumer, Run, Woken};
pub use subtree::{NoSubtree, Subtree};
pub use subvolumes::has_subvolumes;

/// File systems whose hooks are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// ext4.
    Ext4 = 1,
    /// XFS.
    Xfs = 2,
    /// btrfs.
    Btrfs = 3,
}

impl Filesystem {
    /// From its name in the configuration and in the mount table.
    ///
    /// # Errors
    /// [`CaptureError::Options`].
    pub fn from_name(name: &str) -> Result<Self, CaptureError> {
        match name {
            "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            "btrfs" => Ok(Self::Btrfs),
            other => Err(CaptureError::Options(format!(
                "file system {other:?} cannot be protected: use ext4, xfs or btrfs"
            ))),
        }
    }
}

/// What to capture.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Name of the volume; names the pins.
    pub volume_name: String,
    /// The kernel's device number of the file system: `major << 20 | minor`, see [`kernel_device`].
    pub device: u32,
    /// Bytes of the ring: a power of two, at least 1 MiB.
    pub ring_bytes: u32,
    /// The file system's type.
    pub filesystem: Filesystem,
    /// The directory below which it is protected; `None`: all of it.
    pub subtree: Option<Subtree>,
}

/// The kernel's device number (`s_dev`) of the file system mounted at `mount_point`, or that it lies in:
/// what the list of mounts says, for a btrfs shows its files another one.
///
/// # Errors
/// [`CaptureError::System`].
pub fn kernel_device(mount_point: &Path) -> Result<u32, CaptureError> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let failed = |source: std::io::Error| {
        CaptureError::system(format!("looking at {}", mount_point.display()), source)
    };
    let found = statx(CWD, mount_point, AtFlags::empty(), StatxFlags::MNT_ID)
        .map_err(|error| failed(error.into()))?;
    let mounts = std::fs::read("/proc/self/mountinfo").map_err(failed)?;
    device_of_mount(&mounts, found.stx_mnt_id).ok_or_else(|| {
        failed(std::io::Error::other(
            "its mount is not in /proc/self/mountinfo",
        ))
    })
}

/// The device of the mount with this number, in the kernel's form. Anybody may mount something whose name is no
/// text, so that only the first words of a line are taken for some (proc_pid_mountinfo(5)).
fn device_of_mount(mounts: &[u8], number: u64) -> Option<u32> {
    let of_line = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ');
        let mut word = || std::str::from_utf8(words.next()?).ok();
        let (id, _parent, device) = (word()?, word()?, word()?);
        let (major, minor) = device.split_once(':')?;
        let device = major.parse::<u32>().ok()? << 20 | minor.parse::<u32>().ok()?;
        Some((id.parse::<u64>().ok()?, device))
    };
    let mut lines = mounts.split(|byte| *byte == b'\n').filter_map(of_line);
    let (_, device) = lines.find(|(id, _)| *id == number)?;
    Some(device)
}

/// A device number as user space has it, in the kernel's form (`major << 20 | minor`).
#[must_use]
pub fn to_kernel_device(device: u64) -> u32 {
    (libc::major(device) << 20) | (libc::minor(device) & 0xf_ffff)
}

/// The programs of one volume, attached and pinned.
pub struct Capture {
    options: CaptureOptions,
    ring: OwnedFd,
    control: Control,
    programs: Vec<OwnedFd>,
    /// As long as they are open the programs stay attached.
    _links: Vec<FdLink>,
    disabled: Vec<DisabledHook>,
    gate: Option<Gate>,
    resumed: bool,
}

impl Capture {
    /// Attaches to a volume: takes over the pinned programs if they are whole, calibrated and of
    /// this very object, else loads them anew.
    ///
    /// # Errors
    /// [`CaptureError`] naming the hook or file that failed; then nothing is left behind.
    pub fn attach(options: &CaptureOptions) -> Result<Self, CaptureError> {
        if !options.ring_bytes.is_power_of_two() || options.ring_bytes < 1 << 20 {
            return Err(CaptureError::Options(format!(
                "ring_bytes is {}: it must be a power of two of at least 1 MiB",
                options.ring_bytes
            )));
        }
        if options.volume_name.is_empty() {
            return Err(CaptureError::Options(
                "a volume must have a name".to_owned(),
            ));
        }
        let attached = load::attach(options)?;
        let capture = Self {
            options: options.clone(),
            ring: attached.ring,
            control: attached.control,
            programs: attached.programs,
            _links: attached.links,
            disabled: attached.disabled,
            gate: Some(attached.gate),
            resumed: attached.resumed,
        };
        capture.control.set(twinwrite_abi::control::CALIBRATING, 0);
        capture.control.name_agent()?;
        Ok(capture)
    }

    /// Whether [`Self::attach`] would take over what an earlier agent left. Otherwise it takes those
    /// programs away first, and for a moment nothing captures and no gate holds: no epoch may be open
    /// then, and nobody be held.
    #[must_use]
    pub fn can_be_resumed(options: &CaptureOptions) -> bool {
        load::can_be_resumed(options)
    }

    /// The control words of the programs that are pinned for a volume.
    #[must_use]
    pub fn pinned_control(volume_name: &str) -> Option<Control> {
        load::pinned_control(volume_name)
    }

    /// The epoch that the pinned programs of a volume still serve, as its agent left it.
    #[must_use]
    pub fn pinned_epoch(volume_name: &str) -> Option<Epoch> {
        let control = load::pinned_control(volume_name)?;
        Continuity::load(&control).map(|left| left.epoch)
    }

    /// Whether the programs of an earlier agent of this boot are there.
    #[must_use]
    pub fn is_pinned(volume_name: &str) -> bool {
        load::pinned_control(volume_name).is_some()
    }

    /// Removes the programs and pins of a volume.
    ///
    /// # Errors
    /// [`CaptureError::Pin`]; [`CaptureError::Held`] while somebody is held before the gate, whom
    /// nobody could continue any more; [`CaptureError::RepliesHeld`] while replies are.
    pub fn detach(volume_name: &str) -> Result<(), CaptureError> {
        load::remove(volume_name)
    }

    /// Whether anything of an earlier agent's is pinned, whole or not.
    #[must_use]
    pub fn has_pins(volume_name: &str) -> bool {
        load::is_pinned(volume_name)
    }

    /// Ends who is held before the gate of a volume that this node has lost: what was confirmed to them may
    /// be reverted by the new owner, so that they must never be told. So is the kernel's NFS server if it
    /// still has to answer. The programs stay, and hold whoever comes next. The process ids of the ended.
    ///
    /// # Errors
    /// [`CaptureError::OtherGate`]; [`CaptureError::RepliesHeld`] if the server does not end.
    pub fn end_held(volume_name: &str) -> Result<Vec<u32>, CaptureError> {
        let mut gate = load::pinned_gate(volume_name)?;
        let killed = gate.as_mut().map(Gate::kill_held).unwrap_or_default();
        if load::pinned_control(volume_name).is_some_and(|control| control.holds_replies())
            && !server::end()
        {
            return Err(CaptureError::RepliesHeld(volume_name.to_owned()));
        }
        Ok(killed)
    }

    /// Ends the kernel's NFS server if it exports anything below `mount_point`, which it keeps mounted; whether
    /// it did, and has ended.
    #[must_use]
    pub fn end_server_of(mount_point: &Path) -> bool {
        server::exports(mount_point) && server::end()
    }

    /// How often this process has ended the kernel's NFS server.
    #[must_use]
    pub fn server_endings() -> u64 {
        server::endings()
    }

    /// Removes the programs of a volume that this node has lost and unmounted, so that nothing more can be
    /// confirmed on it, and ends whoever they still hold, see [`Self::end_held`]. If that fails they stay.
    /// The process ids of the ended.
    ///
    /// # Errors
    /// [`CaptureError::Pin`]; those of [`Self::end_held`].
    pub fn abandon(volume_name: &str) -> Result<Vec<u32>, CaptureError> {
        if !load::is_pinned(volume_name) {
            return Ok(Vec::new());
        }
        let mut killed = Self::end_held(volume_name)?;
        let mut gate = load::pinned_gate(volume_name)?;
        load::detach(volume_name)?;
        // Who looked at the gate just then.
        std::thread::sleep(std::time::Duration::from_millis(100));
        killed.extend(gate.as_mut().map(Gate::kill_held).unwrap_or_default());
        Ok(killed)
    }

    /// Makes what an earlier agent left attached not capture this process's own work, nor hold it.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn claim(volume_name: &str) -> Result<(), CaptureError> {
        load::pinned_control(volume_name).map_or(Ok(()), |control| control.name_agent())
    }

    /// Opens the gate of what an earlier agent left attached, and continues who is held before it.
    /// Only where no region can be merged into the volume.
    ///
    /// # Errors
    /// [`CaptureError::OtherGate`]: who is held already stays so, and who comes from now on is not.
    pub fn open_pinned_gate(volume_name: &str) -> Result<(), CaptureError> {
        if let Some(control) = load::pinned_control(volume_name) {
            control.open_gate();
        }
        if let Some(mut gate) = load::pinned_gate(volume_name)?
            && !gate.open_for_all()
        {
            tracing::error!(
                volume = volume_name,
                "not everybody held before the gate could be continued"
            );
        }
        Ok(())
    }

    /// Makes sure that no file has names on both sides of a protected directory's border, unless that was proven
    /// and nothing has happened since by which it could be otherwise. `is_left`: whether to break off.
    ///
    /// # Errors
    /// [`BorderError`].
    pub fn prove_border(
        &self,
        mount_point: &Path,
        is_left: &dyn Fn(Looked) -> bool,
    ) -> Result<(), BorderError> {
        let Some(subtree) = &self.options.subtree else {
            return Ok(());
        };
        let misses = || self.recursion_misses();
        border::prove(mount_point, subtree, &self.control, &misses, is_left)
    }

    /// Nobody has watched the volume since [`Self::prove_border`].
    pub fn withdraw_border(&self) {
        border::withdraw(&self.control);
    }

    /// Whether the programs ran already: nothing was missed since the agent before. Then they are
    /// calibrated, too.
    #[must_use]
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// The hooks this kernel does not offer. One with [`Need::Notices`] means that such changes are
    /// not even noticed.
    #[must_use]
    pub fn disabled(&self) -> &[DisabledHook] {
        &self.disabled
    }

    /// Tells the programs whether they can refuse the replies of the kernel's NFS server: not where the
    /// hook is missing, nor while it also serves over RDMA, where a reply passes no hook.
    pub fn watch_server(&self) {
        let has_hook = |disabled: &DisabledHook| disabled.hook.program != server::REFUSES;
        let refuses = self.disabled.iter().all(has_hook)
            && probe::bpf_lsm_active()
            && !server::serves_over_rdma();
        let control = &self.control;
        control.set(twinwrite_abi::control::SERVER_HELD, u64::from(refuses));
    }

    /// A pinned object that somebody removed. The programs of this agent go on, but they would end
    /// with it, and what is written then would pass unseen.
    #[must_use]
    pub fn missing_pin(&self) -> Option<PathBuf> {
        load::missing_pin(&self.options.volume_name, &self.disabled)
    }

    /// What is captured.
    #[must_use]
    pub fn options(&self) -> &CaptureOptions {
        &self.options
    }

    /// The control words.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Opens the ring where the consumer before left it. One consumer at a time.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn consumer(&self) -> Result<RingConsumer, CaptureError> {
        RingConsumer::open(
            self.ring.as_fd(),
            self.options.ring_bytes,
            self.control.clone(),
        )
    }

    /// The threads that are held before the gate, for the one who continues them.
    pub fn take_gate(&mut self) -> Option<Gate> {
        self.gate.take()
    }

    /// Events that programs missed because they were preempted in the middle of another: each is a
    /// change that nobody captured.
    ///
    /// # Errors
    /// [`CaptureError::System`].
    pub fn recursion_misses(&self) -> Result<u64, CaptureError> {
        self.programs.iter().try_fold(0, |sum, program| {
            let misses = sys::recursion_misses(program.as_fd());
            misses
                .map(|misses| sum + misses)
                .map_err(|source| CaptureError::system("reading a program's counters", source))
        })
    }
}

#[cfg(test)]
mod tests;
