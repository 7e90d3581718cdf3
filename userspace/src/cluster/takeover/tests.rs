use super::*;
use crate::ids::Seq;

const STEPS: [&str; 9] = [
    "claim", "fence", "revoke", "save", "mount", "judge", "replay", "epoch", "serve",
];

/// Does nothing but write down what it was asked, and fails where it is told to.
struct Fake {
    calls: Vec<&'static str>,
    events: Vec<Event>,
    fails: Option<&'static str>,
    falls: Option<&'static str>,
    judgement: Judgement,
    fenced_by: Option<FencedBy>,
    ms: u64,
}

impl Fake {
    fn new() -> Self {
        Self {
            calls: Vec::new(),
            events: Vec::new(),
            fails: None,
            falls: None,
            judgement: Judgement::Merge,
            fenced_by: None,
            ms: 0,
        }
    }

    fn call(&mut self, name: &'static str) -> StepResult {
        self.calls.push(name);
        self.ms += 10;
        if self.falls == Some(name) {
            Err(Fallen::Lives.into())
        } else if self.fails == Some(name) {
            Err(format!("{name} is broken").into())
        } else {
            Ok(())
        }
    }
}

impl TakeoverDriver for Fake {
    fn now(&self) -> Stamp {
        let wall_ms = 1_000_000 + i64::try_from(self.ms).unwrap();
        Stamp {
            monotonic: Duration::from_millis(self.ms),
            wall_ms,
        }
    }
    fn report(&mut self, event: Event) {
        self.events.push(event);
    }
    async fn claim(&mut self) -> StepResult {
        self.call("claim")
    }
    async fn fence(&mut self, _: &Claimed) -> StepResult {
        self.call("fence")
    }
    async fn claim_merging(&mut self, fenced: &Fenced) -> StepResult {
        self.fenced_by = Some(fenced.by());
        self.call("claim_merging")
    }
    async fn revoke(&mut self, _: &Fenced) -> StepResult {
        self.call("revoke")
    }
    async fn save_region(&mut self, _: &Revoked) -> StepResult {
        self.call("save")
    }
    async fn mount(&mut self, _: &Saved) -> StepResult {
        self.call("mount")
    }
    async fn judge(&mut self, _: &Mounted) -> StepResult<Judgement> {
        self.call("judge").map(|()| self.judgement.clone())
    }
    async fn replay(&mut self, judged: &Judged) -> StepResult<Merged> {
        assert_eq!(*judged.judgement(), Judgement::Merge);
        let merged = Merged {
            records_replayed: 7,
            cut_seq: Seq(42),
            warnings: vec!["a change was not captured".into()],
        };
        self.call("replay").map(|()| merged)
    }
    async fn open_epoch(&mut self, replayed: &Replayed) -> StepResult {
        let merge = self.judgement == Judgement::Merge;
        assert_eq!(
            replayed.merged().cut_seq,
            if merge { Seq(42) } else { Seq(0) }
        );
        self.call("epoch")
    }
    async fn serve(&mut self, _: &Settled) -> StepResult {
        self.call("serve")
    }
    async fn withdraw(&mut self) -> StepResult {
        self.call("withdraw")
    }
}

const ALL_CALLS: [&str; 10] = [
    "claim",
    "fence",
    "claim_merging",
    "revoke",
    "save",
    "mount",
    "judge",
    "replay",
    "epoch",
    "serve",
];

fn takeover(cause: Cause, has_fence: bool) -> Takeover {
    let detected = (
        Stamp {
            wall_ms: 999_000,
            ..Stamp::default()
        },
        Duration::from_millis(3100),
    );
    Takeover::new("data", &NodeId("a".into()), cause, has_fence, detected)
}

#[tokio::test]
async fn an_owner_that_is_heard_without_its_volumes_is_fenced_and_not_called_silent() {
    let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerLostVolumes, true));
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert_eq!(driver.fenced_by, Some(FencedBy::Command));
    assert!(
        matches!(&driver.events[0], Event::TakeoverBegan { reason, .. }
            if reason.contains("volume_io_limit") && !reason.contains("silent")),
        "{:?}",
        driver.events[0]
    );
}

#[tokio::test]
async fn the_steps_run_in_their_order_and_are_timed() {
    let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert_eq!(driver.calls, ALL_CALLS);
    assert_eq!(driver.fenced_by, Some(FencedBy::Command));
    let status = takeover.status();
    let names: Vec<&str> = status.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names[0], "detect");
    assert_eq!(names[1..], STEPS);
    let times: Vec<u64> = status.steps.iter().map(|step| step.took_ms).collect();
    assert_eq!(times, [3100, 10, 20, 10, 10, 10, 10, 10, 10, 10]);
    assert_eq!(status.steps[9].ended_at_ms, 1_000_100);
    assert_eq!((status.records_replayed, status.cut_seq), (7, Seq(42)));
    assert!(status.serving && status.error.is_none());
    assert!(matches!(driver.events[0], Event::TakeoverBegan { .. }));
    assert!(matches!(
        driver.events[10],
        Event::Serving {
            loss_unknown: false,
            ref warnings,
            ..
        } if warnings.len() == 1
    ));
    assert_eq!(status.warnings, ["a change was not captured"]);
    assert_eq!(driver.events.len(), 11);
    // Once it serves, nothing is done again.
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert_eq!(driver.calls.len(), 10);
}

#[tokio::test]
async fn a_failing_step_stops_with_its_reason_and_is_the_first_one_tried_again() {
    for (index, failing) in ALL_CALLS.into_iter().enumerate() {
        let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
        driver.fails = Some(failing);
        assert_eq!(takeover.run(&mut driver).await, Progress::Stopped);
        assert_eq!(
            driver.calls,
            ALL_CALLS[..=index],
            "nothing runs after {failing}"
        );
        let error = takeover.status().error.clone().unwrap();
        assert!(error.contains(&format!("{failing} is broken")), "{error}");
        assert!(!takeover.status().serving);
        // Still broken: the same step, no other.
        assert_eq!(takeover.advance(&mut driver).await, Progress::Stopped);
        driver.fails = None;
        driver.calls.clear();
        assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
        // The fence step has two parts and is repeated whole.
        let first = if failing == "claim_merging" {
            index - 1
        } else {
            index
        };
        assert_eq!(driver.calls, ALL_CALLS[first..]);
        assert_eq!(takeover.status().error, None);
        assert_eq!(takeover.status().steps.len(), 10);
        let failures = driver
            .events
            .iter()
            .filter(|event| matches!(event, Event::TakeoverStep { error: Some(_), .. }));
        assert_eq!(failures.count(), 2);
    }
}

#[tokio::test]
async fn without_a_fence_command_nothing_happens_until_a_person_confirms() {
    let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, false));
    for _ in 0..3 {
        assert_eq!(takeover.run(&mut driver).await, Progress::WaitsForPerson);
    }
    assert!(driver.calls.is_empty());
    assert_eq!(driver.events.len(), 1, "told once");
    let reason = takeover.status().error.clone().unwrap();
    assert!(reason.starts_with("waiting for a person"), "{reason}");
    assert!(
        reason.contains("twinwrite takeover --confirm-dead a"),
        "{reason}"
    );

    let other = takeover
        .confirm_dead(&NodeId("b".into()), PeerState::Dead)
        .unwrap_err();
    assert!(matches!(other, ConfirmError::OtherNode { .. }));
    for state in [
        PeerState::Alive,
        PeerState::LinkSilent,
        PeerState::MailboxSilent,
    ] {
        let error = takeover
            .confirm_dead(&NodeId("a".into()), state)
            .unwrap_err();
        assert!(error.to_string().contains("power it off first"));
    }
    assert_eq!(takeover.run(&mut driver).await, Progress::WaitsForPerson);
    takeover
        .confirm_dead(&NodeId("a".into()), PeerState::Dead)
        .unwrap();
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert!(!driver.calls.contains(&"fence"));
    assert_eq!(driver.fenced_by, Some(FencedBy::Person));
    assert_eq!(takeover.status().error, None);
    assert!(matches!(driver.events[1], Event::TakeoverBegan { .. }));
}

#[tokio::test]
async fn a_persons_word_replaces_a_fence_command_that_fails() {
    let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
    driver.fails = Some("fence");
    assert_eq!(takeover.run(&mut driver).await, Progress::Stopped);
    takeover
        .confirm_dead(&NodeId("a".into()), PeerState::Dead)
        .unwrap();
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert_eq!(driver.fenced_by, Some(FencedBy::Person));
}

#[tokio::test]
async fn an_owner_that_rebooted_and_says_so_is_not_fenced() {
    let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerRebooted, false));
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert!(!driver.calls.contains(&"fence"));
    assert_eq!(driver.fenced_by, Some(FencedBy::Reboot));
}

#[tokio::test]
async fn nothing_to_merge_merges_nothing_and_an_unknown_loss_is_loud() {
    let why = "the sentinel is of a closed epoch".to_owned();
    for (judgement, unknown) in [
        (Judgement::Nothing { why: why.clone() }, false),
        (Judgement::LossUnknown { why }, true),
    ] {
        let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
        driver.judgement = judgement;
        assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
        assert!(!driver.calls.contains(&"replay"));
        assert_eq!(takeover.loss_unknown(), unknown);
        let last = driver.events.last().unwrap();
        assert!(matches!(last, Event::Serving { loss_unknown, .. } if *loss_unknown == unknown));
    }
}

#[tokio::test]
async fn a_false_alarm_is_withdrawn_until_the_owner_is_fenced_and_not_after() {
    for (index, failing) in ALL_CALLS.into_iter().enumerate() {
        let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
        driver.fails = Some(failing);
        takeover.run(&mut driver).await;
        let result = takeover.withdraw(&mut driver).await;
        if index < 3 {
            result.unwrap();
            assert_eq!(driver.calls.last(), Some(&"withdraw"));
            assert!(matches!(
                driver.events.last(),
                Some(Event::TakeoverWithdrawn { .. })
            ));
        } else {
            assert!(matches!(result, Err(WithdrawError::TooLate(_))));
        }
    }
}

#[tokio::test]
async fn words_that_contradict_each_other_wait_for_a_person_who_gives_the_region_up() {
    let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
    driver.judgement = Judgement::Ask {
        why: "the volume was set back".into(),
        evidence: "mailbox: epoch 5; sentinel: epoch 4".into(),
    };
    takeover.discard_region();
    for _ in 0..3 {
        assert_eq!(takeover.run(&mut driver).await, Progress::WaitsForPerson);
        assert!(takeover.waits_for_judgement() && !takeover.waits_for_fence());
    }
    assert_eq!(
        driver.calls,
        ALL_CALLS[..7],
        "judged once, and nothing after it"
    );
    let waits = |event: &&Event| matches!(event, Event::TakeoverWaits { .. });
    assert_eq!(driver.events.iter().filter(waits).count(), 1, "told once");
    let reason = takeover.status().error.clone().unwrap();
    for part in [
        "set back",
        "sentinel: epoch 4",
        "twinwrite takeover --discard-region data",
    ] {
        assert!(reason.contains(part), "{part} is not in {reason}");
    }
    takeover.discard_region();
    assert_eq!(takeover.run(&mut driver).await, Progress::Serving);
    assert!(!driver.calls.contains(&"replay"));
    assert!(takeover.loss_unknown() && takeover.status().error.is_none());
}

#[tokio::test]
async fn a_claim_that_has_fallen_ends_the_takeover_before_its_next_step() {
    for (falls, behind) in [
        ("claim", "fence"),
        ("claim_merging", "revoke"),
        ("mount", "judge"),
    ] {
        let (mut driver, mut takeover) = (Fake::new(), takeover(Cause::OwnerDead, true));
        driver.falls = Some(falls);
        assert_eq!(takeover.run(&mut driver).await, Progress::Fallen);
        assert_eq!(driver.calls.last(), Some(&falls));
        assert!(!driver.calls.contains(&behind));
        let error = takeover.status().error.clone().unwrap();
        assert!(error.contains("sign of life"), "{error}");
    }
}
