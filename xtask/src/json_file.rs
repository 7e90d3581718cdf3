//! What runs write down, as JSON, for later runs to go on with.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;

/// What earlier runs wrote; empty if there was none.
///
/// # Errors
/// If it is damaged.
pub fn load<T: Default + DeserializeOwned>(path: &Path) -> Result<T> {
    match fs::read(path) {
        Ok(text) => {
            serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
