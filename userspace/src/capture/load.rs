//! Loading, attaching and pinning the programs of one volume, and finding them again.
//!
//! Everything is pinned under `/sys/fs/bpf/twinwrite/<volume>/`, so that capture goes on while the
//! agent restarts. A set is taken over only if it is complete, calibrated, of the same object and
//! for the same device; otherwise it is removed and made anew. It must never leave two sets of
//! programs on one volume.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use aya::maps::{Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{Program, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader};
use twinwrite_abi::{ABI_VERSION, control};

use super::btf::{KERNEL_BTF, inode_globals, missing_for_subtree, running_globals};
use super::control::Control;
use super::gate::Gate;
use super::hooks::{HOOKS, Hook, Kind, Need};
use super::host::{self, HostLock};
use super::object::{fingerprint, object};
use super::probe;
use super::server;
use super::subtree::{self, Subtree};
use super::sys::program_by_id;
use super::{CaptureError, CaptureOptions, Filesystem};

/// Files of which programs keep on which side of the border they lie, where there is one.
const SIDES_MAX: u32 = 1 << 17;
const PIN_ROOT: &str = "/sys/fs/bpf/twinwrite";

/// A hook this kernel does not offer, and why.
#[derive(Clone, Debug)]
pub struct DisabledHook {
    /// The hook.
    pub hook: Hook,
    /// The kernel's words; empty when the set was taken over from an agent before.
    pub reason: String,
}

/// The attached programs of a volume.
pub(super) struct Attached {
    pub(super) ring: OwnedFd,
    pub(super) control: Control,
    pub(super) programs: Vec<OwnedFd>,
    /// Held open: a pin that is removed takes no program away from a living agent.
    pub(super) links: Vec<FdLink>,
    pub(super) disabled: Vec<DisabledHook>,
    pub(super) gate: Gate,
    pub(super) resumed: bool,
}

/// The pinned maps: names in the object, and of the pins.
const MAPS: [(&str, &str); 2] = [("CONTROL", "control"), ("RING", "ring")];

/// A volume's name as that of a file. bpffs refuses some characters, so they are written as `%xx`.
#[must_use]
pub fn escaped(volume: &str) -> String {
    use std::fmt::Write as _;
    let mut name = String::new();
    for byte in volume.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            name.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(name, "%{byte:02x}");
        }
    }
    name
}

/// Where a volume's pins are.
pub(super) fn pin_directory(volume: &str) -> PathBuf {
    Path::new(PIN_ROOT).join(escaped(volume))
}

/// The control words of a volume's pinned programs, if there are any.
pub(super) fn pinned_control(volume: &str) -> Option<Control> {
    let map = MapData::from_pin(pin_directory(volume).join("control")).ok()?;
    Control::map(map.fd().as_fd()).ok()
}

fn link_pin(directory: &Path, hook: &Hook) -> PathBuf {
    directory.join(format!("link-{}", hook.program))
}

/// Takes over the pinned set, or loads a new one.
pub(super) fn attach(options: &CaptureOptions) -> Result<Attached, CaptureError> {
    let directory = pin_directory(&options.volume_name);
    match reopen(&directory, options) {
        Ok(attached) => return Ok(attached),
        Err(reason) => tracing::info!(volume = options.volume_name, "attaching anew: {reason}"),
    }
    remove(&options.volume_name)?;
    load(&directory, options).inspect_err(|_| {
        // Half a set captures half of the changes: take it away.
        if let Err(error) = remove(&options.volume_name) {
            tracing::warn!(volume = options.volume_name, "{error}");
        }
    })
}

/// The gate of the set of programs that is pinned for a volume; `None` if there is none.
///
/// # Errors
/// [`CaptureError::OtherGate`]: whom the programs hold nobody here can tell.
pub(super) fn pinned_gate(volume: &str) -> Result<Option<Gate>, CaptureError> {
    let Some(control) = pinned_control(volume) else {
        return Ok(None);
    };
    match Gate::open(control) {
        Ok(gate) => Ok(Some(gate)),
        Err(CaptureError::Load(reason)) => Err(CaptureError::OtherGate {
            volume: volume.to_owned(),
            reason,
        }),
        Err(error) => Err(error),
    }
}

/// Whether programs are pinned for a volume, or some of them.
pub(super) fn is_pinned(volume: &str) -> bool {
    pin_directory(volume).exists()
}

/// Removes the programs and pins of a volume, unless somebody is held before its gate, whom nobody
/// could continue any more, or an NFS server whose replies would leave.
pub(super) fn remove(volume: &str) -> Result<(), CaptureError> {
    if let Some(gate) = pinned_gate(volume)?
        && !gate.own_entries().is_empty()
    {
        return Err(CaptureError::Held(volume.to_owned()));
    }
    if pinned_control(volume).is_some_and(|control| control.holds_replies()) && server::is_running()
    {
        return Err(CaptureError::RepliesHeld(volume.to_owned()));
    }
    detach(volume)
}

/// Whether [`attach`] would take over what is pinned. Changes nothing.
pub(super) fn can_be_resumed(options: &CaptureOptions) -> bool {
    reopen(&pin_directory(&options.volume_name), options).is_ok()
}

/// Removes all pins of a volume, and with them its programs; with those of the last volume also the
/// host's.
pub(super) fn detach(volume: &str) -> Result<(), CaptureError> {
    let lock = HostLock::open()?;
    let _taken = lock.take()?;
    unpin(volume)?;
    let is_last = fs::read_dir(PIN_ROOT).map_or(true, |mut volumes| volumes.next().is_none());
    if is_last {
        host::remove_pins()?;
    }
    Ok(())
}

fn unpin(volume: &str) -> Result<(), CaptureError> {
    let directory = pin_directory(volume);
    let failed = |what| {
        let path = directory.clone();
        move |source| CaptureError::Pin { what, path, source }
    };
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed("reading")(source)),
    };
    for entry in entries {
        let path = entry.map_err(failed("reading"))?.path();
        fs::remove_file(&path).map_err(|source| CaptureError::Pin {
            what: "removing",
            path,
            source,
        })?;
    }
    fs::remove_dir(&directory).map_err(failed("removing"))
}

/// A pin of the set that is not there any more. Without all of them the next agent cannot take the
/// programs over, and they end with this one.
pub(super) fn missing_pin(volume: &str, disabled: &[DisabledHook]) -> Option<PathBuf> {
    let directory = pin_directory(volume);
    let is_disabled = |hook: &Hook| disabled.iter().any(|d| d.hook.program == hook.program);
    let maps = MAPS.iter().map(|(_, pin)| directory.join(pin));
    let links = HOOKS.iter().filter(|hook| !is_disabled(hook));
    maps.chain(links.map(|hook| link_pin(&directory, hook)))
        .find(|path| !path.exists())
}

/// Opens the pinned set; the error says why it cannot be taken over.
fn reopen(directory: &Path, options: &CaptureOptions) -> Result<Attached, String> {
    if !directory.exists() {
        return Err("no programs are pinned".to_owned());
    }
    let map = |name: &str| {
        MapData::from_pin(directory.join(name)).map_err(|error| format!("pinned {name}: {error}"))
    };
    let control_map = map("control")?;
    let control = Control::map(control_map.fd().as_fd()).map_err(|error| error.to_string())?;
    let same = |what: &str, slot, want: u64| {
        let have = control.get(slot);
        if have == want {
            Ok(())
        } else {
            Err(format!("pinned {what} is {have}, not {want}"))
        }
    };
    same(
        "state",
        control::STATE,
        control::ATTACHED | control::CALIBRATED,
    )?;
    same("format version", control::ABI, ABI_VERSION.into())?;
    same("object", control::OBJECT, fingerprint())?;
    same("device", control::DEVICE, options.device.into())?;
    same(
        "file system",
        control::FILESYSTEM,
        options.filesystem as u64,
    )?;
    for (slot, word) in subtree::words(options.subtree.as_ref()) {
        same("protected directory", slot, word)?;
    }
    let ring = map("ring")?;
    let ring_bytes = ring_bytes_of(&ring).map_err(|error| error.to_string())?;
    if ring_bytes != options.ring_bytes {
        return Err(format!(
            "pinned ring has {ring_bytes} bytes, not {}",
            options.ring_bytes
        ));
    }
    let mask = control.get(control::DISABLED);
    let (mut programs, mut links, mut disabled) = (Vec::new(), Vec::new(), Vec::new());
    for (index, hook) in HOOKS.iter().enumerate() {
        if mask >> index & 1 == 1 {
            disabled.push(DisabledHook {
                hook: *hook,
                reason: String::new(),
            });
            continue;
        }
        let lost = |error: String| format!("pinned hook {}: {error}", hook.function);
        let link = PinnedLink::from_pin(link_pin(directory, hook));
        let link = FdLink::from(link.map_err(|error| lost(error.to_string()))?);
        let info = link.info().map_err(|error| lost(error.to_string()))?;
        programs.push(program_by_id(info.program_id()).map_err(|error| lost(error.to_string()))?);
        links.push(link);
    }
    let ring = duplicate(&ring).map_err(|error| error.to_string())?;
    let gate = Gate::open(control.clone()).map_err(|error| error.to_string())?;
    Ok(Attached {
        ring,
        control,
        programs,
        links,
        disabled,
        gate,
        resumed: true,
    })
}

fn ring_bytes_of(ring: &MapData) -> Result<u32, CaptureError> {
    let info = ring
        .info()
        .map_err(|error| CaptureError::Load(error.to_string()))?;
    Ok(info.max_entries())
}

fn duplicate(map: &MapData) -> Result<OwnedFd, CaptureError> {
    let fd = map.fd().as_fd().try_clone_to_owned();
    fd.map_err(|source| CaptureError::system("duplicating a map's descriptor", source))
}

/// As many volumes attach at once as there are processors: each takes one for seconds, and the first ones
/// are protected while the next ones wait.
static ATTACHING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// One of those that attach.
struct Turn;

impl Turn {
    fn take() -> Self {
        let (attaching, left) = &ATTACHING;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let attaching = attaching.lock().unwrap_or_else(PoisonError::into_inner);
        let mut attaching = left
            .wait_while(attaching, |attaching| *attaching >= processors)
            .unwrap_or_else(PoisonError::into_inner);
        *attaching += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (attaching, left) = &ATTACHING;
        *attaching.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        left.notify_one();
    }
}

fn load(directory: &Path, options: &CaptureOptions) -> Result<Attached, CaptureError> {
    let _turn = Turn::take();
    let began = Instant::now();
    let mut ebpf = {
        // Nobody removes the host's maps before this volume's directory is there.
        let lock = HostLock::open()?;
        let _taken = lock.take()?;
        fs::create_dir_all(directory).map_err(|source| CaptureError::Pin {
            what: "creating (is bpffs mounted on /sys/fs/bpf?)",
            path: directory.to_owned(),
            source,
        })?;
        load_object(options)?
    };
    let mut pinned = |(name, pin): (&str, &str)| {
        let map = take_map(&mut ebpf, name)?;
        let path = directory.join(pin);
        map.pin(&path).map_err(|error| CaptureError::Pin {
            what: "pinning",
            path,
            source: io::Error::other(error.to_string()),
        })?;
        Ok(map)
    };
    let loaded = Instant::now();
    let [control_map, ring_map] = MAPS.map(&mut pinned);
    let (control_map, ring_map) = (control_map?, ring_map?);
    let control = Control::map(control_map.fd().as_fd())?;
    control.name_agent()?;
    // No epoch is open where programs are loaded anew.
    control.settle_gaps(None);
    control.open_gate();
    control.set(control::DEVICE, options.device.into());
    for (slot, word) in subtree::words(options.subtree.as_ref()) {
        control.set(slot, word);
    }
    let gate = Gate::open(control.clone())?;
    let (programs, links, disabled) = attach_all(&mut ebpf, directory, options)?;
    let mask = HOOKS.iter().enumerate().fold(0, |mask, (index, hook)| {
        mask | u64::from(disabled.iter().any(|d| d.hook.program == hook.program)) << index
    });
    control.set(control::ABI, ABI_VERSION.into());
    control.set(control::OBJECT, fingerprint());
    control.set(control::FILESYSTEM, options.filesystem as u64);
    control.set(control::DISABLED, mask);
    control.set(control::STATE, control::ATTACHED);
    tracing::info!(
        volume = options.volume_name,
        object_ms = loaded.duration_since(began).as_millis(),
        programs_ms = loaded.elapsed().as_millis(),
        "the capture programs are attached"
    );
    Ok(Attached {
        ring: duplicate(&ring_map)?,
        control,
        programs,
        links,
        disabled,
        gate,
        resumed: false,
    })
}

fn load_object(options: &CaptureOptions) -> Result<Ebpf, CaptureError> {
    let device = u64::from(options.device);
    let mut loader = EbpfLoader::new();
    // The programs read no structure whose layout would have to be looked up there.
    loader.btf(None);
    for (name, value) in running_globals()? {
        loader.override_global(name, value, true);
    }
    loader.override_global("TARGET_DEV", &device, true);
    let in_inode = inode_globals(options.filesystem);
    if in_inode.is_none() && options.filesystem == Filesystem::Btrfs {
        return Err(CaptureError::NoMember(
            "member btrfs_inode.root (/sys/kernel/btf/btrfs), which tells subvolumes apart"
                .to_owned(),
        ));
    }
    let subtree = options.subtree.as_ref().map(Subtree::globals);
    for (name, value) in in_inode.iter().flatten().chain(subtree.iter().flatten()) {
        loader.override_global(name, value, true);
    }
    if subtree.is_some() {
        if let Some(member) = missing_for_subtree()? {
            return Err(CaptureError::NoMember(format!(
                "member for {member}, without which `directory` cannot be used: protect the volume as a whole"
            )));
        }
        loader.map_max_entries("SIDES", SIDES_MAX);
    }
    let is_always_told = u64::from(probe::is_state_of_new_told(options.filesystem));
    loader.override_global("STATE_OF_NEW", &is_always_told, true);
    loader.map_max_entries("RING", options.ring_bytes);
    for (name, path) in host::pins()? {
        loader.map_pin_path(name, path);
    }
    loader
        .load(object()?)
        .map_err(|error| CaptureError::Load(chain(&error)))
}

fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<MapData, CaptureError> {
    match ebpf.take_map(name) {
        Some(Map::RingBuf(data) | Map::Array(data)) => Ok(data),
        _ => Err(CaptureError::Load(format!("the object has no map {name}"))),
    }
}

type Programs = (Vec<OwnedFd>, Vec<FdLink>, Vec<DisabledHook>);

fn attach_all(
    ebpf: &mut Ebpf,
    directory: &Path,
    options: &CaptureOptions,
) -> Result<Programs, CaptureError> {
    let btf = Btf::from_sys_fs().map_err(|error| CaptureError::NoBtf {
        path: KERNEL_BTF.into(),
        reason: chain(&error),
    })?;
    let (mut programs, mut links, mut disabled) = (Vec::new(), Vec::new(), Vec::new());
    for hook in HOOKS {
        if !hook.need.is_wanted_on(options) {
            disabled.push(DisabledHook {
                hook: *hook,
                reason: "not of such a volume".to_owned(),
            });
            continue;
        }
        match attach_one(ebpf, &btf, hook) {
            Ok((program, link)) => {
                let path = link_pin(directory, hook);
                let pinned = link.pin(&path).map_err(|error| CaptureError::Pin {
                    what: "pinning",
                    path,
                    source: io::Error::other(chain(&error)),
                })?;
                programs.push(program);
                links.push(FdLink::from(pinned));
            }
            Err(reason) => {
                let essential = match hook.need {
                    Need::Always => true,
                    Need::On(filesystems) => filesystems.contains(&options.filesystem),
                    Need::Only(_) | Need::KeepsBorder => true,
                    Need::Notices(_)
                    | Need::Covered
                    | Need::OnlyCovered(_)
                    | Need::KeepsHeld
                    | Need::HoldsReplies
                    | Need::RefusesMappings
                    | Need::StopsPolling => false,
                };
                if essential {
                    let (program, hook) = (hook.program, hook.function);
                    return Err(CaptureError::Hook {
                        program,
                        hook,
                        reason,
                    });
                }
                let (program, function) = (hook.program, hook.function);
                tracing::info!(program, function, "without this hook: {reason}");
                disabled.push(DisabledHook {
                    hook: *hook,
                    reason,
                });
            }
        }
    }
    Ok((programs, links, disabled))
}

fn attach_one(ebpf: &mut Ebpf, btf: &Btf, hook: &Hook) -> Result<(OwnedFd, FdLink), String> {
    let words = |error: ProgramError| chain(&error);
    let program = ebpf
        .program_mut(hook.program)
        .ok_or("the object does not have it")?;
    let link = match (hook.kind, program) {
        (Kind::Entry, Program::FEntry(program)) => {
            program.load(hook.function, btf).map_err(words)?;
            let id = program.attach().map_err(words)?;
            FdLink::from(program.take_link(id).map_err(words)?)
        }
        (Kind::Exit, Program::FExit(program)) => {
            program.load(hook.function, btf).map_err(words)?;
            let id = program.attach().map_err(words)?;
            FdLink::from(program.take_link(id).map_err(words)?)
        }
        (Kind::Tracepoint, Program::BtfTracePoint(program)) => {
            program.load(hook.function, btf).map_err(words)?;
            let id = program.attach().map_err(words)?;
            FdLink::from(program.take_link(id).map_err(words)?)
        }
        (Kind::ModuleTracepoint, Program::RawTracePoint(program)) => {
            program.load().map_err(words)?;
            let id = program.attach(hook.function).map_err(words)?;
            FdLink::from(program.take_link(id).map_err(words)?)
        }
        (Kind::Lsm, Program::Lsm(program)) => {
            program.load(hook.function, btf).map_err(words)?;
            let id = program.attach().map_err(words)?;
            FdLink::from(program.take_link(id).map_err(words)?)
        }
        _ => return Err("the object has another kind of program there".to_owned()),
    };
    let info = link.info().map_err(|error| error.to_string())?;
    let program = program_by_id(info.program_id()).map_err(|error| error.to_string())?;
    Ok((program, link))
}

/// An error with its causes, on few lines: a verifier's log is cut to its end.
fn chain(error: &dyn std::error::Error) -> String {
    const LINES_MAX: usize = 12;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > LINES_MAX {
        let end = lines[lines.len() - LINES_MAX..].join("\n");
        text = format!("{}\n...\n{end}", lines[0]);
    }
    text
}
