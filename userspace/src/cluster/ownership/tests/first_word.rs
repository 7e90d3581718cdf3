//! What a node says after it decided, and what it decides from that later.

use super::*;

/// An agent that writes its first word and is restarted in the same boot decides no bolder.
#[test]
fn a_restart_after_the_first_word_serves_only_what_was_served_before_it() {
    let mut waiting = 0;
    for owner in ["a", "b"] {
        for (own_name, own) in &own_words() {
            for (peer_name, slot, live) in &peer_words() {
                let (this_node, configured_owner) = (node("a"), node(owner));
                let mut facts = Facts {
                    this_node: &this_node,
                    boot_id: BOOT,
                    configured_owner: &configured_owner,
                    own,
                    peer_slot: slot,
                    peer_live: live.as_ref(),
                    captured: false,
                };
                let first = decide(&facts);
                let Some(word) = first_word(&facts, first) else {
                    continue;
                };
                let said = OwnWord {
                    word: Word::Says(word),
                    boot_id: Some(BOOT),
                };
                facts.own = &said;
                let again = decide(&facts);
                let told = format!("{own_name} / {peer_name}: {first:?} {again:?} {said:?}");
                assert!(serves(first) || !serves(again), "{told}");
                if first == Decision::WaitForMerge {
                    waiting += 1;
                    assert_eq!(again, first, "{told}");
                }
                if first == Decision::TakenOver {
                    assert_eq!(again, Decision::Mirror, "{told}");
                }
            }
        }
    }
    assert!(waiting > 0);
}

#[test]
fn the_first_word_withdraws_a_claim_that_fenced_nobody() {
    let own = claim("a", 6, Phase::Claiming, EpochState::None);
    let own = OwnWord {
        word: Word::Says(own),
        boot_id: Some(BOOT),
    };
    let live = LiveAnswer {
        claim: Some(claim("b", 5, Phase::Settled, EpochState::Open)),
        serving: true,
    };
    let (this_node, configured_owner) = (node("a"), node("b"));
    let facts = Facts {
        this_node: &this_node,
        boot_id: BOOT,
        configured_owner: &configured_owner,
        own: &own,
        peer_slot: &Word::Nothing,
        peer_live: Some(&live),
        captured: false,
    };
    assert_eq!(decide(&facts), Decision::Mirror);
    let word = first_word(&facts, Decision::Mirror).unwrap();
    assert_eq!(
        (word.owner, word.table_version, word.phase),
        (node("b"), 7, Phase::Settled)
    );
}

#[test]
fn the_owners_own_word_counts_where_the_peer_knows_an_older_one() {
    let (a, b) = (NodeId("a".into()), NodeId("b".into()));
    let first = VolumeClaim::first(a.clone());
    let open = VolumeClaim {
        epoch: Epoch(1),
        epoch_state: EpochState::Open,
        ..first.clone()
    };
    let boot_id = BootId([7; 16]);
    let said = |claim: &VolumeClaim| Word::Says(claim.clone());
    let heard = LiveAnswer {
        claim: Some(first.clone()),
        serving: false,
    };
    let own = OwnWord {
        word: said(&open),
        boot_id: Some(boot_id),
    };
    let peer_slot = said(&first);
    let facts = Facts {
        this_node: &a,
        boot_id,
        configured_owner: &a,
        own: &own,
        peer_slot: &peer_slot,
        peer_live: Some(&heard),
        captured: false,
    };
    assert_eq!(decide(&facts), Decision::Serve(ServeAs::Resumed));
    let word = first_word(&facts, Decision::Serve(ServeAs::Resumed));
    assert_eq!(
        word.as_ref(),
        Some(&open),
        "the open epoch is not forgotten"
    );
    // And the mirror believes its owner rather than itself.
    let own = OwnWord {
        word: said(&first),
        boot_id: Some(boot_id),
    };
    let peer_slot = said(&open);
    let facts = Facts {
        this_node: &b,
        own: &own,
        peer_slot: &peer_slot,
        peer_live: None,
        ..facts
    };
    assert_eq!(decide(&facts), Decision::Mirror);
    assert_eq!(first_word(&facts, Decision::Mirror), Some(open));
}

#[test]
fn a_withdrawn_takeover_does_not_take_the_owner_back_to_an_epoch_of_before() {
    // The peer withdrew while it had heard of epoch 3 only; epoch 4 has begun since.
    let own = OwnWord {
        word: Word::Says(VolumeClaim {
            epoch: Epoch(4),
            ..claim("a", 5, Phase::Settled, EpochState::Open)
        }),
        boot_id: Some(BOOT),
    };
    let withdrawn = claim("a", 6, Phase::Settled, EpochState::Closed);
    let peer_slot = Word::Says(withdrawn);
    let (this, boot_id) = (node("a"), BOOT);
    let facts = Facts {
        this_node: &this,
        boot_id,
        configured_owner: &this,
        own: &own,
        peer_slot: &peer_slot,
        peer_live: None,
        captured: false,
    };
    for decision in [Decision::Serve(ServeAs::Resumed), Decision::WaitForMerge] {
        let word = first_word(&facts, decision).expect("it owns the volume");
        let told = (word.table_version, word.epoch, word.epoch_state);
        assert_eq!(told, (6, Epoch(4), EpochState::Open), "{decision:?}");
    }
}

/// What a withdrawn takeover of `b` gives back to `a`, which had adopted the claim.
fn after_a_withdrawal(captured: bool) -> (Decision, Option<VolumeClaim>) {
    let adopted = OwnWord {
        word: Word::Says(claim("b", 6, Phase::Claiming, EpochState::Open)),
        boot_id: Some(BOOT),
    };
    let withdrawn = VolumeClaim {
        epoch: Epoch(0),
        ..claim("a", 7, Phase::Settled, EpochState::None)
    };
    let live = LiveAnswer {
        claim: Some(withdrawn),
        serving: false,
    };
    let this = node("a");
    let facts = Facts {
        this_node: &this,
        boot_id: BOOT,
        configured_owner: &this,
        own: &adopted,
        peer_slot: &Word::Nothing,
        peer_live: Some(&live),
        captured,
    };
    let decision = decide(&facts);
    (decision, first_word(&facts, decision))
}

#[test]
fn a_node_that_has_the_volume_mounted_never_asks_for_a_merge() {
    let (decision, word) = after_a_withdrawal(true);
    assert_eq!(decision, Decision::Serve(ServeAs::Resumed));
    let word = word.expect("it owns the volume");
    let told = (word.owner, word.phase, word.epoch_state);
    assert_eq!(told, (node("a"), Phase::Settled, EpochState::Open));
}

#[test]
fn an_epoch_that_the_peer_never_heard_of_is_merged_first() {
    let (decision, word) = after_a_withdrawal(false);
    assert_eq!(decision, Decision::WaitForMerge);
    assert!(word.is_some_and(|word| word.epoch_state == EpochState::Open));
}

#[test]
fn a_claim_that_may_be_withdrawn_does_not_take_the_own_epoch_away() {
    let own = OwnWord {
        word: Word::Says(claim("a", 5, Phase::Settled, EpochState::Open)),
        boot_id: Some(BootId([9; 16])),
    };
    let claiming = VolumeClaim {
        epoch: Epoch(0),
        ..claim("b", 6, Phase::Claiming, EpochState::None)
    };
    let peer_slot = Word::Says(claiming);
    let this = node("a");
    let facts = Facts {
        this_node: &this,
        boot_id: BOOT,
        configured_owner: &this,
        own: &own,
        peer_slot: &peer_slot,
        peer_live: None,
        captured: false,
    };
    assert_eq!(decide(&facts), Decision::TakenOver);
    let word = first_word(&facts, Decision::TakenOver).expect("the peer's claim");
    let told = (word.owner, word.table_version, word.epoch_state);
    assert_eq!(told, (node("b"), 6, EpochState::Open));
    assert!(word.epoch > Epoch(0));
}
