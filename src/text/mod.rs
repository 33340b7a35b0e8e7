//! Text in, tokens out, and back: tokenizers, chat templates, incremental decoding, stop strings.
//! Knows models' files only as bytes and headers; no HTTP, no device.

use std::sync::Arc;

use crate::error::Result;
use crate::request::TokenId;

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
#[derive(Debug)]
pub struct Tokenizer {}

/// One chat message, content flattened to text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `developer` (rendered as `system`), `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {}

/// Decodes tokens as they come, holding back bytes that are not yet whole characters.
#[derive(Debug)]
pub struct DecodeStream {}

/// Looks for stop strings across token borders, holding back what may be the start of one.
#[derive(Debug)]
pub struct StopStrings {}

#[expect(unused_variables, clippy::unused_self, reason = "skeleton")]
impl Tokenizer {
    /// Token ids of `text`, control-token look-alikes as plain text; with the model's own
    /// prefix and suffix tokens (BERT's `[CLS]`, `[SEP]`; a BOS where the model wants one) if
    /// `wrap`.
    pub fn encode(&self, text: &str, wrap: bool) -> Result<Vec<TokenId>> {
        Ok(Vec::new())
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        0
    }

    /// A decoder for one answer.
    pub fn stream(self: &Arc<Self>) -> DecodeStream {
        DecodeStream {}
    }
}

#[expect(unused_variables, clippy::unused_self, reason = "skeleton")]
impl ChatTemplate {
    /// The prompt of a conversation, ending with the generation prompt. Control tokens come from
    /// the template alone, never from message content.
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<TokenId>> {
        Ok(Vec::new())
    }
}

#[expect(unused_variables, clippy::unused_self, reason = "skeleton")]
impl DecodeStream {
    /// The text that `token` completes; may be empty.
    pub fn push(&mut self, token: TokenId) -> String {
        String::new()
    }

    /// What is left at the end: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::new()
    }
}

#[expect(unused_variables, clippy::unused_self, reason = "skeleton")]
impl StopStrings {
    /// None of `strings` is empty.
    pub fn new(strings: Vec<String>) -> Self {
        Self {}
    }

    /// Text that can be shown now, and whether a stop string was found (what follows it, and the
    /// string itself, are dropped).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        (String::new(), false)
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> String {
        String::new()
    }
}
