//! Model manifests.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce::config::manifest::Manifest;

fuzz_target!(|text: &str| {
    if let Ok(manifest) = Manifest::parse(text) {
        let _ = manifest.bytes();
    }
});
