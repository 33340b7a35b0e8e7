//! `/predict` and this API's form of `/rerank`.

use std::time::Instant;

use axum::extract::Request;
use schemars::JsonSchema;
use serde::Serialize;

use super::refusal::Refusal;
use super::wire::{CutFields, PredictBody, Prediction};
use super::{Call, Done};
use crate::error::Error;
use crate::http::body;
use crate::http::encode::{self, Encoded, INPUTS_MAX};
use crate::http::rerank::{Ranking, RerankBody, rank};
use crate::model::{EncoderCard, ModelTask};
use crate::request::Yield;

/// A cross-encoder is a classifier of one label.
const PREDICT: [ModelTask; 2] = [ModelTask::Classify, ModelTask::Rerank];
const RERANK: [ModelTask; 1] = [ModelTask::Rerank];

/// One text of a ranking, the best first.
#[derive(Serialize, JsonSchema)]
pub(super) struct Rank<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    score: f32,
}

/// A score for each label, the best first.
pub(super) async fn predict(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: PredictBody = body::json(&front, &mut call.ticket, request).await?;
    let inputs = body.inputs.ok_or_else(|| Error::invalid("inputs", "`inputs` is required"))?;
    if inputs.len() > INPUTS_MAX {
        return Err(Refusal::too_many(inputs.len(), INPUTS_MAX));
    }
    let (passages, many) = inputs.passages()?;
    let texts = passages.iter().flat_map(|passage| passage.texts());
    let characters = texts.map(|text| text.chars().count()).sum();
    let model = call.model(&front, body.model.as_ref(), &PREDICT)?;
    let entry = front.enter_model(&mut call.ticket, model)?;
    let cut = body.cut.read(model.context())?;
    let started = Instant::now();
    let inputs = front.encode_passages(entry, passages, cut).await?;
    let tokenised = started.elapsed();
    let encoded = encode::run(&front, &mut call.ticket, model, inputs, Yield::Answer).await?;
    let Encoded { mut vectors, usage } = encoded;
    let card = model.encoder()?;
    let predict =
        |scores: &mut Vec<f32>| predictions(card, scores, body.raw_scores.unwrap_or(false));
    let predictions: Vec<Vec<Prediction<'_>>> = vectors.iter_mut().map(predict).collect();
    let json = match &predictions[..] {
        [one] if !many => serde_json::to_vec(one),
        all => serde_json::to_vec(all),
    };
    let json = json.expect("strings and finite numbers always serialise");
    Ok(Done { json, usage, characters, tokenised })
}

fn predictions<'c>(card: &'c EncoderCard, scores: &mut [f32], raw: bool) -> Vec<Prediction<'c>> {
    if !raw {
        encode::probabilities(card, scores);
    }
    let labels = scores.iter().zip(&card.labels);
    let mut predictions: Vec<Prediction<'c>> =
        labels.map(|(&score, label)| Prediction { score, label }).collect();
    predictions.sort_by(|a, b| b.score.total_cmp(&a.score));
    predictions
}

/// Texts by how well they answer a query.
pub(super) async fn rerank(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: RerankBody = body::json(&front, &mut call.ticket, request).await?;
    ranked(call, body).await
}

/// As [`rerank`], for a body that is read already.
pub(super) async fn ranked(call: &mut Call, body: RerankBody) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let query = body.query.ok_or_else(|| Error::invalid("query", "`query` is required"))?;
    let texts = body.texts.ok_or_else(|| Error::invalid("texts", "`texts` is required"))?;
    if texts.is_empty() {
        return Err(Refusal::empty("texts"));
    }
    if texts.len() > INPUTS_MAX {
        return Err(Refusal::too_many(texts.len(), INPUTS_MAX));
    }
    let model = call.model(&front, body.model.as_ref(), &RERANK)?;
    let cut = CutFields::new(body.truncate, body.truncation_direction).read(model.context())?;
    let characters = query.chars().count() * texts.len()
        + texts.iter().map(|text| text.chars().count()).sum::<usize>();
    let ranking = Ranking { query, documents: &texts, cut, raw: body.raw_scores.unwrap_or(false) };
    let ranked = rank(&front, &mut call.ticket, model, ranking).await?;
    let shown = body.return_text.unwrap_or(false);
    let rank = |&(index, score): &(usize, f32)| {
        let text = shown.then(|| texts[index].as_str());
        Rank { index, text, score }
    };
    let ranks: Vec<Rank<'_>> = ranked.order.iter().map(rank).collect();
    let json = serde_json::to_vec(&ranks).expect("strings and finite numbers always serialise");
    let tokenised = ranked.tokenised;
    Ok(Done { json, usage: ranked.usage, characters, tokenised })
}
