use super::*;

mod crashes;

const CLUSTER: &str = "pair";
const VOLUME: &str = "data";

fn sentinel(epoch: u64, seq: u64, closed: bool) -> Sentinel {
    Sentinel {
        cluster: CLUSTER.into(),
        volume: VOLUME.into(),
        epoch: Epoch(epoch),
        seq: Seq(seq),
        closed,
        time_ns: 1_700_000_000_123_000_000,
    }
}

fn owner(epoch: u64, state: EpochState) -> OwnerWord {
    OwnerWord {
        node: NodeId("a".into()),
        epoch: Epoch(epoch),
        state,
        phase: Phase::Settled,
        last_mirrored: Seq(9),
        time_ns: Some(1_700_000_000_000_000_000),
        exact: true,
    }
}

fn region(epoch: u64, closed: bool, last: u64) -> RegionWord {
    let claim = RegionClaim {
        cluster: CLUSTER.into(),
        volume: VOLUME.into(),
        filesystem_uuid: [0; 16],
        epoch: Epoch(epoch),
        closed,
        last: Seq(last),
        marked: Seq(0),
    };
    RegionWord::Says {
        claim,
        time_ns: None,
    }
}

fn words(owner: OwnerWord, on_volume: Sentinel, region: RegionWord) -> Words {
    Words {
        owner: Some(owner),
        sentinel: SentinelWord::Says(on_volume),
        region,
        merging: None,
        mounted_uuid: None,
        unmounted: false,
    }
}

#[test]
fn a_volume_that_somebody_unmounted_while_its_epoch_ran_is_not_merged_into() {
    let mut found = words(
        owner(5, EpochState::Open),
        sentinel(5, 3, false),
        region(5, false, 9),
    );
    found.unmounted = true;
    asks(&found, "unmounted since");
    assert!(found.to_string().contains("file system: unmounted"));
    // What is closed, or durable, stays so.
    let mut closed = words(
        owner(5, EpochState::Closed),
        sentinel(5, 3, true),
        region(5, true, 9),
    );
    closed.unmounted = true;
    assert!(matches!(closed.ruling(), Ruling::Void(_)));
    // This node had begun the merge itself, and unmounted the volume when it was stopped.
    found.merging = Some(Epoch(5));
    assert!(matches!(found.ruling(), Ruling::Merge { .. }));
}

#[track_caller]
fn asks(words: &Words, what: &str) {
    let Ruling::Ask(why) = words.ruling() else {
        panic!("a person is to be asked, not {:?}", words.ruling());
    };
    assert!(why.contains(what), "{why}");
}

#[test]
fn words_that_agree_are_merged() {
    let agreed = words(
        owner(5, EpochState::Open),
        sentinel(5, 3, false),
        region(5, false, 9),
    );
    assert_eq!(agreed.ruling(), Ruling::Merge { after: Seq(3) });
    let durable = Words {
        region: region(5, false, 3),
        ..agreed.clone()
    };
    assert!(matches!(durable.ruling(), Ruling::Nothing(_)));
    // A slot that was torn by the crash takes nothing away.
    let torn = Words {
        owner: None,
        ..agreed
    };
    assert_eq!(torn.ruling(), Ruling::Merge { after: Seq(3) });
}

#[test]
fn an_owner_whose_epoch_is_not_on_the_volume_contradicts_it() {
    let said = owner(5, EpochState::Open);
    asks(
        &words(said.clone(), sentinel(4, 3, false), region(5, false, 9)),
        "set back",
    );
    asks(
        &words(said.clone(), sentinel(4, 0, true), region(5, false, 9)),
        "set back",
    );
    let none = Words {
        sentinel: SentinelWord::Missing,
        ..words(said.clone(), sentinel(0, 0, true), RegionWord::Missing)
    };
    asks(&none, "no sentinel");
    let remembered = OwnerWord {
        exact: false,
        ..said
    };
    asks(
        &words(remembered, sentinel(4, 3, false), region(4, false, 9)),
        "set back",
    );
    asks(
        &words(
            owner(5, EpochState::Closed),
            sentinel(4, 3, false),
            region(4, false, 9),
        ),
        "never closed on it",
    );
}

#[test]
fn an_older_word_of_the_owner_contradicts_a_later_epoch_only_if_it_is_its_own() {
    let said = owner(4, EpochState::Open);
    let later = words(said.clone(), sentinel(5, 3, false), region(5, false, 9));
    asks(&later, "mailbox");
    let remembered = Words {
        owner: Some(OwnerWord {
            exact: false,
            ..said
        }),
        ..later.clone()
    };
    assert_eq!(remembered.ruling(), Ruling::Merge { after: Seq(3) });
    // What a node in a takeover had heard of the owner before it is not its own word either.
    let merging = Words {
        owner: Some(OwnerWord {
            phase: Phase::Merging,
            ..owner(4, EpochState::Open)
        }),
        region: RegionWord::Missing,
        ..later.clone()
    };
    asks(&merging, "half merged");
    let ended = Words {
        owner: Some(owner(4, EpochState::Closed)),
        ..later
    };
    assert_eq!(ended.ruling(), Ruling::Merge { after: Seq(3) });
}

#[test]
fn a_region_that_the_volume_does_not_explain_is_shown_to_a_person() {
    let (said, open) = (owner(5, EpochState::Open), sentinel(5, 3, false));
    asks(
        &words(said.clone(), open.clone(), region(5, true, 9)),
        "closed",
    );
    asks(
        &words(said.clone(), open.clone(), region(6, false, 9)),
        "epoch 6",
    );
    let damaged = RegionWord::Damaged("frame 3".into());
    asks(
        &words(said.clone(), open.clone(), damaged.clone()),
        "frame 3",
    );
    let mut behind = region(5, false, 9);
    if let RegionWord::Says { claim, .. } = &mut behind {
        claim.marked = Seq(7);
    }
    asks(&words(said.clone(), open, behind), "set back");
    // Where the sentinel voids it, its damage matters to nobody.
    let void = words(owner(5, EpochState::Closed), sentinel(5, 3, true), damaged);
    assert!(matches!(void.ruling(), Ruling::Void(_)));
}

#[test]
fn a_region_that_another_node_saved_is_not_given_up() {
    let said = OwnerWord {
        phase: Phase::Merging,
        ..owner(5, EpochState::Open)
    };
    for here in [RegionWord::Missing, region(3, false, 8)] {
        asks(
            &words(said.clone(), sentinel(5, 3, false), here),
            "bring the copy",
        );
    }
    let lost = words(
        owner(5, EpochState::Open),
        sentinel(5, 3, false),
        RegionWord::Missing,
    );
    assert!(matches!(lost.ruling(), Ruling::Void(_)));
}

#[test]
fn a_merge_that_another_node_began_and_did_not_end_is_not_taken_for_a_loss() {
    // Whatever the mailbox still says: the slot of the node that died may be torn.
    for said in [None, Some(owner(5, EpochState::Open))] {
        for here in [RegionWord::Missing, region(3, false, 8)] {
            let half = Words {
                owner: said.clone(),
                merging: Some(Epoch(5)),
                ..words(owner(5, EpochState::Open), sentinel(5, 3, false), here)
            };
            asks(&half, "half merged");
        }
    }
    let again = Words {
        merging: Some(Epoch(5)),
        ..words(
            owner(5, EpochState::Open),
            sentinel(5, 3, false),
            region(5, false, 9),
        )
    };
    assert_eq!(again.ruling(), Ruling::Merge { after: Seq(3) });
    // The note of a merge that was finished means nothing.
    let old = Words {
        merging: Some(Epoch(5)),
        ..words(
            owner(7, EpochState::Open),
            sentinel(7, 3, false),
            RegionWord::Missing,
        )
    };
    assert!(matches!(old.ruling(), Ruling::Void(_)));
}

#[test]
fn a_finished_takeover_is_known_again_and_a_closed_epoch_is_not_taken_for_one() {
    let merging = OwnerWord {
        phase: Phase::Merging,
        ..owner(5, EpochState::Open)
    };
    let finished = words(merging, sentinel(6, 0, true), region(5, false, 9));
    assert!(matches!(finished.ruling(), Ruling::Nothing(_)));
    let closed = words(
        owner(4, EpochState::Closed),
        sentinel(5, 7, true),
        RegionWord::Missing,
    );
    assert!(matches!(closed.ruling(), Ruling::Void(_)));
}

#[test]
fn the_wrong_volume_is_refused_whoever_asks() {
    let mut foreign = sentinel(5, 3, false);
    foreign.volume = "other".into();
    let given = words(owner(5, EpochState::Open), foreign, region(5, false, 9));
    assert!(matches!(
        given.ruling(),
        Ruling::Refuse(Refusal::Foreign { .. })
    ));
}

#[test]
fn the_evidence_names_all_three_words_with_epoch_state_seq_and_time() {
    let told = words(
        owner(5, EpochState::Open),
        sentinel(4, 3, false),
        region(5, false, 9),
    )
    .to_string();
    assert_eq!(
        told,
        "mailbox: a said epoch 5, Open, record 9 mirrored, at 2023-11-14T22:13:20.000Z; \
         sentinel: epoch 4, open, record 3 durable, at 2023-11-14T22:13:20.123Z; \
         region: epoch 5, open, ends with record 9, at an unknown time"
    );
}
