//! Proof that the hooks tell the truth on this kernel: known operations on the volume, compared
//! field by field and byte by byte with the records they left.
//!
//! Hooks differ between kernels in ways no version number tells. So before a volume is called
//! protected the agent does one of everything in `<mount>/.twinwrite/calibrate/`, learns from it
//! where the write hook leaves the file position, and then demands that every record is exactly
//! what the operation was. A difference is an error that names the hook. It must never be run while
//! records of a running epoch are in the ring: it releases what it reads.

mod bench;
mod btrfs;
mod filled;
mod gaps;
mod known;
mod operations;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use twinwrite_abi::control;

use super::{Capture, CaptureError, Filesystem};
use bench::Bench;

/// What calibration found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// Whether the write hook leaves the file position at the end of the write.
    pub pos_is_end: bool,
    /// Known operations that were verified.
    pub operations: u32,
    /// What could not be tried here, and why.
    pub skipped: Vec<String>,
}

/// Ends the capture of the agent's own work, whatever happens.
struct OwnWorkCaptured<'a>(&'a Capture);

impl Drop for OwnWorkCaptured<'_> {
    fn drop(&mut self) {
        self.0.control().set(control::CALIBRATING, 0);
    }
}

/// Calibrates and verifies all hooks of a freshly attached capture.
///
/// # Errors
/// [`CaptureError::Calibration`] naming the hook, or what else failed. The volume is cleaned up in
/// either case; the capture must not be used after an error.
pub fn calibrate(capture: &Capture, mount_point: &Path) -> Result<Calibration, CaptureError> {
    if capture.resumed() {
        return Err(CaptureError::Options(
            "a capture that was taken over is calibrated already".to_owned(),
        ));
    }
    let began = Instant::now();
    let directory = mount_point.join(".twinwrite").join("calibrate");
    clear(&directory)?;
    fs::create_dir_all(&directory).map_err(|source| {
        CaptureError::system(format!("creating {}", directory.display()), source)
    })?;
    // What is made there would inherit it.
    match rustix::fs::removexattr(&directory, "system.posix_acl_default") {
        Ok(()) | Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
        Err(source) => {
            return Err(CaptureError::system(
                format!("removing the default ACL of {}", directory.display()),
                io::Error::from(source),
            ));
        }
    }
    let outcome = run(capture, &directory);
    let cleared = clear(&directory);
    let calibration = outcome?;
    cleared?;
    let control = capture.control();
    control.acknowledge_gaps(&control.gaps());
    control.set(control::STATE, control::ATTACHED | control::CALIBRATED);
    tracing::info!(
        volume = capture.options().volume_name,
        ms = began.elapsed().as_millis(),
        "the hooks tell what they must"
    );
    Ok(calibration)
}

fn clear(directory: &Path) -> Result<(), CaptureError> {
    match fs::remove_dir_all(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(CaptureError::system(
            format!("removing {}", directory.display()),
            source,
        )),
    }
}

fn run(capture: &Capture, directory: &Path) -> Result<Calibration, CaptureError> {
    capture.control().set(control::CALIBRATING, 1);
    let _own_work = OwnWorkCaptured(capture);
    let mut bench = Bench::new(capture, directory)?;
    let pos_is_end = operations::find_position(&mut bench)?;
    capture
        .control()
        .set(control::POS_IS_END, u64::from(pos_is_end));
    operations::data(&mut bench)?;
    operations::marks(&mut bench)?;
    operations::names(&mut bench)?;
    operations::moves(&mut bench)?;
    operations::attributes(&mut bench)?;
    operations::removals(&mut bench)?;
    filled::ranges(&mut bench)?;
    filled::extended(&mut bench)?;
    filled::mapped(&mut bench)?;
    gaps::all(&mut bench)?;
    if capture.options().filesystem == Filesystem::Btrfs {
        btrfs::no_subvolume(&mut bench)?;
    }
    bench.discard()?;
    Ok(Calibration {
        pos_is_end,
        operations: bench.operations,
        skipped: bench.skipped,
    })
}
