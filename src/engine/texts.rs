//! A model's tokenizer, chat template and stop tokens, from wherever its files keep them.

use crate::engine::residency::{OpenedModel, json};
use crate::store::ModelFiles;
use crate::text::ModelText;
use crate::text::huggingface::HfFiles;

/// Reads them; what is wrong, in words, if they cannot be used.
pub(super) fn read(opened: &OpenedModel, files: &ModelFiles) -> Result<ModelText, String> {
    if let Some(header) = opened.gguf() {
        return ModelText::from_gguf(header).map_err(|error| error.to_string());
    }
    let bytes = |name: &str| -> Result<Option<Vec<u8>>, String> {
        let read = files.path(name).map(std::fs::read).transpose();
        read.map_err(|error| format!("{name}: {error}"))
    };
    let Some(tokenizer) = bytes("tokenizer.json")? else {
        return Err("its manifest has no file 'tokenizer.json'".into());
    };
    if opened.outline.kv.is_none() {
        return ModelText::from_hf(&tokenizer).map_err(|error| error.to_string());
    }
    let json = |name: &str| json(files.path(name)).map_err(|error| error.to_string());
    let template = bytes("chat_template.jinja")?.map(String::from_utf8).transpose();
    let files = HfFiles {
        tokenizer,
        tokenizer_config: json("tokenizer_config.json")?,
        chat_template: template.map_err(|error| format!("chat_template.jinja: {error}"))?,
        generation_config: json("generation_config.json")?,
        config: json("config.json")?,
    };
    ModelText::from_hf_generator(&files).map_err(|error| error.to_string())
}
