//! Judging the words that survive an owner, as `agent::successor` does it.

use twinwrite::cluster::claim::{Phase, VolumeClaim};
use twinwrite::cluster::takeover::Judgement;
use twinwrite::cluster::words::{OwnerWord, RegionWord, Ruling, SentinelWord, Words};
use twinwrite::ids::Epoch;
use twinwrite::region::layout::{region_state, unpadded};
use twinwrite::region::scan::Scan;
use twinwrite::replay::RegionClaim;

use super::Driver;
use crate::ledger::{VOLUME, node_id};
use crate::say;
use crate::world::name;

impl Driver<'_> {
    /// The owner's word: its own slot, as long as it speaks of its own ownership there; else what this
    /// node took over from it into its claim.
    pub(super) fn owner_word(&self) -> Option<OwnerWord> {
        let peer = node_id(1 - self.node);
        let of = |claim: VolumeClaim, phase, exact| OwnerWord {
            node: peer.clone(),
            epoch: claim.epoch,
            state: claim.epoch_state,
            phase,
            last_mirrored: claim.last_mirrored,
            time_ns: None,
            exact,
        };
        let ledger = &self.world.machines[self.node].agent.as_ref()?.ledger;
        let told = ledger.peer_report().and_then(|r| r.volumes.get(VOLUME));
        if let Some(claim) = told.filter(|claim| claim.owner == peer) {
            return Some(of(claim.clone(), claim.phase, true));
        }
        Some(of(ledger.claim()?, Phase::Settled, false))
    }

    pub(super) fn judge_it(&mut self) -> Judgement {
        let sentinel = self.world.disk.sentinel().cloned();
        let saved = self.world.machines[self.node].saved.as_ref();
        let mut cut = None;
        let region = match saved.map(|saved| (saved.header(), saved.scan())) {
            Some((Some(header), Ok(scan))) => {
                cut = self.behind(&scan);
                let claim = RegionClaim {
                    cluster: unpadded(&header.cluster),
                    volume: unpadded(&header.volume),
                    filesystem_uuid: header.filesystem_uuid,
                    epoch: Epoch(header.epoch),
                    closed: header.state != region_state::OPEN,
                    last: scan.cut,
                    marked: scan.checkpoint_seq,
                };
                let time_ns = None;
                RegionWord::Says { claim, time_ns }
            }
            Some((_, Err(error))) => RegionWord::Damaged(error.to_string()),
            Some((None, _)) | None => RegionWord::Missing,
        };
        let words = Words {
            owner: self.owner_word(),
            sentinel: sentinel.map_or(SentinelWord::Missing, SentinelWord::Says),
            region,
            // The note of a begun merge is not modelled.
            merging: None,
            mounted_uuid: None,
            // Nobody else has the volume here.
            unmounted: false,
        };
        self.memory.held = words.region_epoch();
        say!(self.world, "{}: the words are: {words}", name(self.node));
        match words.ruling() {
            Ruling::Merge { after } => {
                self.memory.after = Some(after);
                self.memory.cut = cut;
                Judgement::Merge
            }
            Ruling::Nothing(why) => {
                let merged_before = words.region_epoch() < words.latest_epoch();
                self.memory.cut = cut.filter(|_| !merged_before);
                Judgement::Nothing { why }
            }
            Ruling::Void(why) => Judgement::LossUnknown { why },
            Ruling::Ask(why) => {
                // Only the other node's own half-done takeover is beyond what crashes explain.
                if !why.contains("taking the volume over") {
                    self.world.violate(
                        "2, whole up to the cut",
                        format!("the judge asks a person: {why}; {words}"),
                    );
                }
                Judgement::Ask {
                    why,
                    evidence: words.to_string(),
                }
            }
            Ruling::Refuse(refusal) => {
                self.world.violate(
                    "2, whole up to the cut",
                    format!("the takeover refuses: {refusal}"),
                );
                Judgement::LossUnknown {
                    why: refusal.to_string(),
                }
            }
        }
    }

    /// Ring position behind the last record up to the cut.
    pub(super) fn behind(&self, scan: &Scan) -> Option<u64> {
        let saved = self.world.machines[self.node].saved.as_ref()?;
        let mut behind = scan.head.ring_pos.map_or(0, |at| at.0);
        for record in scan
            .records(saved.log())
            .take_while(|record| record.seq <= scan.cut)
        {
            behind = record.ring_pos.0 + record.view.span() as u64;
        }
        Some(behind)
    }

    /// What was promised must be in what counts.
    pub(super) fn check_promise(&mut self, judgement: &Judgement) {
        let Some(promised) = self.world.promised else {
            return;
        };
        if matches!(judgement, Judgement::LossUnknown { .. }) {
            // A person who calls the mirror dead gives up what it saved.
            let is_given_up = !self.world.machines[1 - promised.node].up;
            if !self.world.has_lost(&promised) && !self.world.half_merged && !is_given_up {
                self.world.violate(
                    "2, whole up to the cut",
                    format!(
                        "epoch {} was shown as protected, and nothing is merged: {judgement:?}",
                        promised.epoch
                    ),
                );
            }
            self.world.promised = None;
        }
    }
}
