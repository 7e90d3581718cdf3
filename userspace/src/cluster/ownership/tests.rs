mod first_word;

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

/// Both have claimed with one version, found each other, and decide from what stands in the slots.
#[test]
fn of_two_nodes_that_claim_at_once_one_goes_on() {
    let (a, b) = (node("a"), node("b"));
    let decision = |this: &NodeId, own: Phase, theirs: Phase| {
        let peer = if *this == a { "b" } else { "a" };
        let word = Word::Says(claim(&this.0, 6, own, EpochState::Open));
        let facts = Facts {
            this_node: this,
            boot_id: BOOT,
            configured_owner: &a,
            own: &OwnWord {
                word,
                boot_id: Some(BOOT),
            },
            peer_slot: &Word::Says(claim(peer, 6, theirs, EpochState::Open)),
            peer_live: None,
            captured: false,
        };
        let decision = decide(&facts);
        (
            decision,
            first_word(&facts, decision).expect("a word").owner,
        )
    };
    let (claiming, merging) = (Phase::Claiming, Phase::Merging);
    let goes_on = |owner: &NodeId| (Decision::FinishTakeover, owner.clone());
    let gives_way = |owner: &NodeId| (Decision::Mirror, owner.clone());
    assert_eq!(decision(&a, claiming, claiming), goes_on(&a));
    assert_eq!(decision(&b, claiming, claiming), gives_way(&a));
    // Who has mounted it stays, and the other gives way, whatever their names are.
    let settled = Phase::Settled;
    assert_eq!(decision(&a, claiming, settled), gives_way(&b));
    assert_eq!(decision(&b, claiming, settled), gives_way(&a));
    // Who may not have been checked yet goes on alone no more than the other.
    for (own, theirs) in [(claiming, merging), (merging, claiming)] {
        let suspended = Decision::Suspended(Doubt::BothClaim);
        assert_eq!(decision(&a, own, theirs).0, suspended);
        assert_eq!(decision(&b, own, theirs).0, suspended);
    }
}
