//! What an interrupted fetch leaves in a model's folder of the cache, and its removal.

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::manifest::Manifest;

use super::stamp;

/// A folder for files that are not whole yet.
pub(super) const SCRATCH: &str = ".tmp-";
/// An interrupted download, which the next attempt goes on with.
pub(super) const PARTIAL: &str = ".part-";

/// A folder that goes away with its owner, or else at the next fetch of its model.
pub(super) struct Scratch(pub(super) PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "cannot remove a scratch folder");
        }
    }
}

/// Scratch folders, half-written stamps, and downloads of files that are no longer wanted.
pub(super) fn leftovers(folder: &Path, manifest: &Manifest) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let temporary = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let unwanted =
            |part: &str| !manifest.files.iter().any(|file| part.starts_with(&file.sha256[..16]));
        name.starts_with(SCRATCH)
            || name.contains(stamp::HALF_WRITTEN)
            || name.strip_prefix(PARTIAL).is_some_and(unwanted)
    };
    paths.filter(temporary).collect()
}

/// Removes them.
pub(super) fn sweep(folder: &Path, manifest: &Manifest) {
    for path in leftovers(folder, manifest) {
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        if let Err(error) = removed {
            tracing::debug!(path = %path.display(), %error, "cannot remove a leftover");
        }
    }
}
