//! The two views of a generation body: chat has messages, completions have a prompt, and
//! log-probabilities are asked for in two ways.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use crate::http::openai::GenerateBody;

/// A [`GenerateBody`] of `/v1/chat/completions`.
pub(in crate::http) struct ChatBody;

/// A [`GenerateBody`] of `/v1/completions`.
pub(in crate::http) struct TextBody;

impl JsonSchema for ChatBody {
    fn schema_name() -> Cow<'static, str> {
        "ChatBody".into()
    }

    fn json_schema(schemas: &mut SchemaGenerator) -> Schema {
        let mut logprobs = schemas.subschema_for::<Option<bool>>();
        logprobs.insert("description".into(), "Whether tokens come with theirs.".into());
        view(schemas, ["model", "messages"], &["prompt", "echo"], logprobs)
    }
}

impl JsonSchema for TextBody {
    fn schema_name() -> Cow<'static, str> {
        "CompletionBody".into()
    }

    fn json_schema(schemas: &mut SchemaGenerator) -> Schema {
        let logprobs = json_schema!({
            "description": "How many of the likeliest tokens are listed; not together with `echo`.",
            "anyOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"enum": [false, null]}],
        });
        let without = ["messages", "top_logprobs", "chat_template_kwargs"];
        view(schemas, ["model", "prompt"], &without, logprobs)
    }
}

fn view(
    schemas: &mut SchemaGenerator,
    required: [&str; 2],
    without: &[&str],
    logprobs: Schema,
) -> Schema {
    let mut schema = GenerateBody::json_schema(schemas);
    let fields = schema.get_mut("properties").and_then(|fields| fields.as_object_mut());
    let fields = fields.expect("a body has fields");
    fields.retain(|name, _| !without.contains(&name.as_str()));
    for name in required {
        // The type is one or null; null is as good as missing.
        if let Some(kind) = fields[name].get_mut("type").filter(|kind| kind.is_array()) {
            *kind = kind[0].take();
        } else if let Some(kinds) = fields[name].get_mut("anyOf") {
            fields[name] = kinds[0].take();
        }
    }
    fields.insert("logprobs".into(), logprobs.into());
    schema.insert("required".into(), required.to_vec().into());
    schema.remove("description");
    schema
}
