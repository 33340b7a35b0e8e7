//! Where headers and configurations are read from: files here, and files elsewhere of which only
//! the beginning is asked for. Knows nothing of what is in them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value as Json;

use super::{Fault, PlanError};
use crate::config::Models;
use crate::config::manifest::{FileSource, ManifestFile};
use crate::store::ModelFiles;
use crate::store::peek::peek;

/// Configuration files larger than this are not configuration.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// The start of a file, and how long the whole is.
pub(super) struct Source {
    pub(super) name: String,
    pub(super) start: Box<dyn Read>,
    pub(super) bytes: u64,
}

impl Source {
    /// A file of this machine.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn file(path: &Path) -> Result<Self, PlanError> {
        let file = File::open(path).map_err(|error| unreadable(path, &error))?;
        let bytes = file.metadata().map_err(|error| unreadable(path, &error))?.len();
        Ok(Self { name: path.display().to_string(), start: Box::new(file), bytes })
    }

    /// A file of this machine, if it is there.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub(super) fn beside(path: &Path) -> Result<Option<Self>, PlanError> {
        path.exists().then(|| Self::file(path)).transpose()
    }

    /// A manifest's file: here, or the first of its sources that answers.
    ///
    /// # Errors
    /// No source gives a part of a file, each with its reason.
    pub(super) fn of_manifest(
        model: &str,
        file: &ManifestFile,
        here: &ModelFiles,
        models: &Models,
    ) -> Result<Self, PlanError> {
        if let Some(path) = here.path(&file.file) {
            return Self::file(path);
        }
        let mut reasons = Vec::new();
        for source in &file.sources {
            match Self::at(source, models) {
                Ok(found) if found.bytes == file.bytes => {
                    return Ok(Self { name: file.file.clone(), ..found });
                }
                Ok(found) => reasons.push(format!(
                    "{source}: {} bytes, the manifest says {}",
                    found.bytes, file.bytes
                )),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        let message = format!(
            "{model}: {} is not on this machine, nor can its header be read elsewhere ({}): run \
             sconce pull {model}, or plan with a shape",
            file.file,
            reasons.join("; ")
        );
        Err(PlanError::new(Fault::Input, message))
    }

    /// `hub:OWNER/NAME@COMMIT/PATH`, `https://HOST/PATH` or `file:PATH`.
    ///
    /// # Errors
    /// It is none of these, or does not answer.
    pub(super) fn at(address: &str, models: &Models) -> Result<Self, PlanError> {
        let parsed = FileSource::parse(address).map_err(|allowed| {
            PlanError::new(Fault::Usage, format!("{address:?}: must be {allowed}"))
        })?;
        let (start, bytes) = peek(&parsed, models)
            .map_err(|reason| PlanError::new(Fault::Unavailable, format!("{address}: {reason}")))?;
        Ok(Self {
            name: address.split(['?', '#']).next().unwrap_or(address).to_owned(),
            start,
            bytes,
        })
    }

    /// Whether its name says that it is a GGUF file.
    pub(super) fn is_gguf(&self) -> bool {
        self.name.ends_with(".gguf")
    }

    /// Its name without folders and ending.
    pub(super) fn stem(&self) -> &str {
        let file = self.name.rsplit('/').next().unwrap_or(&self.name);
        file.rsplit_once('.').map_or(file, |(stem, _)| stem)
    }

    /// The whole of it: a configuration.
    ///
    /// # Errors
    /// It is too large for one, or no text.
    pub(super) fn text(self) -> Result<String, PlanError> {
        let Self { name, start, bytes } = self;
        if bytes > CONFIG_BYTES_MAX {
            let message = format!("{name}: {bytes} bytes, at most {CONFIG_BYTES_MAX} are read");
            return Err(PlanError::new(Fault::Data, message));
        }
        let mut text = String::new();
        let read = start.take(CONFIG_BYTES_MAX).read_to_string(&mut text);
        read.map_err(|error| PlanError::new(Fault::Input, format!("{name}: {error}")))?;
        Ok(text)
    }

    /// The whole of it as JSON.
    ///
    /// # Errors
    /// As [`Source::text`], or it is no JSON.
    pub(super) fn json(self) -> Result<Json, PlanError> {
        let name = self.name.clone();
        serde_json::from_str(&self.text()?)
            .map_err(|error| PlanError::new(Fault::Data, format!("{name}: not JSON: {error}")))
    }
}

pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> PlanError {
    PlanError::new(Fault::Input, format!("{}: {error}", path.display()))
}
