//! What tests share: the real models' files, fetched once, and golden data.

use std::path::PathBuf;

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

/// A golden file, parsed.
pub(crate) fn golden(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}
