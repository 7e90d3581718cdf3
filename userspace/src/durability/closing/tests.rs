use super::*;

fn closing() -> Closing {
    Closing::new(Epoch(7), Seq(42), "the link is gone")
}

/// What a driver that never fails does, in order.
fn steps_of(mut closing: Closing, mut fails: impl FnMut(Step) -> bool) -> Vec<String> {
    let (mut now_us, mut told) = (0, Vec::new());
    for _ in 0..100 {
        match closing.next(now_us) {
            Next::Begin(step) => {
                let failed = fails(step);
                told.push(format!("{step:?}{}", if failed { " failed" } else { "" }));
                let result = if failed { Err("broken".into()) } else { Ok(()) };
                closing.ended(step, result, now_us);
            }
            Next::OpenGates(_) => {
                assert!(closing.is_proven());
                told.push("OpenGates".into());
            }
            Next::Wait { until_us } => {
                assert!(until_us > now_us, "a wait that waits for nothing");
                now_us = until_us;
            }
            Next::Closed => {
                told.push("Closed".into());
                break;
            }
        }
    }
    told
}

#[test]
fn the_steps_come_in_their_order() {
    let told = steps_of(closing(), |_| false);
    let order = ["Mailbox", "Checkpoint", "Mirror", "OpenGates", "Closed"];
    assert_eq!(told, order);
    let closing = closing();
    assert_eq!(
        (closing.epoch(), closing.last_mirrored()),
        (Epoch(7), Seq(42))
    );
    assert_eq!(
        (closing.reason(), closing.trouble(0)),
        ("the link is gone", None)
    );
}

#[test]
fn a_mailbox_that_fails_holds_up_neither_checkpoint_nor_gates_but_the_next_epoch() {
    let mut tries = 0;
    let told = steps_of(closing(), |step| {
        tries += u32::from(step == Step::Mailbox);
        step == Step::Mailbox && tries <= 3
    });
    let order = [
        "Mailbox failed",
        "Checkpoint",
        "Mirror",
        "OpenGates",
        "Mailbox failed",
        "Mailbox failed",
        "Mailbox",
        "Closed",
    ];
    assert_eq!(told, order);
}

#[test]
fn a_checkpoint_that_fails_is_tried_again_later_each_time_and_the_gates_stay_shut() {
    let mut closing = closing();
    assert!(matches!(closing.next(0), Next::Begin(Step::Mailbox)));
    closing.ended(Step::Mailbox, Ok(()), 0);
    let (mut now_us, mut waits) = (0, Vec::new());
    for _ in 0..10 {
        assert!(matches!(
            closing.next(now_us),
            Next::Begin(Step::Checkpoint)
        ));
        closing.ended(Step::Checkpoint, Err("EIO".into()), now_us);
        let Next::Wait { until_us } = closing.next(now_us) else {
            panic!("nothing but waiting is right after a failed checkpoint");
        };
        waits.push((until_us - now_us) / 1000);
        assert!(matches!(closing.next(until_us - 1), Next::Wait { .. }));
        assert!(closing.trouble(now_us).unwrap().contains("EIO"));
        now_us = until_us;
    }
    assert_eq!(
        waits,
        [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000]
    );
    assert!(matches!(
        closing.next(now_us),
        Next::Begin(Step::Checkpoint)
    ));
    closing.ended(Step::Checkpoint, Ok(()), now_us);
    assert_eq!(closing.trouble(now_us), None);
    assert!(matches!(closing.next(now_us), Next::Begin(Step::Mirror)));
}

#[test]
fn a_mirror_that_fails_or_is_silent_does_not_hold_the_gates() {
    let told = steps_of(closing(), |step| step == Step::Mirror);
    let order = [
        "Mailbox",
        "Checkpoint",
        "Mirror failed",
        "OpenGates",
        "Closed",
    ];
    assert_eq!(told, order);

    let mut closing = closing();
    for step in [Step::Mailbox, Step::Checkpoint] {
        assert!(matches!(closing.next(0), Next::Begin(begun) if begun == step));
        closing.ended(step, Ok(()), 0);
    }
    assert!(matches!(closing.next(0), Next::Begin(Step::Mirror)));
    let Next::Wait { until_us } = closing.next(0) else {
        panic!("its answer is waited for");
    };
    assert_eq!(until_us, MIRROR_LIMIT_US);
    assert!(matches!(closing.next(until_us), Next::OpenGates(_)));
    assert!(matches!(closing.next(until_us), Next::Closed));
    // Its late answer changes nothing.
    closing.ended(Step::Mirror, Err("timed out".into()), until_us + 1);
    assert!(matches!(closing.next(until_us + 1), Next::Closed));
}

#[test]
fn a_mailbox_that_hangs_is_left_behind_and_its_late_success_counts() {
    let mut closing = closing();
    assert!(matches!(closing.next(0), Next::Begin(Step::Mailbox)));
    let Next::Wait { until_us } = closing.next(0) else {
        panic!("the checkpoint comes after the mailbox");
    };
    assert_eq!(until_us, MAILBOX_LIMIT_US);
    assert!(matches!(
        closing.next(until_us),
        Next::Begin(Step::Checkpoint)
    ));
    assert!(closing.trouble(until_us).unwrap().contains("mailbox"));
    closing.ended(Step::Checkpoint, Ok(()), until_us);
    assert!(matches!(closing.next(until_us), Next::Begin(Step::Mirror)));
    closing.ended(Step::Mirror, Ok(()), until_us);
    assert!(matches!(closing.next(until_us), Next::OpenGates(_)));
    // It is not written a second time beside the first, and no new epoch begins.
    let hours = until_us * 10_000;
    assert!(matches!(closing.next(hours), Next::Wait { .. }));
    closing.ended(Step::Mailbox, Ok(()), hours);
    assert!(matches!(closing.next(hours), Next::Closed));
}

#[test]
fn a_checkpoint_that_hangs_is_told_and_holds_the_gates() {
    let mut closing = closing();
    assert!(matches!(closing.next(0), Next::Begin(Step::Mailbox)));
    closing.ended(Step::Mailbox, Ok(()), 0);
    assert!(matches!(closing.next(0), Next::Begin(Step::Checkpoint)));
    assert_eq!(closing.trouble(CHECKPOINT_LIMIT_US - 1), None);
    assert!(
        closing
            .trouble(CHECKPOINT_LIMIT_US)
            .unwrap()
            .contains("hangs")
    );
    assert!(matches!(closing.next(u64::MAX - 1), Next::Wait { .. }));
    assert!(!closing.is_proven());
}
