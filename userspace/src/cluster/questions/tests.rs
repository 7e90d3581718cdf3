use super::*;

const BOOT: Option<BootId> = Some(BootId([1; 16]));
const T0: Duration = Duration::from_secs(1000);

fn waiting(volumes: &[&str]) -> Questions {
    let mut questions = Questions::default();
    for volume in volumes {
        questions.ask(volume, Some(Question::IsPeerDead));
    }
    questions
}

#[test]
fn a_word_that_nobody_waits_for_is_refused_and_not_kept() {
    let mut questions = Questions::default();
    assert_eq!(questions.peer_is_dead(BOOT, T0), Err(NotTaken::NobodyWaits));
    questions.ask("data", Some(Question::IsPeerDead));
    assert!(!questions.take("data", Question::IsPeerDead, BOOT, T0));
    questions.ask("data", None);
    assert_eq!(questions.peer_is_dead(BOOT, T0), Err(NotTaken::NobodyWaits));
}

#[test]
fn a_word_is_for_every_volume_that_waits_and_for_each_once() {
    let mut questions = waiting(&["data", "home"]);
    assert_eq!(questions.peer_is_dead(BOOT, T0).unwrap(), ["data", "home"]);
    questions.ask("later", Some(Question::IsPeerDead));
    for volume in ["data", "home"] {
        // Asked again meanwhile, as a keeper does at every look.
        questions.ask(volume, Some(Question::IsPeerDead));
        assert!(questions.take(volume, Question::IsPeerDead, BOOT, T0));
        assert!(!questions.take(volume, Question::IsPeerDead, BOOT, T0));
    }
    assert!(!questions.take("later", Question::IsPeerDead, BOOT, T0));
}

#[test]
fn a_word_is_too_old_after_its_limit() {
    for (later, counts) in [(0, true), (60, true), (61, false)] {
        let mut questions = waiting(&["data"]);
        questions.peer_is_dead(BOOT, T0).unwrap();
        let now = T0 + Duration::from_secs(later);
        assert_eq!(
            questions.take("data", Question::IsPeerDead, BOOT, now),
            counts
        );
    }
}

#[test]
fn a_word_is_for_one_boot_of_the_peer() {
    for (boot, counts) in [(BOOT, true), (Some(BootId([2; 16])), false), (None, false)] {
        let mut questions = waiting(&["data"]);
        questions.peer_is_dead(BOOT, T0).unwrap();
        assert_eq!(
            questions.take("data", Question::IsPeerDead, boot, T0),
            counts
        );
    }
}

#[test]
fn a_question_that_was_settled_otherwise_takes_its_word_along() {
    let mut questions = waiting(&["data"]);
    questions.peer_is_dead(BOOT, T0).unwrap();
    questions.ask("data", None);
    questions.ask("data", Some(Question::IsPeerDead));
    assert!(!questions.take("data", Question::IsPeerDead, BOOT, T0));
}

#[test]
fn the_two_words_do_not_answer_each_others_question() {
    let mut questions = waiting(&["data"]);
    assert_eq!(
        questions.region_is_void("data", BOOT, T0),
        Err(NotTaken::DoesNotWait("data".into()))
    );
    questions.peer_is_dead(BOOT, T0).unwrap();
    questions.ask("data", Some(Question::IsRegionVoid));
    assert!(!questions.take("data", Question::IsRegionVoid, BOOT, T0));
    assert_eq!(questions.peer_is_dead(BOOT, T0), Err(NotTaken::NobodyWaits));
    questions.region_is_void("data", BOOT, T0).unwrap();
    assert!(!questions.take("data", Question::IsPeerDead, BOOT, T0));
    assert!(questions.take("data", Question::IsRegionVoid, BOOT, T0));
}
