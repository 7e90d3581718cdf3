//! What capturing costs the writer besides time: no memory that it allocates, no system call that it makes.
//!
//! A program overwrites a block of a file in the page cache some thousand times, first while nobody protects the
//! volume, then on the protected one; the kernel's own events count its allocations and system calls.

use anyhow::{Context as _, Result, ensure};

use super::bench::{self, NO_CHECKPOINT, losses, require_start};
use super::with_lab;
use crate::lab::config::MOUNT_POINT;
use crate::lab::{AgentAction, Lab, NodeName, Service};
use crate::progress;

use NodeName::{A, B};

const WRITES: u64 = 4000;
/// Allocations that a write's path makes now and then by itself, for all writes together.
const ALLOCATIONS_BY_CHANCE: u64 = WRITES / 100;
/// The loader's and the program's own beginning and end.
const CALLS_BY_CHANCE: u64 = 10;

pub(super) fn run() -> Result<()> {
    let options = crate::lab::Options {
        service: Service::PlainMount,
        ..bench::options(&[], &[NO_CHECKPOINT])
    };
    with_lab("writer_cost", options, |lab| {
        let bare = measure(lab)?;
        lab.run(A, &format!("umount {MOUNT_POINT}"))?;
        for node in [B, A] {
            lab.agent(node, AgentAction::Start)?;
        }
        require_start(lab)?;
        let captured_before = bench::number(&bench::volume(lab, A)?, "captured_seq")?;
        let lost_before = losses(lab, A)?;
        let protected = measure(lab)?;
        let captured = bench::number(&bench::volume(lab, A)?, "captured_seq")? - captured_before;
        ensure!(
            captured >= 2 * WRITES && losses(lab, A)? == lost_before,
            "of two times {WRITES} writes {captured} are captured"
        );
        let words = format!(
            "{WRITES} writes of 4 KiB: {} allocations and {} system calls while nobody captures, {} and {} \
             captured",
            bare.allocations, bare.calls, protected.allocations, protected.calls
        );
        progress::note(&words);
        ensure!(bare.calls >= WRITES, "the counters see nothing: {words}");
        ensure!(
            protected.allocations <= bare.allocations + ALLOCATIONS_BY_CHANCE
                && protected.calls <= bare.calls + CALLS_BY_CHANCE,
            "capturing costs the writer more than time: {words}"
        );
        Ok(())
    })
}

/// What the kernel counted for the writing program.
struct Counted {
    allocations: u64,
    calls: u64,
}

/// Writes once to have the blocks in the page cache, and once more under the kernel's eyes.
fn measure(lab: &Lab) -> Result<Counted> {
    let write = format!(
        "dd if=/dev/zero of={MOUNT_POINT}/overwritten bs=4096 count={WRITES} conv=notrunc status=none"
    );
    let script = format!(
        "set -e
         {write}
         mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
         cd /sys/kernel/tracing
         count() {{
             echo >set_event; echo >trace; echo 8192 >buffer_size_kb
             for event in $*; do echo 1 >events/$event/enable; done
             sh -c 'echo $$ >set_event_pid; echo 1 >tracing_on; exec {write}'
             echo 0 >tracing_on; echo >set_event; echo >set_event_pid
             cat per_cpu/cpu*/stats | awk '/^(entries|overrun):/ {{ sum += $2 }} END {{ print sum + 0 }}'
         }}
         count kmem/kmalloc kmem/kmem_cache_alloc kmem/mm_page_alloc
         count raw_syscalls/sys_enter"
    );
    let said = lab.run(A, &script)?;
    let numbers: Vec<u64> = said.split_whitespace().flat_map(str::parse).collect();
    let [allocations, calls] = numbers[..] else {
        return Err(anyhow::anyhow!("the counters say {said:?}")).context("counting events");
    };
    Ok(Counted { allocations, calls })
}
