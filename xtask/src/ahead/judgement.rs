//! The oracle's word on every volume of a survivor.

use std::fs;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::pair::Pair;
use super::round;
use super::{CASES, POSTGRES};
use crate::lab::{Lab, NodeName};

/// What the oracle found on one volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// What its application does.
    #[serde(default)]
    pub case: String,
    /// Nothing is missing that must be there.
    pub pass: bool,
    /// The older content was written before the power went.
    pub ready: bool,
    /// Versions tried.
    pub tried: u64,
    /// Operations confirmed as durable.
    pub confirmations: u64,
    /// Cells that show less than was confirmed.
    pub confirmed_lost: u64,
    /// Cells that show less than what was mirrored.
    pub mirrored_lost: u64,
    /// The first of them.
    pub differences: Vec<String>,
}

/// A log that is judged, in the share of the survivor.
pub(super) fn log(index: usize) -> String {
    format!("judged/vol{index}.log")
}

/// Hands the logs that the applications of `dead` left to its peer.
pub(super) fn hand_over(lab: &Lab, dead: NodeName) -> Result<()> {
    let (from, to) = (lab.share(dead), lab.share(dead.peer()));
    fs::create_dir_all(to.join("judged"))?;
    for (index, case) in CASES.iter().enumerate() {
        fs::copy(round::log(&from, index), to.join(log(index)))
            .with_context(|| format!("the log of {case} is missing"))?;
    }
    Ok(())
}

/// Holds every volume on `survivor` against the logs that were handed over, and clears away what passes.
pub(super) fn judge(
    pair: &Pair<'_>,
    survivor: NodeName,
    number: u64,
    mirrored: &[bool],
) -> Result<Vec<Judgement>> {
    let to = pair.lab.share(survivor);
    let mut script = String::new();
    for (index, case) in CASES.iter().enumerate() {
        let log = log(index);
        let directory = round::directory(index, number);
        let flag = match mirrored.get(index) {
            Some(true) => "--older-mirrored",
            _ => "",
        };
        // A database that is used again stays.
        let clear = match *case {
            POSTGRES => "true".to_owned(),
            _ => format!("rm -rf {directory}"),
        };
        let seed = round::seed(pair.seed, number, index);
        script += &format!(
            "(twinwrite-workload ahead-check --case {case} --directory {directory} --log /host/{log} \
             --seed {seed} {flag} >/host/judged/vol{index}.json 2>/host/judged/vol{index}.err &&\n \
             {clear}) &\n"
        );
    }
    script += "wait\n";
    pair.lab.run(survivor, &script)?;
    let mut judgements = Vec::new();
    for (index, case) in CASES.iter().enumerate() {
        let name = to.join(format!("judged/vol{index}"));
        let text = fs::read(name.with_extension("json"))?;
        let said = fs::read_to_string(name.with_extension("err")).unwrap_or_default();
        let found: Result<Judgement, _> = serde_json::from_slice(&text);
        let mut found = found.with_context(|| format!("the oracle failed on {case}: {said}"))?;
        found.case = (*case).to_owned();
        judgements.push(found);
    }
    Ok(judgements)
}
