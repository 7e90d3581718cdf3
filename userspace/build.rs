//! Embeds the eBPF object into the library.
//!
//! The object is built by `cargo xtask build` for another target with another compiler, so it is
//! taken from where that puts it; without it the library still builds, and loading says what to do.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no manifest dir")?);
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let object = env::var_os("TWINWRITE_EBPF_OBJECT").map_or_else(
        || manifest_dir.join("../target/ebpf/twinwrite.bpf.o"),
        PathBuf::from,
    );
    println!("cargo::rerun-if-env-changed=TWINWRITE_EBPF_OBJECT");
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) => {
            println!(
                "cargo::warning=built without the eBPF programs: {}: {error}; run `cargo xtask build`",
                object.display()
            );
            Vec::new()
        }
    };
    fs::write(out_dir.join("twinwrite.bpf.o"), bytes)?;
    Ok(())
}
