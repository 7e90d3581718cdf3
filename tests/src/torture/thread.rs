//! One thread's work.

use std::io;

use super::act::Hands;
use super::action::{Action, Kind};
use super::generator::{Generator, Place, SHARED_SLOTS, usable};
use super::log::{self, Log};
use super::model::{Model, OWN_SLOTS};
use super::{Case, Options, Regime, SHARED, SHARED_PERCENT, Summary};
use crate::error::{Error, Told as _};

/// A thread, and all that it keeps.
pub(super) struct Worker {
    generator: Generator,
    model: Model,
    own: Hands,
    shared: Hands,
    log: Option<Log>,
    summary: Summary,
    options: Options,
}

/// The operations of a thread, as its seed decides them.
pub(super) fn generator(case: &Case, thread: u64, kinds: &[Kind], is_settled: bool) -> Generator {
    let shared_percent = if is_settled { SHARED_PERCENT } else { 0 };
    let mut kinds = usable(kinds);
    if is_settled && !case.flushes() && kinds.len() > 1 {
        kinds.retain(|kind| *kind != Kind::Sync);
    }
    Generator::new(case.seed, thread, &kinds, shared_percent)
}

impl Worker {
    pub(super) fn new(options: &Options, thread: u64) -> Result<Self, Error> {
        let top = options.root.join(options.case.directory());
        let (is_settled, log) = match &options.regime {
            Regime::Settled => (true, None),
            Regime::Running(directory) => {
                let path = log::path(directory, &options.case, thread);
                (false, Some(Log::create(path)?))
            }
        };
        Ok(Self {
            generator: generator(&options.case, thread, &options.kinds, is_settled),
            model: Model::new(),
            own: Hands::new(top.join(Case::thread(thread)), OWN_SLOTS),
            shared: Hands::new(top.join(SHARED), SHARED_SLOTS),
            log,
            summary: Summary::default(),
            options: options.clone(),
        })
    }

    /// So many operations; the first that fails and must not ends them.
    pub(super) fn run(mut self, operations: u64) -> Result<Summary, Error> {
        for number in 1..=operations {
            self.step(number)?;
        }
        Ok(self.summary)
    }

    fn step(&mut self, number: u64) -> Result<(), Error> {
        let (place, action) = self.generator.next(&self.model);
        let hands = match place {
            Place::Own => &mut self.own,
            Place::Shared => &mut self.shared,
        };
        let result = hands.carry_out(&action);
        if let Some(log) = &mut self.log {
            log.note(&result)?;
        }
        let wrong = match &result {
            Ok(()) => {
                self.summary.succeeded += 1;
                place == Place::Own && self.model.apply(&action).is_err()
            }
            Err(error) => {
                *self.summary.refused.entry(error.to_string()).or_default() += 1;
                !is_answer(place, &action, error)
            }
        };
        if !wrong {
            return Ok(());
        }
        let top = self.options.root.join(self.options.case.directory());
        let words = format!("operation {number} of a thread, {action:?}: {result:?}");
        Err(io::Error::other(words)).told("work in", &top)
    }
}

/// Whether the system may answer so: to operations that this file system does not have, and, on files
/// that others change meanwhile, to any.
fn is_answer(place: Place, action: &Action, error: &io::Error) -> bool {
    let Some(number) = error.raw_os_error() else {
        return false;
    };
    let is_serious = matches!(
        number,
        libc::EIO | libc::EROFS | libc::ENOSPC | libc::ENOMEM | libc::ESTALE | libc::EFAULT
    );
    match place {
        Place::Shared => !is_serious,
        Place::Own => match action {
            Action::Reflink { .. } | Action::Allocate { .. } | Action::Copy { .. } => {
                matches!(number, libc::EOPNOTSUPP | libc::EINVAL | libc::EXDEV)
            }
            Action::Write { .. } => number == libc::EINVAL,
            Action::SetFlags { .. } | Action::SetXattr { .. } | Action::SetAcl { .. } => {
                matches!(number, libc::EOPNOTSUPP | libc::ENOTTY)
            }
            Action::OpenUnnamed { .. } => number == libc::EOPNOTSUPP,
            _ => false,
        },
    }
}
