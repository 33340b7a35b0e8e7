//! Checks what a generation body asks for: ranges, limits, and the fields that are understood
//! and not served yet. Those are refused by name, never ignored.

use std::sync::Arc;

use serde_json::Value;

use super::openai::{GenerateBody, Stop};
use super::sampling;
use super::sse::Shape;
use crate::config::Limits;
use crate::error::{Error, ErrorKind, Result};
use crate::request::{Detail, Generate, Sampling, TokenId};
use crate::text::{ChatTemplate, ModelText};

/// What the API and the templates that know efforts take for granted.
const DEFAULT_EFFORT: &str = "medium";

/// Most stop strings, and the longest one in bytes.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 1024;

/// The checked part of a generation body that does not depend on the model.
#[derive(Debug)]
pub(super) struct Params {
    pub(super) shape: Shape,
    pub(super) sampling: Sampling,
    pub(super) detail: Detail,
    /// Answers to each prompt.
    pub(super) choices: u32,
    /// Whether each answer begins with its prompt.
    pub(super) echo: bool,
    /// What the chat template is told besides the messages.
    pub(super) flags: Vec<(&'static str, bool)>,
    pub(super) max_tokens: Option<u32>,
    pub(super) stops: Vec<String>,
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

impl Params {
    /// Takes its part out of `body`.
    ///
    /// # Errors
    /// `InvalidRequest` out of range, `Unsupported` for what is not served yet.
    pub(super) fn take(body: &mut GenerateBody, shape: Shape, limits: &Limits) -> Result<Self> {
        refuse_unserved(body, shape)?;
        let stream = body.stream.unwrap_or(false);
        if !stream && body.stream_options.is_some() {
            let message = "stream_options needs stream to be true";
            return Err(Error::invalid("stream_options", message));
        }
        let include_usage =
            body.stream_options.as_ref().and_then(|options| options.0.include_usage);
        Ok(Self {
            shape,
            sampling: sampling::sampling(body)?,
            choices: sampling::choices(body, limits.max_choices)?,
            echo: sampling::echo(body)?,
            flags: flags(body)?,
            detail: sampling::detail(body, shape)?,
            max_tokens: max_tokens(body)?,
            stops: stops(body.stop.take())?,
            ignore_eos: body.ignore_eos.unwrap_or(false),
            stream,
            include_usage: include_usage.unwrap_or(false),
        })
    }

    /// The scheduler's view, for one prompt of a model with `context` tokens, and its first choice.
    ///
    /// # Errors
    /// `ContextLengthExceeded` if the prompt leaves no room, or less than explicitly asked for;
    /// `InvalidRequest` for a bias of a token that the model does not have.
    pub(super) fn generate(
        &self,
        prompt: Arc<[TokenId]>,
        text: &ModelText,
        context: u32,
    ) -> Result<Generate> {
        sampling::check_bias(&self.detail, text.tokenizer.vocab_size())?;
        let length = prompt.len();
        if length == 0 {
            return Err(Error::new(ErrorKind::InvalidRequest, "the prompt is empty"));
        }
        let rest = (context as usize).saturating_sub(length) as u32;
        let wanted = self.max_tokens.unwrap_or_else(|| self.shape.default_max().min(rest));
        if rest == 0 || wanted > rest {
            let asked = match self.max_tokens {
                Some(wanted) => format!(" and asks for {wanted} more"),
                None => String::new(),
            };
            let message = format!(
                "the prompt has {length} tokens{asked}; the model's context is {context} tokens \
                 (limits.context)"
            );
            return Err(Error::new(ErrorKind::ContextLengthExceeded, message));
        }
        let stop_tokens =
            if self.ignore_eos { Arc::default() } else { Arc::clone(&text.stop_tokens) };
        let (sampling, detail) = (self.sampling, self.detail.clone());
        Ok(Generate { prompt, max_tokens: wanted, stop_tokens, sampling, detail })
    }
}

fn refuse_unserved(body: &GenerateBody, shape: Shape) -> Result<()> {
    let filled = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let choice = body.tool_choice.as_ref().filter(|choice| !choice.is_null());
    let choice_is = |name: &str| choice.and_then(Value::as_str) == Some(name);
    let chat = shape == Shape::Chat;
    let not_text =
        |kinds: &Vec<String>| kinds.is_empty() || kinds.iter().any(|kind| kind != "text");
    let refused = [
        ("echo", chat && body.echo == Some(true)),
        ("suffix", body.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
        ("top_logprobs", !chat && body.top_logprobs.is_some_and(|n| n > 0)),
        ("prompt_logprobs", body.prompt_logprobs.is_some()),
        ("min_tokens", body.min_tokens.is_some_and(|n| n > 0)),
        ("stop_token_ids", filled(&body.stop_token_ids)),
        ("tools", filled(&body.tools) && !choice_is("none")),
        ("tool_choice", choice.is_some() && !choice_is("none") && !choice_is("auto")),
        ("functions", filled(&body.functions)),
        ("response_format", body.response_format.as_ref().is_some_and(|f| f.0.r#type != "text")),
        ("guided_json", body.guided_json.is_some()),
        ("guided_regex", body.guided_regex.is_some()),
        ("guided_choice", body.guided_choice.is_some()),
        ("guided_grammar", body.guided_grammar.is_some()),
        ("structured_outputs", body.structured_outputs.is_some()),
        ("chat_template", body.chat_template.is_some()),
        ("continue_final_message", body.continue_final_message == Some(true)),
        ("audio", body.audio.is_some()),
        ("modalities", body.modalities.as_ref().is_some_and(not_text)),
        ("web_search_options", body.web_search_options.is_some()),
        ("add_generation_prompt", chat && body.add_generation_prompt == Some(false)),
        ("include_stop_str_in_output", body.include_stop_str_in_output == Some(true)),
        ("allowed_token_ids", filled(&body.allowed_token_ids)),
        ("bad_words", filled(&body.bad_words)),
        ("truncate_prompt_tokens", body.truncate_prompt_tokens.is_some()),
        ("use_beam_search", body.use_beam_search == Some(true)),
        ("grammar", body.grammar.as_ref().is_some_and(|grammar| !grammar.is_empty())),
        ("json_schema", body.json_schema.is_some()),
    ];
    match refused.into_iter().find(|&(_, asked)| asked) {
        None => Ok(()),
        Some((name, _)) => Err(unserved(name)),
    }
}

fn unserved(name: &'static str) -> Error {
    let message = format!("'{name}' is not served with this value; leave it out");
    Error::new(ErrorKind::Unsupported, message).at(name)
}

/// Refuses an effort that the model's own template would look at: it is a hint to all others, and
/// clients send it to every model.
///
/// # Errors
/// `Unsupported`.
pub(super) fn check_effort(effort: Option<&str>, template: Option<&ChatTemplate>) -> Result<()> {
    let Some(effort) = effort else { return Ok(()) };
    let asks_for = |name| template.is_some_and(|template| template.mentions(name));
    let switches = effort == "none" && FLAGS.iter().any(|flag| asks_for(flag));
    let tells = effort != DEFAULT_EFFORT && asks_for("reasoning_effort");
    if switches || tells { Err(unserved("reasoning_effort")) } else { Ok(()) }
}

/// What may be said to a chat template: switches that models' own templates ask for, by name.
const FLAGS: [&str; 2] = ["enable_thinking", "thinking"];

fn flags(body: &GenerateBody) -> Result<Vec<(&'static str, bool)>> {
    let given = body.chat_template_kwargs.iter().flatten();
    let flag = |(name, value): (&String, &Value)| {
        let known = FLAGS.into_iter().find(|known| known == name);
        known.zip(value.as_bool()).ok_or_else(|| {
            let shown: String = name.chars().take(40).collect();
            let allowed = FLAGS.join(", ");
            let message = format!("'{shown}' is not one of {allowed}, which take true or false");
            Error::invalid("chat_template_kwargs", message)
        })
    };
    given.map(flag).collect()
}

fn max_tokens(body: &GenerateBody) -> Result<Option<u32>> {
    let (name, value) = match body.max_completion_tokens {
        Some(value) => ("max_completion_tokens", Some(value)),
        None => ("max_tokens", body.max_tokens),
    };
    if value == Some(0) {
        return Err(Error::invalid(name, format!("{name} has to be at least 1")));
    }
    Ok(value)
}

fn stops(stop: Option<Stop>) -> Result<Vec<String>> {
    let stops = match stop {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Many(stops)) => stops,
    };
    if stops.len() > STOPS_MAX {
        let message = format!("{} stop strings, at most {STOPS_MAX}", stops.len());
        return Err(Error::invalid("stop", message));
    }
    if let Some(stop) = stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        let message =
            format!("a stop string has {} bytes, it takes 1 to {STOP_BYTES_MAX}", stop.len());
        return Err(Error::invalid("stop", message));
    }
    Ok(stops)
}
