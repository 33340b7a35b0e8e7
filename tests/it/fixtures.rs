//! What tests share: the real models' files, fetched once, and golden data.

use std::path::PathBuf;

use sconce::store::ModelFiles;
use serde_json::Value;

/// A golden file, parsed.
pub(crate) fn golden(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}
