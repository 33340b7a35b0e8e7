//! A model's files: where they come from, whether they are whole, where they lie, and what their
//! headers say. Reads headers within bounds; never a tensor's data.

pub mod gguf;
pub mod safetensors;
pub mod progress;
pub mod error;
mod checksum;
mod package;
mod remote;
mod stamp;
mod leftovers;
pub mod fetch;
pub mod peek;

use std::path::PathBuf;

/// The files of one model, present and verified.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    /// The manifest's `file` key (for example `model.gguf`, `tokenizer.json`) and where it lies.
    pub files: Vec<(String, PathBuf)>,
}

impl ModelFiles {
    /// Where the file named `name` in the manifest lies.
    pub fn path(&self, name: &str) -> Option<&PathBuf> {
        self.files.iter().find(|(file, _)| file == name).map(|(_, path)| path)
    }
}

/// A header that cannot be used: what is wrong, the value, the limit.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file cannot be read.
    #[error("cannot read the file: {0}")]
    Io(#[from] std::io::Error),
    /// The content is not what it claims to be.
    #[error("{0}")]
    Invalid(String),
}
