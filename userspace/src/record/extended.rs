//! The extended state of an inode: what an EXTENDED record is filled with.
//!
//! ```text
//! 0 version u32 | 4 known u32 | 8 mode u32 | 12 flags u32 | 16 xflags u32 | 20 extent_bytes u32 |
//! 24 project u32 | 28 copy_extent_bytes u32 | 32 attributes u32 | 36 zero u32
//! 40 attributes, by name: name_len u32 | value_len u32 | the name | the value
//! ```
//!
//! Integers are little-endian. It is the whole state: an attribute that is not in it is not there. Pure: it
//! must never trust a length before it has checked it.

use std::collections::BTreeMap;

use thiserror::Error;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use twinwrite_abi::EXTENDED_BYTES_MAX;

/// Version of the layout.
const VERSION: u32 = 1;
/// Bit of `known`: the inode's flags and project are told. Symlinks and special files have none.
const FLAGS_KNOWN: u32 = 1 << 0;
/// Longest name of an attribute (`XATTR_NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;
/// Longest value (`XATTR_SIZE_MAX`).
pub const VALUE_BYTES_MAX: usize = 64 * 1024;

/// Inode flags and the quota project, as `FS_IOC_GETFLAGS` and `FS_IOC_FSGETXATTR` tell them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct InodeFlags {
    /// `FS_*_FL` (include/uapi/linux/fs.h).
    pub flags: u32,
    /// `FS_XFLAG_*` of `struct fsxattr`.
    pub xflags: u32,
    /// `fsx_extsize`, bytes.
    pub extent_bytes: u32,
    /// `fsx_projid`.
    pub project: u32,
    /// `fsx_cowextsize`, bytes.
    pub copy_extent_bytes: u32,
}

impl InodeFlags {
    /// `FS_IMMUTABLE_FL` and `FS_APPEND_FL`: such an inode takes no names, bytes or attributes.
    pub const LOCKS: u32 = 0x10 | 0x20;
    /// `FS_XFLAG_IMMUTABLE` and `FS_XFLAG_APPEND`.
    pub const EXTENDED_LOCKS: u32 = 0x08 | 0x10;

    /// `FS_NOCOW_FL`: what is written lies where it lay, and has no checksum. Of btrfs.
    pub const IN_PLACE: u32 = 0x80_0000;

    /// Which of [`Self::LOCKS`] it has.
    #[must_use]
    pub fn locks(&self) -> u32 {
        self.flags & Self::LOCKS
    }

    /// The same, but with just these of [`Self::LOCKS`].
    #[must_use]
    pub fn locked(self, locks: u32) -> Self {
        Self {
            flags: self.flags & !Self::LOCKS | locks & Self::LOCKS,
            xflags: self.xflags & !Self::EXTENDED_LOCKS,
            ..self
        }
    }

    /// The same, but open to every change.
    #[must_use]
    pub fn unlocked(self) -> Self {
        self.locked(0)
    }
}

/// Why bytes are no extended state.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ExtendedError {
    /// Too few bytes.
    #[error("extended state: {what} does not fit into the {have} bytes that are left")]
    Short {
        /// What did not fit.
        what: &'static str,
        /// Bytes there are.
        have: usize,
    },
    /// A field has a value that nobody writes.
    #[error("extended state: {field} is {value}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// It is larger than a record can hold.
    #[error(
        "the extended attributes of one inode take {bytes} bytes, of which {EXTENDED_BYTES_MAX} can be mirrored"
    )]
    TooLarge {
        /// Bytes it takes.
        bytes: usize,
    },
}

/// The extended state of one inode; borrows the attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extended<'a> {
    /// `i_mode` when the state was read: an ACL changes it.
    pub mode: u32,
    /// Flags and project; `None` for what has none.
    pub flags: Option<InodeFlags>,
    /// Every extended attribute, by its whole name.
    pub attributes: BTreeMap<&'a [u8], &'a [u8]>,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Head {
    version: U32,
    known: U32,
    mode: U32,
    flags: U32,
    xflags: U32,
    extent_bytes: U32,
    project: U32,
    copy_extent_bytes: U32,
    attributes: U32,
    zero: U32,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct AttributeHead {
    name_len: U32,
    value_len: U32,
}

const _: () = assert!(size_of::<Head>() == 40);
const _: () = assert!(size_of::<AttributeHead>() == 8);

impl<'a> Extended<'a> {
    /// The bytes of a record's fill.
    ///
    /// # Errors
    /// [`ExtendedError::TooLarge`].
    pub fn encode(&self) -> Result<Vec<u8>, ExtendedError> {
        let flags = self.flags.unwrap_or_default();
        let known = if self.flags.is_some() { FLAGS_KNOWN } else { 0 };
        let head = Head {
            version: VERSION.into(),
            known: known.into(),
            mode: self.mode.into(),
            flags: flags.flags.into(),
            xflags: flags.xflags.into(),
            extent_bytes: flags.extent_bytes.into(),
            project: flags.project.into(),
            copy_extent_bytes: flags.copy_extent_bytes.into(),
            attributes: (self.attributes.len() as u32).into(),
            zero: 0.into(),
        };
        let mut bytes = head.as_bytes().to_vec();
        for (name, value) in &self.attributes {
            let head = AttributeHead {
                name_len: (name.len() as u32).into(),
                value_len: (value.len() as u32).into(),
            };
            bytes.extend_from_slice(head.as_bytes());
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(value);
        }
        // A fill as long as its record would be one that goes on.
        if bytes.len() >= EXTENDED_BYTES_MAX as usize {
            return Err(ExtendedError::TooLarge { bytes: bytes.len() });
        }
        Ok(bytes)
    }

    /// Reads what [`Extended::encode`] wrote, or somebody hostile.
    ///
    /// # Errors
    /// [`ExtendedError`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ExtendedError> {
        let field = |field, value: u32| ExtendedError::Field {
            field,
            value: value.into(),
        };
        let short = |what, left: &[u8]| ExtendedError::Short {
            what,
            have: left.len(),
        };
        let (head, mut left) =
            Head::read_from_prefix(bytes).map_err(|_| short("the header", bytes))?;
        if head.version != VERSION {
            return Err(field("version", head.version.get()));
        }
        if head.known.get() & !FLAGS_KNOWN != 0 {
            return Err(field("known", head.known.get()));
        }
        let flags = InodeFlags {
            flags: head.flags.get(),
            xflags: head.xflags.get(),
            extent_bytes: head.extent_bytes.get(),
            project: head.project.get(),
            copy_extent_bytes: head.copy_extent_bytes.get(),
        };
        let mut state = Self {
            mode: head.mode.get(),
            flags: (head.known.get() & FLAGS_KNOWN != 0).then_some(flags),
            attributes: BTreeMap::new(),
        };
        for _ in 0..head.attributes.get() {
            let (attribute, rest) = AttributeHead::read_from_prefix(left)
                .map_err(|_| short("an attribute's lengths", left))?;
            let (name_len, value_len) = (attribute.name_len.get(), attribute.value_len.get());
            if name_len == 0 || name_len as usize > NAME_BYTES_MAX {
                return Err(field("name_len", name_len));
            }
            if value_len as usize > VALUE_BYTES_MAX {
                return Err(field("value_len", value_len));
            }
            let (name, rest) = (rest.split_at_checked(name_len as usize))
                .ok_or_else(|| short("an attribute's name", rest))?;
            let (value, rest) = (rest.split_at_checked(value_len as usize))
                .ok_or_else(|| short("an attribute's value", rest))?;
            if name.contains(&0) {
                return Err(field("a NUL in a name, name_len", name_len));
            }
            let follows = state.attributes.last_key_value();
            if follows.is_some_and(|(last, _)| *last >= name) {
                return Err(field("names out of order, name_len", name_len));
            }
            state.attributes.insert(name, value);
            left = rest;
        }
        if !left.is_empty() {
            return Err(ExtendedError::Field {
                field: "bytes behind the last attribute",
                value: left.len() as u64,
            });
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::{Extended, ExtendedError, InodeFlags};

    fn state() -> Extended<'static> {
        Extended {
            mode: 0o100_640,
            flags: Some(InodeFlags {
                flags: 0x40,
                xflags: 0x80,
                extent_bytes: 4096,
                project: 7,
                copy_extent_bytes: 0,
            }),
            attributes: [(&b"user.b"[..], &b""[..]), (b"user.a", b"12")].into(),
        }
    }

    #[test]
    fn its_bytes_are_pinned() {
        let words: [u32; 10] = [1, 1, 0o100_640, 0x40, 0x80, 4096, 7, 0, 2, 0];
        let mut golden: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        golden.extend(b"\x06\0\0\0\x02\0\0\0user.a12\x06\0\0\0\0\0\0\0user.b");
        assert_eq!(state().encode().as_ref(), Ok(&golden));
        assert_eq!(Extended::decode(&golden), Ok(state()));
    }

    #[test]
    fn damage_is_told_and_never_read_beyond_the_end() {
        let golden = state().encode().expect("small");
        for len in 0..golden.len() {
            assert!(Extended::decode(&golden[..len]).is_err(), "{len} bytes");
        }
        let mut longer = golden.clone();
        longer.push(0);
        assert!(Extended::decode(&longer).is_err());
        for at in [0, 4, 32, 40, 44] {
            let mut damaged = golden.clone();
            damaged[at + 3] = 0xff;
            assert!(Extended::decode(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_a_record_cannot_hold_is_refused() {
        let value = vec![7; super::VALUE_BYTES_MAX];
        let names: Vec<String> = (0..5).map(|i| format!("user.{i}")).collect();
        let state = Extended {
            attributes: (names.iter())
                .map(|name| (name.as_bytes(), &value[..]))
                .collect(),
            ..Extended::default()
        };
        assert!(matches!(
            state.encode(),
            Err(ExtendedError::TooLarge { bytes }) if bytes > 5 * value.len()
        ));
    }
}
