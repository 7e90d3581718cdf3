//! Names that an older file took after the cut.

use super::cases::{Case, ROOT, replay};
use super::model::Model;
use super::world::{NewKind, Op, World};
use crate::ids::Identity;

/// `c` is durable before the log begins, the log makes `a`, and then this happens after the cut.
fn with_what_came_later(later: &[Op]) -> (World<'static>, Identity, Identity) {
    let mut world = World::new(1, ROOT, None);
    let old = world.create(ROOT, "c", NewKind::File);
    world.run(Op::Checkpoint);
    let new = world.create(ROOT, "a", NewKind::File);
    world.write(new, 0, b"of the log");
    for op in later {
        world.run(op.clone());
    }
    (world, old, new)
}

fn at(name: &str) -> (Identity, Vec<u8>) {
    (ROOT, name.into())
}

/// Replays the log up to its fourth event over a disk that has the first `disk` events, twice.
fn merged(world: World<'static>, disk: usize) -> Model {
    let case = Case::with_cut(world, 4);
    let mut model = case.state(disk);
    let before = model.clone();
    replay(&case.plan(), &mut model).expect("replay");
    let touched = case.touched(disk.max(4), &|index| index < disk);
    case.check(&before, &model, &touched)
        .expect("nothing is lost");
    replay(&case.plan(), &mut model).expect("replay once more");
    model
}

#[test]
fn an_older_file_that_was_renamed_over_the_logs_keeps_its_new_name() {
    let rename = Op::Rename {
        from: at("c"),
        to: at("a"),
    };
    let (world, old, _) = with_what_came_later(&[rename]);
    let model = merged(world, 5);
    let names = model.entries(ROOT);
    assert_eq!(names.get(b"a".as_slice()), Some(&old));
    assert_eq!(names.get(b"c".as_slice()), None);
    // The log's file is kept aside with its bytes, and once only.
    let own = names[b".twinwrite".as_slice()];
    let aside = model.entries(model.entries(own)[b"recovered".as_slice()]);
    assert_eq!(aside.len(), 1, "{aside:?}");
}

#[test]
fn two_files_that_were_exchanged_stay_exchanged() {
    let exchange = Op::Exchange {
        from: at("a"),
        to: at("c"),
    };
    let (world, old, new) = with_what_came_later(&[exchange]);
    let model = merged(world, 5);
    let names = model.entries(ROOT);
    assert_eq!(names.get(b"a".as_slice()), Some(&old));
    assert_eq!(names.get(b"c".as_slice()), Some(&new));
}

#[test]
fn a_file_that_was_made_after_the_cut_makes_room() {
    let later = [
        Op::Rename {
            from: at("a"),
            to: at("b"),
        },
        Op::Create {
            directory: ROOT,
            name: b"a".to_vec(),
            kind: NewKind::File,
            mode: 0o600,
        },
    ];
    let (world, old, new) = with_what_came_later(&later);
    let model = merged(world, 6);
    let names = model.entries(ROOT);
    assert_eq!(names.get(b"a".as_slice()), Some(&new));
    assert_eq!(names.get(b"c".as_slice()), Some(&old));
}
