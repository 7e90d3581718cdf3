//! Extended attributes, ACLs among them, inode flags and projects; and the locks among the flags.
//!
//! An immutable or append-only inode takes no bytes, names or attributes, so whatever is to be changed is
//! unlocked first and locked again at the end. A run that is interrupted in between must not leave it open:
//! the locks are noted first, in the name of an empty file under staging, which reaches the disk no later
//! than the unlocking does, because a file system commits changes of metadata in their order. In the same way
//! the capabilities of a file are noted that loses them by being written.
//!
//! What was made and is to be locked cannot be rid of its stamp after [`Apply::settle`]: it loses it before, and a
//! note stands for the stamp until all is tidied up.

use super::Apply;
use crate::ids::Identity;
use crate::record::extended::{Extended, InodeFlags};
use crate::replay::plan::{Inode, Kind};
use crate::replay::volume::{Stamp, Step, Volume, VolumeError};

const LOCKED: &str = "locked";
const CAPABLE: &str = "capable";
const MADE: &str = "made";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";

/// What an interrupted run left to be done, in the name of a file under staging.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Note {
    /// The inode must have these of [`InodeFlags::LOCKS`].
    Locked(Identity, u32),
    /// The file must have this capability.
    Capable(Identity, Vec<u8>),
    /// The first was made by this epoch's replay, for the second.
    Made(Identity, Identity),
}

impl Note {
    fn name(&self) -> Vec<u8> {
        let text = match self {
            Self::Locked(Identity { ino, generation }, locks) => {
                format!("{LOCKED}-{ino}-{generation}-{locks:x}")
            }
            Self::Capable(Identity { ino, generation }, value) => {
                let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{CAPABLE}-{ino}-{generation}-{hex}")
            }
            Self::Made(Identity { ino, generation }, planned) => {
                format!(
                    "{MADE}-{ino}-{generation}-{}.{}",
                    planned.ino, planned.generation
                )
            }
        };
        text.into_bytes()
    }

    fn parse(name: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(name).ok()?;
        let mut words = text.split('-');
        let what = words.next()?;
        let identity = Identity {
            ino: words.next()?.parse().ok()?,
            generation: words.next()?.parse().ok()?,
        };
        let value = words.next()?;
        if words.next().is_some() {
            return None;
        }
        match what {
            LOCKED => Some(Self::Locked(identity, u32::from_str_radix(value, 16).ok()?)),
            CAPABLE => {
                let byte = |at| u8::from_str_radix(value.get(at..at + 2)?, 16).ok();
                let bytes: Option<Vec<u8>> = (0..value.len()).step_by(2).map(byte).collect();
                Some(Self::Capable(identity, bytes?))
            }
            MADE => {
                let (ino, generation) = value.split_once('.')?;
                let planned = Identity {
                    ino: ino.parse().ok()?,
                    generation: generation.parse().ok()?,
                };
                Some(Self::Made(identity, planned))
            }
            _ => None,
        }
    }
}

/// Whether a file of this name under staging is a note, which stays until all is done.
pub(super) fn is_note(name: &[u8]) -> bool {
    Note::parse(name).is_some()
}

/// Whether it is a note of what is still to be done, of whatever epoch.
pub(super) fn is_to_be_done(name: &[u8]) -> bool {
    matches!(
        Note::parse(name),
        Some(Note::Locked(..) | Note::Capable(..))
    )
}

/// Whether it is a note that stands for a stamp: what it says is of one epoch only.
pub(super) fn is_stamp_note(name: &[u8]) -> bool {
    matches!(Note::parse(name), Some(Note::Made(..)))
}

/// One thing of an inode's flags that can be set without the others.
#[derive(Clone, Copy, Debug)]
enum Part {
    Flag(u32),
    ExtendedFlag(u32),
    ExtentBytes,
    Project,
    CopyExtentBytes,
}

impl Part {
    /// What differs, one by one.
    fn between(now: InodeFlags, wanted: InodeFlags) -> Vec<Self> {
        let bits = |differing: u32| {
            (0..32)
                .map(|bit| 1u32 << bit)
                .filter(move |bit| differing & bit != 0)
        };
        let mut parts: Vec<Self> = bits(now.flags ^ wanted.flags).map(Self::Flag).collect();
        parts.extend(bits(now.xflags ^ wanted.xflags).map(Self::ExtendedFlag));
        parts.extend((now.extent_bytes != wanted.extent_bytes).then_some(Self::ExtentBytes));
        parts.extend((now.project != wanted.project).then_some(Self::Project));
        let copy_extent_bytes = now.copy_extent_bytes != wanted.copy_extent_bytes;
        parts.extend(copy_extent_bytes.then_some(Self::CopyExtentBytes));
        parts
    }

    /// `flags` with this part as `wanted` has it.
    fn of(self, wanted: InodeFlags, flags: InodeFlags) -> InodeFlags {
        let mut flags = flags;
        match self {
            Self::Flag(bit) => flags.flags = flags.flags & !bit | wanted.flags & bit,
            Self::ExtendedFlag(bit) => flags.xflags = flags.xflags & !bit | wanted.xflags & bit,
            Self::ExtentBytes => flags.extent_bytes = wanted.extent_bytes,
            Self::Project => flags.project = wanted.project,
            Self::CopyExtentBytes => flags.copy_extent_bytes = wanted.copy_extent_bytes,
        }
        flags
    }
}

/// What replay makes must not inherit what a directory of its own has got from the volume's root.
///
/// # Errors
/// A step that failed.
pub(super) fn pass_on_no_acl<V: Volume>(volume: &mut V, directory: Identity) -> Step<()> {
    if volume.attributes(directory)?.contains_key(DEFAULT_ACL) {
        volume.set_attribute(directory, DEFAULT_ACL, None)?;
    }
    Ok(())
}

impl<'a, V: Volume> Apply<'_, 'a, V> {
    /// Reads what an interrupted run has noted; stamps of other epochs are gone by now.
    pub(super) fn read_notes(&mut self) -> Step<()> {
        for name in self.volume.list(self.staging)? {
            match Note::parse(&name) {
                Some(Note::Locked(identity, locks)) => {
                    self.locks.insert(identity, locks);
                }
                Some(Note::Capable(identity, value)) => {
                    self.capabilities.insert(identity, value);
                }
                Some(Note::Made(disk, planned)) => {
                    self.noted.insert(disk, planned);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// The stamp of an inode, or what a note says for it.
    pub(super) fn stamp(&mut self, disk: Identity) -> Step<Option<Stamp>> {
        let epoch = self.plan.epoch;
        let noted = self.noted.get(&disk).copied();
        match noted.map(|identity| Stamp { epoch, identity }) {
            None => self.volume.stamp(disk),
            stamp => Ok(stamp),
        }
    }

    /// Opens every inode of the log to changes.
    pub(super) fn unlock(&mut self) -> Step<()> {
        let root = self.volume.root()?;
        let on_disk: Vec<Identity> = self.planned.keys().copied().chain([root]).collect();
        for disk in on_disk {
            self.unlock_one(disk)?;
        }
        Ok(())
    }

    /// Opens one inode to changes, until [`Apply::settle`].
    pub(super) fn unlock_one(&mut self, disk: Identity) -> Step<()> {
        if !self.volume.stat(disk)?.is_some_and(|stat| stat.is_locked) {
            return Ok(());
        }
        let Some(flags) = self.volume.flags(disk)? else {
            return Ok(());
        };
        // What an interrupted run has noted is what the inode had.
        if !self.locks.contains_key(&disk) {
            self.note(&Note::Locked(disk, flags.locks()))?;
            self.locks.insert(disk, flags.locks());
        }
        self.volume.set_flags(disk, flags.unlocked())
    }

    /// The stamp says that a note stands for nothing of the log, whose identity it may have got by chance.
    fn note(&mut self, note: &Note) -> Step<()> {
        let name = note.name();
        if self.volume.lookup(self.staging, &name)?.is_none() {
            let made = self.volume.create(self.staging, &name, Kind::File)?;
            self.stamp_note(made)?;
        }
        Ok(())
    }

    pub(super) fn stamp_note(&mut self, note: Identity) -> Step<()> {
        let nobody = Identity {
            ino: 0,
            generation: 0,
        };
        let stamp = Stamp {
            epoch: self.plan.epoch,
            identity: nobody,
        };
        self.volume.set_stamp(note, Some(stamp))
    }

    /// Before a file is written, which takes its capabilities away. The store that is replayed need not have
    /// done so: one through a mapping does not. Where it did, the log tells it.
    pub(super) fn keep_capability(
        &mut self,
        disk: Identity,
        inode: &Inode<'a>,
        made: bool,
    ) -> Step<()> {
        let is_told = inode.extended.is_some_and(|told| made || !told.confirmed);
        if is_told || self.capabilities.contains_key(&disk) {
            return Ok(());
        }
        if let Some(value) = self.volume.attribute(disk, CAPABILITY)? {
            self.note(&Note::Capable(disk, value.clone()))?;
            self.capabilities.insert(disk, value);
        }
        Ok(())
    }

    /// Sets what was told last: attributes, flags and project, but for the locks.
    pub(super) fn extended(&mut self, disk: Identity, inode: &Inode<'a>, made: bool) -> Step<()> {
        let told = inode.extended.filter(|told| made || !told.confirmed);
        let Some(state) = told.and_then(|told| Extended::decode(told.value).ok()) else {
            if let Some(value) = self.capabilities.get(&disk).cloned() {
                self.set_or_warn(disk, CAPABILITY, Some(&value))?;
            }
            return Ok(());
        };
        // A btrfs makes an attribute of the flag that says "compressed": how is in the attributes.
        if let Some(wanted) = state.flags {
            self.flags_but_locks(disk, wanted.unlocked())?;
            self.locks.insert(disk, wanted.locks());
        }
        self.extended_attributes(disk, &state)
    }

    /// Whether it is written over in place, of a file that was made and has no bytes yet: a btrfs changes that of
    /// no other, and says nothing (`btrfs_fileattr_set`).
    pub(super) fn set_in_place(&mut self, disk: Identity, inode: &Inode<'a>) -> Step<()> {
        let told = inode
            .extended
            .and_then(|told| Extended::decode(told.value).ok());
        let Some(wanted) = told.and_then(|state| state.flags) else {
            return Ok(());
        };
        let Some(now) = self.volume.flags(disk)? else {
            return Ok(());
        };
        let differs = (now.flags ^ wanted.flags) & InodeFlags::IN_PLACE;
        if differs == 0 {
            return Ok(());
        }
        let next = InodeFlags {
            flags: now.flags ^ differs,
            ..now
        };
        match self.volume.set_flags(disk, next) {
            // It is tried again, and told, when all flags are set.
            Err(error) if self.is_refused(disk, &error)? => Ok(()),
            other => other,
        }
    }

    /// What is not to stay goes first: all of an inode's attributes share a place of limited size, so what
    /// is there in the end need not fit in beside what was there.
    fn extended_attributes(&mut self, disk: Identity, state: &Extended<'_>) -> Step<()> {
        let now = self.volume.attributes(disk)?;
        for (name, value) in &now {
            match state.attributes.get(name.as_slice()) {
                Some(wanted) if *wanted == value.as_slice() => {}
                Some(_) => match self.volume.set_attribute(disk, name, None) {
                    Err(error) if self.is_refused(disk, &error)? => {}
                    other => other?,
                },
                None => self.set_or_warn(disk, name, None)?,
            }
        }
        for (name, value) in &state.attributes {
            if now.get(*name).map(Vec::as_slice) != Some(*value) {
                self.set_or_warn(disk, name, Some(value))?;
            }
        }
        Ok(())
    }

    fn set_or_warn(&mut self, disk: Identity, name: &[u8], value: Option<&[u8]>) -> Step<()> {
        match self.volume.set_attribute(disk, name, value) {
            Err(error) if self.is_refused(disk, &error)? => {
                let what = if value.is_some() { "set" } else { "removed" };
                self.outcome.warnings.push(format!(
                    "WARNING: attribute {} of inode {disk} cannot be {what} here as the log tells it ({error}): do it by hand",
                    name.escape_ascii()
                ));
                Ok(())
            }
            other => other,
        }
    }

    fn flags_but_locks(&mut self, disk: Identity, wanted: InodeFlags) -> Step<()> {
        let Some(now) = self.volume.flags(disk)? else {
            return Ok(());
        };
        if now == wanted {
            return Ok(());
        }
        match self.volume.set_flags(disk, wanted) {
            Err(error) if self.is_refused(disk, &error)? => {}
            Ok(()) => {
                let now = self.volume.flags(disk)?.unwrap_or(wanted);
                if (now.flags ^ wanted.flags) & InodeFlags::IN_PLACE != 0 {
                    self.outcome.warnings.push(format!(
                        "WARNING: whether inode {disk} is written over in place (chattr +C) cannot be set here as \
                         the log tells it: copy it by hand"
                    ));
                }
                return Ok(());
            }
            other => return other,
        }
        // One by one, so that what is refused takes nothing else with it.
        let mut flags = now;
        for part in Part::between(now, wanted) {
            let next = part.of(wanted, flags);
            match self.volume.set_flags(disk, next) {
                Err(error) if self.is_refused(disk, &error)? => {
                    self.outcome.warnings.push(format!(
                        "WARNING: {part:x?} of inode {disk} cannot be set here as the log tells it ({error}): do it by hand"
                    ));
                }
                other => {
                    other?;
                    flags = next;
                }
            }
        }
        Ok(())
    }

    /// What this kernel, file system or security module lets nobody set is no reason not to serve the rest.
    fn is_refused(&mut self, disk: Identity, error: &VolumeError) -> Step<bool> {
        Ok(match error.source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY | libc::ERANGE | libc::E2BIG) => {
                true
            }
            Some(libc::EPERM | libc::EACCES) => {
                (self.volume.stat(disk)?).is_some_and(|stat| !stat.is_locked)
            }
            _ => false,
        })
    }

    /// A note takes the stamp's place: see the head of this file.
    fn note_stamp(&mut self, disk: Identity) -> Step<()> {
        let stamp = self.volume.stamp(disk)?;
        let Some(stamp) = stamp.filter(|stamp| stamp.epoch == self.plan.epoch) else {
            return Ok(());
        };
        self.note(&Note::Made(disk, stamp.identity))?;
        self.volume.set_stamp(disk, None)
    }

    /// Locks again what was locked, or is to be from now on. Nothing may be changed after this.
    pub(super) fn settle(&mut self) -> Step<()> {
        for (disk, locks) in std::mem::take(&mut self.locks) {
            let Some(flags) = self.volume.flags(disk)? else {
                continue;
            };
            if flags.locks() != locks {
                self.note_stamp(disk)?;
                self.volume.set_flags(disk, flags.locked(locks))?;
            }
        }
        for name in self.volume.list(self.staging)? {
            if is_to_be_done(&name) {
                self.volume.unlink(self.staging, &name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Note;
    use crate::ids::Identity;

    #[test]
    fn notes_can_be_read_again() {
        let identity = Identity {
            ino: 12,
            generation: 4_000_000_000,
        };
        for note in [
            Note::Locked(identity, 0x30),
            Note::Capable(identity, vec![0, 0xff, 0x10]),
            Note::Made(identity, Identity { ino: 7, ..identity }),
        ] {
            assert_eq!(Note::parse(&note.name()).as_ref(), Some(&note));
        }
        for other in [
            "locked-",
            "locked-1-2",
            "locked-1-2-zz",
            "capable-1-2-abc",
            "made-1-2-3",
            "kept-1-2",
            "1-2",
        ] {
            assert_eq!(Note::parse(other.as_bytes()), None, "{other}");
        }
    }
}
