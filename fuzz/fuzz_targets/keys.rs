//! The file of API keys. No message quotes what could be a key.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use sconce::config::keys::parse;

fuzz_target!(|text: &str| {
    match parse(Path::new("keys.toml"), text) {
        Ok(keys) => assert!(!keys.is_empty()),
        Err(error) => {
            // What a plain key can be: long, and nothing that messages are made of.
            let error = error.to_string();
            for word in text.split(|c: char| c.is_whitespace() || c == '"' || c == '\'') {
                let secret = word.len() >= 16 && word.bytes().any(|byte| byte.is_ascii_digit());
                assert!(!secret || !error.contains(word), "{error}");
            }
        }
    }
});
