//! Why a model's files are not here, in words that say what to do, and the exit code for it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A model's files could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No place had the file, or none had the right one.
    #[error("{0}")]
    Unobtainable(Box<Unobtainable>),
    /// The cache folder cannot be used.
    #[error("{}", cache_message(.doing, .path, .source))]
    Cache {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room for the file.
    #[error(
        "the disk is full: no room for {needed} bytes in {}; make room there, or set \
         models.cache_dir (SCONCE_CACHE_DIR, --cache-dir) to a folder on a larger disk",
        .folder.display()
    )]
    DiskFull {
        /// Bytes of the file that did not fit.
        needed: u64,
        /// Where.
        folder: PathBuf,
    },
    /// Someone asked to stop.
    #[error("stopped while fetching {model}")]
    Stopped {
        /// The model.
        model: String,
    },
}

/// All that was tried for one file.
#[derive(Debug, Clone)]
pub struct Unobtainable {
    /// The model.
    pub model: String,
    /// The manifest's file.
    pub file: String,
    /// Whether fetching was forbidden.
    pub offline: bool,
    /// Each place, in order.
    pub tried: Vec<Attempt>,
}

/// Why one place did not give a file.
#[derive(Debug)]
pub(super) enum Failure {
    /// It could not be had from there; in words.
    Absent(String),
    /// There is a file, and not the one that the manifest pins; in words.
    Wrong(String),
    /// There was no room.
    DiskFull,
    /// Someone asked to stop.
    Stopped,
    /// The cache folder cannot be used, whatever the source.
    Cache {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Failure {
    /// A failed write into the cache folder.
    pub(super) fn writing(doing: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::Cache { doing, path: path.to_owned(), source },
        }
    }
}

/// One place that did not give a file.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// A path, or a source as the manifest names it.
    pub place: String,
    /// Why not.
    pub reason: String,
    /// It had a file, and not the one that the manifest pins.
    pub mismatch: bool,
}

impl StoreError {
    /// The process's exit code, from sysexits.h.
    pub fn exit_code(&self) -> u8 {
        match self {
            StoreError::Unobtainable(lost) if lost.tried.iter().any(|one| one.mismatch) => 65,
            StoreError::Unobtainable(_) => 69,
            StoreError::Cache { .. } | StoreError::DiskFull { .. } => 73,
            StoreError::Stopped { .. } => 75,
        }
    }
}

impl fmt::Display for Unobtainable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: cannot get {}; tried", self.model, self.file)?;
        for (index, attempt) in self.tried.iter().enumerate() {
            write!(f, " ({}) {}: {};", index + 1, attempt.place, attempt.reason)?;
        }
        let advice = if self.offline {
            "unset models.offline (SCONCE_OFFLINE, --offline), or put the file in one of these \
             places"
        } else if self.tried.iter().any(|attempt| attempt.mismatch) {
            "if the file is meant to differ, change the manifest; otherwise do not trust the source"
        } else {
            "check this machine's network and Python, or put the file in one of these places"
        };
        write!(f, " {advice}")
    }
}

fn cache_message(doing: &str, path: &Path, source: &io::Error) -> String {
    let path = path.display();
    format!(
        "cannot {doing} {path}: {source}; set models.cache_dir (SCONCE_CACHE_DIR, --cache-dir) to \
         a folder that this user can write to"
    )
}
