//! A database that takes commits without ever asking for durability: `synchronous=OFF` with a
//! rollback journal, as careless as SQLite can be.
//!
//! The expected rows come from a model kept in memory, not from the database. No mapping is used
//! (`mmap_size=0`, no write-ahead log), and SQLite calls neither fsync nor fallocate this way.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, Transaction, params};

use crate::error::{Error, Told};
use crate::manifest::{Database, Manifest};
use crate::random::Random;
use crate::walk::describe;

/// Where the database lies, below the volume's root.
pub const PREFIX: &str = "sqlite";
/// Its file, below the volume's root.
pub const DATABASE: &str = "sqlite/database";

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    name: String,
    amount: i64,
    body: Vec<u8>,
}

/// What was found in a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Rows that could be read.
    pub rows: u64,
    /// Their checksum in the order of their keys.
    pub rows_crc32c: u32,
    /// `ok`, or what is wrong in SQLite's words.
    pub integrity: String,
}

/// Inserts `rows` rows, `batch` a transaction, changing and deleting earlier ones on the way.
///
/// # Errors
/// [`Error::Database`] for the first statement that fails; [`Error::DatabaseContent`] if the
/// database disagrees with the model before anything has crashed.
pub fn run(root: &Path, rows: u64, batch: u64) -> Result<Manifest, Error> {
    let directory = root.join(PREFIX);
    fs::create_dir(&directory).told("make directory", &directory)?;
    let path = root.join(DATABASE);
    let failed = |source| Error::Database {
        path: path.clone(),
        source,
    };
    let mut connection = Connection::open(&path).map_err(failed)?;
    prepare(&connection).map_err(failed)?;
    let mut model = BTreeMap::new();
    let mut random = Random::new(0x0da7_aba5);
    let mut commits = 0;
    let mut next = 1;
    while next <= rows {
        let last = rows.min(next + batch.max(1) - 1);
        let transaction = connection.transaction().map_err(failed)?;
        change(&transaction, &mut model, &mut random, next..=last).map_err(failed)?;
        transaction.commit().map_err(failed)?;
        commits += 1;
        next = last + 1;
    }
    drop(connection);
    let expected = Database {
        path: Path::new(DATABASE).into(),
        rows: model.len() as u64,
        rows_crc32c: checksum(&model),
        commits,
    };
    let found = read(&path);
    if !matches(&expected, &found) {
        let reason = format!("holds {found:?}, its commits said {expected:?}");
        return Err(Error::DatabaseContent { path, reason });
    }
    let mut manifest = describe(root, Path::new(PREFIX))?;
    manifest.databases.push(expected);
    Ok(manifest)
}

/// A small cache makes SQLite spill pages in the middle of a transaction, journal first.
fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(
        "PRAGMA page_size=4096;
         PRAGMA journal_mode=DELETE;
         PRAGMA synchronous=OFF;
         PRAGMA mmap_size=0;
         PRAGMA temp_store=MEMORY;
         PRAGMA cache_size=16;
         CREATE TABLE entries(
             id INTEGER PRIMARY KEY, name TEXT NOT NULL, amount INTEGER NOT NULL, body BLOB NOT NULL);
         CREATE INDEX entries_by_name ON entries(name);",
    )
}

/// One transaction: inserts these keys, then changes and deletes some of those that are there.
fn change(
    transaction: &Transaction<'_>,
    model: &mut BTreeMap<u64, Row>,
    random: &mut Random,
    keys: std::ops::RangeInclusive<u64>,
) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare_cached("INSERT INTO entries VALUES(?1, ?2, ?3, ?4)")?;
    let mut update =
        transaction.prepare_cached("UPDATE entries SET name=?2, amount=?3, body=?4 WHERE id=?1")?;
    let mut delete = transaction.prepare_cached("DELETE FROM entries WHERE id=?1")?;
    for key in keys.clone() {
        let row = row(random);
        insert.execute(params![key.cast_signed(), row.name, row.amount, row.body])?;
        model.insert(key, row);
    }
    for _ in keys.clone().step_by(4) {
        let key = 1 + random.below(*keys.end());
        if let Some(old) = model.get_mut(&key) {
            *old = row(random);
            update.execute(params![key.cast_signed(), old.name, old.amount, old.body])?;
        }
    }
    for _ in keys.clone().step_by(10) {
        let key = 1 + random.below(*keys.end());
        delete.execute(params![key.cast_signed()])?;
        model.remove(&key);
    }
    Ok(())
}

fn row(random: &mut Random) -> Row {
    let len = random.below(700) as usize;
    Row {
        name: format!("name-{:x}", random.number()),
        amount: random.number().cast_signed(),
        body: random.bytes(len),
    }
}

fn checksum(rows: &BTreeMap<u64, Row>) -> u32 {
    rows.iter()
        .fold(0, |crc, (key, row)| add_row(crc, key.cast_signed(), row))
}

fn add_row(crc: u32, key: i64, row: &Row) -> u32 {
    let crc = crc32c::crc32c_append(crc, &key.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &(row.name.len() as u64).to_le_bytes());
    let crc = crc32c::crc32c_append(crc, row.name.as_bytes());
    let crc = crc32c::crc32c_append(crc, &row.amount.to_le_bytes());
    crc32c::crc32c_append(crc, &row.body)
}

/// Whether a database is what its commits said.
#[must_use]
pub fn matches(expected: &Database, found: &Found) -> bool {
    found.integrity == "ok"
        && found.rows == expected.rows
        && found.rows_crc32c == expected.rows_crc32c
}

/// Reads a database that a crash may have damaged; SQLite rolls back a journal that lies beside it.
#[must_use]
pub fn read(path: &Path) -> Found {
    let mut found = Found {
        rows: 0,
        rows_crc32c: 0,
        integrity: String::new(),
    };
    let outcome = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).and_then(
        |connection| {
            found.integrity =
                connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
            read_rows(&connection, &mut found)
        },
    );
    if let Err(error) = outcome {
        found.integrity = format!("cannot be read: {error}");
    }
    found
}

fn read_rows(connection: &Connection, found: &mut Found) -> rusqlite::Result<()> {
    let mut statement =
        connection.prepare("SELECT id, name, amount, body FROM entries ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let content = Row {
            name: row.get(1)?,
            amount: row.get(2)?,
            body: row.get(3)?,
        };
        found.rows_crc32c = add_row(found.rows_crc32c, row.get(0)?, &content);
        found.rows += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (tempfile::TempDir, Database) {
        let root = tempfile::tempdir().expect("a root");
        let manifest = run(root.path(), 600, 25).expect("a run");
        let database = manifest.databases.into_iter().next().expect("one database");
        assert_eq!(database.commits, 24);
        (root, database)
    }

    #[test]
    fn a_whole_database_matches_and_is_alone() {
        let (root, expected) = made();
        assert!(matches(&expected, &read(&root.path().join(DATABASE))));
        let names = fs::read_dir(root.path().join(PREFIX))
            .expect("a directory")
            .count();
        assert_eq!(names, 1, "a journal was left");
    }

    #[test]
    fn one_changed_row_a_lost_row_and_a_damaged_page_are_seen() {
        for statement in [
            "UPDATE entries SET amount = amount + 1 WHERE id = (SELECT max(id) FROM entries)",
            "DELETE FROM entries WHERE id = (SELECT min(id) FROM entries)",
        ] {
            let (root, expected) = made();
            let path = root.path().join(DATABASE);
            Connection::open(&path)
                .and_then(|c| c.execute(statement, []))
                .expect("a change");
            assert!(!matches(&expected, &read(&path)), "{statement}");
        }
        let (root, expected) = made();
        let path = root.path().join(DATABASE);
        let mut bytes = fs::read(&path).expect("a database");
        bytes[3 * 4096..4 * 4096].fill(0);
        fs::write(&path, bytes).expect("damage");
        assert!(!matches(&expected, &read(&path)));
        fs::remove_file(&path).expect("removal");
        assert!(read(&path).integrity.starts_with("cannot be read"));
        assert!(!path.exists(), "the check made a database");
    }
}
