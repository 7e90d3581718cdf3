//! What the kernel tells of a mounted ext4 in sysfs: numbers that it has in memory, so that whoever asks
//! for one never waits for the disk.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// A mounted ext4, as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ext4(PathBuf);

impl Ext4 {
    /// The one on this device, in the kernel's form; `None`: there is none.
    #[must_use]
    pub fn on(device: u32) -> Option<Self> {
        Self::below(Path::new("/sys"), device)
    }

    /// The same, where sysfs is mounted elsewhere.
    #[must_use]
    pub fn below(sys: &Path, device: u32) -> Option<Self> {
        let (major, minor) = (device >> 20, device & 0xf_ffff);
        let block = std::fs::read_link(sys.join(format!("dev/block/{major}:{minor}"))).ok()?;
        let directory = sys.join("fs/ext4").join(block.file_name()?);
        directory.is_dir().then_some(Self(directory))
    }

    /// Where a number or a switch of this name is.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A number; `None`: this kernel has none of this name.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        let mut text = String::new();
        let mut file = File::open(self.path(name)).ok()?.take(32);
        file.read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_by_its_device_and_its_numbers_read() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        std::fs::create_dir_all(sys.join("dev/block")).unwrap();
        std::fs::create_dir_all(sys.join("fs/ext4/dm-3")).unwrap();
        let link = |name| sys.join("dev/block").join(name);
        std::os::unix::fs::symlink("../../devices/virtual/block/dm-3", link("254:3")).unwrap();
        std::os::unix::fs::symlink("../../devices/pci/block/vda", link("253:16")).unwrap();
        let ext4 = Ext4::below(sys, (254 << 20) | 3).unwrap();
        assert_eq!(ext4.number("errors_count"), None);
        std::fs::write(ext4.path("errors_count"), "17\n").unwrap();
        assert_eq!(ext4.number("errors_count"), Some(17));
        std::fs::write(ext4.path("errors_count"), "many\n").unwrap();
        assert_eq!(ext4.number("errors_count"), None);
        assert_eq!(Ext4::below(sys, (253 << 20) | 16), None, "no ext4");
        assert_eq!(Ext4::below(sys, (7 << 20) | 1), None, "no such device");
    }
}
