//! A bounded reader for the index of a model in several safetensors files
//! (`model.safetensors.index.json`): which file has which tensor. Trusts nothing in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{NAME_BYTES_MAX, TENSORS_MAX, invalid};
use crate::store::HeaderError;

/// Longest index; those of the largest models in use have some MB.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Most files that a model is in.
pub const FILES_MAX: usize = 1024;

/// Reads the index at `path`: the file of each tensor, by tensor.
///
/// # Errors
/// What is wrong with it, with the value and the limit.
pub fn read(path: &Path) -> Result<BTreeMap<String, String>, HeaderError> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    if bytes > INDEX_BYTES_MAX {
        return Err(invalid(format!("an index of {bytes} bytes; the limit is {INDEX_BYTES_MAX}")));
    }
    let mut text = Vec::with_capacity(bytes as usize);
    file.take(INDEX_BYTES_MAX).read_to_end(&mut text)?;
    parse(&text)
}

pub(super) fn parse(text: &[u8]) -> Result<BTreeMap<String, String>, HeaderError> {
    let index: Index = serde_json::from_slice(text)
        .map_err(|error| invalid(format!("the index cannot be read: {error}")))?;
    let Files(files) = index.weight_map;
    let distinct: BTreeSet<&String> = files.values().collect();
    if distinct.len() > FILES_MAX {
        let count = distinct.len();
        return Err(invalid(format!("an index of {count} files; the limit is {FILES_MAX}")));
    }
    for name in distinct {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.starts_with('.') || !name.ends_with(".safetensors") || !name.chars().all(plain) {
            let shown: String = name.chars().take(80).collect();
            return Err(invalid(format!("the index names {shown:?}, which is no plain file name")));
        }
    }
    Ok(files)
}

#[derive(Deserialize)]
struct Index {
    weight_map: Files,
}

struct Files(BTreeMap<String, String>);

/// Reads the object entry by entry, so that a tensor that appears twice is seen.
impl<'de> Deserialize<'de> for Files {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Files;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Files, A::Error> {
                let mut files = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    let longest = tensor.len().max(file.len());
                    if longest > NAME_BYTES_MAX || files.len() == TENSORS_MAX {
                        return Err(A::Error::custom(format!(
                            "names have at most {NAME_BYTES_MAX} bytes, and there are at most \
                             {TENSORS_MAX} of them"
                        )));
                    }
                    if files.insert(tensor.clone(), file).is_some() {
                        return Err(A::Error::custom(format!("tensor {tensor} appears twice")));
                    }
                }
                Ok(Files(files))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
