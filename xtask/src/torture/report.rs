//! What a run found, in words.

use super::{Case, Regime};

/// What was found of one case.
#[derive(Clone, Debug)]
pub struct Judgement {
    /// The case.
    pub case: Case,
    /// What the survivor shows and should not, in words; none: no difference.
    pub differences: Vec<String>,
    /// Where operations were interrupted: how far each thread was, and what is there of it.
    pub threads: Vec<Thread>,
}

/// What is there of an interrupted thread.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    /// Operations that had returned.
    pub acknowledged: u64,
    /// All up to this one must be there.
    pub floor: u64,
    /// The tree is exactly that after this one; none: the disk was ahead.
    pub exact: Option<u64>,
}

/// One power cut.
#[derive(Clone, Debug)]
pub struct Round {
    /// When it came.
    pub regime: Regime,
    /// Each case.
    pub judgements: Vec<Judgement>,
    /// Operations that succeeded, where all returned.
    pub succeeded: u64,
    /// Epochs that ended between the first operation and the cut.
    pub epochs_ended: u64,
    /// Records that were merged.
    pub records_replayed: u64,
    /// Of the same cases so many show a difference on the disk without mirroring; none: not looked at.
    pub lost_without: Option<usize>,
    /// How long it all took.
    pub seconds: f64,
}

impl Round {
    /// Cases that show a difference.
    pub(super) fn failed(&self) -> impl Iterator<Item = Case> {
        let failed = self.judgements.iter().filter(|judgement| !judgement.pass());
        failed.map(|judgement| judgement.case)
    }

    /// A line for each case, and one for all.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.judgements.iter().map(Judgement::line).collect();
        let lost = self.lost_without.map_or_else(String::new, |lost| {
            format!(
                ", without mirroring {lost} of {} differ",
                self.judgements.len()
            )
        });
        let done = match self.regime {
            Regime::Settled => format!("{} operations", self.succeeded),
            Regime::Running => "interrupted operations".to_owned(),
        };
        lines.push(format!(
            "power cut after {done}: {} epochs ended, {} records merged{lost}, {:.0} s",
            self.epochs_ended, self.records_replayed, self.seconds
        ));
        lines
    }
}

impl Judgement {
    fn pass(&self) -> bool {
        self.differences.is_empty()
    }

    fn line(&self) -> String {
        let Case {
            seed,
            length,
            threads,
        } = self.case;
        let found = match self.differences.as_slice() {
            [] => "no difference".to_owned(),
            words => format!("DIFFERS: {}", words.join("; ")),
        };
        let each: Vec<String> = self.threads.iter().map(Thread::words).collect();
        let each = match each.as_slice() {
            [] => String::new(),
            each => format!(" ({})", each.join(", ")),
        };
        format!("seed {seed}, {threads} threads of {length} operations: {found}{each}")
    }
}

impl Thread {
    fn words(&self) -> String {
        let shown = self
            .exact
            .map_or_else(|| "disk ahead".to_owned(), |exact| format!("shows {exact}"));
        format!("{} told, {} due, {shown}", self.acknowledged, self.floor)
    }
}

/// What a whole run found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Each power cut.
    pub rounds: Vec<Round>,
    /// The command that runs the smallest case that was found to fail.
    pub shrunk: Option<String>,
    /// What kept it from going on.
    pub error: Option<String>,
}

impl Report {
    /// No difference, no error, and a crash that would have taken something.
    #[must_use]
    pub fn is_as_it_should_be(&self) -> bool {
        self.error.is_none() && self.failed() == 0 && !self.proves_nothing()
    }

    fn failed(&self) -> usize {
        self.rounds.iter().flat_map(Round::failed).count()
    }

    /// Every disk that was looked at had kept all by itself.
    fn proves_nothing(&self) -> bool {
        let mut looked_at = self.rounds.iter().filter_map(|round| round.lost_without);
        looked_at.all(|lost| lost == 0)
    }

    /// The last lines.
    #[must_use]
    pub fn told(&self) -> String {
        let judged = self.rounds.iter().map(|round| round.judgements.len());
        let mut text = format!(
            "{} seeds in {} power cuts: {} differ\n",
            judged.sum::<usize>(),
            self.rounds.len(),
            self.failed()
        );
        if self.error.is_none() && self.proves_nothing() {
            text += "the disk lost nothing in any crash, so this proves nothing\n";
        }
        for line in self.shrunk.iter().chain(&self.error) {
            text += line;
            text.push('\n');
        }
        text
    }
}
