//! The demonstration: A's power is cut while applications write without ever flushing, and B has
//! everything they were told was written. Then the same crash without mirroring, which loses it.
//!
//! It judges by what the applications noted outside of the volume. It never reports success for a
//! run that did not lose data without mirroring: such a run proves nothing.

mod control;
mod metrics;
mod mirrored;
mod report;
mod timeline;
mod workload;

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::lab::{
    CrashKind, Filesystem, KernelRelease, Lab, Lifetime, LinkKind, NodeName, Options, Programs,
    Service,
};
use crate::progress;

pub use report::Report;

/// How long the second writer runs before the crash: longer than the agent remembers the peak of
/// its lag, so that the exported peak is the stream's own.
const STREAM_FOR: Duration = Duration::from_secs(21);
/// How long it runs in the negative control. There is no lag to read; and a kernel flushes by itself
/// what is 30 s old (`dirty_expire_centisecs`), so a longer wait would show less of what a crash takes.
const STREAM_FOR_IN_CONTROL: Duration = Duration::from_secs(3);

/// What to demonstrate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The lab's name.
    pub lab: String,
    /// How A dies.
    pub crash: CrashKind,
    /// The volume's file system.
    pub filesystem: Filesystem,
    /// The machines' kernel.
    pub kernel: KernelRelease,
    /// How bytes reach the mirror.
    pub link: LinkKind,
    /// Which programs go in.
    pub programs: Programs,
    /// Leave the mirrored lab up.
    pub keep: bool,
}

impl Plan {
    fn options(&self, service: Service) -> Options {
        Options {
            filesystem: self.filesystem,
            kernel: self.kernel,
            link: self.link,
            service,
            programs: self.programs,
            ..Options::default()
        }
    }
}

/// Runs both halves; what went wrong is part of the report.
#[must_use]
pub fn run(plan: &Plan) -> Report {
    let mut report = Report::new(plan);
    let result = mirrored::run(plan, &mut report).and_then(|()| control::run(plan, &mut report));
    report.error = result.err().map(|error| format!("{error:#}"));
    report.judge();
    report
}

/// Gives `work` a lab of its own and ends it, whatever happens, unless it is to be kept.
fn with_lab(
    name: &str,
    options: Options,
    keep: bool,
    work: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    let lab = Lab::named(name)?;
    if lab.is_up()? {
        bail!("lab {name} is up already: cargo xtask vm --lab {name} down");
    }
    let lifetime = if keep {
        Lifetime::UntilDown
    } else {
        Lifetime::ThisProcess
    };
    let ending = Ending { lab: &lab, keep };
    let result = Lab::up(
        name,
        Options {
            lifetime,
            ..options
        },
    )
    .and_then(|lab| work(&lab));
    drop(ending);
    if result.is_err() {
        for node in NodeName::ALL {
            let (agent, console) = (lab.agent_log(node), lab.console_log(node));
            for log in [agent, console].iter().filter(|log| log.exists()) {
                progress::note(&format!("log of {node}: {}", log.display()));
            }
        }
    }
    result.with_context(|| format!("in lab {name}"))
}

/// Ends a lab also if what it was made for fails or panics.
struct Ending<'a> {
    lab: &'a Lab,
    keep: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let name = self.lab.name();
        if self.keep {
            progress::note(&format!(
                "lab {name} is kept; its end: cargo xtask vm --lab {name} down"
            ));
        } else if let Err(error) = self.lab.down() {
            progress::note(&format!("lab {name} does not end: {error:#}"));
        }
    }
}
