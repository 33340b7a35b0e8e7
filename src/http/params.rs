//! Checks what a generation body asks for: ranges, limits, and the fields that are understood
//! and not served yet. Those are refused by name, never ignored.

use serde_json::Value;

use super::openai::{GenerateBody, Stop};
use crate::error::{Error, ErrorKind, Result};
use crate::request::{Generate, Sampling, TokenId};
use crate::text::ModelText;
use std::sync::Arc;

/// Most stop strings, and the longest one in bytes.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 1024;

/// The checked part of a generation body that does not depend on the model.
#[derive(Debug)]
pub(super) struct Params {
    pub(super) sampling: Sampling,
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
    pub(super) fn take(body: &mut GenerateBody) -> Result<Self> {
        refuse_unserved(body)?;
        let stream = body.stream.unwrap_or(false);
        if !stream && body.stream_options.is_some() {
            let message = "stream_options needs stream to be true";
            return Err(Error::invalid("stream_options", message));
        }
        let include_usage = body.stream_options.as_ref().and_then(|options| options.include_usage);
        Ok(Self {
            sampling: sampling(body)?,
            max_tokens: max_tokens(body)?,
            stops: stops(body.stop.take())?,
            ignore_eos: body.ignore_eos.unwrap_or(false),
            stream,
            include_usage: include_usage.unwrap_or(false),
        })
    }

    /// The scheduler's view, for one prompt of a model with `context` tokens; `default_max` is
    /// how long an answer may be when the caller does not say: the rest of the context at most.
    ///
    /// # Errors
    /// `ContextLengthExceeded` if the prompt leaves no room, or less than explicitly asked for.
    pub(super) fn generate(
        &self,
        prompt: Arc<[TokenId]>,
        text: &ModelText,
        context: u32,
        default_max: u32,
    ) -> Result<Generate> {
        let length = prompt.len();
        if length == 0 {
            return Err(Error::new(ErrorKind::InvalidRequest, "the prompt is empty"));
        }
        let rest = (context as usize).saturating_sub(length) as u32;
        let wanted = self.max_tokens.unwrap_or_else(|| default_max.min(rest));
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
        Ok(Generate { prompt, max_tokens: wanted, stop_tokens, sampling: self.sampling })
    }
}

fn refuse_unserved(body: &GenerateBody) -> Result<()> {
    let not_neutral = |value: Option<f32>, neutral| value.is_some_and(|value| value != neutral);
    let filled = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let choice = body.tool_choice.as_ref().filter(|choice| !choice.is_null());
    let choice_is = |name: &str| choice.and_then(Value::as_str) == Some(name);
    let logprobs = body.logprobs.as_ref();
    let not_text =
        |kinds: &Vec<String>| kinds.is_empty() || kinds.iter().any(|kind| kind != "text");
    let refused = [
        ("n", body.n.is_some_and(|n| n != 1)),
        ("best_of", body.best_of.is_some_and(|n| n != 1)),
        ("echo", body.echo == Some(true)),
        ("suffix", body.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
        ("logprobs", logprobs.is_some_and(|logprobs| *logprobs != Value::Bool(false))),
        ("top_logprobs", body.top_logprobs.is_some_and(|n| n > 0)),
        ("prompt_logprobs", body.prompt_logprobs.is_some()),
        ("logit_bias", body.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty())),
        ("frequency_penalty", not_neutral(body.frequency_penalty, 0.0)),
        ("presence_penalty", not_neutral(body.presence_penalty, 0.0)),
        ("repetition_penalty", not_neutral(body.repetition_penalty, 1.0)),
        ("min_tokens", body.min_tokens.is_some_and(|n| n > 0)),
        ("stop_token_ids", filled(&body.stop_token_ids)),
        ("tools", filled(&body.tools) && !choice_is("none")),
        ("tool_choice", choice.is_some() && !choice_is("none") && !choice_is("auto")),
        ("functions", filled(&body.functions)),
        ("response_format", body.response_format.as_ref().is_some_and(|f| f.r#type != "text")),
        ("guided_json", body.guided_json.is_some()),
        ("guided_regex", body.guided_regex.is_some()),
        ("guided_choice", body.guided_choice.is_some()),
        ("guided_grammar", body.guided_grammar.is_some()),
        ("structured_outputs", body.structured_outputs.is_some()),
        ("chat_template", body.chat_template.is_some()),
        (
            "chat_template_kwargs",
            body.chat_template_kwargs.as_ref().is_some_and(|kwargs| !kwargs.is_empty()),
        ),
        ("continue_final_message", body.continue_final_message == Some(true)),
        ("audio", body.audio.is_some()),
        ("modalities", body.modalities.as_ref().is_some_and(not_text)),
        ("web_search_options", body.web_search_options.is_some()),
    ];
    match refused.into_iter().find(|&(_, asked)| asked) {
        None => Ok(()),
        Some((name, _)) => {
            let message = format!("'{name}' is not served with this value; leave it out");
            Err(Error::new(ErrorKind::Unsupported, message).at(name))
        }
    }
}

fn sampling(body: &GenerateBody) -> Result<Sampling> {
    let within = |name, value: Option<f32>, default: f32, most: f32| {
        let value = value.unwrap_or(default);
        if (0.0..=most).contains(&value) {
            return Ok(value);
        }
        Err(Error::invalid(name, format!("{name} is {value}, it has to be within 0 and {most}")))
    };
    let top_k = match body.top_k.unwrap_or(0) {
        -1 => 0,
        k => u32::try_from(k).map_err(|_| {
            Error::invalid("top_k", format!("top_k is {k}, it has to be -1, 0 or positive"))
        })?,
    };
    Ok(Sampling {
        temperature: within("temperature", body.temperature, 1.0, 2.0)?,
        top_p: within("top_p", body.top_p, 1.0, 1.0)?,
        top_k,
        min_p: within("min_p", body.min_p, 0.0, 1.0)?,
        seed: body.seed.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |seed| seed as u64),
        choice: 0,
    })
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
