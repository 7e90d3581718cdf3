//! Taking a volume over: the real work behind the steps of `cluster::takeover`.
//!
//! Every step may be called again, by this agent after a failure or by the next one after its
//! death: what is already done it leaves. It must never touch the volume before the step that
//! carries the proof of the fence.

use std::fs::File;
use std::future::Future;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};

use super::clock::{duration, wall_ms, wall_ns};
use super::filesystem_uuid::filesystem_uuid;
use super::merge::{MergeError, SavedRegion};
use super::node::{Node, lock};
use super::reserve::Reserve;
use super::unmounted::was_unmounted;
use crate::capture::Capture;
use crate::cluster::claim::{EpochState, Phase, VolumeClaim};
use crate::cluster::command;
use crate::cluster::fence::fence;
use crate::cluster::mailbox::word_of;
use crate::cluster::mounts::{self, MountState};
use crate::cluster::ownership::Word;
use crate::cluster::standing::{Fallen, Slot, claim_of, is_fenced, is_not_outbid};
use crate::cluster::takeover::{
    Claimed, Fenced, FencedBy, Judged, Judgement, Merged, Mounted, Replayed, Revoked, Saved,
    Settled, Stamp, StepResult, TakeoverDriver,
};
use crate::cluster::words::{OwnerWord, RegionWord, Ruling, SentinelWord, Words};
use crate::config::Volume;
use crate::events::Event;
use crate::ids::{Epoch, Seq};
use crate::region::layout::{RegionHeader, Sealed as _, region_state};
use crate::replay::{self, Sentinel, SentinelError, SentinelFile, sentinel, underway};
use crate::status::PeerState;

/// Longest time a serve command may take.
const SERVE_LIMIT: Duration = Duration::from_secs(60);

/// The takeover of one volume by this node.
pub struct Successor {
    node: Arc<Node>,
    volume: Volume,
    began: Instant,
    /// Records of the region and where to begin, once judged.
    merge: Option<(SavedRegion, Seq)>,
    /// The volume's sentinel file: from the judgement to the new epoch nobody else writes to it.
    sentinel: Option<SentinelFile>,
    /// Whether somebody had unmounted the volume when this node came to mount it.
    unmounted: bool,
    /// Epoch of the region that was saved, once judged; 0: none.
    held: Epoch,
    /// Phase of the word from which this node, which owns the volume, took it over for itself.
    owned: Option<Phase>,
    /// The owner's slot when a person called it dead.
    judged: Option<Slot>,
}

/// Where the copies of a volume's regions are kept.
fn saved_path(state_dir: &Path, volume: &str) -> PathBuf {
    state_dir.join("saved").join(format!("{volume}.region"))
}

impl Successor {
    /// Nothing done yet.
    pub fn new(node: Arc<Node>, volume: Volume) -> Self {
        Self {
            node,
            volume,
            began: Instant::now(),
            judged: None,
            merge: None,
            sentinel: None,
            unmounted: false,
            held: Epoch(0),
            owned: None,
        }
    }

    /// A person calls the owner dead, whose slot was this then: the word falls with any later sign of life.
    pub fn remember_slot(&mut self, spoken_of: Slot) {
        self.judged = Some(spoken_of);
    }

    fn saved(&self) -> PathBuf {
        saved_path(&self.node.config.cluster.state_dir, &self.volume.name)
    }

    /// Everything anybody has said of this volume.
    fn known(&self) -> Vec<VolumeClaim> {
        let name = &self.volume.name;
        let mut known: Vec<VolumeClaim> = self.node.ledger.claim(name).into_iter().collect();
        for word in [
            self.node.ledger.own_word(name).word,
            self.node.ledger.peer_word(name),
        ] {
            if let Word::Says(claim) = word {
                known.push(claim);
            }
        }
        known
    }

    /// The same, and what the peer's slot says now.
    fn known_and(&self, now: &Slot) -> Vec<VolumeClaim> {
        let mut known = self.known();
        if let Word::Says(claim) = word_of(now, &self.volume.name) {
            known.push(claim);
        }
        known
    }

    /// Claims the volume, and looks whether the peer did so at the same time.
    fn claim_it(&mut self) -> anyhow::Result<Result<(), Fallen>> {
        let (ledger, name) = (&self.node.ledger, &self.volume.name);
        let own = ledger.claim(name);
        let now = ledger.say_and_look()?;
        match claim_of(&self.node.id, own.as_ref(), &self.known_and(&now)) {
            Ok(Some(claim)) => {
                let own = own.filter(|own| own.owner == claim.owner);
                self.owned = self.owned.or(own.map(|own| own.phase));
                ledger.publish(name, &claim)?;
            }
            Ok(None) => {}
            Err(fallen) => return Ok(Err(fallen)),
        }
        self.look_again()
    }

    /// Whether the peer has claimed the volume since this node did.
    fn look_again(&mut self) -> anyhow::Result<Result<(), Fallen>> {
        let (ledger, name) = (&self.node.ledger, &self.volume.name);
        let now = ledger.say_and_look()?;
        let own = ledger.claim(name).context("there is no claim")?;
        let stands = is_not_outbid(&own, name, &now);
        if stands.is_err() {
            self.give_back_to_itself(&now)?;
        }
        Ok(stands)
    }

    /// Whether the fence holds; if so this node merges from here on.
    fn claim_merging_it(&mut self, by: FencedBy) -> anyhow::Result<Result<(), Fallen>> {
        let (ledger, name) = (&self.node.ledger, &self.volume.name);
        let judged = self.judged.clone().unwrap_or_else(|| ledger.peer_slot());
        let now = ledger.say_and_look()?;
        let own = ledger.claim(name).context("there is no claim")?;
        if let Err(fallen) = is_fenced(by, &own, name, &judged, &now) {
            self.give_back_to_itself(&now)?;
            return Ok(Err(fallen));
        }
        ledger.update(name, |claim| claim.phase = Phase::Merging)?;
        Ok(Ok(()))
    }

    /// What this node took over for itself and has not mounted waits again as it did before.
    fn give_back_to_itself(&mut self, now: &Slot) -> anyhow::Result<bool> {
        let waited = |phase: &Phase| matches!(phase, Phase::Unmerged | Phase::Settled);
        let Some(phase) = self.owned.filter(waited) else {
            return Ok(false);
        };
        let claim = VolumeClaim::change(self.node.id.clone(), phase, &self.known_and(now));
        self.node.ledger.publish(&self.volume.name, &claim)?;
        self.owned = None;
        Ok(true)
    }

    fn withdraw_it(&mut self) -> anyhow::Result<()> {
        let now = self.node.ledger.say_and_look()?;
        if self.give_back_to_itself(&now)? {
            return Ok(());
        }
        let known = self.known_and(&now);
        let claim = VolumeClaim::change(self.node.peer.clone(), Phase::Settled, &known);
        Ok(self.node.ledger.publish(&self.volume.name, &claim)?)
    }

    /// The epoch the region may be of, as far as anybody said, and whether it was closed.
    fn last_word(&self) -> (Epoch, EpochState) {
        self.known()
            .iter()
            .map(|claim| (claim.epoch, claim.epoch_state))
            .max()
            .unwrap_or((Epoch(0), EpochState::None))
    }

    fn save(&self) -> anyhow::Result<()> {
        let Some(host) = self.node.regions.get(&self.volume.name) else {
            return Ok(());
        };
        let mut host = lock(host);
        let path = self.saved();
        // The memory may not have survived this node's own reboot; a copy of before may have. And a
        // person may have brought the copy that the other node saved.
        let Some(live) = host
            .header()?
            .filter(|live| live.state != region_state::EMPTY)
        else {
            return Ok(());
        };
        if saved_epoch(&path).is_some_and(|saved| saved > live.epoch) {
            return Ok(());
        }
        let directory = path.parent().context("the state directory has no parent")?;
        std::fs::create_dir_all(directory)?;
        host.save_to(&path)?;
        Ok(())
    }

    /// Looks, before this node mounts the volume for the first time in this takeover, whether anybody had
    /// unmounted it, and keeps the answer: an agent that goes on with the takeover finds only its
    /// own traces.
    fn look_for_unmount(&mut self, mounted: bool) -> anyhow::Result<()> {
        let note = self.saved().with_extension("found");
        let epoch = self.last_word().0;
        let of = |unmounted: bool| format!("epoch {epoch} unmounted {unmounted}\n");
        let noted = std::fs::read_to_string(&note).unwrap_or_default();
        if noted == of(true) || noted == of(false) {
            self.unmounted = noted == of(true);
            return Ok(());
        }
        self.unmounted = !mounted && was_unmounted(&self.volume.device, &self.volume.filesystem)?;
        let directory = note.parent().context("the state directory has no parent")?;
        std::fs::create_dir_all(directory)?;
        let file = File::create(&note)?;
        std::io::Write::write_all(&mut &file, of(self.unmounted).as_bytes())?;
        file.sync_all()?;
        File::open(directory)?.sync_all()?;
        Ok(())
    }

    fn mount_it(&mut self) -> anyhow::Result<Result<(), Fallen>> {
        let found = mounts::find(&self.volume)?;
        self.look_for_unmount(!matches!(found, MountState::NotMounted))?;
        match found {
            MountState::Mounted(_) => {}
            MountState::NotMounted => {
                if let Err(fallen) = self.look_again()? {
                    return Ok(Err(fallen));
                }
                std::fs::create_dir_all(&self.volume.mount_point)?;
                mounts::mount(&self.volume)?;
            }
            _ => {
                mounts::require_mounted(&self.volume)?;
            }
        }
        Ok(Ok(()))
    }

    /// The epoch this takeover writes when it has finished.
    fn new_epoch(&self) -> Epoch {
        let told = self.last_word().0;
        let read = sentinel::read(&self.volume.mount_point);
        // A sentinel that this takeover wrote already is not counted up again.
        let on_volume = read.map_or(Epoch(0), |s| if s.closed { Epoch(0) } else { s.epoch });
        told.max(self.held).max(on_volume).next()
    }

    /// The owner's word: its own slot, as long as it speaks of its own ownership there; else what this
    /// node took over from it into its claim.
    fn owner_word(&self) -> Option<OwnerWord> {
        let (ledger, name, peer) = (&self.node.ledger, &self.volume.name, &self.node.peer);
        let of = |claim: VolumeClaim, phase, time_ns, exact| OwnerWord {
            node: peer.clone(),
            epoch: claim.epoch,
            state: claim.epoch_state,
            phase,
            last_mirrored: claim.last_mirrored,
            time_ns,
            exact,
        };
        let report = ledger.peer_report();
        let told = report.as_ref().and_then(|report| {
            let claim = report.volumes.get(name).cloned();
            claim.filter(|claim| claim.owner == *peer)
        });
        if let (Some(claim), Some(report)) = (told, report) {
            let phase = claim.phase;
            return Some(of(claim, phase, Some(report.time_ns), true));
        }
        let remembered = ledger.claim(name)?;
        Some(of(remembered, Phase::Settled, None, false))
    }

    /// The three words, and the region if there is one.
    fn words(&self) -> anyhow::Result<(Words, Option<SavedRegion>)> {
        let sentinel = match sentinel::read(&self.volume.mount_point) {
            Ok(sentinel) => SentinelWord::Says(sentinel),
            Err(SentinelError::Missing(_)) => SentinelWord::Missing,
            Err(error @ (SentinelError::Damaged(_) | SentinelError::Untrusted { .. })) => {
                SentinelWord::Unreadable(error.to_string())
            }
            Err(error) => return Err(error.into()),
        };
        let path = self.saved();
        let (region, saved) = if path.exists() {
            match SavedRegion::load(&path) {
                Ok(saved) if saved.header.state == region_state::EMPTY => {
                    (RegionWord::Missing, None)
                }
                Ok(saved) => {
                    let (claim, mirrored) = (saved.claim(), saved.scan.mirrored);
                    let time_ns = mirrored.map(|mirrored| mirrored.time_ns);
                    (RegionWord::Says { claim, time_ns }, Some(saved))
                }
                Err(MergeError::Scan(error)) => (RegionWord::Damaged(error.to_string()), None),
                Err(error) => {
                    let context = format!("reading the saved region {}", path.display());
                    return Err(anyhow::Error::new(error).context(context));
                }
            }
        } else {
            (RegionWord::Missing, None)
        };
        let uuid = filesystem_uuid(&self.volume.device, &self.volume.filesystem)?;
        let words = Words {
            owner: self.owner_word(),
            sentinel,
            region,
            merging: underway::read(&self.volume.mount_point),
            mounted_uuid: Some(uuid),
            unmounted: self.unmounted,
        };
        Ok((words, saved))
    }

    fn judge_it(&mut self) -> anyhow::Result<Judgement> {
        if self.sentinel.is_none() {
            // Judged on what nobody can change any more.
            self.sentinel = Some(SentinelFile::open(&self.volume.mount_point)?);
        }
        let (words, saved) = self.words()?;
        self.held = words.region_epoch();
        tracing::info!(volume = %self.volume.name, "judged: {words}");
        match (words.ruling(), saved) {
            (Ruling::Merge { after }, Some(saved)) => {
                self.merge = Some((saved, after));
                Ok(Judgement::Merge)
            }
            (Ruling::Merge { .. }, None) => Err(anyhow!("there is no region to merge")),
            (Ruling::Nothing(why), _) => Ok(Judgement::Nothing { why }),
            (Ruling::Void(what), _) => Ok(Judgement::LossUnknown {
                why: format!("{what}; what was written since then and not flushed is lost"),
            }),
            (Ruling::Ask(why), _) => Ok(Judgement::Ask {
                why,
                evidence: words.to_string(),
            }),
            (Ruling::Refuse(refusal), _) => Err(anyhow!(refusal)),
        }
    }

    fn merge_it(&mut self) -> anyhow::Result<Merged> {
        let (Some((saved, after)), Some(held)) = (&self.merge, &mut self.sentinel) else {
            return Ok(Merged::default());
        };
        let mount = &self.volume.mount_point;
        let outcome = saved.merge(held, mount, *after, &mut |_| ())?;
        let volume = &self.volume.name;
        tracing::info!(%volume, "replay: {outcome}");
        for item in &outcome.recovered {
            tracing::warn!(%volume, "moved out of the way, not proven dead: {item:?}");
        }
        for text in outcome.lost.iter().chain(&outcome.warnings) {
            tracing::warn!(%volume, "replay: {text}");
        }
        let merged = Merged {
            records_replayed: outcome.records,
            cut_seq: saved.scan.cut,
            warnings: outcome
                .warnings
                .iter()
                .chain(&outcome.lost)
                .cloned()
                .collect(),
        };
        let sentinel = self.new_sentinel(self.new_epoch());
        if let Some(held) = &mut self.sentinel {
            replay::finish_held(mount, held, &sentinel)?;
        }
        if let Err(error) = replay::tidy(mount, &outcome) {
            tracing::warn!(%volume, %error, "what replay left behind could not be tidied up");
        }
        // Before anybody writes to the volume again.
        if let Some(board) = self.node.board.volume(volume) {
            Reserve::of(mount, board).keep();
        }
        Ok(merged)
    }

    /// The sentinel of the epoch that begins with this ownership and has no region yet.
    fn new_sentinel(&self, epoch: Epoch) -> Sentinel {
        Sentinel {
            cluster: self.node.config.cluster.name.clone(),
            volume: self.volume.name.clone(),
            epoch,
            seq: Seq(0),
            closed: true,
            time_ns: wall_ns(),
        }
    }

    fn settle(&mut self) -> anyhow::Result<()> {
        let mount = &self.volume.mount_point;
        let epoch = match sentinel::read(mount) {
            Ok(found) if found.closed && found.epoch > self.last_word().0 => found.epoch,
            _ => {
                let epoch = self.new_epoch();
                let sentinel = self.new_sentinel(epoch);
                match &mut self.sentinel {
                    Some(held) => replay::finish_held(mount, held, &sentinel)?,
                    None => replay::finish(mount, &sentinel)?,
                }
                epoch
            }
        };
        self.node.ledger.update(&self.volume.name, |claim| {
            claim.phase = Phase::Settled;
            claim.epoch = epoch;
            claim.epoch_state = EpochState::Closed;
            claim.last_mirrored = Seq(0);
        })?;
        let saved = self.saved();
        if saved.exists() {
            let kept_as = if self.merge.is_some() {
                "merged"
            } else {
                "void"
            };
            std::fs::rename(&saved, saved.with_extension(kept_as))?;
        }
        match std::fs::remove_file(saved.with_extension("found")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        // Nothing can be merged any more: whoever the programs of an earlier agent hold goes on.
        if let Err(error) = Capture::open_pinned_gate(&self.volume.name) {
            tracing::error!(volume = %self.volume.name, "{error}");
        }
        // The owner that this node is from now on holds it itself.
        self.sentinel = None;
        Ok(())
    }
}

/// Epoch of a saved copy; `None` if there is none that can be read.
fn saved_epoch(path: &Path) -> Option<u64> {
    let mut bytes = [0; size_of::<RegionHeader>()];
    File::open(path).ok()?.read_exact(&mut bytes).ok()?;
    RegionHeader::open(&bytes).map(|header| header.epoch)
}

/// Runs the volume's serve command, if it has one.
///
/// # Errors
/// When it fails: the volume is mounted then, and nobody was told to serve it.
pub async fn run_serve_command(node: &Node, volume: &Volume) -> anyhow::Result<()> {
    let Some(words) = &volume.serve_command else {
        return Ok(());
    };
    let mount_point = volume.mount_point.display().to_string();
    let replace = [
        ("volume", volume.name.as_str()),
        ("mount_point", mount_point.as_str()),
    ];
    let ran = command::run(words, &replace, SERVE_LIMIT)
        .await
        .context("serve_command")?;
    node.events.record(ran.event("serve"));
    ensure!(
        ran.outcome == command::Outcome::Succeeded,
        "serve_command {}: {}",
        ran.told(),
        ran.output
    );
    Ok(())
}

/// Runs blocking work without holding up the other tasks.
fn blocking<T>(work: impl FnOnce() -> anyhow::Result<T>) -> StepResult<T> {
    tokio::task::block_in_place(work).map_err(Into::into)
}

impl TakeoverDriver for Successor {
    fn now(&self) -> Stamp {
        Stamp {
            monotonic: self.began.elapsed(),
            wall_ms: wall_ms(),
        }
    }

    fn report(&mut self, event: Event) {
        self.node.events.record(event);
    }

    async fn claim(&mut self) -> StepResult {
        let state = self.node.peer_state();
        let reported = self.node.ledger.peer_report();
        let unmerged = reported
            .and_then(|report| report.volumes.get(&self.volume.name).map(|c| c.phase))
            == Some(Phase::Unmerged);
        if !unmerged && matches!(state, PeerState::Alive | PeerState::LinkSilent) {
            return Err(anyhow!("node {} is heard again", self.node.peer).into());
        }
        Ok(blocking(|| self.claim_it())??)
    }

    async fn fence(&mut self, _: &Claimed) -> StepResult {
        let cluster = &self.node.config.cluster;
        let words = cluster.fence_command.as_deref().unwrap_or_default();
        let limit = duration(cluster.fence_timeout);
        fence(words, &self.node.peer, limit, &self.node.events).await?;
        Ok(())
    }

    async fn claim_merging(&mut self, fenced: &Fenced) -> StepResult {
        Ok(blocking(|| self.claim_merging_it(fenced.by()))??)
    }

    async fn revoke(&mut self, _: &Fenced) -> StepResult {
        let host = self.node.regions.get(&self.volume.name);
        blocking(|| Ok(host.map_or(Ok(()), |host| lock(host).seal())?))
    }

    async fn save_region(&mut self, _: &Revoked) -> StepResult {
        blocking(|| self.save())
    }

    async fn mount(&mut self, _: &Saved) -> StepResult {
        Ok(blocking(|| self.mount_it())??)
    }

    async fn judge(&mut self, _: &Mounted) -> StepResult<Judgement> {
        blocking(|| self.judge_it())
    }

    async fn replay(&mut self, _: &Judged) -> StepResult<Merged> {
        blocking(|| self.merge_it())
    }

    async fn open_epoch(&mut self, _: &Replayed) -> StepResult {
        blocking(|| self.settle())
    }

    fn serve(&mut self, _: &Settled) -> impl Future<Output = StepResult> + Send {
        let (node, volume) = (Arc::clone(&self.node), self.volume.clone());
        async move { Ok(run_serve_command(&node, &volume).await?) }
    }

    async fn withdraw(&mut self) -> StepResult {
        blocking(|| self.withdraw_it())
    }
}
