//! The beginning of a file that is elsewhere, for whoever only needs its header. What it gives was
//! not compared with any checksum: it may be planned with, never served.

use std::fs::File;
use std::io::Read;

use crate::config::Models;
use crate::config::manifest::FileSource;

use super::error::Failure;
use super::remote::{Address, Client};

/// The content of `source` from its beginning, brought as it is read, and the size of the whole.
///
/// # Errors
/// Why it cannot be had from there, in words.
pub fn peek(source: &FileSource, models: &Models) -> Result<(Box<dyn Read>, u64), String> {
    let address = match source {
        FileSource::File(path) => {
            let file = File::open(path).map_err(|error| error.to_string())?;
            let bytes = file.metadata().map_err(|error| error.to_string())?.len();
            return Ok((Box::new(file), bytes));
        }
        FileSource::Package { .. } => return Err("a package comes as a whole only".into()),
        FileSource::Hub { repo, revision, path } => Address::on_hub(models, repo, revision, path),
        FileSource::Https(url) => Address::of(url),
    };
    if models.offline {
        return Err("not asked: models.offline is set".into());
    }
    let opened = Client::new(models).and_then(|client| client.open(&address));
    let (start, bytes) = opened.map_err(|failure| match failure {
        Failure::Absent(reason) | Failure::Wrong(reason) => reason,
        other => format!("{other:?}"),
    })?;
    Ok((Box::new(start), bytes))
}
