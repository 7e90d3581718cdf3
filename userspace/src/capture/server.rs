//! The kernel's NFS server on this node: whether it runs, and ending it.
//!
//! Its threads cannot be killed. It is told to have none, as `rpc.nfsd 0` does; what it still had to
//! answer, and its cache of replies, are gone then. It must never be ended for a volume that this node
//! still owns.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

/// The program that refuses its replies.
pub(super) const REFUSES: &str = "gate_reply";
const THREADS: &str = "/proc/fs/nfsd/threads";
const PORTS: &str = "/proc/fs/nfsd/portlist";
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

/// Whether it takes requests over RDMA.
pub(super) fn serves_over_rdma() -> bool {
    fs::read_to_string(PORTS).is_ok_and(|ports| ports.lines().any(|port| port.starts_with("rdma")))
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

/// Ends it; whether it has no threads any more.
pub(super) fn end() -> bool {
    if is_running() {
        tracing::error!(
            "the kernel's NFS server is ended: it would confirm what the new owner of the volume may revert"
        );
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
    use super::is_thread;

    #[test]
    fn only_a_thread_of_the_kernel_is_the_server() {
        assert!(is_thread("67 (nfsd) S 2 0 0 0 -1 2129984 0 0"));
        assert!(!is_thread("67 (nfsd) S 2 0 0 0 -1 4194304 0 0"));
        assert!(!is_thread("67 (nfsd4) S 2 0 0 0 -1 2129984 0 0"));
        assert!(!is_thread("67 (a (nfsd) S 1 0 0 0 -1 4194304 0 0"));
        assert!(!is_thread(""));
    }
}
