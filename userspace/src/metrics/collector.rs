//! Encoding the board at scrape time.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use twinwrite_abi::{gap, op};

use crate::board::{Board, Buckets, Gauge, LATENCY_BOUNDS_SECONDS, VolumeBoard};
use crate::status::{PeerState, Protection, Role};

const OPERATION_NAMES: [(u8, &str); 12] = [
    (op::WRITE, "write"),
    (op::CREATE, "create"),
    (op::LINK, "link"),
    (op::UNLINK, "unlink"),
    (op::RENAME, "rename"),
    (op::EXCHANGE, "exchange"),
    (op::SETATTR, "setattr"),
    (op::TMPFILE, "tmpfile"),
    (op::SYMLINK, "symlink"),
    (op::FSYNC, "fsync"),
    (op::GAP, "gap"),
    (op::EXTENDED, "extended"),
];
const PROTECTIONS: [(Protection, &str); 4] = [
    (Protection::Protected, "protected"),
    (Protection::Exposed, "exposed"),
    (Protection::Alone, "alone"),
    (Protection::Suspended, "suspended"),
];
const ROLES: [(Role, &str); 3] = [
    (Role::Owner, "owner"),
    (Role::Mirror, "mirror"),
    (Role::None, "none"),
];
const PEER_STATES: [(PeerState, &str); 5] = [
    (PeerState::Unknown, "unknown"),
    (PeerState::Alive, "alive"),
    (PeerState::LinkSilent, "link_silent"),
    (PeerState::MailboxSilent, "mailbox_silent"),
    (PeerState::Dead, "dead"),
];

#[derive(Debug)]
struct BoardCollector(Arc<Board>);

/// A registry that shows this board under the prefix `twinwrite`.
pub fn registry(board: Arc<Board>) -> Registry {
    let mut registry = Registry::with_prefix("twinwrite");
    registry.register_collector(Box::new(BoardCollector(board)));
    registry
}

type Labels<'a> = [(&'a str, &'a str)];

/// One family under way: descriptor first, then samples with labels.
struct Family<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
    name: &'a str,
    help: &'a str,
    unit: Option<Unit>,
}

impl Family<'_, '_> {
    fn counters<'l>(
        self,
        samples: impl Iterator<Item = (Vec<(&'l str, &'l str)>, u64)>,
    ) -> Result<(), Error> {
        let mut encoder = self.encoder.encode_descriptor(
            self.name,
            self.help,
            self.unit.as_ref(),
            MetricType::Counter,
        )?;
        for (labels, value) in samples {
            let labels: &Labels<'_> = &labels;
            ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauges<'l>(
        self,
        samples: impl Iterator<Item = (Vec<(&'l str, &'l str)>, f64)>,
    ) -> Result<(), Error> {
        let mut encoder = self.encoder.encode_descriptor(
            self.name,
            self.help,
            self.unit.as_ref(),
            MetricType::Gauge,
        )?;
        for (labels, value) in samples {
            let labels: &Labels<'_> = &labels;
            ConstGauge::new(value).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

type Read = fn(&VolumeBoard) -> f64;
type Count = fn(&VolumeBoard) -> u64;

const GAUGES: [(&str, &str, Option<Unit>, Read); 19] = [
    ("epoch", "Running or last epoch of the volume", None, |v| {
        v.epoch.get() as f64
    }),
    ("captured_seq", "Last record captured", None, |v| {
        v.captured_seq.get() as f64
    }),
    (
        "mirrored_seq",
        "Last record in the mirror's region",
        None,
        |v| v.mirrored_seq.get() as f64,
    ),
    (
        "purged_seq",
        "Last record purged because it is durable",
        None,
        |v| v.purged_seq.get() as f64,
    ),
    (
        "lag_records",
        "Records captured and not yet mirrored",
        None,
        |v| v.lag_records.get() as f64,
    ),
    (
        "lag",
        "Bytes captured and not yet mirrored",
        Some(Unit::Bytes),
        |v| v.lag_bytes.get() as f64,
    ),
    (
        "lag",
        "Age of the oldest record not yet mirrored",
        Some(Unit::Seconds),
        |v| v.lag_us.get() as f64 / 1e6,
    ),
    (
        "lag_peak_records",
        "Largest lag_records of the last 10 to 20 seconds",
        None,
        |v| v.lag_records_peak.get() as f64,
    ),
    (
        "lag_peak",
        "Largest lag_seconds of the last 10 to 20 seconds",
        Some(Unit::Seconds),
        |v| v.lag_us_peak.get() as f64 / 1e6,
    ),
    (
        "unpurged",
        "Bytes in the region that are not yet purged",
        Some(Unit::Bytes),
        |v| v.unpurged_bytes.get() as f64,
    ),
    (
        "region",
        "Bytes of the region's log",
        Some(Unit::Bytes),
        |v| v.region_bytes.get() as f64,
    ),
    (
        "reserve",
        "Bytes of the volume set aside for a takeover",
        Some(Unit::Bytes),
        |v| v.reserve_bytes.get() as f64,
    ),
    (
        "filesystem_errors",
        "Errors that the file system of the volume has counted",
        None,
        |v| v.filesystem_errors.get() as f64,
    ),
    (
        "oldest_unflushed_age",
        "Age of the oldest unflushed record",
        Some(Unit::Seconds),
        |v| v.oldest_unflushed_age_us.get() as f64 / 1e6,
    ),
    (
        "mapped_pages",
        "Pages that may be changed through shared mappings, and are looked at for that",
        None,
        |v| v.mapped_pages.get() as f64,
    ),
    (
        "mapped_look_age",
        "Time since these pages were looked at: what was stored since is in no record",
        Some(Unit::Seconds),
        |v| v.mapped_age_us.get() as f64 / 1e6,
    ),
    (
        "proof_age",
        "Time since the last checkpoint proved durability",
        Some(Unit::Seconds),
        |v| match v.proof_age_ms() {
            u64::MAX => f64::INFINITY,
            ms => ms as f64 / 1e3,
        },
    ),
    (
        "gate_held_groups",
        "Thread groups stopped before the gate now",
        None,
        |v| v.gate_held_groups.get() as f64,
    ),
    (
        "zero_copy",
        "1 if ring bytes go to the wire without a copy",
        None,
        |v| f64::from(u8::from(v.zero_copy.load(Ordering::Relaxed))),
    ),
];

const COUNTERS: [(&str, &str, Count); 9] = [
    ("drops", "Events lost because the ring was full", |v| {
        v.drops.get()
    }),
    (
        "fills",
        "Writes whose bytes came from the page cache",
        |v| v.fills.get(),
    ),
    (
        "recursion_misses",
        "Hook runs that the kernel skipped",
        |v| v.recursion_misses.get(),
    ),
    (
        "writeback_errors",
        "Write-backs of the volume that failed",
        |v| v.writeback_errors.get(),
    ),
    (
        "gate_replies_refused",
        "Replies of the kernel's NFS server that were refused at the gate",
        |v| v.gate_replies_refused.get(),
    ),
    ("checkpoints", "Checkpoints that proved durability", |v| {
        v.checkpoints.get()
    }),
    ("checkpoint_failures", "Checkpoints that failed", |v| {
        v.checkpoint_failures.get()
    }),
    ("epochs_closed", "Epochs that ended", |v| {
        v.epochs_closed.get()
    }),
    (
        "missed_wakeups",
        "Sleeps ended by the safety timeout with records waiting",
        |v| v.missed_wakeups.get(),
    ),
];

impl BoardCollector {
    fn volumes(&self) -> impl Iterator<Item = &VolumeBoard> {
        self.0.volumes().map(|v| &**v)
    }

    fn plain(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        // A gauge, because the classic text format, which promtool reads, knows no info type.
        let build = [(vec![("version", env!("CARGO_PKG_VERSION"))], 1.0)];
        Family {
            encoder,
            name: "build_info",
            help: "Version of the agent",
            unit: None,
        }
        .gauges(build.into_iter())?;
        for (name, help, unit, read) in GAUGES {
            Family {
                encoder,
                name,
                help,
                unit,
            }
            .gauges(
                self.volumes()
                    .map(|v| (vec![("volume", &*v.name)], read(v))),
            )?;
        }
        for (name, help, read) in COUNTERS {
            Family {
                encoder,
                name,
                help,
                unit: None,
            }
            .counters(
                self.volumes()
                    .map(|v| (vec![("volume", &*v.name)], read(v))),
            )?;
        }
        Ok(())
    }

    fn by_operation(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let each = |read: fn(&VolumeBoard, usize) -> u64| {
            self.volumes().flat_map(move |v| {
                OPERATION_NAMES.iter().map(move |(op, name)| {
                    (
                        vec![("volume", &*v.name), ("operation", *name)],
                        read(v, usize::from(*op)),
                    )
                })
            })
        };
        let records = each(|v, op| v.records[op].get());
        Family {
            encoder,
            name: "records",
            help: "Records captured",
            unit: None,
        }
        .counters(records)?;
        let bytes = each(|v, op| v.bytes[op].get());
        let help = "Bytes of the records captured";
        Family {
            encoder,
            name: "captured",
            help,
            unit: Some(Unit::Bytes),
        }
        .counters(bytes)?;
        let gaps = self.volumes().flat_map(|v| {
            gap::NAMES.iter().zip(&v.gaps).map(move |(name, count)| {
                (vec![("volume", &*v.name), ("reason", *name)], count.get())
            })
        });
        let help = "Changes noticed and not captured";
        Family {
            encoder,
            name: "gaps",
            help,
            unit: None,
        }
        .counters(gaps)
    }

    fn gate(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let calls = self.volumes().flat_map(|v| {
            [
                ("passed", &v.gate_passed),
                ("polled", &v.gate_polled),
                ("held", &v.gate_holds),
            ]
            .map(|(outcome, count)| {
                (
                    vec![("volume", &*v.name), ("outcome", outcome)],
                    count.get(),
                )
            })
        });
        Family {
            encoder,
            name: "gate_calls",
            help: "Calls of the fsync class that came to the gate, by what they met there",
            unit: None,
        }
        .counters(calls)?;
        self.histogram(
            encoder,
            "gate_held",
            "Time for which a thread was stopped before the gate",
            |v| (&v.held_counts, &v.held_sum_us),
        )
    }

    fn states(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let protection = self.volumes().flat_map(|v| {
            let now = v.words().protection;
            PROTECTIONS.iter().map(move |(state, name)| {
                let labels = vec![("volume", &*v.name), ("state", *name)];
                (labels, f64::from(u8::from(*state == now)))
            })
        });
        let help = "1 for the volume's present protection";
        Family {
            encoder,
            name: "protection_state",
            help,
            unit: None,
        }
        .gauges(protection)?;
        let role = self.volumes().flat_map(|v| {
            let now = v.words().role;
            ROLES.iter().map(move |(role, name)| {
                (
                    vec![("volume", &*v.name), ("role", *name)],
                    f64::from(u8::from(*role == now)),
                )
            })
        });
        let help = "1 for what this node is to the volume";
        Family {
            encoder,
            name: "role",
            help,
            unit: None,
        }
        .gauges(role)?;
        let peers = self.0.peers().iter().flat_map(|p| {
            let now = p.state();
            PEER_STATES.iter().map(move |(state, name)| {
                (
                    vec![("peer", &*p.node.0), ("state", *name)],
                    f64::from(u8::from(*state == now)),
                )
            })
        });
        let help = "1 for the peer's present state as seen from here";
        Family {
            encoder,
            name: "peer_state",
            help,
            unit: None,
        }
        .gauges(peers)?;
        let ages = self.0.peers().iter().flat_map(|p| {
            [
                ("link", &p.heartbeat_age_ms),
                ("mailbox", &p.mailbox_age_ms),
            ]
            .map(|(path, age)| {
                (
                    vec![("peer", &*p.node.0), ("path", path)],
                    age.get() as f64 / 1e3,
                )
            })
        });
        let io = self.0.peers().iter().map(|p| {
            (
                vec![("peer", &*p.node.0)],
                p.volume_io_age_ms.get() as f64 / 1e3,
            )
        });
        let help = "How long ago the volumes that the peer serves last answered it";
        Family {
            encoder,
            name: "peer_volume_io_age",
            help,
            unit: Some(Unit::Seconds),
        }
        .gauges(io)?;
        let help = "Time since the peer's last heartbeat";
        Family {
            encoder,
            name: "heartbeat_age",
            help,
            unit: Some(Unit::Seconds),
        }
        .gauges(ages)
    }

    fn takeover(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let words: Vec<_> = self.volumes().map(|v| (&*v.name, v.words())).collect();
        let steps = words.iter().flat_map(|(name, words)| {
            words
                .takeover
                .iter()
                .flat_map(|t| &t.steps)
                .map(move |step| {
                    (
                        vec![("volume", *name), ("step", &*step.name)],
                        step.took_ms as f64 / 1e3,
                    )
                })
        });
        let help = "Time each step of the last takeover took";
        Family {
            encoder,
            name: "takeover_step",
            help,
            unit: Some(Unit::Seconds),
        }
        .gauges(steps)
    }

    fn latency(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        self.histogram(
            encoder,
            "mirror_latency",
            "Time from the capture of a frame's first record to its place in the region",
            |v| (&v.latency_counts, &v.latency_sum_us),
        )
    }

    /// A histogram of times: counts per bucket, and their sum in microseconds.
    fn histogram(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        read: fn(&VolumeBoard) -> (&Buckets, &Gauge),
    ) -> Result<(), Error> {
        let mut family =
            encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for volume in self.volumes() {
            let (counts, sum_us) = read(volume);
            let bounds = LATENCY_BOUNDS_SECONDS.iter().copied().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().map(|c| c.get())).collect();
            let count = buckets.iter().map(|(_, n)| n).sum();
            let sum = sum_us.get() as f64 / 1e6;
            let labels = [("volume", &*volume.name)];
            family
                .encode_family(&labels)?
                .encode_histogram::<[(&str, &str); 0]>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl Collector for BoardCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        self.plain(&mut encoder)?;
        self.by_operation(&mut encoder)?;
        self.states(&mut encoder)?;
        self.takeover(&mut encoder)?;
        self.gate(&mut encoder)?;
        self.latency(&mut encoder)
    }
}
