//! The configuration file, with everything that is checked when it is read.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sconce::config::flags::Flags;
use sconce::config::load::{Environment, load};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("models")).expect("a folder of models");
    folder
});

fuzz_target!(|text: &str| {
    let file = FOLDER.path().join("sconce.toml");
    std::fs::write(&file, text).expect("the file is written");
    let models = FOLDER.path().join("models");
    let environment = Environment::of(&[
        ("HOME", FOLDER.path().to_str().expect("UTF-8")),
        ("SCONCE_MODELS_DIR", models.to_str().expect("UTF-8")),
    ]);
    let flags = Flags { config: Some(file), ..Flags::default() };
    if let Ok(config) = load(&flags, &environment) {
        let _ = config.hash();
    }
});
