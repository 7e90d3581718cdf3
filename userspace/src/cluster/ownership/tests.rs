use std::fmt::Write;

use super::*;
use crate::ids::{Epoch, Seq};

const BOOT: BootId = BootId([1; 16]);
const EARLIER: BootId = BootId([9; 16]);

fn node(name: &str) -> NodeId {
    NodeId(name.into())
}

/// A claim; this node is `a`, its own version is 5.
fn claim(owner: &str, table_version: u64, phase: Phase, epoch_state: EpochState) -> VolumeClaim {
    VolumeClaim {
        table_version,
        owner: node(owner),
        phase,
        epoch: Epoch(3),
        epoch_state,
        last_mirrored: Seq(0),
    }
}

const STATES: [(&str, EpochState); 3] = [
    ("none", EpochState::None),
    ("open", EpochState::Open),
    ("closed", EpochState::Closed),
];

/// Every own word that a node can have, by name.
fn own_words() -> Vec<(String, OwnWord)> {
    let said = |claim, boot_id| OwnWord {
        word: Word::Says(claim),
        boot_id: Some(boot_id),
    };
    let mut words = vec![
        (
            "nothing".to_owned(),
            OwnWord {
                word: Word::Nothing,
                boot_id: None,
            },
        ),
        (
            "unreadable".to_owned(),
            OwnWord {
                word: Word::Unreadable,
                boot_id: None,
            },
        ),
    ];
    for (boot, boot_id) in [("same boot", BOOT), ("rebooted", EARLIER)] {
        for (name, state) in STATES {
            let phase = Phase::Settled;
            words.push((
                format!("mine {name}, {boot}"),
                said(claim("a", 5, phase, state), boot_id),
            ));
        }
        let phases = [
            ("claiming", Phase::Claiming, EpochState::None),
            ("merging", Phase::Merging, EpochState::None),
            ("unmerged", Phase::Unmerged, EpochState::Open),
        ];
        for (name, phase, state) in phases {
            let claim = claim("a", 5, phase, state);
            words.push((format!("mine {name}, {boot}"), said(claim, boot_id)));
        }
        let peers = claim("b", 5, Phase::Settled, EpochState::Open);
        words.push((format!("peer's, {boot}"), said(peers, boot_id)));
    }
    words
}

/// Every claim that the peer can make, by name.
fn peer_claims() -> Vec<(String, VolumeClaim)> {
    let mut claims = Vec::new();
    for (relation, version) in [("older", 4), ("equal", 5), ("newer", 6)] {
        for (owner, whose) in [("a", "mine"), ("b", "its")] {
            for (name, state) in STATES {
                let claim = claim(owner, version, Phase::Settled, state);
                claims.push((format!("{relation} {whose} {name}"), claim));
            }
        }
    }
    claims
}

/// Every way in which the peer's word can reach this node.
fn peer_words() -> Vec<(String, Word, Option<LiveAnswer>)> {
    let live = |claim, serving| Some(LiveAnswer { claim, serving });
    let mut words = vec![
        ("slot blank".to_owned(), Word::Nothing, None),
        ("slot unreadable".to_owned(), Word::Unreadable, None),
        ("live, blank".to_owned(), Word::Nothing, live(None, false)),
        (
            "live, slot unreadable".to_owned(),
            Word::Unreadable,
            live(None, false),
        ),
    ];
    for (name, claim) in peer_claims() {
        words.push((format!("slot {name}"), Word::Says(claim.clone()), None));
        for (serving, doing) in [(false, "idle"), (true, "serving")] {
            let answer = live(Some(claim.clone()), serving);
            words.push((format!("live {name} {doing}"), Word::Nothing, answer));
        }
    }
    words
}

struct Case<'a> {
    owner: &'a str,
    own_name: &'a str,
    own: &'a OwnWord,
    peer_name: &'a str,
    slot: &'a Word,
    live: Option<&'a LiveAnswer>,
    decision: Decision,
}

/// Runs through all combinations.
fn for_all(mut visit: impl FnMut(&Case<'_>)) {
    for owner in ["a", "b"] {
        for (own_name, own) in &own_words() {
            for (peer_name, slot, live) in &peer_words() {
                let decision = decide(&Facts {
                    this_node: &node("a"),
                    boot_id: BOOT,
                    configured_owner: &node(owner),
                    own,
                    peer_slot: slot,
                    peer_live: live.as_ref(),
                    captured: false,
                });
                let live = live.as_ref();
                visit(&Case {
                    owner,
                    own_name,
                    own,
                    peer_name,
                    slot,
                    live,
                    decision,
                });
            }
        }
    }
}

/// Peers' words that decide the same for every state of the epoch become one.
fn without_equal_states(mut peers: Vec<String>) -> Vec<String> {
    for index in 0..peers.len() {
        let Some(none) = peers
            .get(index)
            .filter(|peer| peer.contains(" none"))
            .cloned()
        else {
            continue;
        };
        let others = [
            none.replace(" none", " open"),
            none.replace(" none", " closed"),
        ];
        if others.iter().all(|other| peers.contains(other)) {
            peers.retain(|peer| !others.contains(peer));
            peers
                .iter_mut()
                .filter(|peer| **peer == none)
                .for_each(|peer| {
                    *peer = none.replace(" none", " any");
                });
        }
    }
    peers
}

/// Decisions, each with the peer's words that lead to it.
type Rows = Vec<(String, Vec<String>)>;

#[test]
fn the_whole_table_is_as_it_was_decided() {
    let mut groups: Vec<(String, Rows)> = Vec::new();
    for_all(|case| {
        let head = match case.own.word {
            // Once a node has a word of its own, the configured owner plays no part.
            Word::Says(_) if case.owner == "b" => return,
            Word::Says(_) => format!("own word: {}", case.own_name),
            _ => format!(
                "own word: {}, configured owner: {}",
                case.own_name, case.owner
            ),
        };
        if groups.last().is_none_or(|(last, _)| *last != head) {
            groups.push((head, Vec::new()));
        }
        let rows = &mut groups.last_mut().unwrap().1;
        let (decision, peer) = (format!("{:?}", case.decision), case.peer_name.to_owned());
        match rows.iter_mut().find(|(known, _)| *known == decision) {
            Some((_, peers)) => peers.push(peer),
            None => rows.push((decision, vec![peer])),
        }
    });
    let mut told = String::new();
    for (head, rows) in groups {
        writeln!(told, "{head}").unwrap();
        for (decision, peers) in rows {
            let peers = without_equal_states(peers).join(", ");
            writeln!(told, "  {decision}: {peers}").unwrap();
        }
    }
    insta::assert_snapshot!("ownership", told);
}

#[test]
fn the_configured_owner_plays_no_part_once_a_node_has_a_word_of_its_own() {
    let mut decided = std::collections::HashMap::new();
    for_all(|case| {
        if matches!(case.own.word, Word::Says(_)) {
            let key = (case.own_name.to_owned(), case.peer_name.to_owned());
            let before = decided.insert(key, case.decision);
            assert!(before.is_none_or(|before| before == case.decision));
        }
    });
}

fn serves(decision: Decision) -> bool {
    matches!(decision, Decision::Serve(_) | Decision::FinishTakeover)
}

fn says(word: &Word) -> Option<&VolumeClaim> {
    match word {
        Word::Says(claim) => Some(claim),
        Word::Nothing | Word::Unreadable => None,
    }
}

#[test]
fn nobody_serves_what_the_peer_claims_later_or_serves() {
    let mut disputed = 0;
    for_all(|case| {
        let peer = says(case.slot).or(case.live.and_then(|live| live.claim.as_ref()));
        let own_version = says(&case.own.word).map_or(0, |claim| claim.table_version);
        let serving = case.live.is_some_and(|live| live.serving);
        let later =
            peer.is_some_and(|peer| peer.owner == node("b") && peer.table_version >= own_version);
        if later || serving {
            disputed += 1;
            assert!(
                !serves(case.decision),
                "{} / {}",
                case.own_name,
                case.peer_name
            );
        }
    });
    assert!(disputed > 100);
}

#[test]
fn an_open_epoch_of_an_earlier_boot_is_never_served_unmerged() {
    for_all(|case| {
        let own = says(&case.own.word);
        let open =
            own.is_some_and(|own| own.owner == node("a") && own.epoch_state == EpochState::Open);
        if open && case.own.boot_id == Some(EARLIER) {
            assert!(
                !serves(case.decision),
                "{} / {}",
                case.own_name,
                case.peer_name
            );
        }
    });
}

#[test]
fn nobody_serves_without_having_read_the_peers_word() {
    for_all(|case| {
        if *case.slot == Word::Unreadable && case.live.is_none() {
            assert!(
                !serves(case.decision),
                "{} / {}",
                case.own_name,
                case.peer_name
            );
        }
    });
}

/// Both nodes decide from the same two slots, while neither reaches the other.
#[test]
fn two_nodes_that_see_the_same_mailbox_never_both_serve() {
    let mirrored = |claim: &VolumeClaim| VolumeClaim {
        owner: node(if claim.owner == node("a") { "b" } else { "a" }),
        ..claim.clone()
    };
    let mut words: Vec<Word> = vec![Word::Nothing];
    for version in 1..4 {
        for phase in [
            Phase::Settled,
            Phase::Claiming,
            Phase::Merging,
            Phase::Unmerged,
        ] {
            for (_, state) in STATES {
                words.push(Word::Says(claim("a", version, phase, state)));
                words.push(Word::Says(mirrored(&claim("a", version, phase, state))));
            }
        }
    }
    let mut one = 0;
    for of_a in &words {
        for of_b in &words {
            let decide_as = |name: &str, own: &Word, peer: &Word| {
                let boot_id = says(own).map(|_| BOOT);
                decide(&Facts {
                    this_node: &node(name),
                    boot_id: BOOT,
                    configured_owner: &node("a"),
                    own: &OwnWord {
                        word: own.clone(),
                        boot_id,
                    },
                    peer_slot: peer,
                    peer_live: None,
                    captured: false,
                })
            };
            let (a, b) = (decide_as("a", of_a, of_b), decide_as("b", of_b, of_a));
            assert!(
                !(serves(a) && serves(b)),
                "{of_a:?} / {of_b:?}: {a:?} {b:?}"
            );
            one += u32::from(serves(a) != serves(b));
        }
    }
    assert!(one > 0);
}

#[test]
fn the_later_of_table_and_slot_counts() {
    let said = |claim: VolumeClaim| OwnWord {
        word: Word::Says(claim),
        boot_id: Some(BOOT),
    };
    let nothing = OwnWord {
        word: Word::Nothing,
        boot_id: None,
    };
    let unreadable = OwnWord {
        word: Word::Unreadable,
        boot_id: None,
    };
    let open = said(claim("a", 5, Phase::Settled, EpochState::Open));
    let closed = said(claim("a", 5, Phase::Settled, EpochState::Closed));
    let merging = said(claim("a", 5, Phase::Merging, EpochState::None));
    let newer = said(claim("b", 6, Phase::Settled, EpochState::None));
    for (table, slot, later) in [
        (&open, &closed, &closed),
        (&closed, &open, &closed),
        (&open, &merging, &open),
        (&newer, &open, &newer),
        (&open, &newer, &newer),
        (&open, &unreadable, &open),
        (&open, &nothing, &open),
        (&nothing, &open, &open),
        (&unreadable, &open, &open),
        (&unreadable, &nothing, &unreadable),
        (&nothing, &unreadable, &unreadable),
        (&nothing, &nothing, &nothing),
    ] {
        assert_eq!(
            OwnWord::of(table.clone(), slot.clone()),
            *later,
            "{table:?} {slot:?}"
        );
    }
}

#[test]
fn a_serving_owner_learns_of_a_later_claim() {
    let own = claim("a", 5, Phase::Settled, EpochState::Open);
    let by =
        |owner: &str, version| Word::Says(claim(owner, version, Phase::Claiming, EpochState::None));
    assert!(is_claimed_by_peer(&own, &node("a"), &by("b", 6)));
    assert!(!is_claimed_by_peer(&own, &node("a"), &by("b", 5)));
    assert!(!is_claimed_by_peer(&own, &node("a"), &by("a", 6)));
    assert!(!is_claimed_by_peer(&own, &node("a"), &Word::Unreadable));
}

#[test]
fn every_doubt_names_a_remedy() {
    for doubt in [Doubt::PeerUnreadable, Doubt::OwnWordLost, Doubt::InDoubt] {
        assert!(doubt.told().contains("takeover --confirm-dead"));
    }
    for doubt in [Doubt::BothClaim, Doubt::NeitherClaims] {
        assert!(doubt.told().contains("table.json"));
    }
}

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
