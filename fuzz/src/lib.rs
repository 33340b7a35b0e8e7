//! What fuzz targets share: a front over a made-up engine, and uses of what was parsed.

pub mod front;
pub mod requests;

use sconce::text::Tokenizer;

/// Prints panics, but not those of libraries, which are caught. One that is not caught ends the run
/// whether it was printed or not.
pub fn tell_own_panics() {
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_none_or(|place| !place.file().contains("registry")) {
            eprintln!("{panic}");
        }
    }));
}

/// Does with a tokenizer what requests do.
pub fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", "a small lamp", "\u{e9}\u{1f600} <|im_end|></s>\n\n  x", "\u{2581}\0"] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let size = tokenizer.vocab_size();
            assert!(ids.iter().all(|&id| (id as usize) < size), "an id past the vocabulary");
            let _ = tokenizer.decode(&ids);
            let _ = tokenizer.decode_for_people(&ids, true);
        }
        if let Ok(ids) = tokenizer.encode_prompt(text) {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        }
        let _ = tokenizer.pieces(text, true);
    }
    let _ = tokenizer.decode(&[0, u32::MAX]);
}
