//! What is asked of a model: requests a second, lengths, an objective. Knows how it is written.

use std::collections::BTreeMap;

use super::devices::Assumptions;
use super::model::Model;
use super::{Fault, PlanError};
use crate::config::manifest::LATENCY_SECONDS;
use crate::config::values::nearest;

/// The load of one model.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Load {
    /// Requests a second; 0: none is known.
    pub(super) rps: f64,
    /// Tokens of a request, and of its answer (0 for encoders).
    pub(super) prompt: u32,
    pub(super) output: u32,
    /// 95 of 100 requests should take no longer.
    pub(super) latency_seconds: Option<f64>,
    /// Longest sequence to serve.
    pub(super) context: u32,
}

/// What was given, by model, not yet completed.
#[derive(Debug, Default, Clone)]
struct Given {
    numbers: BTreeMap<&'static str, f64>,
}

/// Keys, and the range of each.
const KEYS: [(&str, f64, f64); 5] = [
    ("rps", 0.000_001, 1e6),
    ("prompt", 1.0, 16_777_216.0),
    ("output", 1.0, 16_777_216.0),
    ("latency", *LATENCY_SECONDS.start(), *LATENCY_SECONDS.end()),
    ("context", 1.0, 16_777_216.0),
];

/// The loads of `models`, completed by manifests and assumptions, and notes of what was assumed.
///
/// # Errors
/// A text that is no load, or names a model that is not there.
pub(super) fn complete(
    models: &[Model],
    texts: &[String],
    assumed: &Assumptions,
) -> Result<(Vec<Load>, Vec<String>), PlanError> {
    let mut given: BTreeMap<String, Given> = BTreeMap::new();
    for text in texts {
        let (name, load) = parse(text)?;
        if !models.iter().any(|model| model.name == name) {
            let known: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
            let hint = nearest(&name, known.iter().copied())
                .map(|nearest| format!(" did you mean {nearest}?"))
                .unwrap_or_default();
            let message = format!("--load {text:?}: no such model:{hint} here are {known:?}");
            return Err(PlanError::new(Fault::Usage, message));
        }
        given.entry(name).or_default().numbers.extend(load.numbers);
    }
    let mut notes = Vec::new();
    let mut loads = Vec::new();
    for model in models {
        let given = given.remove(&model.name).unwrap_or_default();
        loads.push(one(model, &given, assumed, &mut notes)?);
    }
    Ok((loads, notes))
}

fn one(
    model: &Model,
    given: &Given,
    assumed: &Assumptions,
    notes: &mut Vec<String>,
) -> Result<Load, PlanError> {
    let name = &model.name;
    let number = |key: &str| given.numbers.get(key).copied();
    let whole = |key: &str| number(key).map(|value| value as u32);
    let made_for = u32::try_from(model.shape.context).unwrap_or(u32::MAX);
    let prompt = whole("prompt");
    let output = if model.shape.decoder { whole("output") } else { Some(0) };
    let rps = number("rps").unwrap_or(0.0);
    let allowed = whole("context").or(model.context).unwrap_or_else(|| {
        let least = prompt.unwrap_or(0) + output.unwrap_or(0);
        if model.from != "shape" || made_for <= assumed.context_tokens.max(least) {
            return made_for;
        }
        let context = assumed.context_tokens.max(least);
        notes.push(format!("{name}: context {context} of the {made_for} that it was made for"));
        context
    });
    let context = allowed.min(made_for);
    let mut fallback = (assumed.prompt_tokens, assumed.output_tokens);
    if prompt.is_none() || output.is_none() {
        // Something that fits, where less than the usual lengths is allowed.
        if model.shape.decoder && fallback.0 + fallback.1 > context {
            fallback = ((context / 2).max(1), (context / 4).max(1));
        }
        fallback.0 = fallback.0.min(context);
    }
    let load = Load {
        rps,
        prompt: prompt.unwrap_or(fallback.0),
        output: output.unwrap_or(fallback.1),
        latency_seconds: number("latency").or(model.latency_seconds),
        context,
    };
    if prompt.is_none() {
        let Load { prompt, output, .. } = load;
        let and = if output > 0 { format!(", answers of {output}") } else { String::new() };
        notes.push(format!("{name}: prompts of {prompt} tokens{and}; --load says otherwise"));
    }
    if load.prompt + load.output > context {
        let message = format!(
            "{name}: {} tokens of prompt and {} of answer are more than its context of {context}",
            load.prompt, load.output
        );
        return Err(PlanError::new(Fault::Usage, message));
    }
    Ok(load)
}

/// `MODEL:rps=2,prompt=500,output=200,latency=10,context=4096`.
fn parse(text: &str) -> Result<(String, Given), PlanError> {
    let usage = |what: String| PlanError::new(Fault::Usage, format!("--load {text:?}: {what}"));
    let form = "MODEL:rps=2,prompt=500,output=200,latency=10,context=4096 (any of these)";
    let Some((name, rest)) = text.rsplit_once(':') else {
        return Err(usage(format!("must be {form}")));
    };
    let mut given = Given::default();
    for pair in rest.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let Some((key, least, most)) = KEYS.into_iter().find(|(known, ..)| *known == key) else {
            return Err(usage(format!("no key {key:?}; must be {form}")));
        };
        let value = value.parse().ok().filter(|value| (least..=most).contains(value));
        let value = value.ok_or_else(|| usage(format!("{key} is from {least} to {most}")))?;
        given.numbers.insert(key, value);
    }
    Ok((name.to_owned(), given))
}
