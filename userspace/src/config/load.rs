//! Reading the file: where it is wrong, what was meant.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::Config;
use crate::ids::NodeId;

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}: {source}; name another with --config")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A key that does not exist.
    #[error("{path}:{line}: unknown key `{key}`; {hint}")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What may have been meant.
        hint: String,
    },
    /// Not TOML, a missing key, or a value of the wrong kind.
    #[error("{path}:{line}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The file is readable, and what it says cannot be.
    #[error("the configuration cannot be used:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
    /// Nobody said which of the nodes this machine is.
    #[error(
        "this machine is called `{given}`, and the configuration has the nodes {known}: \
         say which one it is with --node"
    )]
    NotANode {
        /// `--node` or the host name.
        given: String,
        /// The nodes of the file.
        known: String,
    },
}

impl Config {
    /// Reads the file; its values are not checked yet, see [`Config::validate`].
    ///
    /// # Errors
    /// An unreadable file, an unknown or missing key, a value of the wrong kind.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// As [`Config::load`], from text; `path` is for the errors.
    ///
    /// # Errors
    /// As [`Config::load`], without `Unreadable`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut config: Self =
            toml::from_str(text).map_err(|error| told_with_place(path, text, &error))?;
        config.digest = format!("{:08x}", crc32c::crc32c(text.as_bytes()));
        Ok(config)
    }

    /// Which node this machine is: `--node` if given, else its host name (also without the domain).
    ///
    /// # Errors
    /// [`ConfigError::NotANode`] if it is none of the configured ones.
    pub fn this_node(&self, flag: Option<&str>, hostname: &str) -> Result<NodeId, ConfigError> {
        let given = flag.unwrap_or(hostname);
        let short = given.split('.').next().unwrap_or(given);
        let known = |name: &str| self.nodes.iter().find(|node| node.name.0 == name);
        let found = known(given).or_else(|| flag.is_none().then(|| known(short)).flatten());
        found
            .map(|node| node.name.clone())
            .ok_or_else(|| ConfigError::NotANode {
                given: given.to_owned(),
                known: quoted(self.nodes.iter().map(|node| node.name.0.as_str())),
            })
    }
}

/// Names between backticks with commas, for error texts.
pub(super) fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn told_with_place(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start);
    let line = 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    let path = path.to_owned();
    match unknown_key(error.message()) {
        Some((key, valid)) => ConfigError::UnknownKey {
            path,
            line,
            hint: hint(&key, &valid),
            key,
        },
        None => ConfigError::Syntax {
            path,
            line,
            message: error.message().to_owned(),
        },
    }
}

/// Takes serde's "unknown field `a`, expected one of `b`, `c`" apart.
fn unknown_key(message: &str) -> Option<(String, Vec<String>)> {
    let rest = message.strip_prefix("unknown field ")?;
    let mut names = rest.split('`').skip(1).step_by(2).map(str::to_owned);
    let key = names.next()?;
    Some((key, names.collect()))
}

fn hint(key: &str, valid: &[String]) -> String {
    let nearest = valid
        .iter()
        .map(|name| (strsim::damerau_levenshtein(key, name), name))
        .min_by_key(|(distance, _)| *distance);
    match nearest {
        Some((distance, name)) if distance <= 2.max(key.len() / 3) => {
            format!("the nearest valid one is `{name}`")
        }
        Some((_, name)) => format!(
            "the nearest valid one is `{name}`; valid here: {}",
            quoted(valid.iter().map(String::as_str))
        ),
        None => "no key is valid here: remove it".to_owned(),
    }
}
