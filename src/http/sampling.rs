//! How tokens are to be chosen, out of a generation body: ranges and limits. Knows no model but
//! the size of its vocabulary.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use super::openai::GenerateBody;
use super::sse::Shape;
use crate::error::{Error, ErrorKind, Result};
use crate::request::{Adjustment, Detail, Sampling, TokenId};

/// Most tokens with a bias.
const BIASES_MAX: usize = 1024;

/// Largest bias: as good as always or never.
const BIAS_MAX: f64 = 100.0;

/// Largest repetition penalty; beyond 2 nothing sensible comes out.
const REPETITION_MAX: f32 = 10.0;

/// Most likely tokens that are listed beside each token.
const CHAT_TOP_MAX: u64 = 20;
const TEXT_TOP_MAX: u64 = 5;

/// Temperature, filters and seed.
///
/// # Errors
/// `InvalidRequest` out of range.
pub(super) fn sampling(body: &GenerateBody) -> Result<Sampling> {
    let share = |name, value, default, most| within(name, value, default, 0.0..=most);
    let top_k = match body.top_k.unwrap_or(0) {
        -1 => 0,
        k => u32::try_from(k).map_err(|_| {
            Error::invalid("top_k", format!("top_k is {k}, it has to be -1, 0 or positive"))
        })?,
    };
    Ok(Sampling {
        temperature: share("temperature", body.temperature, 1.0, 2.0)?,
        top_p: share("top_p", body.top_p, 1.0, 1.0)?,
        top_k,
        min_p: share("min_p", body.min_p, 0.0, 1.0)?,
        seed: body.seed.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |seed| seed as u64),
        choice: 0,
    })
}

/// How many answers each prompt gets.
///
/// # Errors
/// `InvalidRequest` beyond `most` (`limits.max_choices`), `Unsupported` for a `best_of` of its own.
pub(super) fn choices(body: &GenerateBody, most: usize) -> Result<u32> {
    let choices = body.n.unwrap_or(1);
    if choices == 0 || choices as usize > most {
        let message =
            format!("n is {choices}, it has to be within 1 and {most} (limits.max_choices)");
        return Err(Error::invalid("n", message));
    }
    match body.best_of {
        Some(best_of) if best_of != choices => {
            let message = format!(
                "best_of is {best_of} and n is {choices}: answers that are computed and not shown \
                 are not served; ask for n answers with logprobs and choose among them"
            );
            Err(Error::new(ErrorKind::Unsupported, message).at("best_of"))
        }
        _ => Ok(choices),
    }
}

/// Whether each answer begins with its prompt.
///
/// # Errors
/// `Unsupported` together with log-probabilities: those of the prompt would be part of it.
pub(super) fn echo(body: &GenerateBody) -> Result<bool> {
    let echo = body.echo.unwrap_or(false);
    let scored = body.logprobs.as_ref().is_some_and(Value::is_number);
    if echo && scored {
        let message = "echo with logprobs needs those of the prompt, which are not computed; \
                       leave one of them out";
        return Err(Error::new(ErrorKind::Unsupported, message).at("echo"));
    }
    Ok(echo)
}

/// Penalties, bias and log-probabilities.
///
/// # Errors
/// `InvalidRequest` out of range.
pub(super) fn detail(body: &GenerateBody, shape: Shape) -> Result<Detail> {
    let penalty = |name, value| within(name, value, 0.0, -2.0..=2.0);
    let repetition =
        within("repetition_penalty", body.repetition_penalty, 1.0, 0.0..=REPETITION_MAX)?;
    if repetition == 0.0 {
        let message = "repetition_penalty is 0, it has to be above";
        return Err(Error::invalid("repetition_penalty", message));
    }
    let adjustment = Adjustment {
        bias: body.logit_bias.as_ref().map_or_else(|| Ok(Vec::new()), bias)?,
        repetition,
        frequency: penalty("frequency_penalty", body.frequency_penalty)?,
        presence: penalty("presence_penalty", body.presence_penalty)?,
    };
    let adjustment = (!adjustment.is_neutral()).then(|| Arc::new(adjustment));
    let logprobs = match shape {
        Shape::Chat => chat_logprobs(body)?,
        Shape::Text => text_logprobs(body.logprobs.as_ref())?,
    };
    Ok(Detail { adjustment, logprobs })
}

/// Whether the bias is for tokens of this vocabulary.
///
/// # Errors
/// `InvalidRequest` naming the token.
pub(super) fn check_bias(detail: &Detail, vocabulary: usize) -> Result<()> {
    let bias = detail.adjustment.iter().flat_map(|adjustment| &adjustment.bias);
    match bias.map(|&(token, _)| token).find(|&token| token as usize >= vocabulary) {
        None => Ok(()),
        Some(token) => {
            let message = format!("token id {token} is not one of this model's {vocabulary}");
            Err(Error::invalid("logit_bias", message))
        }
    }
}

fn bias(given: &HashMap<String, Value>) -> Result<Vec<(TokenId, f32)>> {
    let invalid = |message: String| Error::invalid("logit_bias", message);
    if given.len() > BIASES_MAX {
        return Err(invalid(format!("{} biases, at most {BIASES_MAX}", given.len())));
    }
    let entry = |(token, value): (&String, &Value)| {
        let shown = || token.chars().take(40).collect::<String>();
        // Only digits: a sign would make two keys of one token, and so would a leading zero.
        let id = token.parse::<TokenId>().ok().filter(|id| id.to_string() == *token);
        let id = id.ok_or_else(|| invalid(format!("'{}' is not a token id", shown())))?;
        let value = value.as_f64().filter(|value| value.abs() <= BIAS_MAX).ok_or_else(|| {
            let message = format!(
                "the bias of '{}' has to be a number within -{BIAS_MAX} and {BIAS_MAX}",
                shown()
            );
            invalid(message)
        })?;
        Ok((id, value as f32))
    };
    let mut bias = given.iter().map(entry).collect::<Result<Vec<_>>>()?;
    bias.retain(|&(_, value)| value != 0.0);
    bias.sort_unstable_by_key(|&(id, _)| id);
    Ok(bias)
}

fn chat_logprobs(body: &GenerateBody) -> Result<Option<u8>> {
    let asked = match &body.logprobs {
        None | Some(Value::Null) => false,
        Some(Value::Bool(asked)) => *asked,
        Some(_) => {
            let message = "logprobs is true or false here; top_logprobs says how many";
            return Err(Error::invalid("logprobs", message));
        }
    };
    let top = body.top_logprobs.unwrap_or(0);
    if top > 0 && !asked {
        return Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    if u64::from(top) > CHAT_TOP_MAX {
        let message = format!("top_logprobs is {top}, at most {CHAT_TOP_MAX}");
        return Err(Error::invalid("top_logprobs", message));
    }
    Ok(asked.then_some(top as u8))
}

fn text_logprobs(given: Option<&Value>) -> Result<Option<u8>> {
    match given {
        None | Some(Value::Null | Value::Bool(false)) => Ok(None),
        Some(given) => match given.as_u64().filter(|&top| top <= TEXT_TOP_MAX) {
            Some(top) => Ok(Some(top as u8)),
            None => {
                let message = format!("logprobs has to be a whole number from 0 to {TEXT_TOP_MAX}");
                Err(Error::invalid("logprobs", message))
            }
        },
    }
}

fn within(
    name: &'static str,
    value: Option<f32>,
    default: f32,
    range: std::ops::RangeInclusive<f32>,
) -> Result<f32> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    let (least, most) = range.into_inner();
    let message = format!("{name} is {value}, it has to be within {least} and {most}");
    Err(Error::invalid(name, message))
}
