//! The kernel's NFS server on this node: whether it runs, and ending it.
//!
//! Its threads cannot be killed. It is told to have none, as `rpc.nfsd 0` does; what it still had to
//! answer, and its cache of replies, are gone then. It must never be ended for a volume that this node
//! still owns.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use std::{fs, io};

/// The program that refuses its replies.
pub(super) const REFUSES: &str = "gate_reply";
const THREADS: &str = "/proc/fs/nfsd/threads";
/// Below a process's root.
const PORTS: &str = "proc/fs/nfsd/portlist";
/// What the kernel's RPC can use, in all namespaces.
const TRANSPORTS: &str = "/proc/sys/sunrpc/transports";
/// What it was asked for lately.
const EXPORTS: &str = "/proc/fs/nfsd/exports";
/// `PF_KTHREAD`.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// Its threads end what they are at first, and that may be a disk that does not answer.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Whether it has threads, in whatever network namespace. What cannot be read counts as yes.
pub(super) fn is_running() -> bool {
    let Ok(processes) = fs::read_dir("/proc") else {
        return true;
    };
    processes
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
        .any(|entry| {
            fs::read_to_string(entry.path().join("stat")).is_ok_and(|stat| is_thread(&stat))
        })
}

/// Whether it was asked for anything below a mount point, or at it.
pub(super) fn exports(mount_point: &Path) -> bool {
    let Ok(list) = fs::read_to_string(EXPORTS) else {
        return false;
    };
    let mount_point = &fs::canonicalize(mount_point).unwrap_or_else(|_| mount_point.to_owned());
    list.lines().any(|line| is_export_below(line, mount_point))
}

/// From a line of the list: the path, in which odd characters are `\\ooo`, then to whom.
fn is_export_below(line: &str, mount_point: &Path) -> bool {
    let Some((path, _)) = line.split_once(['\t', ' ']) else {
        return false;
    };
    Path::new(&unescaped(path)).starts_with(mount_point)
}

/// As `seq_path` and the server's own lists write it (`qword_add`, net/sunrpc/cache.c).
fn unescaped(path: &str) -> OsString {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        };
        match behind.get(..3).filter(|_| first == b'\\').and_then(octal) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// Whether it may take requests over RDMA, in whatever network namespace. What cannot be read counts as yes.
pub(super) fn serves_over_rdma() -> bool {
    match fs::read_to_string(TRANSPORTS) {
        Ok(list) => list.lines().any(is_rdma) && is_running() && may_listen_over_rdma(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Of a list of transports or ports.
fn is_rdma(line: &str) -> bool {
    line.split(' ').next() == Some("rdma")
}

/// The ports are listed for the network namespace in which the list was mounted, so every mount namespace
/// is looked at.
fn may_listen_over_rdma() -> bool {
    let Ok(processes) = procfs::process::all_processes() else {
        return true;
    };
    let mut looked_at = BTreeSet::new();
    let mut is_listed = false;
    for process in processes.flatten() {
        let root = Path::new("/proc").join(process.pid.to_string());
        // One that ended.
        let Ok(namespace) = fs::read_link(root.join("ns/mnt")) else {
            continue;
        };
        if !looked_at.insert(namespace) {
            continue;
        }
        if let Ok(ports) = fs::read_to_string(root.join("root").join(PORTS)) {
            is_listed = true;
            if ports.lines().any(is_rdma) {
                return true;
            }
        }
    }
    !is_listed
}

/// From a process's /proc/PID/stat.
fn is_thread(stat: &str) -> bool {
    // The name, in parentheses, may hold anything; the state behind it is field 3, the flags field 9.
    let Some((head, fields)) = stat.rsplit_once(") ") else {
        return false;
    };
    let flags: Option<u64> = fields.split(' ').nth(9 - 3).and_then(|f| f.parse().ok());
    head.ends_with("(nfsd") && flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

static ENDINGS: AtomicU64 = AtomicU64::new(0);

/// How often [`end`] has ended it.
pub(super) fn endings() -> u64 {
    ENDINGS.load(Ordering::Relaxed)
}

/// Ends it; whether it has no threads any more.
pub(super) fn end() -> bool {
    if is_running() {
        tracing::error!(
            "the kernel's NFS server is ended: it would confirm what the new owner of the volume may revert; \
             start it again (rpc.nfsd) for what else this node exports"
        );
        ENDINGS.fetch_add(1, Ordering::Relaxed);
        let (done, ended) = mpsc::channel();
        // The kernel lets the writer wait for the threads' end, however long.
        let writer = std::thread::Builder::new()
            .name("nfsd-end".to_owned())
            .spawn(move || done.send(fs::write(Path::new(THREADS), "0\n")).ok());
        match writer.map(|_| ended.recv_timeout(END_LIMIT)) {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) | Err(error) => tracing::error!(%error, "{THREADS}"),
            Ok(Err(_)) => tracing::error!("its threads do not end"),
        }
    }
    !is_running()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{is_export_below, is_thread};

    #[test]
    fn an_export_below_the_mount_point_keeps_it_mounted() {
        let at = |line| is_export_below(line, Path::new("/srv/a b"));
        assert!(at("/srv/a\\040b\t*(rw,no_root_squash,sync)"));
        assert!(at("/srv/a\\040b/c\t*(rw)"));
        assert!(!at("/srv/a\\040bc\t*(rw)"));
        assert!(!at("/srv\t*(rw)"));
        assert!(!at("# Version 1.1"));
        assert!(!at("/srv/a\\9"));
    }

    #[test]
    fn only_a_thread_of_the_kernel_is_the_server() {
        assert!(is_thread("67 (nfsd) S 2 0 0 0 -1 2129984 0 0"));
        assert!(!is_thread("67 (nfsd) S 2 0 0 0 -1 4194304 0 0"));
        assert!(!is_thread("67 (nfsd4) S 2 0 0 0 -1 2129984 0 0"));
        assert!(!is_thread("67 (a (nfsd) S 1 0 0 0 -1 4194304 0 0"));
        assert!(!is_thread(""));
    }
}
