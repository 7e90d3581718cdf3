//! When what happened, by the host's clock.
//!
//! The crash, the fence and the serving are stamped on the host. The steps between are stamped by
//! B's clock, whose distance to the host's is measured before the crash.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::lab::{Lab, NodeName, clock};

const TRIES: u32 = 3;

/// How far the host's clock is ahead of a machine's, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClockOffset(i64);

impl ClockOffset {
    /// Asks the machine for its time a few times; the quickest answer is the best.
    pub(super) fn measure(lab: &Lab, node: NodeName) -> Result<Self> {
        let mut best: Option<(i64, i64)> = None;
        for _ in 0..TRIES {
            let asked = clock::now_ms();
            let said = lab.run(node, "date +%s%3N")?;
            let took = clock::now_ms().saturating_sub(asked);
            let there: i64 = said
                .parse()
                .with_context(|| format!("the clock of {node} says `{said}`"))?;
            let offset = asked.saturating_add(took / 2).saturating_sub(there);
            if best.is_none_or(|(quickest, _)| took < quickest) {
                best = Some((took, offset));
            }
        }
        let (_, offset) = best.context("no clock was read")?;
        Ok(Self(offset))
    }

    const fn on_host(self, there_ms: i64) -> i64 {
        there_ms.saturating_add(self.0)
    }
}

/// One line of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Moment {
    /// What happened.
    pub what: &'static str,
    /// The host's time, milliseconds since 1970.
    pub at_ms: i64,
    /// After the crash, milliseconds.
    pub after_ms: i64,
    /// Whose clock says so.
    pub stamped_by: &'static str,
}

/// Puts the moments of a takeover together.
///
/// # Errors
/// If B does not tell a step, or the fence was never asked.
pub(super) fn moments(
    crash_ms: i64,
    serving_ms: i64,
    takeover: &Value,
    offset: ClockOffset,
    events: &[Value],
) -> Result<Vec<Moment>> {
    let fenced_ms = events
        .iter()
        .find(|event| event["event"] == "fenced" && event["node"] == NodeName::A.name())
        .and_then(|event| event["at_ms"].as_i64())
        .context("A was never fenced")?;
    let step = |name: &str| -> Result<i64> {
        let steps = takeover["steps"].as_array().map(Vec::as_slice);
        let mut named = steps.unwrap_or_default().iter();
        match named.rfind(|step| step["name"] == name) {
            Some(step) => {
                let ended = step["ended_at_ms"].as_i64();
                Ok(offset.on_host(ended.with_context(|| format!("step {name} has no end"))?))
            }
            None => bail!("the takeover has no step {name}"),
        }
    };
    let moment = |what, at_ms: i64, stamped_by| Moment {
        what,
        at_ms,
        after_ms: at_ms.saturating_sub(crash_ms),
        stamped_by,
    };
    Ok(vec![
        moment("crash", crash_ms, "host"),
        moment("detected", step("detect")?, "b"),
        moment("fenced", fenced_ms, "host"),
        moment("mounted", step("mount")?, "b"),
        moment("replayed", step("replay")?, "b"),
        moment("serving", serving_ms, "host"),
    ])
}

/// The moments as lines for a person.
pub(super) fn told(moments: &[Moment]) -> String {
    let line = |moment: &Moment| {
        let after = Duration::from_millis(moment.after_ms.unsigned_abs()).as_secs_f32();
        let sign = if moment.after_ms < 0 { '-' } else { '+' };
        format!(
            "  {:9} {sign}{after:6.2} s  ({}'s clock)",
            moment.what, moment.stamped_by
        )
    };
    moments.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::{ClockOffset, moments};
    use serde_json::json;

    #[test]
    fn the_steps_are_moved_to_the_host_s_clock() {
        let takeover = json!({ "steps": [
            { "name": "detect", "ended_at_ms": 2_000 },
            { "name": "mount", "ended_at_ms": 2_500 },
            { "name": "replay", "ended_at_ms": 2_900 },
        ]});
        let events = [
            json!({ "event": "booted", "node": "a", "at_ms": 1 }),
            json!({ "event": "fenced", "node": "a", "at_ms": 3_400 }),
        ];
        let all = moments(100, 4_200, &takeover, ClockOffset(1_000), &events).expect("all steps");
        let found: Vec<_> = all.iter().map(|m| (m.what, m.after_ms)).collect();
        assert_eq!(
            found,
            [
                ("crash", 0),
                ("detected", 2_900),
                ("fenced", 3_300),
                ("mounted", 3_400),
                ("replayed", 3_800),
                ("serving", 4_100),
            ]
        );
        assert!(moments(100, 4_200, &takeover, ClockOffset(0), &[]).is_err());
        let empty = json!({ "steps": [] });
        assert!(moments(100, 4_200, &empty, ClockOffset(0), &events).is_err());
    }
}
