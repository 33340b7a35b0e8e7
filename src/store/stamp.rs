//! Vouchers for verified files: while size and time of change stay what they were when the
//! checksum was compared, it need not be compared again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Part of the name of a stamp that is not finished.
pub(super) const HALF_WRITTEN: &str = ".ok-tmp-";

/// What is known of a file without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    bytes: u64,
    modified_ns: i128,
}

impl Identity {
    /// Of the file at `path`.
    ///
    /// # Errors
    /// There is none, or it cannot be looked at.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        if !found.is_file() {
            return Err(io::Error::other("not a file"));
        }
        let modified_ns =
            i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec());
        Ok(Self { bytes: found.len(), modified_ns })
    }

    /// Its size.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The stamp's own path in `folder`, and what it says for the file at `path`. A stamp beside its
/// file does not name it, so that a whole cache can be moved.
fn stamp_for(folder: &Path, path: &Path, sha256: &str, identity: &Identity) -> (PathBuf, String) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Identity { bytes, modified_ns } = identity;
    let content = format!("sha256 {sha256}\nbytes {bytes}\nmodified_ns {modified_ns}\n");
    if path.parent() == Some(folder) {
        return (folder.join(format!("{name}.ok")), content);
    }
    let stamp = folder.join(format!("{}-{name}.elsewhere.ok", &sha256[..16]));
    (stamp, format!("{content}path {}\n", path.display()))
}

/// Whether the file at `path`, which looks like `identity` now, was verified as `sha256`.
pub(super) fn holds(folder: &Path, path: &Path, sha256: &str, identity: &Identity) -> bool {
    let (stamp, content) = stamp_for(folder, path, sha256, identity);
    fs::read_to_string(stamp).is_ok_and(|found| found == content)
}

/// Notes that the file at `path` was verified as `sha256` while it looked like `identity`. A
/// folder that cannot be written to only costs the time to verify again.
pub(super) fn put(folder: &Path, path: &Path, sha256: &str, identity: &Identity) {
    let (stamp, content) = stamp_for(folder, path, sha256, identity);
    let mut fresh = stamp.clone().into_os_string();
    fresh.push(format!("{HALF_WRITTEN}{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let written = fs::create_dir_all(folder)
        .and_then(|()| fs::write(&fresh, content))
        .and_then(|()| fs::rename(&fresh, &stamp));
    if let Err(error) = written {
        let stamp = stamp.display();
        tracing::debug!(%stamp, %error, "cannot note that a file was verified");
        let _ = fs::remove_file(&fresh);
    }
}
