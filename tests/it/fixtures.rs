//! Where the tests find real model files and golden data. Knows what they are called, not what
//! is in them.

use std::path::{Path, PathBuf};

use sconce::config::flags::Flags;
use sconce::config::load::{Environment, load};
use sconce::store::ModelFiles;
use sconce::store::fetch::ensure;
use sconce::store::progress::Progress;
use serde_json::Value;

/// The files of a model in `models/`, from the user's cache; fetched on first use.
pub(crate) fn model_files(name: &str) -> ModelFiles {
    let config = load(&Flags::default(), &Environment::current()).expect("a sound configuration");
    let manifest = config.manifests.iter().find(|manifest| manifest.name == name);
    let manifest = manifest.unwrap_or_else(|| panic!("no manifest of {name}"));
    ensure(manifest, &config.models, &Progress::lines()).expect("the model's files")
}

/// A file of a model, by the manifest's names.
pub(crate) fn model_file(model: &str, file: &str) -> PathBuf {
    let files = model_files(model);
    files.path(file).unwrap_or_else(|| panic!("{model} has no file {file}")).clone()
}

/// A file of the golden data.
pub(crate) fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file)
}

/// A golden JSON file.
///
/// # Panics
/// If it is not there or not JSON.
pub(crate) fn golden_json(file: &str) -> Value {
    let path = golden(file);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
