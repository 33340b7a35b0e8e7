//! Where the tests find real model files and golden data. Knows what they are called, not what
//! is in them.

use std::path::{Path, PathBuf};

/// A file of a model, by the manifest's names: `SCONCE_TEST_MODELS` is a folder with
/// `<model>/<file>`.
///
/// # Panics
/// If it is not there: a test that needs it must not pass without.
pub(crate) fn model_file(model: &str, file: &str) -> PathBuf {
    let folder = std::env::var_os("SCONCE_TEST_MODELS")
        .expect("SCONCE_TEST_MODELS names the folder with the models' files");
    let path = Path::new(&folder).join(model).join(file);
    assert!(path.is_file(), "{} is not there", path.display());
    path
}

/// A file of the golden data.
pub(crate) fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file)
}

/// A golden JSON file.
///
/// # Panics
/// If it is not there or not JSON.
pub(crate) fn golden_json(file: &str) -> serde_json::Value {
    let path = golden(file);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
