//! The eBPF object inside this binary.

use super::CaptureError;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/twinwrite.bpf.o"));

/// The object's bytes.
///
/// # Errors
/// [`CaptureError::NoObject`] when the library was built without it.
pub(super) fn object() -> Result<&'static [u8], CaptureError> {
    if OBJECT.is_empty() {
        Err(CaptureError::NoObject)
    } else {
        Ok(OBJECT)
    }
}

/// A number that changes with the object: pinned programs of another object are not taken over.
#[must_use]
pub(super) fn fingerprint() -> u64 {
    u64::from(crc32c::crc32c(OBJECT)) << 32 | (OBJECT.len() as u64 & 0xffff_ffff)
}
