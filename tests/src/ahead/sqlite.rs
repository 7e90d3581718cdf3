//! SQLite, so that every commit is durable before it returns: `synchronous=FULL` with a write-ahead log, `EXTRA`
//! with a rollback journal, whose removal is the commit. `FULL` leaves that removal to the next fsync, and a power
//! cut takes the last commit back (<https://sqlite.org/pragma.html#pragma_synchronous>).

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, params};

use super::database::{Database, ROWS};
use super::{Case, Options};
use crate::error::{Error, Told as _};
use crate::random::Random;

const FILE: &str = "database";

/// The database below a run's directory.
pub(super) fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

/// An open database.
pub(super) struct Sqlite {
    connection: Connection,
    path: PathBuf,
    /// The mode in which a commit is durable.
    durable: &'static str,
}

fn durable_mode(case: Case) -> &'static str {
    if case == Case::SqliteWal {
        "FULL"
    } else {
        "EXTRA"
    }
}

impl Sqlite {
    pub(super) fn create(options: &Options, random: &mut Random) -> Result<Self, Error> {
        let (case, directory) = (options.case, options.directory.as_path());
        std::fs::create_dir_all(directory).told("make directory", directory)?;
        let path = path(directory);
        let failed = |source| Error::Database {
            path: path.clone(),
            source,
        };
        let connection = Connection::open(&path).map_err(failed)?;
        // Alone in the database, SQLite keeps the log's index in memory that is not the volume's.
        if case == Case::SqliteWal && random.below(4) > 0 {
            connection
                .pragma_update(None, "locking_mode", "EXCLUSIVE")
                .map_err(failed)?;
        }
        let journal = if case == Case::SqliteWal {
            "WAL"
        } else {
            "DELETE"
        };
        let durable = durable_mode(case);
        connection
            .execute_batch(&format!(
                "PRAGMA journal_mode={journal}; PRAGMA wal_autocheckpoint=0; PRAGMA synchronous={durable};
                 CREATE TABLE cells(id INTEGER PRIMARY KEY, version INTEGER NOT NULL, body BLOB NOT NULL);
                 BEGIN;"
            ))
            .map_err(failed)?;
        for row in 0..ROWS {
            connection
                .execute("INSERT INTO cells VALUES(?1, 0, zeroblob(600))", [row])
                .map_err(failed)?;
        }
        connection.execute_batch("COMMIT").map_err(failed)?;
        Ok(Self {
            connection,
            path,
            durable,
        })
    }
}

impl Sqlite {
    /// A database that is there.
    pub(super) fn open(options: &Options) -> Result<Self, Error> {
        let path = path(&options.directory);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
        match Connection::open_with_flags(&path, flags) {
            Ok(connection) => Ok(Self {
                connection,
                path,
                durable: durable_mode(options.case),
            }),
            Err(source) => Err(Error::Database { path, source }),
        }
    }
}

impl Database for Sqlite {
    fn commit(&mut self, version: u64, rows: &[u32], durable: bool) -> Result<(), Error> {
        // A checkpoint without care would leave rows that no later commit makes durable.
        let (synchronous, checkpoint_pages) = if durable {
            (self.durable, 24)
        } else {
            ("OFF", 0)
        };
        let mut work = || {
            self.connection
                .pragma_update(None, "synchronous", synchronous)?;
            self.connection
                .pragma_update(None, "wal_autocheckpoint", checkpoint_pages)?;
            let transaction = self.connection.transaction()?;
            for row in rows {
                transaction.execute(
                    "UPDATE cells SET version = ?2, body = randomblob(600) WHERE id = ?1",
                    params![row, version.cast_signed()],
                )?;
            }
            transaction.commit()
        };
        work().map_err(|source| Error::Database {
            path: self.path.clone(),
            source,
        })
    }
}

/// Rows and versions of a database that a crash interrupted, or what is wrong with it.
pub(super) fn read(directory: &Path) -> Result<Vec<(u32, u64)>, String> {
    let connection =
        Connection::open_with_flags(path(directory), OpenFlags::SQLITE_OPEN_READ_WRITE);
    let connection = connection.map_err(|error| error.to_string())?;
    let integrity: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .map_err(|error| format!("integrity_check: {error}"))?;
    if integrity != "ok" {
        return Err(format!("integrity_check: {integrity}"));
    }
    let mut statement = connection
        .prepare("SELECT id, version FROM cells ORDER BY id")
        .map_err(|error| error.to_string())?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)));
    rows.and_then(|rows| rows.collect::<rusqlite::Result<Vec<(u32, i64)>>>())
        .map(|rows| {
            let rows = rows.into_iter();
            rows.map(|(row, version)| (row, version.cast_unsigned()))
                .collect()
        })
        .map_err(|error| error.to_string())
}
