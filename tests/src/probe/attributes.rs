//! Attributes.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use rustix::fs::{IFlags, XattrFlags, ioctl_getflags, ioctl_setflags, lremovexattr, lsetxattr};

use super::{BASE, Group, Probe, Work, base, nothing, overwrite, pattern};

/// Version 2 of an ACL's extended attribute, then entries of tag, permissions and id
/// (`struct posix_acl_xattr_entry`, include/uapi/linux/posix_acl_xattr.h).
const ACL_VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;
const ACCESS_ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";

const fn probe(name: &'static str, prepare: Work, act: Work) -> Probe {
    Probe {
        name,
        group: Group::Attributes,
        prepare,
        act,
    }
}

pub(super) const PROBES: &[Probe] = &[
    probe("chmod", nothing, |dir| mode(dir, 0o4711)),
    probe("chmod-directory", directory, |dir| {
        fs::set_permissions(dir.join("directory"), Permissions::from_mode(0o1770))
    }),
    probe("chown", nothing, |dir| {
        chown(dir.join(BASE), Some(1_234), Some(70_000))
    }),
    probe("chown-symlink", link, |dir| {
        lchown(dir.join("link"), Some(1_234), Some(1_235))
    }),
    probe("set-id-bits-cleared-by-chown", set_id, |dir| {
        chown(dir.join(BASE), Some(1_234), None)
    }),
    probe("utimes", nothing, |dir| {
        times(dir, BASE, UtimensatFlags::FollowSymlink)
    }),
    probe("utimes-symlink", link, |dir| {
        times(dir, "link", UtimensatFlags::NoFollowSymlink)
    }),
    probe("utimes-directory", directory, |dir| {
        times(dir, "directory", UtimensatFlags::FollowSymlink)
    }),
    probe("xattr-user", nothing, |dir| set(dir, "user.one", 100)),
    probe("xattr-trusted", nothing, |dir| set(dir, "trusted.one", 100)),
    probe("xattr-security", nothing, |dir| {
        set(dir, "security.one", 100)
    }),
    probe("xattr-of-3000-bytes", nothing, |dir| {
        set(dir, "user.large", 3_000)
    }),
    probe("xattr-of-64-kib", nothing, |dir| {
        match set(dir, "user.largest", 65_536) {
            // ext4 keeps them in one block.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOSPC | libc::E2BIG | libc::ERANGE)
                ) =>
            {
                Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
            }
            result => result,
        }
    }),
    probe("xattr-replace", attributed, |dir| set(dir, "user.one", 200)),
    probe("xattr-remove", attributed, |dir| {
        Ok(lremovexattr(dir.join(BASE), "user.one")?)
    }),
    probe("xattr-directory", directory, |dir| {
        let value = pattern(3, 50);
        Ok(lsetxattr(
            dir.join("directory"),
            "user.one",
            &value,
            XattrFlags::empty(),
        )?)
    }),
    probe("xattr-symlink", link, |dir| {
        let value = pattern(3, 50);
        Ok(lsetxattr(
            dir.join("link"),
            "trusted.one",
            &value,
            XattrFlags::empty(),
        )?)
    }),
    probe("acl-access", nothing, |dir| acl(dir, BASE, ACCESS_ACL, 6)),
    probe("acl-default", directory, |dir| {
        acl(dir, "directory", DEFAULT_ACL, 5)
    }),
    probe("acl-inherited", inheriting, |dir| {
        fs::write(dir.join("directory/new"), pattern(2, 100))?;
        fs::create_dir(dir.join("directory/below"))
    }),
    probe("acl-default-changed-after-create", inheriting, |dir| {
        fs::write(dir.join("directory/new"), pattern(2, 100))?;
        acl(dir, "directory", DEFAULT_ACL, 4)
    }),
    probe("acl-removed", inheriting, |dir| {
        Ok(lremovexattr(dir.join("directory"), DEFAULT_ACL)?)
    }),
    probe("flag-no-dump", nothing, |dir| flag(dir, IFlags::NODUMP)),
    probe("flag-append-only", nothing, |dir| flag(dir, IFlags::APPEND)),
    probe("flag-immutable", nothing, |dir| {
        flag(dir, IFlags::IMMUTABLE)
    }),
    probe("write-then-immutable", nothing, |dir| {
        overwrite(&base(dir)?, 2, 5_000, 100)?;
        flag(dir, IFlags::IMMUTABLE)
    }),
];

fn mode(dir: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(dir.join(BASE), Permissions::from_mode(mode))
}

fn directory(dir: &Path) -> io::Result<()> {
    fs::create_dir(dir.join("directory"))
}

fn link(dir: &Path) -> io::Result<()> {
    symlink(BASE, dir.join("link"))
}

fn set_id(dir: &Path) -> io::Result<()> {
    mode(dir, 0o6755)
}

fn times(dir: &Path, name: &str, follow: UtimensatFlags) -> io::Result<()> {
    let at = |seconds, nanoseconds| TimeSpec::new(seconds, nanoseconds);
    let (accessed, modified) = (at(1_000_000_000, 5), at(1_234_567_890, 123_456_789));
    Ok(utimensat(
        AT_FDCWD,
        &dir.join(name),
        &accessed,
        &modified,
        follow,
    )?)
}

fn set(dir: &Path, name: &str, bytes: usize) -> io::Result<()> {
    let value = pattern(bytes as u64, bytes);
    Ok(lsetxattr(
        dir.join(BASE),
        name,
        &value,
        XattrFlags::empty(),
    )?)
}

fn attributed(dir: &Path) -> io::Result<()> {
    set(dir, "user.one", 100)?;
    set(dir, "user.two", 100)
}

fn inheriting(dir: &Path) -> io::Result<()> {
    directory(dir)?;
    acl(dir, "directory", DEFAULT_ACL, 6)
}

/// Gives user 1234 these permissions, as an ACL of its own.
fn acl(dir: &Path, name: &str, attribute: &str, permissions: u16) -> io::Result<()> {
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 6, NO_ID),
        (0x02, permissions, 1_234),
        (0x04, 4, NO_ID),
        (0x10, 7, NO_ID),
        (0x20, 0, NO_ID),
    ];
    let mut value = ACL_VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Ok(lsetxattr(
        dir.join(name),
        attribute,
        &value,
        XattrFlags::empty(),
    )?)
}

fn flag(dir: &Path, flag: IFlags) -> io::Result<()> {
    let file = File::open(dir.join(BASE))?;
    let flags = ioctl_getflags(&file)?;
    Ok(ioctl_setflags(&file, flags | flag)?)
}
