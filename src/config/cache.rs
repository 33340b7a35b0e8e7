//! Where fetched files go when nobody says: the user's cache folder, or a private folder among the
//! temporary files, so that a container with any uid and no HOME works.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::error::{ConfigError, Fault};
use super::load::Environment;
use super::values::join;

/// The first of these that can be written to; it exists afterwards: `$XDG_CACHE_HOME/sconce`,
/// `$HOME/.cache/sconce`, `$TMPDIR/sconce-UID`.
///
/// # Errors
/// None of them can be written to.
pub fn default_dir(environment: &Environment) -> Result<PathBuf, ConfigError> {
    let absolute =
        |name| environment.get(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let xdg = absolute("XDG_CACHE_HOME");
    let cache = xdg.or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    let preferred = cache.map(|cache| cache.join("sconce"));
    if let Some(dir) = preferred.as_ref().filter(|dir| writable(dir)) {
        return Ok(dir.clone());
    }
    let temporary = absolute("TMPDIR").unwrap_or_else(|| "/tmp".into());
    private(&temporary).ok_or_else(|| {
        let mut tried: Vec<PathBuf> = preferred.into_iter().collect();
        tried.push(temporary);
        let tried: Vec<_> = tried.iter().map(|dir| dir.display()).collect();
        let message = format!(
            "no folder for fetched files can be written to (tried {}): set models.cache_dir \
             (SCONCE_CACHE_DIR, --cache-dir) to one that can",
            join(&tried, ", ")
        );
        ConfigError::new(Fault::CannotCreate, message)
    })
}

/// Where the hub's own tools keep their files: `$HF_HOME/hub`, or `huggingface/hub` in the user's
/// cache.
pub(super) fn hub_dir(environment: &Environment) -> Option<PathBuf> {
    let home = environment.get("HF_HOME").map(PathBuf::from);
    let user = || {
        let xdg = environment.get("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || environment.get("HOME").map(|home| Path::new(home).join(".cache"));
        Some(xdg.or_else(home)?.join("huggingface"))
    };
    Some(home.or_else(user)?.join("hub"))
}

/// Whether files can be made in `dir`, which is created if need be.
fn writable(dir: &Path) -> bool {
    let probe =
        dir.join(format!(".probe-{}-{:?}", std::process::id(), std::thread::current().id()));
    let made = fs::create_dir_all(dir).and_then(|()| fs::write(&probe, b""));
    made.and_then(|()| fs::remove_file(&probe)).is_ok()
}

/// A folder that only this user can write to: others must not be able to plant files in it.
fn private(parent: &Path) -> Option<PathBuf> {
    let user = fs::metadata("/proc/self").ok()?.uid();
    let dir = parent.join(format!("sconce-{user}"));
    // An existing folder is fine if it is ours, which is checked next.
    let _ = fs::DirBuilder::new().mode(0o700).create(&dir);
    let found = fs::symlink_metadata(&dir).ok()?;
    let ours = found.is_dir() && found.uid() == user && found.mode() & 0o022 == 0;
    (ours && writable(&dir)).then_some(dir)
}
