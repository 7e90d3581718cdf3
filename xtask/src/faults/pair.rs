//! The pair of machines that the faults are injected into: who owns and who mirrors just now, what is
//! written meanwhile, what the agents tell of it and when, and what a crash in the middle leaves.
//!
//! Volume and mailbox lie behind device mappings, so that their faults can be injected. It never takes
//! a moment of one machine's clock for one of another's.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::lab::config::MOUNT_POINT;
use crate::lab::{AgentAction, AwaitedState, Lab, NodeName, Options, Service, clock};
use crate::progress;
use crate::scenarios::bench::{self, LIMIT, number, peer_state, volume};

const POLL: Duration = Duration::from_millis(150);
const EVENTS: &str = "/var/lib/twinwrite/events.jsonl";
/// Operations a second, of which some ask for durability: enough that a lag shows, little enough for an
/// emulated machine.
const PER_SECOND: u64 = 100;
const CONFIRM_EVERY: u64 = 40;
const WARM_UP: u64 = 150;

/// Puts a device mapping in front of the volume and the mailbox. The kernel's device stays known in
/// `/run/disk-NAME`, its size in `/run/size-NAME`.
const MAP_DISKS: &str = "modprobe -a dm-mod dm-flakey dm-delay; \
    for name in volume mailbox; do \
      disk=$(readlink -f /dev/disk/by-id/virtio-$name); size=$(blockdev --getsz $disk); \
      echo $disk >/run/disk-$name; echo $size >/run/size-$name; \
      dmsetup create lab-$name --noudevsync --table \"0 $size linear $disk 0\" || exit 1; \
      [ -e /dev/mapper/lab-$name ] || dmsetup mknodes; \
      ln -sfn /dev/mapper/lab-$name /dev/disk/by-id/virtio-$name; \
    done";

/// A moment by one machine's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) node: NodeName,
    at_ns: i128,
    /// The host's clock, not later.
    host_ms: i64,
}

/// What was told of a fault, and how long after it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// The event's name.
    pub(crate) event: String,
    /// After the injection.
    pub(crate) after_ms: Option<u64>,
    /// The volume's protection then.
    pub(crate) state: String,
    /// Its reason, or what the event says.
    pub(crate) reason: String,
}

/// What the survivor's volume holds of what was written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Left {
    pub(crate) confirmations: u64,
    pub(crate) confirmed_bytes_lost: u64,
    pub(crate) unconfirmed_records_lost: u64,
}

/// The machines, and who is who.
pub(crate) struct Pair<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) owner: NodeName,
}

/// Settings that all faults share: limits that an emulated machine on a busy host keeps, and no
/// checkpoint but those that the faults cause.
pub(crate) fn options() -> Options {
    Options {
        service: Service::Nothing,
        ..bench::options(
            &["dead_after = \"6s\"", "volume_io_limit = \"15s\""],
            &[
                "lag_limit = \"3s\"",
                "checkpoint_age = \"10m\"",
                "region_bytes = \"64MiB\"",
            ],
        )
    }
}

impl<'a> Pair<'a> {
    /// Of machines on which nothing runs yet.
    pub(crate) fn start(lab: &'a Lab) -> Result<Self> {
        let pair = Self {
            lab,
            owner: NodeName::A,
        };
        for node in NodeName::ALL {
            lab.run(node, MAP_DISKS)?;
        }
        for node in NodeName::ALL {
            lab.agent(node, AgentAction::Start)?;
        }
        pair.ready()?;
        Ok(pair)
    }

    pub(crate) fn mirror(&self) -> NodeName {
        self.owner.peer()
    }

    /// Waits until the owner's volume is protected, the mirror mirrors, and they hear each other.
    pub(crate) fn ready(&self) -> Result<()> {
        self.lab.wait(self.owner, AwaitedState::Owner, LIMIT)?;
        self.lab.wait(self.owner, AwaitedState::Protected, LIMIT)?;
        self.lab.wait(self.mirror(), AwaitedState::Mirror, LIMIT)?;
        bench::until(self.lab, "both hear each other", LIMIT, || {
            Ok(peer_state(self.lab, self.owner)? == "alive"
                && peer_state(self.lab, self.mirror())? == "alive")
        })
    }

    /// The moment that a command on `node` tells.
    pub(crate) fn at(&self, node: NodeName, command: &str) -> Result<Moment> {
        let host_ms = clock::now_ms();
        let said = self.lab.run(node, command)?;
        moment(node, &said, host_ms)
    }

    /// The present moment by the clock of `node`.
    pub(crate) fn now(&self, node: NodeName) -> Result<Moment> {
        let host_ms = clock::now_ms();
        let said = self.lab.run(node, "date +%s%N")?;
        moment(node, &said, host_ms)
    }

    /// Runs what injects a fault on `node`; the moment is the one right before.
    pub(crate) fn inject(&self, node: NodeName, command: &str) -> Result<Moment> {
        let host_ms = clock::now_ms();
        let output = self
            .lab
            .exec(node, &format!("date +%s%N\n{command}"), LIMIT)?;
        ensure!(
            output.status == 0,
            "the fault could not be injected on {node}: `{command}` ended with status {}: {}{}",
            output.status,
            output.text(),
            String::from_utf8_lossy(&output.stderr)
        );
        let text = output.text();
        moment(node, text.lines().next().unwrap_or_default(), host_ms)
    }

    /// The same moment by the clock of `node`: by how long ago it was on the host's clock. It is rather a
    /// little too early than too late.
    pub(crate) fn on_clock_of(&self, moment: Moment, node: NodeName) -> Result<Moment> {
        if moment.node == node {
            return Ok(moment);
        }
        let age_ms = clock::now_ms() - moment.host_ms;
        let at_ns = self.now(node)?.at_ns - i128::from(age_ms) * 1_000_000;
        Ok(Moment {
            node,
            at_ns,
            host_ms: moment.host_ms,
        })
    }

    /// Waits for the first event on the node of `since` that was written after it and of which `tells`.
    pub(crate) fn await_event(
        &self,
        since: Moment,
        limit: Duration,
        what: &str,
        tells: impl Fn(&Value) -> bool,
    ) -> Result<Seen> {
        let deadline = Instant::now() + limit + LIMIT;
        loop {
            let found = self.event(since, &tells)?;
            if let Some((event, after_ms)) = found {
                self.trust_clock(since)?;
                let state = event["to"].as_str().unwrap_or_default();
                return Ok(Seen {
                    event: event["event"].as_str().unwrap_or_default().to_owned(),
                    after_ms: Some(after_ms),
                    state: state.to_owned(),
                    reason: reason_of(&event),
                });
            }
            if Instant::now() >= deadline {
                bail!("never told: {what}\n{}", self.lab.explain());
            }
            sleep(POLL);
        }
    }

    /// The seconds of an emulated machine may fly: then what its clock measured is no time.
    fn trust_clock(&self, since: Moment) -> Result<()> {
        let now = self.now(since.node)?;
        let there_ms = (now.at_ns - since.at_ns) / 1_000_000;
        // The host's reading is from before the machine's, so it has waited for longer.
        let here_ms = i128::from(clock::now_ms() - since.host_ms);
        ensure!(
            there_ms <= here_ms * 5 / 4 + 1000,
            "the clock of {} flies: {there_ms} ms passed there, {here_ms} ms here",
            since.node
        );
        Ok(())
    }

    fn event(&self, since: Moment, tells: impl Fn(&Value) -> bool) -> Result<Option<(Value, u64)>> {
        let text = self
            .lab
            .run(since.node, &format!("tail -n 80 {EVENTS} 2>/dev/null"))?;
        for line in text.lines() {
            let Ok(event) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let at: jiff::Timestamp = match event["time"].as_str().map(str::parse) {
                Some(Ok(at)) => at,
                _ => bail!("an event without a time: {line}"),
            };
            let after_ns = at.as_nanosecond() - since.at_ns;
            if after_ns >= 0 && tells(&event) {
                return Ok(Some((event, u64::try_from(after_ns / 1_000_000)?)));
            }
        }
        Ok(None)
    }

    /// What `node` says of the volume: protection and reason.
    pub(crate) fn shown(&self, node: NodeName) -> Result<(String, String)> {
        let volume = volume(self.lab, node)?;
        let word = |field: &str| volume[field].as_str().unwrap_or_default().to_owned();
        Ok((word("protection"), word("reason")))
    }

    /// Records that the owner says are captured and not mirrored.
    pub(crate) fn lag(&self) -> Option<u64> {
        let volume = volume(self.lab, self.owner).ok()?;
        number(&volume, "lag_records").ok()
    }

    /// Begins to write on the owner, and returns when it is well under way.
    pub(crate) fn write(&self) -> Result<Writer<'a>> {
        self.write_at(PER_SECOND, CONFIRM_EVERY)
    }

    /// The same at another pace, and asking for durability less often. `syncfs` comes after every so many
    /// operations, `fsync` in the second half of them.
    pub(crate) fn write_at(&self, per_second: u64, confirm_every: u64) -> Result<Writer<'a>> {
        let writer = Writer::start(self.lab, self.owner, per_second, confirm_every)?;
        bench::until(self.lab, "the writer is under way", LIMIT, || {
            Ok(writer.acknowledged() >= WARM_UP)
        })?;
        Ok(writer)
    }

    /// Waits until the mirror serves, and judges there what is left.
    pub(crate) fn taken_over(&self, writer: &Writer<'_>) -> Result<Left> {
        bench::await_takeover(self.lab, self.mirror())?;
        writer.judge(self.mirror())
    }

    /// Brings the machine of the former owner back as the mirror of the one that took over.
    pub(crate) fn come_back(&mut self) -> Result<()> {
        let former = self.owner;
        self.owner = former.peer();
        self.bring_up(former)?;
        self.lab
            .run(self.owner, &format!("rm -rf {MOUNT_POINT}/*"))?;
        self.ready()
    }

    /// Boots a dead machine and starts its agent.
    pub(crate) fn bring_up(&self, node: NodeName) -> Result<()> {
        self.boot(node)?;
        self.lab.agent(node, AgentAction::Start)
    }

    /// Boots a dead machine.
    pub(crate) fn boot(&self, node: NodeName) -> Result<()> {
        self.lab.boot(node, false)?;
        self.lab.run(node, MAP_DISKS).map(drop)
    }
}

fn moment(node: NodeName, said: &str, host_ms: i64) -> Result<Moment> {
    let at_ns = said
        .parse()
        .with_context(|| format!("the clock of {node} says `{said}`"))?;
    Ok(Moment {
        node,
        at_ns,
        host_ms,
    })
}

/// What an event says, in words.
fn reason_of(event: &Value) -> String {
    let text = ["reason", "error", "to", "outcome"]
        .iter()
        .find_map(|field| event[*field].as_str());
    text.unwrap_or_default().to_owned()
}

/// A stream on the owner that asks for durability now and then, and runs until it is ended.
pub(crate) struct Writer<'a> {
    lab: &'a Lab,
    node: NodeName,
}

impl<'a> Writer<'a> {
    fn start(lab: &'a Lab, node: NodeName, per_second: u64, confirm_every: u64) -> Result<Self> {
        let share = lab.share(node);
        for file in ["stream.log", "stream.confirmed", "stream.out"] {
            let _ = fs::remove_file(share.join(file));
        }
        // An earlier one's remains on the disk must never look like this one's.
        static SEED: AtomicU64 = AtomicU64::new(1000);
        let seed = SEED.fetch_add(1, Ordering::Relaxed);
        lab.run(
            node,
            &format!(
                "setsid twinwrite-workload stream --root {MOUNT_POINT} --log /host/stream.log \
                 --seed {seed} --operations-per-second {per_second} --confirm-every {confirm_every} \
                 </dev/null >/host/stream.out 2>&1 & echo $! >/run/stream.pid"
            ),
        )?;
        Ok(Self { lab, node })
    }

    /// Operations that its log says have returned.
    pub(crate) fn acknowledged(&self) -> u64 {
        let log = fs::read(self.lab.share(self.node).join("stream.log")).unwrap_or_default();
        // The first line is the header.
        let lines = log.iter().filter(|byte| **byte == b'\n').count();
        lines.saturating_sub(1) as u64
    }

    /// Lets it write for a while longer; what is wrong may keep it from that.
    pub(crate) fn go_on(&self, operations: u64, longest: Duration) {
        let (wanted, deadline) = (self.acknowledged() + operations, Instant::now() + longest);
        while self.acknowledged() < wanted && Instant::now() < deadline {
            sleep(POLL);
        }
    }

    /// Ends it, and takes away what it wrote.
    pub(crate) fn end(&self) -> Result<()> {
        let command =
            format!("kill -KILL $(cat /run/stream.pid); rm -rf {MOUNT_POINT}/stream; true");
        self.lab.run(self.node, &command).map(drop)
    }

    /// What the oracle finds of it on `judge`.
    pub(crate) fn judge(&self, judge: NodeName) -> Result<Left> {
        let (from, to) = (self.lab.share(self.node), self.lab.share(judge));
        for file in ["stream.log", "stream.confirmed"] {
            fs::copy(from.join(file), to.join(file))
                .with_context(|| format!("the writer's {file} is missing"))?;
        }
        let command =
            format!("twinwrite-workload check --root {MOUNT_POINT} --stream /host/stream.log");
        let output = self.lab.exec(judge, &command, LIMIT)?;
        ensure!(
            output.status < 2,
            "the oracle failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let damage = report["stream_damage"].as_array().map_or(1, Vec::len);
        ensure!(damage == 0, "something is torn: {report}");
        let left = Left {
            confirmations: number(&report, "stream_confirmations")?,
            confirmed_bytes_lost: number(&report, "stream_confirmed_bytes_lost")?,
            unconfirmed_records_lost: number(&report, "tail_operations_lost")?,
        };
        ensure!(
            left.confirmations > 0,
            "nothing was ever confirmed, so this proves nothing: {report}"
        );
        progress::note(&format!("{left:?}, {}", report["stream_prefix"]));
        Ok(left)
    }
}
