//! `tokenizer.json` and the files beside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce::text::ModelText;
use sconce::text::huggingface::HfFiles;

// The library panics on some files, which is caught where they are read: nothing to tell of.
fuzz_target!(init: sconce_fuzz::tell_own_panics(), |data: &[u8]| {
    let mut parts = data.split(|byte| *byte == 0);
    let tokenizer = parts.next().unwrap_or_default().to_vec();
    let mut json = || parts.next().and_then(|part| serde_json::from_slice(part).ok());
    let (tokenizer_config, generation_config) = (json(), json());
    let files = HfFiles { tokenizer, tokenizer_config, generation_config, ..HfFiles::default() };
    if let Ok(text) = ModelText::from_hf_generator(&files) {
        sconce_fuzz::use_tokenizer(&text.tokenizer);
    }
});
