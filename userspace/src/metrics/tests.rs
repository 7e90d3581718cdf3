//! What the endpoint shows is what the board holds, in a text that Prometheus accepts.

use std::sync::Arc;
use std::time::Duration;

use super::registry;
use crate::board::Board;
use crate::ids::NodeId;
use crate::status::{Protection, Role, TakeoverStatus, TakeoverStep};

fn text() -> String {
    let board = Arc::new(Board::new(
        NodeId("a".into()),
        &[NodeId("b".into())],
        &[("vol0".to_owned(), "rdma")],
    ));
    let volume = board.volume("vol0").expect("configured");
    volume.say(Role::Owner, Protection::Exposed, "a test");
    volume.lag_us.set(1500);
    volume.records[1].add(7);
    volume.latency(40);
    volume.proved();
    volume.gate_polled.set(3);
    volume.held(Duration::from_micros(1500));
    volume.tell_takeover(TakeoverStatus {
        steps: vec![TakeoverStep {
            name: "fence".into(),
            took_ms: 250,
            ended_at_ms: 0,
        }],
        ..Default::default()
    });
    super::text(&registry(board)).expect("encodes")
}

#[test]
fn the_board_is_shown() {
    let text = text();
    for line in [
        "twinwrite_build_info{version=\"0.1.0\"} 1.0",
        "twinwrite_lag_seconds{volume=\"vol0\"} 0.0015",
        "twinwrite_records_total{volume=\"vol0\",operation=\"write\"} 7",
        "twinwrite_protection_state{volume=\"vol0\",state=\"exposed\"} 1",
        "twinwrite_protection_state{volume=\"vol0\",state=\"protected\"} 0",
        "twinwrite_takeover_step_seconds{volume=\"vol0\",step=\"fence\"} 0.25",
        "twinwrite_mirror_latency_seconds_bucket{le=\"0.00005\",volume=\"vol0\"} 1",
        "twinwrite_mirror_latency_seconds_count{volume=\"vol0\"} 1",
        "twinwrite_checkpoints_total{volume=\"vol0\"} 1",
        "twinwrite_gate_calls_total{volume=\"vol0\",outcome=\"polled\"} 3",
        "twinwrite_gate_held_seconds_bucket{le=\"0.0025\",volume=\"vol0\"} 1",
    ] {
        assert!(
            text.lines().any(|l| l.starts_with(line)),
            "no `{line}` in\n{text}"
        );
    }
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let text = text();
    let shown: std::collections::BTreeSet<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# TYPE "))
        .filter_map(|l| l.split(' ').next())
        .collect();
    let page = include_str!("../../../docs/operations.md");
    let documented: std::collections::BTreeSet<&str> = page
        .lines()
        .filter_map(|l| l.strip_prefix("| `twinwrite_"))
        .filter_map(|l| l.split('`').next())
        .collect();
    let shown: std::collections::BTreeSet<&str> = shown
        .iter()
        .filter_map(|n| n.strip_prefix("twinwrite_"))
        .collect();
    assert_eq!(
        shown, documented,
        "left: the endpoint, right: docs/operations.md"
    );
}

#[test]
fn promtool_accepts_the_text() {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs (apt-get install prometheus)");
    let mut input = promtool.stdin.take().expect("piped");
    input.write_all(text().as_bytes()).expect("promtool reads");
    drop(input);
    let output = promtool.wait_with_output().expect("promtool ends");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
}
