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
    inode: u64,
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
        Ok(Self { bytes: found.len(), modified_ns, inode: found.ino() })
    }

    /// Its size.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Where the stamp for the file at `path` lies: in `folder`, by the pinned checksum and the path.
fn place(folder: &Path, path: &Path, sha256: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Elsewhere two files of one name may have the same content: the path inside tells them apart.
    if path.parent() == Some(folder) {
        return folder.join(format!("{name}.ok"));
    }
    folder.join(format!("{}-{name}.elsewhere.ok", &sha256[..16]))
}

fn content(path: &Path, sha256: &str, identity: &Identity) -> String {
    let Identity { bytes, modified_ns, inode } = identity;
    format!("sha256 {sha256}\nbytes {bytes}\nmodified_ns {modified_ns}\ninode {inode}\n{path:?}\n")
}

/// Whether the file at `path`, which looks like `identity` now, was verified as `sha256`.
pub(super) fn holds(folder: &Path, path: &Path, sha256: &str, identity: &Identity) -> bool {
    let found = fs::read_to_string(place(folder, path, sha256));
    found.is_ok_and(|found| found == content(path, sha256, identity))
}

/// Notes that the file at `path` was verified as `sha256` while it looked like `identity`. A
/// folder that cannot be written to only costs the time to verify again.
pub(super) fn put(folder: &Path, path: &Path, sha256: &str, identity: &Identity) {
    let stamp = place(folder, path, sha256);
    let mut fresh = stamp.clone().into_os_string();
    fresh.push(format!("{HALF_WRITTEN}{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let written = fs::create_dir_all(folder)
        .and_then(|()| fs::write(&fresh, content(path, sha256, identity)))
        .and_then(|()| fs::rename(&fresh, &stamp));
    if let Err(error) = written {
        let stamp = stamp.display();
        tracing::debug!(%stamp, %error, "cannot note that a file was verified");
        let _ = fs::remove_file(&fresh);
    }
}
