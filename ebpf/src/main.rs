//! The eBPF programs that capture every change to a protected volume.
//!
//! One object serves every kernel and file system: offsets and enum values are globals that user
//! space sets from the running kernel's BTF, and a program whose kernel function is missing is
//! simply not loaded. Each program filters by the volume's super block first, then by the agent's
//! thread group, and hands one record to the ring while the inode or directory lock is still held
//! (where the kernel allows), so that ring order is the order of the operations.
//!
//! A program must never change what the kernel does, or lose a change without counting it; only the gate
//! lets a thread wait, at the end of its system call (`gate`), and an NFS client for its answer (`server`).
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod attributes;
mod btrfs;
mod calls;
mod config;
mod data;
mod direct;
mod emit;
mod extended;
mod gaps;
mod gate;
mod hold;
mod mapping;
mod names;
mod server;
mod space;
mod subtree;
mod sync;
mod unnoticed;
mod workers;
mod writeback;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
