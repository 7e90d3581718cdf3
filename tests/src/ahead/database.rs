//! Databases: rows that transactions give versions, first without asking for durability, then with.

use super::history::Reach;
use super::{Options, Run};
use crate::error::Error;
use crate::random::Random;

/// Rows of the table: each is a cell.
pub(super) const ROWS: u32 = 40;
const ROWS_EACH: u64 = 3;
const OLDER: u32 = 12;

/// A database as its application sees it.
pub(super) trait Database {
    /// Gives rows a version in one transaction; `durable`: returns when it is.
    fn commit(&mut self, version: u64, rows: &[u32], durable: bool) -> Result<(), Error>;
}

/// `create` makes the database with all rows in version 0, durable.
pub(super) fn run<D: Database>(
    mut run: Run<'_>,
    random: &mut Random,
    create: impl FnOnce(&Options, &mut Random) -> Result<D, Error>,
) -> Result<(), Error> {
    let mut database = create(run.options, random)?;
    for _ in 0..OLDER {
        let rows = rows(random);
        let version = run.log.try_cells(&rows)?;
        database.commit(version, &rows, false)?;
    }
    run.wait()?;
    loop {
        let rows = rows(random);
        let version = run.log.try_cells(&rows)?;
        database.commit(version, &rows, true)?;
        // A durable commit makes all before it durable.
        run.log.confirmed(version, Reach::All)?;
        run.pause(random);
    }
}

/// All rows in one durable transaction.
pub(super) fn follow(mut run: Run<'_>, mut database: impl Database) -> Result<(), Error> {
    let rows: Vec<u32> = (0..ROWS).collect();
    let version = run.log.try_cells(&rows)?;
    database.commit(version, &rows, true)?;
    run.log.confirmed(version, Reach::All)
}

fn rows(random: &mut Random) -> Vec<u32> {
    let mut rows: Vec<u32> = (0..ROWS_EACH)
        .map(|_| random.below(ROWS.into()) as u32)
        .collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}
