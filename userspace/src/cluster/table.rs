//! This node's own memory of who owns what: `state_dir/table.json`, on its local disk.
//!
//! Written whole, to a new file that is synced and renamed, so that a crash leaves the old table or
//! the new one. Order of writing: a change of owner goes into the table first and into the mailbox
//! then; an epoch's end goes into the mailbox first (the gates wait for it). A damaged table is an
//! error of its own: this module must never take it for an empty one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::claim::{BootId, VolumeClaim};

/// Largest table that is read.
const TABLE_BYTES_MAX: u64 = 64 * 1024;
const VERSION: u32 = 1;
const FILE_NAME: &str = "table.json";

/// Why the table cannot be used.
#[derive(Debug, Error)]
pub enum TableError {
    /// A read or write failed.
    #[error(
        "cannot {what} the ownership table {path}: {source}; `cluster.state_dir` must be on a local disk that can be written"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `write`.
        what: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is not what this agent writes.
    #[error(
        "the ownership table {path} is damaged ({reason}); move it away: the node then asks its peer"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// What this node knows of its volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    version: u32,
    /// The cluster it speaks of.
    pub cluster: String,
    /// The boot in which it was written.
    pub boot_id: BootId,
    /// Its word on each volume, by name.
    pub volumes: BTreeMap<String, VolumeClaim>,
}

impl Table {
    /// A table without volumes.
    #[must_use]
    pub fn new(cluster: &str, boot_id: BootId) -> Self {
        Self {
            version: VERSION,
            cluster: cluster.to_owned(),
            boot_id,
            volumes: BTreeMap::new(),
        }
    }

    /// Reads the table of `state_dir`; `None` if there is none.
    ///
    /// # Errors
    /// As told by [`TableError`]; another cluster's table counts as damaged.
    pub fn load(state_dir: &Path, cluster: &str) -> Result<Option<Self>, TableError> {
        let path = state_dir.join(FILE_NAME);
        let damaged = |reason: String| TableError::Damaged {
            path: path.clone(),
            reason,
        };
        let text = match read_limited(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(TableError::Io {
                    path,
                    what: "read",
                    source,
                });
            }
        };
        let table: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if table.version != VERSION {
            return Err(damaged(format!("version {}, not {VERSION}", table.version)));
        }
        if table.cluster != cluster {
            return Err(damaged(format!(
                "of the cluster `{}`, not `{cluster}`",
                table.cluster
            )));
        }
        Ok(Some(table))
    }

    /// Writes the table; when it returns, the local disk has it.
    ///
    /// # Errors
    /// What failed; the old table is then still there.
    pub fn store(&self, state_dir: &Path) -> Result<(), TableError> {
        let path = state_dir.join(FILE_NAME);
        self.replace(state_dir, &path)
            .map_err(|source| TableError::Io {
                path,
                what: "write",
                source,
            })
    }

    fn replace(&self, state_dir: &Path, path: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(state_dir)?;
        let fresh = state_dir.join("table.json.new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        File::open(state_dir)?.sync_all()
    }
}

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?
        .take(TABLE_BYTES_MAX)
        .read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::claim::{EpochState, Phase};
    use crate::ids::{Epoch, NodeId, Seq};

    fn table() -> Table {
        let mut table = Table::new("office", BootId([3; 16]));
        let claim = VolumeClaim {
            table_version: 4,
            owner: NodeId("b".into()),
            phase: Phase::Merging,
            epoch: Epoch(9),
            epoch_state: EpochState::Closed,
            last_mirrored: Seq(17),
        };
        table.volumes.insert("data".into(), claim);
        table
    }

    #[test]
    fn a_table_is_read_as_it_was_written_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("not/yet/there");
        assert_eq!(Table::load(&state_dir, "office").unwrap(), None);
        table().store(&state_dir).unwrap();
        assert_eq!(Table::load(&state_dir, "office").unwrap(), Some(table()));
        let mut next = table();
        next.volumes.clear();
        next.store(&state_dir).unwrap();
        assert_eq!(Table::load(&state_dir, "office").unwrap(), Some(next));
    }

    #[test]
    fn a_damaged_or_foreign_table_is_an_error_and_never_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        table().store(dir.path()).unwrap();
        let path = dir.path().join("table.json");
        let good = std::fs::read(&path).unwrap();
        assert!(
            Table::load(dir.path(), "home")
                .unwrap_err()
                .to_string()
                .contains("`office`")
        );
        for length in 0..good.len() {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(
                Table::load(dir.path(), "office").is_err(),
                "cut at {length}"
            );
        }
        std::fs::write(
            &path,
            String::from_utf8(good)
                .unwrap()
                .replace("17", "17, \"x\": 1"),
        )
        .unwrap();
        let error = Table::load(dir.path(), "office").unwrap_err().to_string();
        assert!(error.contains("move it away"), "{error}");
    }

    #[test]
    fn a_table_that_cannot_be_written_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = table().store(&file).unwrap_err().to_string();
        assert!(error.contains("cluster.state_dir"), "{error}");
    }
}
