//! The configuration file and, after a NUL, a model's manifest, with everything that is checked
//! when they are read.
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
    let (text, manifest) = text.split_once('\0').unwrap_or((text, ""));
    let file = FOLDER.path().join("sconce.toml");
    std::fs::write(&file, text).expect("the file is written");
    let models = FOLDER.path().join("models");
    std::fs::write(models.join("model.toml"), manifest).expect("the manifest is written");
    let environment = Environment::of(&[
        ("HOME", FOLDER.path().to_str().expect("UTF-8")),
        ("SCONCE_MODELS_DIR", models.to_str().expect("UTF-8")),
    ]);
    let flags = Flags { config: Some(file), ..Flags::default() };
    if let Ok(config) = load(&flags, &environment) {
        let _ = config.hash();
    }
});
