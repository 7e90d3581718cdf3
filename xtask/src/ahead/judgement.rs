//! The oracle's word on every volume of a survivor.

use std::fs;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::pair::Pair;
use super::round;
use super::{CASES, POSTGRES};
use crate::lab::NodeName;

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

/// Holds every volume on `survivor` against the logs that the applications of `dead` left, and clears
/// away what passes.
pub(super) fn judge(
    pair: &Pair<'_>,
    dead: NodeName,
    survivor: NodeName,
    number: u64,
    mirrored: &[bool],
) -> Result<Vec<Judgement>> {
    let (from, to) = (pair.lab.share(dead), pair.lab.share(survivor));
    let mut script = String::new();
    fs::create_dir_all(to.join("judged"))?;
    for (index, case) in CASES.iter().enumerate() {
        let log = format!("judged/vol{index}.log");
        fs::copy(round::log(&from, index), to.join(&log))
            .with_context(|| format!("the log of {case} is missing"))?;
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
