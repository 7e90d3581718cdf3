use super::*;
use crate::image::Mutation;

const WHO: Identity = Identity {
    ino: 10,
    generation: 1,
};
const RECORD_BYTES: u64 = 64;

fn name(letter: u8) -> Register {
    Register::Name(ROOT, vec![letter])
}

fn created() -> Mutation {
    Mutation::Create {
        inode: WHO,
        directory: false,
        mode: 0o644,
        place: Some((ROOT, vec![b'b'])),
    }
}

/// A file is made as `b`, renamed to `c`, and `c` is removed; `is_lost`: no record tells of the rename.
fn renamed_and_removed(is_lost: bool) -> History {
    let mut history = History::new(Image::fresh());
    let changes: [&[(Register, u64)]; 3] = [
        &[(Register::Exists(WHO), 1), (name(b'b'), as_value(WHO))],
        &[(name(b'b'), 0), (name(b'c'), as_value(WHO))],
        &[(name(b'c'), 0), (Register::Exists(WHO), 0)],
    ];
    for (index, registers) in changes.into_iter().enumerate() {
        let operation = history.begin(index as u64 + 1);
        for (register, value) in registers {
            history.set(operation, register.clone(), *value);
        }
        let lacks = is_lost && index == 1;
        history.operations[operation].noticed = lacks;
        history.operations[operation].captured = (!lacks).then_some(index as u64 * RECORD_BYTES);
    }
    history
}

#[test]
fn a_file_keeps_the_name_that_only_a_lost_rename_took_away() {
    let fresh = Image::fresh();
    let mut kept = fresh.clone();
    kept.apply(&created(), 1);
    let cut = Some(3 * RECORD_BYTES);
    assert_eq!(renamed_and_removed(true).check(cut, &fresh, &kept), Ok(()));
    // Every record is there: the file must be gone.
    let whole = renamed_and_removed(false).check(cut, &fresh, &kept);
    assert!(whole.is_err());
    // So it must where its removal was confirmed.
    let mut confirmed = renamed_and_removed(true);
    confirmed.settle(3);
    assert!(confirmed.check(cut, &fresh, &kept).is_err());
}
