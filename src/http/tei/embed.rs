//! `/embed`, `/embed_all`, `/similarity`.

use std::time::Instant;

use axum::extract::Request;

use super::refusal::Refusal;
use super::wire::{EmbedAllBody, EmbedBody, SimilarityBody};
use super::{Call, Done};
use crate::error::{Error, ErrorKind};
use crate::http::body;
use crate::http::embeddings::PRINTED_PER_MICRO;
use crate::http::encode::{self, Encoded, Finish, INPUTS_MAX};
use crate::http::input::Input;
use crate::http::object::Object;
use crate::model::ModelTask;
use crate::request::{Micros, Yield};

/// Most numbers in an answer of `/embed_all`: about 50 MB of JSON.
const NUMBERS_MAX: usize = 4 << 20;

const EMBED: [ModelTask; 1] = [ModelTask::Embed];

/// One vector for each input.
pub(super) async fn embed(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: EmbedBody = body::json(&front, &mut call.ticket, request).await?;
    let input = check(body.inputs)?;
    let characters = input.characters();
    let model = call.model(&front, body.model.as_ref(), &EMBED)?;
    let entry = front.enter_model(&mut call.ticket, model)?;
    let normalize = body.normalize.unwrap_or(true);
    let finish = Finish::new(model, model.encoder()?, Some(normalize), body.dimensions)?;
    let cut = body.cut.read(model.context())?;
    let started = Instant::now();
    let inputs = encode::tokens(&front, entry, input, cut, "inputs").await?;
    let tokenised = started.elapsed();
    let encoded = encode::run(&front, &mut call.ticket, model, inputs, Yield::Answer).await?;
    let Encoded { mut vectors, usage } = encoded;
    let numbers = vectors.len() * finish.dimensions;
    let print = move || {
        vectors.iter_mut().for_each(|vector| finish.apply(vector));
        Ok(serde_json::to_vec(&vectors).expect("finite numbers always serialise"))
    };
    let json = front.heavy(printing(numbers), print).await?;
    Ok(Done { json, usage, characters, tokenised })
}

/// The last state of each token of each input, as it is.
pub(super) async fn embed_all(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: EmbedAllBody = body::json(&front, &mut call.ticket, request).await?;
    let input = check(body.inputs)?;
    let characters = input.characters();
    let model = call.model(&front, body.model.as_ref(), &EMBED)?;
    let entry = front.enter_model(&mut call.ticket, model)?;
    let width = model.encoder()?.width as usize;
    let cut = body.cut.read(model.context())?;
    let started = Instant::now();
    let inputs = encode::tokens(&front, entry, input, cut, "inputs").await?;
    let tokenised = started.elapsed();
    let tokens: usize = inputs.iter().map(|text| text.tokens.len()).sum();
    if tokens * width > NUMBERS_MAX {
        let message = format!(
            "{tokens} tokens of {width} numbers each are {} numbers; an answer has at most \
             {NUMBERS_MAX}; send fewer or shorter inputs",
            tokens * width
        );
        return Err(Error::new(ErrorKind::TooLarge, message).into());
    }
    let encoded = encode::run(&front, &mut call.ticket, model, inputs, Yield::Tokens).await?;
    let Encoded { vectors, usage } = encoded;
    let print = move || {
        let states: Vec<Vec<&[f32]>> =
            vectors.iter().map(|states| states.chunks_exact(width).collect()).collect();
        Ok(serde_json::to_vec(&states).expect("finite numbers always serialise"))
    };
    let json = front.heavy(printing(tokens * width), print).await?;
    Ok(Done { json, usage, characters, tokenised })
}

/// How close each sentence is to the source: the cosine of their vectors.
pub(super) async fn similarity(call: &mut Call, request: Request) -> Result<Done, Refusal> {
    let front = call.front.clone();
    let body: SimilarityBody = body::json(&front, &mut call.ticket, request).await?;
    let Object(compared) =
        body.inputs.ok_or_else(|| Error::invalid("inputs", "`inputs` is required"))?;
    if compared.sentences.is_empty() {
        return Err(Refusal::empty("sentences"));
    }
    let mut texts = vec![compared.source_sentence];
    texts.extend(compared.sentences);
    let input = check(Some(Input::Texts(texts)))?;
    let characters = input.characters();
    let model = call.model(&front, body.model.as_ref(), &EMBED)?;
    let entry = front.enter_model(&mut call.ticket, model)?;
    let finish = Finish::new(model, model.encoder()?, Some(true), None)?;
    let cut = body.parameters.unwrap_or_default().0.read(model.context())?;
    let started = Instant::now();
    let inputs = encode::tokens(&front, entry, input, cut, "inputs").await?;
    let tokenised = started.elapsed();
    let encoded = encode::run(&front, &mut call.ticket, model, inputs, Yield::Answer).await?;
    let Encoded { mut vectors, usage } = encoded;
    vectors.iter_mut().for_each(|vector| finish.apply(vector));
    let source = vectors.remove(0);
    let cosine = |vector: &Vec<f32>| source.iter().zip(vector).map(|(a, b)| a * b).sum::<f32>();
    let cosines: Vec<f32> = vectors.iter().map(cosine).collect();
    let json = serde_json::to_vec(&cosines).expect("finite numbers always serialise");
    Ok(Done { json, usage, characters, tokenised })
}

/// Whether there are inputs, and not too many.
fn check(input: Option<Input>) -> Result<Input, Refusal> {
    let input = input.ok_or_else(|| Error::invalid("inputs", "`inputs` is required"))?;
    if input.has_empty() {
        return Err(Refusal::empty("inputs"));
    }
    if input.len() > INPUTS_MAX {
        return Err(Refusal::too_many(input.len(), INPUTS_MAX));
    }
    Ok(input)
}

fn printing(numbers: usize) -> Micros {
    Micros((numbers / PRINTED_PER_MICRO) as u64)
}
