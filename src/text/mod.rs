//! Text in, tokens out, and back: tokenizers, chat templates, incremental decoding, stop strings.
//! Knows models' files only as bytes and headers; no HTTP, no device.

mod bpe;
mod control;
mod decode;
pub mod encode;
mod gguf;
pub mod huggingface;
mod jinja;
mod literal;
mod split;
mod spm;
mod stop;
mod template;
mod tokenizer;

use std::sync::Arc;

use crate::request::TokenId;
use crate::store::HeaderError;
use crate::store::gguf::Header;

/// Everything textual about one model.
#[derive(Debug, Clone)]
pub struct ModelText {
    /// Encodes and decodes.
    pub tokenizer: Arc<Tokenizer>,
    /// Turns messages into a prompt; generators only.
    pub template: Option<Arc<ChatTemplate>>,
    /// Tokens that end an answer.
    pub stop_tokens: Arc<[TokenId]>,
}

/// A model's tokenizer. Cheap to share; encoding is CPU work: long text goes to a blocking pool.
/// Built by [`Tokenizer::from_gguf`] or [`Tokenizer::from_hf_json`].
pub struct Tokenizer {
    model: tokenizer::Model,
    /// Another for text that goes on after a control token, where that is encoded differently.
    continued: Option<Box<tokenizers::Tokenizer>>,
    /// What each token adds to a decoded text.
    bytes: decode::TokenBytes,
    /// Tokens that only templates, wrapping and whole prompts may yield.
    controls: control::Controls,
    /// Goes before wrapped text.
    begin: Option<TokenId>,
    /// Goes after wrapped text.
    end: Option<TokenId>,
    /// A space is put before texts; decoding takes it off.
    space_before: bool,
}

/// One text, or two that are read together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// The text; the query of a pair.
    pub text: Arc<str>,
    /// What it is compared with.
    pub second: Option<String>,
}

/// How a passage of too many tokens is shortened: the longer text of two first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Most tokens, those of the wrapping included.
    pub length: usize,
    /// Most tokens of the second text, before anything else.
    pub second: usize,
    /// Where tokens are taken away.
    pub side: Side,
}

/// An end of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// The beginning.
    Left,
    /// The end.
    #[default]
    Right,
}

/// One token of a text, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its id.
    pub id: TokenId,
    /// What it stands for in the text; a control token's own text.
    pub text: String,
    /// The tokenizer put it there.
    pub special: bool,
    /// Characters of the text that it stands for; none for what the tokenizer put there.
    pub characters: Option<(usize, usize)>,
}

/// One chat message, content flattened to text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `developer` (rendered as `system`), `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A model's chat template: code from a stranger, run without a loader and with limits on its
/// work, depth and output.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: minijinja::Environment<'static>,
    begin: String,
    end: String,
}

/// Decodes tokens as they come, holding back bytes that are not yet whole characters.
#[derive(Debug)]
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    pending: Vec<u8>,
}

/// Looks for stop strings across token borders, holding back what may be the start of one.
#[derive(Debug)]
pub struct StopStrings {
    patterns: Vec<stop::Pattern>,
    held: String,
    found: bool,
}

/// A tokenizer or a chat template that cannot be used: what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TextError(String);

impl From<HeaderError> for TextError {
    fn from(error: HeaderError) -> Self {
        TextError(error.to_string())
    }
}

/// Metadata keys that name a token which ends an answer.
const STOP_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Control tokens that end an answer wherever a vocabulary has them: files often name only one.
const STOP_NAMES: [&str; 8] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
];

impl ModelText {
    /// A generator's text from its GGUF header. A file without a template serves completions
    /// only.
    ///
    /// # Errors
    /// The vocabulary or the template cannot be used.
    pub fn from_gguf(header: &Header) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_gguf(header)?;
        let tokens = header.strings("tokenizer.ggml.tokens")?;
        let text_at = |key: &str| -> Result<&str, TextError> {
            if !header.has(key) {
                return Ok("");
            }
            let id = header.u32(key)?;
            tokens.get(id as usize).copied().ok_or_else(|| {
                TextError(format!("{key} is {id}; the vocabulary has {} tokens", tokens.len()))
            })
        };
        let template = if header.has("tokenizer.chat_template") {
            let source = header.str("tokenizer.chat_template")?;
            let begin = text_at("tokenizer.ggml.bos_token_id")?;
            let end = text_at("tokenizer.ggml.eos_token_id")?;
            Some(Arc::new(ChatTemplate::new(source, begin, end)?))
        } else {
            None
        };

        let mut stops = Vec::new();
        for key in STOP_KEYS {
            if header.has(key) {
                text_at(key)?;
                stops.push(header.u32(key)?);
            }
        }
        stops.extend(STOP_NAMES.iter().filter_map(|name| tokenizer.control(name)));
        stops.sort_unstable();
        stops.dedup();
        Ok(Self { tokenizer: Arc::new(tokenizer), template, stop_tokens: stops.into() })
    }

    /// An encoder's text from its `tokenizer.json`: no template, no stop tokens.
    ///
    /// # Errors
    /// The tokenizer cannot be used.
    pub fn from_hf(tokenizer_json: &[u8]) -> Result<Self, TextError> {
        let tokenizer = Arc::new(Tokenizer::from_hf_json(tokenizer_json)?);
        Ok(Self { tokenizer, template: None, stop_tokens: Arc::from([]) })
    }
}

#[cfg(test)]
mod tests;
