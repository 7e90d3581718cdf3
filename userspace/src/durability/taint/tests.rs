//! Nothing counts before it was written again and synced behind that.

use super::*;

const A: Identity = Identity {
    ino: 11,
    generation: 1,
};
const B: Identity = Identity {
    ino: 12,
    generation: 1,
};

fn clean() -> Taint {
    Taint::new(7, RingPos(640))
}

/// A checkpoint without anything beside.
fn checkpoint(taint: &mut Taint) -> bool {
    taint.permit().is_some_and(|permit| taint.proven(permit))
}

#[test]
fn without_errors_every_checkpoint_counts() {
    let mut taint = clean();
    assert!(checkpoint(&mut taint) && !taint.is_tainted() && taint.may_close());
    assert_eq!((taint.rewrite(), taint.told()), (Rewrite::Nothing, None));
    taint.looked(7, [], RingPos(6400));
    assert!(checkpoint(&mut taint));
}

#[test]
fn later_syncs_prove_nothing_however_often_they_succeed() {
    let mut taint = clean();
    taint.looked(8, [A], RingPos(1280));
    for _ in 0..100 {
        assert!(!checkpoint(&mut taint));
        assert!(!taint.may_close());
        taint.looked(8, [], RingPos(1280));
    }
    assert_eq!(taint.rewrite(), Rewrite::Inodes(vec![A]));
    assert!(taint.told().is_some_and(|told| told.contains("11.1")));
}

#[test]
fn written_again_it_takes_one_more_checkpoint() {
    let mut taint = clean();
    taint.looked(9, [A, B], RingPos(1280));
    let asked = taint.rewrite();
    assert_eq!(asked, Rewrite::Inodes(vec![A, B]));
    taint.rewritten(&Rewrite::Inodes(vec![A]), 9);
    assert_eq!(taint.rewrite(), Rewrite::Inodes(vec![B]));
    assert_eq!(taint.permit(), None, "one of the two is missing");
    taint.rewritten(&asked, 9);
    assert!(taint.is_tainted(), "written is not proven");
    assert!(checkpoint(&mut taint));
    assert!(!taint.is_tainted());
}

#[test]
fn a_checkpoint_under_way_does_not_count_when_an_error_comes() {
    let mut taint = clean();
    let permit = taint.permit();
    taint.looked(8, [A], RingPos(1280));
    assert!(permit.is_some_and(|permit| !permit.holds(8)));
    assert!(permit.is_some_and(|permit| !taint.proven(permit)));
    // Nor does it when the bytes were written again beside it: it may have synced before.
    taint.rewritten(&taint.rewrite(), 8);
    assert!(permit.is_some_and(|permit| !taint.proven(permit)));
    assert!(taint.is_tainted());
    assert!(checkpoint(&mut taint));
}

#[test]
fn a_sync_that_failed_taints_everything() {
    let mut taint = clean();
    taint.noticed(Whose::Anybody);
    assert!(!checkpoint(&mut taint));
    assert_eq!(taint.rewrite(), Rewrite::Everything);
    taint.rewritten(&Rewrite::Inodes(vec![A]), 7);
    assert_eq!(taint.rewrite(), Rewrite::Everything);
    taint.rewritten(&Rewrite::Everything, 7);
    assert!(checkpoint(&mut taint));
}

#[test]
fn an_error_that_nobody_bears_is_anybodys() {
    let mut taint = clean();
    taint.looked(10, [A], RingPos(1280));
    assert_eq!(taint.rewrite(), Rewrite::Everything);
    assert!(
        taint
            .told()
            .is_some_and(|told| told.contains("on the volume"))
    );
}

#[test]
fn an_error_while_it_is_written_again_begins_it_anew() {
    let mut taint = clean();
    taint.looked(8, [A], RingPos(1280));
    let asked = taint.rewrite();
    taint.looked(9, [A], RingPos(1280));
    taint.rewritten(&asked, 8);
    assert_eq!(taint.rewrite(), asked, "the writing began before the error");
    taint.rewritten(&asked, 9);
    taint.looked(10, [A], RingPos(1280));
    assert_eq!((taint.rewrite(), taint.permit()), (asked, None));
}

#[test]
fn marks_behind_the_last_clean_look_prove_nothing() {
    let mut taint = clean();
    taint.looked(7, [], RingPos(1280));
    taint.looked(8, [A], RingPos(1920));
    assert!(taint.believes_mark(A, RingPos(1216)), "before that look");
    assert!(!taint.believes_mark(A, RingPos(1280)));
    assert!(taint.believes_mark(B, RingPos(1280)));
    taint.rewritten(&taint.rewrite(), 8);
    assert!(
        !taint.believes_mark(A, RingPos(9999)),
        "not before the proof"
    );
    assert!(checkpoint(&mut taint));
    assert!(taint.believes_mark(A, RingPos(9999)));
    taint.noticed(Whose::Anybody);
    assert!(!taint.believes_mark(B, RingPos(9999)));
}
