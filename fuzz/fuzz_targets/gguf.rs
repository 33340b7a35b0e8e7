//! GGUF headers, and everything that is made of their metadata: sizes, tokenizer, chat template.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce::arch::{Description, encoder_card, outline};
use sconce::store::gguf::parse;
use sconce::text::ModelText;

fuzz_target!(|data: &[u8]| {
    // As if the tensors' data followed.
    let file_bytes = data.len() as u64 + (1 << 20);
    let Ok(header) = parse(data, file_bytes) else { return };
    for tensor in header.tensors.values() {
        assert!(tensor.offset + tensor.bytes <= file_bytes, "{tensor:?} lies outside the file");
    }
    let description = Description::Gguf(&header);
    let _ = outline(&description);
    let _ = encoder_card(&description);
    if let Ok(text) = ModelText::from_gguf(&header) {
        sconce_fuzz::use_tokenizer(&text.tokenizer);
    }
});
