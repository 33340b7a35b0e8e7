//! Log-probabilities in the two shapes of the API. Knows tokens and their bytes, not where the
//! numbers come from.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, Serializer};

use super::answer::ScoredToken;
use crate::request::TokenId;
use crate::text::Tokenizer;

/// `logprobs` of a chat choice, whole or chunk.
#[derive(Serialize, JsonSchema)]
pub(super) struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Serialize, JsonSchema)]
struct ChatToken<'a> {
    #[serde(flatten)]
    chosen: Entry<'a>,
    top_logprobs: Vec<Entry<'a>>,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "TokenLogprob")]
struct Entry<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    /// Null for tokens that are no text.
    bytes: Option<&'a [u8]>,
}

/// `logprobs` of a completion's choice, whole or chunk: columns.
#[derive(Serialize, JsonSchema)]
pub(super) struct TextLogprobs<'a> {
    tokens: Vec<Cow<'a, str>>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Ranked<'a>>,
    text_offset: Vec<u32>,
}

/// A JSON object in this order.
struct Ranked<'a>(Vec<(Cow<'a, str>, f32)>);

impl JsonSchema for Ranked<'_> {
    fn schema_name() -> Cow<'static, str> {
        "RankedTokens".into()
    }

    fn json_schema(schemas: &mut SchemaGenerator) -> Schema {
        BTreeMap::<String, f32>::json_schema(schemas)
    }
}

impl Serialize for Ranked<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl<'a> ChatLogprobs<'a> {
    /// Of `tokens`, each with its most likely ones.
    pub(super) fn new(tokenizer: &'a Tokenizer, tokens: &[ScoredToken]) -> Self {
        let entry = |id: TokenId, logprob: f32| Entry {
            token: name(tokenizer, id, ""),
            logprob,
            bytes: Some(tokenizer.token_bytes(id)).filter(|bytes| !bytes.is_empty()),
        };
        let content = tokens.iter().map(|scored| ChatToken {
            chosen: entry(scored.token, scored.logprobs.chosen),
            top_logprobs: scored.logprobs.top.iter().map(|&(id, p)| entry(id, p)).collect(),
        });
        Self { content: content.collect(), refusal: None }
    }
}

impl<'a> TextLogprobs<'a> {
    /// Of `tokens`, each with its most likely ones and itself.
    pub(super) fn new(tokenizer: &'a Tokenizer, tokens: &[ScoredToken]) -> Self {
        let name = |id| name(tokenizer, id, "bytes:");
        let ranked = |ScoredToken { token, logprobs, .. }: &ScoredToken| {
            let own = (*token, logprobs.chosen);
            let missing = !logprobs.top.iter().any(|(id, _)| id == token);
            let all = logprobs.top.iter().copied().chain(missing.then_some(own));
            Ranked(all.map(|(id, logprob)| (name(id), logprob)).collect())
        };
        Self {
            tokens: tokens.iter().map(|scored| name(scored.token)).collect(),
            token_logprobs: tokens.iter().map(|scored| scored.logprobs.chosen).collect(),
            top_logprobs: tokens.iter().map(ranked).collect(),
            text_offset: tokens.iter().map(|scored| scored.offset).collect(),
        }
    }
}

/// A token as text, different for every token: part of a character as its bytes after `mark`, one
/// that is no text by its own name or number.
fn name<'a>(tokenizer: &'a Tokenizer, id: TokenId, mark: &str) -> Cow<'a, str> {
    let bytes = tokenizer.token_bytes(id);
    if bytes.is_empty() {
        let name = tokenizer.control_name(id).map(Cow::Borrowed);
        return name.unwrap_or_else(|| Cow::Owned(format!("<|token {id}|>")));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => {
            let mut text = mark.to_owned();
            for byte in bytes {
                write!(text, "\\x{byte:02x}").expect("a string takes everything");
            }
            Cow::Owned(text)
        }
    }
}
