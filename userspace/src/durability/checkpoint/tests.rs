//! One at a time, never forgotten, with patience.

use super::*;

#[test]
fn age_and_requests_begin_one_and_only_one() {
    let mut plan = CheckpointPlanner::new(1000);
    assert_eq!(plan.poll(0, 999), None);
    assert_eq!(plan.poll(1, 1000), Some(CheckpointReason::Age));
    assert_eq!(plan.poll(2, 5000), None, "one runs");
    plan.want(CheckpointReason::RegionHalf);
    plan.want(CheckpointReason::Gap);
    plan.want(CheckpointReason::Requested);
    plan.succeeded(10);
    assert_eq!(
        plan.poll(11, 0),
        Some(CheckpointReason::Gap),
        "wanted while one ran"
    );
    plan.succeeded(20);
    assert_eq!((plan.poll(21, 0), plan.proof_age_us(25)), (None, Some(5)));
}

#[test]
fn a_failed_one_is_tried_again_later_each_time() {
    let mut plan = CheckpointPlanner::new(1000);
    plan.want(CheckpointReason::Gap);
    let mut now_us = 0;
    for (failures, after_us) in [(1, 100_000), (2, 200_000), (3, 400_000)] {
        assert_eq!(plan.poll(now_us, 0), Some(CheckpointReason::Gap));
        assert_eq!(plan.failed(now_us), Retry { failures, after_us });
        assert_eq!(plan.poll(now_us + after_us - 1, 9999), None);
        now_us += after_us;
    }
    for _ in 0..100 {
        assert!(plan.poll(now_us, 0).is_some());
        now_us += plan.failed(now_us).after_us;
    }
    assert!(plan.poll(now_us, 0).is_some());
    assert_eq!(plan.failed(now_us).after_us, RETRY_MAX_US);
    assert_eq!(plan.proof_age_us(now_us), None);
    assert!(plan.poll(now_us + RETRY_MAX_US, 0).is_some());
    plan.succeeded(now_us);
    plan.want(CheckpointReason::Requested);
    assert_eq!(plan.poll(now_us, 0), Some(CheckpointReason::Requested));
    assert_eq!(
        plan.failed(now_us),
        Retry {
            failures: 1,
            after_us: RETRY_MIN_US
        }
    );
}
