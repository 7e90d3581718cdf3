use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    heartbeat_interval: Duration::from_millis(500),
    dead_after: Duration::from_secs(3),
};
const X: BootId = BootId([1; 16]);
const Y: BootId = BootId([2; 16]);
const Z: BootId = BootId([3; 16]);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn beat(boot_id: BootId, counter: u64) -> Beat {
    Beat { boot_id, counter }
}

fn slot(boot_id: BootId, counter: u64) -> MailboxLook {
    MailboxLook::Beat {
        beat: beat(boot_id, counter),
        word: LastWord::OwnsNothing,
    }
}

/// A peer, and a node that looks every 500 ms.
struct Watch {
    peer: Liveness,
    now: Duration,
    counter: u64,
    changes: Vec<Change>,
}

impl Watch {
    fn new() -> Self {
        Self {
            peer: Liveness::new(LIMITS, ms(0)),
            now: ms(0),
            counter: 0,
            changes: Vec::new(),
        }
    }

    /// Looks `times`; each path's counter moves or stands still.
    fn looks(&mut self, times: u64, link_moves: bool, mailbox_moves: bool) -> PeerState {
        for _ in 0..times {
            self.now += ms(500);
            self.counter += 1;
            let of = |moves: bool| if moves { self.counter } else { 0 };
            let link = Some(beat(X, of(link_moves)));
            let changes = self.peer.look(self.now, link, slot(X, of(mailbox_moves)));
            self.changes.extend(changes);
        }
        self.peer.state()
    }
}

fn alive() -> Watch {
    let mut watch = Watch::new();
    assert_eq!(watch.looks(4, true, true), PeerState::Alive);
    watch.changes.clear();
    watch
}

#[test]
fn a_peer_that_boots_long_after_this_node_is_not_dead_at_its_first_word() {
    let mut peer = Liveness::new(LIMITS, ms(0));
    let mut now = ms(0);
    for _ in 0..20 {
        now += ms(500);
        peer.look(now, None, MailboxLook::Nothing);
    }
    assert_eq!(peer.state(), PeerState::Unknown);
    // It boots, mounts, and says at once that it owns the volume.
    let owns = |counter| MailboxLook::Beat {
        beat: beat(X, counter),
        word: LastWord::Owns,
    };
    now += ms(500);
    peer.look(now, Some(beat(X, 1)), owns(1));
    assert_eq!(peer.state(), PeerState::Unknown);
    now += ms(500);
    peer.look(now, Some(beat(X, 2)), owns(2));
    assert_eq!(peer.state(), PeerState::Alive);
    // If it dies instead, a whole window after its first word tells.
    let mut peer = Liveness::new(LIMITS, ms(0));
    for look in 1..=20 {
        peer.look(ms(500) * look, None, MailboxLook::Nothing);
    }
    let states = (21..=27).map(|look| {
        peer.look(ms(500) * look, Some(beat(X, 1)), owns(1));
        peer.state()
    });
    let states: Vec<PeerState> = states.collect();
    assert_eq!(states[..6], [PeerState::Unknown; 6]);
    assert_eq!(states[6], PeerState::Dead);
}

#[test]
fn a_peer_that_falls_silent_on_both_paths_is_dead_after_the_limit_and_not_before() {
    let mut watch = alive();
    // The first of these looks sees the counter fall back to 0, which is a change.
    assert_eq!(watch.looks(6, false, false), PeerState::Alive);
    assert_eq!(watch.looks(1, false, false), PeerState::Dead);
    assert_eq!(
        watch.changes,
        [Change::State {
            from: PeerState::Alive,
            to: PeerState::Dead
        }]
    );
    assert_eq!(watch.peer.ages(watch.now), (ms(3000), ms(3000)));
}

#[test]
fn one_living_path_is_enough_to_live() {
    let mut watch = alive();
    assert_eq!(watch.looks(600, false, true), PeerState::LinkSilent);
    assert_eq!(watch.looks(1, true, true), PeerState::Alive);
    assert_eq!(watch.looks(600, true, false), PeerState::MailboxSilent);
    // The link's window begins when the link falls silent, not when the mailbox did.
    assert_eq!(watch.looks(6, false, false), PeerState::MailboxSilent);
    assert_eq!(watch.looks(1, false, false), PeerState::Dead);
    assert_eq!(watch.looks(1, false, true), PeerState::LinkSilent);
}

#[test]
fn a_peer_that_was_never_heard_is_unknown_whatever_old_counter_the_mailbox_holds() {
    let mut watch = Watch::new();
    assert_eq!(watch.looks(600, false, false), PeerState::Unknown);
    let mut peer = Liveness::new(LIMITS, ms(0));
    for look in 1..600 {
        peer.look(ms(500 * look), None, MailboxLook::Nothing);
    }
    assert_eq!(peer.state(), PeerState::Unknown);
}

#[test]
fn a_peer_never_heard_is_dead_after_a_whole_window_if_its_last_word_was_that_it_owns() {
    let mut peer = Liveness::new(LIMITS, ms(0));
    let owns = MailboxLook::Beat {
        beat: beat(X, 41),
        word: LastWord::Owns,
    };
    // The window begins with the first reading.
    for look in 1..7 {
        assert_eq!(peer.look(ms(500 * look), None, owns), []);
    }
    let died = Change::State {
        from: PeerState::Unknown,
        to: PeerState::Dead,
    };
    assert_eq!(peer.look(ms(3500), None, owns), [died]);
}

#[test]
fn time_in_which_this_node_stood_still_does_not_count() {
    let mut watch = alive();
    watch.looks(5, false, false);
    // SIGSTOP for ten minutes; the peer's counters are read before it had a chance to be heard.
    watch.now += ms(600_000);
    assert_eq!(watch.looks(1, false, false), PeerState::Alive);
    assert_eq!(watch.changes, [Change::OwnStall { gap: ms(600_500) }]);
    assert_eq!(watch.looks(5, false, false), PeerState::Alive);
    assert_eq!(watch.looks(1, false, false), PeerState::Dead);
}

#[test]
fn a_node_that_is_always_too_slow_never_calls_its_peer_dead() {
    let mut watch = alive();
    for _ in 0..300 {
        watch.now += ms(600);
        assert_eq!(watch.looks(1, false, false), PeerState::Alive);
    }
}

#[test]
fn a_stall_brings_no_dead_peer_back_and_no_silent_path_to_life() {
    let mut watch = alive();
    watch.looks(7, false, true);
    watch.now += ms(5000);
    assert_eq!(watch.looks(1, false, true), PeerState::LinkSilent);
    watch.looks(7, false, false);
    watch.now += ms(5000);
    assert_eq!(watch.looks(20, false, false), PeerState::Dead);
    let states = watch
        .changes
        .iter()
        .filter(|change| matches!(change, Change::State { .. }));
    assert_eq!(states.count(), 2);
}

#[test]
fn a_mailbox_that_this_node_cannot_read_proves_nothing() {
    let mut watch = alive();
    for _ in 0..100 {
        watch.now += ms(500);
        watch
            .peer
            .look(watch.now, Some(beat(X, 0)), MailboxLook::Unreadable);
    }
    assert_eq!(watch.peer.state(), PeerState::LinkSilent);
    // Readable again, and a whole window silent.
    watch.counter = 0;
    assert_eq!(watch.looks(6, false, false), PeerState::LinkSilent);
    assert_eq!(watch.looks(1, false, false), PeerState::Dead);
}

#[test]
fn a_damaged_slot_is_silence() {
    let mut watch = alive();
    for _ in 0..7 {
        watch.now += ms(500);
        watch.peer.look(watch.now, None, MailboxLook::Nothing);
    }
    assert_eq!(watch.peer.state(), PeerState::Dead);
}

#[test]
fn a_peer_that_stopped_on_purpose_is_not_dead_and_can_come_back() {
    let mut watch = alive();
    for _ in 0..20 {
        watch.now += ms(500);
        let stopped = MailboxLook::Beat {
            beat: beat(X, 99),
            word: LastWord::Stopped,
        };
        watch.peer.look(watch.now, Some(beat(X, 4)), stopped);
    }
    assert_eq!(watch.peer.state(), PeerState::Unknown);
    assert_eq!(watch.looks(2, true, true), PeerState::Alive);
}

#[test]
fn another_boot_id_says_that_the_boot_before_is_dead_once() {
    let mut watch = alive();
    let link = Some(beat(X, watch.counter));
    let rebooted = |from, to| Change::Rebooted { from, to };
    // Y is heard in the mailbox; what X left in this node's memory says nothing any more.
    assert_eq!(
        watch.peer.look(ms(2500), link, slot(Y, 1)),
        [rebooted(X, Y)]
    );
    assert_eq!(watch.peer.look(ms(3000), link, slot(Y, 2)), []);
    assert_eq!(watch.peer.look(ms(3500), Some(beat(Y, 3)), slot(Y, 3)), []);
    assert_eq!(watch.peer.boot_id(), Some(Y));
    assert_eq!(
        watch.peer.look(ms(4000), Some(beat(Y, 3)), slot(Z, 1)),
        [rebooted(Y, Z)]
    );
    // A remainder of an even older boot is no reboot.
    assert_eq!(watch.peer.look(ms(4500), Some(beat(Y, 3)), slot(Z, 2)), []);
}

#[test]
fn an_old_slot_of_an_earlier_boot_does_not_hide_the_living_one() {
    let mut peer = Liveness::new(LIMITS, ms(0));
    assert_eq!(peer.look(ms(500), Some(beat(Y, 1)), slot(X, 900)), []);
    let rebooted = Change::Rebooted { from: Y, to: X };
    assert!(
        !peer
            .look(ms(1000), Some(beat(Y, 2)), slot(X, 900))
            .contains(&rebooted)
    );
    assert_eq!(peer.boot_id(), Some(Y));
}

/// What this node saw at one look.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Duration,
    link: Option<u64>,
    mailbox: Option<u64>,
    unreadable: bool,
}

/// Says independently of the code, from the whole history, whether `Dead` may be said now.
fn death_is_proven(history: &[Look]) -> bool {
    let now = history[history.len() - 1].at;
    let since = now.saturating_sub(LIMITS.dead_after);
    // The looks of the window and the one that opens it.
    let first = history.iter().rposition(|look| look.at <= since);
    let Some(first) = first else { return false };
    let window = &history[first..];
    let watched = window
        .windows(2)
        .all(|two| two[1].at - two[0].at <= ms(1000));
    let still = |of: fn(&Look) -> Option<u64>| {
        let seen: Vec<u64> = window.iter().filter_map(of).collect();
        seen.windows(2).all(|two| two[0] == two[1])
    };
    let readable = window[1..].iter().all(|look| !look.unreadable);
    watched && readable && still(|look| look.link) && still(|look| look.mailbox)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Never dead while any counter moves, nor over a time this node did not watch.
    #[test]
    fn dead_is_said_only_of_a_watched_window_without_a_sign_of_life(
        steps in prop::collection::vec(
            (prop_oneof![8 => 100u64..1000, 1 => 1000u64..9000], 0u8..40, 0u8..40, 0u8..30),
            1..120,
        ),
    ) {
        let mut peer = Liveness::new(LIMITS, ms(0));
        let mut history =
            vec![Look { at: ms(0), link: None, mailbox: None, unreadable: false }];
        let (mut at, mut link, mut mailbox) = (ms(0), 0u64, 0u64);
        for (gap, link_moves, mailbox_moves, unreadable) in steps {
            at += ms(gap);
            link += u64::from(link_moves < 2);
            mailbox += u64::from(mailbox_moves < 2);
            let unreadable = unreadable == 0;
            let look = if unreadable { MailboxLook::Unreadable } else { slot(X, mailbox) };
            history.push(Look {
                at,
                link: Some(link),
                mailbox: (!unreadable).then_some(mailbox),
                unreadable,
            });
            let died = peer.look(at, Some(beat(X, link)), look).iter().any(|change| {
                matches!(change, Change::State { to: PeerState::Dead, .. })
            });
            if died {
                prop_assert!(death_is_proven(&history), "{history:#?}");
            }
        }
    }

    /// A peer whose heartbeats come, on either path, at an uneven pace within the limit lives.
    #[test]
    fn a_peer_that_is_heard_within_the_limit_on_either_path_is_never_dead(
        steps in prop::collection::vec((1u64..900, any::<bool>()), 1..400),
    ) {
        let mut peer = Liveness::new(LIMITS, ms(0));
        let (mut at, mut since, mut link, mut mailbox) = (ms(0), 0, 0u64, 0u64);
        for (gap, on_link) in steps {
            at += ms(gap);
            since += gap;
            if since + 900 >= 3000 {
                since = 0;
                *if on_link { &mut link } else { &mut mailbox } += 1;
            }
            peer.look(at, Some(beat(X, link)), slot(X, mailbox));
            prop_assert_ne!(peer.state(), PeerState::Dead);
        }
    }
}

/// Looks every 500 ms at a peer that is silent on both paths and had announced a restart.
fn silent_looks(watch: &mut Watch, times: u64, tidings: &Tidings) -> PeerState {
    let (link, mailbox) = (Some(beat(X, watch.counter)), slot(X, watch.counter));
    for _ in 0..times {
        watch.now += ms(500);
        let changes = watch.peer.look_and_hear(watch.now, link, mailbox, tidings);
        watch.changes.extend(changes);
    }
    watch.peer.state()
}

fn restarting(on_link: u64, on_mailbox: u64) -> Tidings {
    let told = |within_ms| Told {
        restart_within: ms(within_ms),
        volume_io_age: None,
    };
    Tidings {
        link: told(on_link),
        mailbox: told(on_mailbox),
        own_volume_io: true,
    }
}

#[test]
fn an_announced_restart_is_not_death_until_its_time_and_the_limit_are_over() {
    for (on_link, on_mailbox) in [(10_000, 10_000), (10_000, 0), (0, 10_000)] {
        let mut watch = alive();
        let tidings = restarting(on_link, on_mailbox);
        // Heard last at the look before these: 10 s that it asked for, and 3 s of usual silence.
        assert_eq!(silent_looks(&mut watch, 25, &tidings), PeerState::Alive);
        assert_eq!(watch.changes, []);
        assert_eq!(silent_looks(&mut watch, 1, &tidings), PeerState::Dead);
    }
}

#[test]
fn without_an_announcement_silence_counts_as_usual() {
    let mut watch = alive();
    let tidings = restarting(0, 0);
    assert_eq!(silent_looks(&mut watch, 5, &tidings), PeerState::Alive);
    assert_eq!(silent_looks(&mut watch, 1, &tidings), PeerState::Dead);
}

#[test]
fn the_next_agent_takes_the_announcement_back_and_has_a_window_to_come_back_on_the_link() {
    let mut watch = alive();
    let announced = restarting(10_000, 10_000);
    silent_looks(&mut watch, 12, &announced);
    // It is heard in the mailbox, and its link is still to be made; the old line says "restarting".
    let link = Some(beat(X, watch.counter));
    let mut states = Vec::new();
    for look in 1..=8 {
        watch.now += ms(500);
        let slot = slot(X, watch.counter + look);
        watch
            .peer
            .look_and_hear(watch.now, link, slot, &restarting(10_000, 0));
        states.push(watch.peer.state());
    }
    let alive = states.iter().filter(|s| **s == PeerState::Alive).count();
    assert_eq!(alive, 6, "3 s for the link: {states:?}");
    assert_eq!(states[7], PeerState::LinkSilent);
    // And if it dies then, the usual limit counts: what the old line says is older than its last word.
    let slot = slot(X, watch.counter + 8);
    for look in 1..=6 {
        watch.now += ms(500);
        watch
            .peer
            .look_and_hear(watch.now, link, slot, &restarting(10_000, 0));
        let dead = watch.peer.state() == PeerState::Dead;
        assert_eq!(dead, look == 6, "{look}");
    }
}

/// A peer that owns, lives on both paths, and tells this age of its volumes' last answer.
fn owner_with_io(age: Option<Duration>, limit: Option<Duration>, own_io: bool) -> PeerState {
    let mut peer = Liveness::new(LIMITS, ms(0)).with_volume_io_limit(limit);
    let told = Told {
        restart_within: ms(0),
        volume_io_age: age,
    };
    let tidings = Tidings {
        link: told,
        mailbox: told,
        own_volume_io: own_io,
    };
    for look in 1..=8 {
        let slot = MailboxLook::Beat {
            beat: beat(X, look),
            word: LastWord::Owns,
        };
        peer.look_and_hear(ms(500 * look), Some(beat(X, look)), slot, &tidings);
    }
    peer.state()
}

#[test]
fn a_node_whose_volumes_do_not_answer_is_dead_where_a_limit_says_so_and_this_node_reaches_them() {
    let limit = Some(ms(30_000));
    assert_eq!(
        owner_with_io(Some(ms(30_000)), limit, true),
        PeerState::Dead
    );
    assert_eq!(
        owner_with_io(Some(ms(29_999)), limit, true),
        PeerState::Alive
    );
    assert_eq!(owner_with_io(None, limit, true), PeerState::Alive);
    assert_eq!(
        owner_with_io(Some(ms(90_000)), None, true),
        PeerState::Alive
    );
    // The disk itself is gone: nobody could do better.
    assert_eq!(
        owner_with_io(Some(ms(90_000)), limit, false),
        PeerState::Alive
    );
}
