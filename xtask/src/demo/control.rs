//! The negative control: the same applications, the same crash, no mirroring.

use anyhow::Result;

use super::report::Report;
use super::workload::{self, Stream};
use super::{Plan, STREAM_FOR_IN_CONTROL, with_lab};
use crate::lab::{NodeName, Options, Programs, Service};
use crate::progress;

pub(super) fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    progress::note("Now the same without mirroring.");
    let options = Options {
        programs: Programs::AsBuilt,
        ..plan.options(Service::PlainMount)
    };
    let name = format!("{}-control", plan.lab);
    with_lab(&name, options, false, |lab| {
        workload::settle(lab)?;
        let stream = Stream::start(lab)?;
        stream.run_on(STREAM_FOR_IN_CONTROL, || Ok(()))?;
        progress::step(&format!("Crashing A ({})", report.crash), || {
            lab.crash(NodeName::A, plan.crash)
        })?;
        lab.mount_plainly(NodeName::B)?;
        let checked = workload::check(lab, None)?;
        report.without_mirror(&checked);
        Ok(())
    })
}
