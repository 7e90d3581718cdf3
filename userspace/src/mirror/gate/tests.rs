use super::*;

const fn at(position: u64) -> OpenTo {
    OpenTo::Position(RingPos(position))
}

#[test]
fn a_word_says_the_same_to_both_sides() {
    for open_to in [at(0), at(64), OpenTo::All] {
        assert_eq!(OpenTo::of_word(open_to.word()), open_to);
    }
    assert!(!OpenTo::of_word(0).admits(RingPos(64)), "new programs hold");
    assert!(at(128).admits(RingPos(128)) && !at(128).admits(RingPos(192)));
    assert!(OpenTo::All.admits(RingPos(u64::MAX)));
}

#[test]
fn a_mark_passes_once_it_is_mirrored_and_not_before() {
    let mut gate = Gate::left(OpenTo::All);
    gate.shut(RingPos(640));
    assert_eq!(gate.open_to(), at(640));
    gate.mirrored(RingPos(6400), RingPos(0));
    assert_eq!(gate.open_to(), at(640), "no epoch runs yet");
    gate.begin(RingPos(704));
    assert_eq!(gate.open_to(), at(704), "what was drained waits for nobody");
    gate.mirrored(RingPos(768), RingPos(0));
    assert_eq!(gate.open_to(), at(768));
    gate.mirrored(RingPos(704), RingPos(0));
    assert_eq!(gate.open_to(), at(768), "never back");
}

#[test]
fn bytes_read_late_hold_the_gates_until_all_that_they_may_show_is_mirrored() {
    let mut gate = Gate::left(OpenTo::All);
    gate.shut(RingPos(0));
    gate.begin(RingPos(0));
    gate.mirrored(RingPos(64), RingPos(256));
    assert_eq!(gate.open_to(), at(0));
    gate.mirrored(RingPos(192), RingPos(0));
    assert_eq!(gate.open_to(), at(0), "the demand stays");
    gate.mirrored(RingPos(256), RingPos(0));
    assert_eq!(gate.open_to(), at(256));
}

#[test]
fn after_a_restart_nothing_passes_before_what_the_ring_held_is_mirrored() {
    let mut gate = Gate::left(at(128));
    gate.mirrored(RingPos(4096), RingPos(0));
    assert_eq!(gate.open_to(), at(128), "not known to go on yet");
    gate.resume(RingPos(1024));
    gate.mirrored(RingPos(960), RingPos(0));
    assert_eq!(gate.open_to(), at(128));
    gate.mirrored(RingPos(1024), RingPos(0));
    assert_eq!(gate.open_to(), at(1024));
}

#[test]
fn while_an_epoch_is_closed_nothing_passes_and_then_everything() {
    let mut gate = Gate::left(at(128));
    gate.resume(RingPos(128));
    gate.hold();
    gate.mirrored(RingPos(4096), RingPos(0));
    assert_eq!(gate.open_to(), at(128));
    gate.open(&Proven::without_sentinel());
    assert_eq!(gate.open_to(), OpenTo::All);
    gate.mirrored(RingPos(8192), RingPos(0));
    assert_eq!(gate.open_to(), OpenTo::All);
}
