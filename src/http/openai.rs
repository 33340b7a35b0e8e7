//! The OpenAI wire types: bodies that come in, objects that go out. Shapes only; `params.rs`
//! says what is served. Unknown fields are ignored: SDKs add some often.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::input::Input;
use super::logprobs::{ChatLogprobs, TextLogprobs};
use super::object::Object;
use crate::request::Usage;

/// The body of `/v1/chat/completions` and `/v1/completions`: `messages` belongs to the one,
/// `prompt` to the other, all else to both.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(super) struct GenerateBody {
    pub(super) model: Option<String>,
    #[schemars(length(min = 1, max = 2048))]
    pub(super) messages: Option<Vec<Object<ChatMessage>>>,
    pub(super) prompt: Option<Input>,
    #[schemars(range(min = 1))]
    pub(super) max_tokens: Option<u32>,
    /// Goes before `max_tokens`.
    #[schemars(range(min = 1))]
    pub(super) max_completion_tokens: Option<u32>,
    #[schemars(range(min = 0, max = 2))]
    pub(super) temperature: Option<f32>,
    #[schemars(range(min = 0, max = 1))]
    pub(super) top_p: Option<f32>,
    /// 0 and -1: all tokens.
    #[schemars(range(min = -1, max = u32::MAX))]
    pub(super) top_k: Option<i64>,
    #[schemars(range(min = 0, max = 1))]
    pub(super) min_p: Option<f32>,
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<Stop>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) stream: Option<bool>,
    /// Only where `stream` is true.
    pub(super) stream_options: Option<Object<StreamOptions>>,
    /// At most `limits.max_choices`.
    #[schemars(range(min = 1))]
    pub(super) n: Option<u32>,
    /// Only as `n` says.
    #[schemars(range(min = 1))]
    pub(super) best_of: Option<u32>,
    pub(super) echo: Option<bool>,
    /// A flag in chat, a number in completions.
    pub(super) logprobs: Option<Value>,
    /// Only where `logprobs` is true.
    #[schemars(range(min = 0, max = 20))]
    pub(super) top_logprobs: Option<u32>,
    /// From token ids to what is added to their logits, -100 to 100.
    #[schemars(with = "Option<BTreeMap<String, f32>>", length(max = 1024))]
    pub(super) logit_bias: Option<HashMap<String, Value>>,
    #[schemars(range(min = -2, max = 2))]
    pub(super) frequency_penalty: Option<f32>,
    #[schemars(range(min = -2, max = 2))]
    pub(super) presence_penalty: Option<f32>,
    /// More than 0.
    #[schemars(range(min = 0, max = 10))]
    pub(super) repetition_penalty: Option<f32>,
    /// `enable_thinking` and `thinking`, true or false.
    #[schemars(with = "Option<BTreeMap<String, bool>>")]
    pub(super) chat_template_kwargs: Option<HashMap<String, Value>>,
    // Understood and not served yet: refused where they would change the answer.
    #[schemars(skip)]
    pub(super) suffix: Option<String>,
    #[schemars(skip)]
    pub(super) prompt_logprobs: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) min_tokens: Option<u32>,
    #[schemars(skip)]
    pub(super) stop_token_ids: Option<Vec<IgnoredAny>>,
    #[schemars(skip)]
    pub(super) tools: Option<Vec<IgnoredAny>>,
    #[schemars(skip)]
    pub(super) tool_choice: Option<Value>,
    #[schemars(skip)]
    pub(super) functions: Option<Vec<IgnoredAny>>,
    #[schemars(skip)]
    pub(super) response_format: Option<Object<ResponseFormat>>,
    #[schemars(skip)]
    pub(super) guided_json: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) guided_regex: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) guided_choice: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) guided_grammar: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) structured_outputs: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) chat_template: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) continue_final_message: Option<bool>,
    #[schemars(skip)]
    pub(super) audio: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) modalities: Option<Vec<String>>,
    #[schemars(skip)]
    pub(super) web_search_options: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) add_generation_prompt: Option<bool>,
    #[schemars(skip)]
    pub(super) include_stop_str_in_output: Option<bool>,
    #[schemars(skip)]
    pub(super) allowed_token_ids: Option<Vec<IgnoredAny>>,
    #[schemars(skip)]
    pub(super) bad_words: Option<Vec<IgnoredAny>>,
    #[schemars(skip)]
    pub(super) truncate_prompt_tokens: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) use_beam_search: Option<bool>,
    #[schemars(skip)]
    pub(super) grammar: Option<String>,
    #[schemars(skip)]
    pub(super) json_schema: Option<IgnoredAny>,
    #[schemars(skip)]
    pub(super) reasoning_effort: Option<String>,
}

/// One chat message as it comes in.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["role", "content"]))]
pub(super) struct ChatMessage {
    #[schemars(extend("enum" = ["system", "developer", "user", "assistant", "tool"]))]
    pub(super) role: String,
    #[serde(default)]
    #[schemars(required)]
    pub(super) content: Option<Content>,
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub(super) name: Option<String>,
    #[serde(default)]
    #[schemars(skip)]
    pub(super) tool_calls: Option<Vec<IgnoredAny>>,
}

/// A message's content: a string, or parts of which only text is served.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    Text(String),
    /// The type of the first part that is not text.
    NotText(String),
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "TextPart", extend("required" = ["type", "text"]))]
struct Part {
    #[schemars(extend("const" = "text"))]
    r#type: String,
    #[serde(default)]
    #[schemars(required)]
    text: Option<String>,
}

/// One stop string or several.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Stop {
    One(#[schemars(length(min = 1, max = 1024))] String),
    Many(#[schemars(length(max = 4), inner(length(min = 1, max = 1024)))] Vec<String>),
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct StreamOptions {
    /// Whether a last chunk has the usage.
    #[serde(default)]
    pub(super) include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ResponseFormat {
    pub(super) r#type: String,
}

/// The body of `/v1/embeddings`.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["model", "input"]))]
pub(super) struct EmbeddingsBody {
    #[serde(default)]
    #[schemars(required)]
    pub(super) model: Option<String>,
    #[serde(default)]
    #[schemars(required)]
    pub(super) input: Option<Input>,
    #[serde(default)]
    #[schemars(extend("enum" = ["float", "base64", null]))]
    pub(super) encoding_format: Option<String>,
    /// Fewer than the model has only where it was trained for that.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub(super) dimensions: Option<u64>,
}

impl JsonSchema for Content {
    fn schema_name() -> Cow<'static, str> {
        "Content".into()
    }

    fn json_schema(schemas: &mut SchemaGenerator) -> Schema {
        let part = schemas.subschema_for::<Part>();
        json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": part}]})
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or an array of content parts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
        Ok(Content::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
        let mut texts = Vec::new();
        let mut other = None;
        while let Some(Object(part)) = parts.next_element::<Object<Part>>()? {
            match (part.r#type.as_str(), part.text) {
                ("text", Some(text)) => texts.push(text),
                ("text", None) => return Err(de::Error::missing_field("text")),
                _ => other = other.or(Some(part.r#type)),
            }
        }
        Ok(other.map_or_else(|| Content::Text(texts.join("\n")), Content::NotText))
    }
}

/// Tokens in and out, as every endpoint reports them.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub(super) struct GenerateUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[schemars(rename = "PromptTokens")]
struct PromptDetails {
    cached_tokens: u32,
}

#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[schemars(rename = "CompletionTokens")]
struct CompletionDetails {
    reasoning_tokens: u32,
}

impl From<Usage> for GenerateUsage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.generated_tokens,
            total_tokens: usage.prompt_tokens + usage.generated_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
            completion_tokens_details: CompletionDetails { reasoning_tokens: 0 },
        }
    }
}

/// A whole answer, or one chunk of it.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Generated{C}")]
pub(super) struct Answer<'a, C> {
    pub(super) id: &'a str,
    #[schemars(extend("enum" = ["chat.completion", "chat.completion.chunk", "text_completion"]))]
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: &'a [C],
    /// Left out of chunks unless the caller asked for usage; then null in all but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<GenerateUsage>>,
}

/// A choice of a chat completion.
#[derive(Serialize, JsonSchema)]
pub(super) struct ChatChoice<'a> {
    pub(super) index: u32,
    pub(super) message: AnswerMessage<'a>,
    pub(super) logprobs: Option<ChatLogprobs<'a>>,
    #[schemars(extend("enum" = ["stop", "length"]))]
    pub(super) finish_reason: &'static str,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct AnswerMessage<'a> {
    #[schemars(extend("const" = "assistant"))]
    pub(super) role: &'static str,
    pub(super) content: &'a str,
    pub(super) refusal: Option<()>,
}

/// A choice of a chat chunk.
#[derive(Serialize, JsonSchema)]
pub(super) struct ChatDelta<'a> {
    pub(super) index: u32,
    pub(super) delta: Delta<'a>,
    pub(super) logprobs: Option<ChatLogprobs<'a>>,
    #[schemars(extend("enum" = ["stop", "length", null]))]
    pub(super) finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize, JsonSchema)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<&'a str>,
}

/// A choice of a completion, whole or chunk.
#[derive(Serialize, JsonSchema)]
pub(super) struct TextChoice<'a> {
    pub(super) text: &'a str,
    pub(super) index: u32,
    pub(super) logprobs: Option<TextLogprobs<'a>>,
    #[schemars(extend("enum" = ["stop", "length", null]))]
    pub(super) finish_reason: Option<&'static str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_text_parts_or_named_otherwise() {
        let parse = |json: &str| serde_json::from_str::<Content>(json);
        assert_eq!(parse(r#""hi""#).unwrap(), Content::Text("hi".into()));
        let parts = r#"[{"type":"text","text":"a"},{"type":"text","text":"b"}]"#;
        assert_eq!(parse(parts).unwrap(), Content::Text("a\nb".into()));
        let image = r#"[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"x"}}]"#;
        assert_eq!(parse(image).unwrap(), Content::NotText("image_url".into()));
        assert!(parse(r#"[{"type":"text"}]"#).is_err());
        assert!(parse("[1]").is_err());
        assert!(parse("{}").is_err());
    }
}
