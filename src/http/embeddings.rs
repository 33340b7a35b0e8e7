//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::Serialize;

use super::encode::{self, Encoded, Finish, INPUTS_MAX};
use super::generate::{model_name, refuse};
use super::openai::EmbeddingsBody;
use super::openapi::{Operation, SERVED};
use super::{Id, body, error, whole};
use crate::admission::ticket::Ticket;
use crate::admission::{Entry, Front};
use crate::error::{Error, Result};
use crate::model::ModelTask;
use crate::request::{Micros, Usage, Yield};

/// Numbers that are printed in a microsecond; as base64 they are copied.
pub(super) const PRINTED_PER_MICRO: usize = 25;
const COPIED_PER_MICRO: usize = 500;

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new().route("/v1/embeddings", post(create))
}

pub(super) fn operations() -> Vec<Operation> {
    let embed = Operation::post("/v1/embeddings", "openai", "A vector for each text");
    let embed = embed.takes::<EmbeddingsBody>().gives::<List<'static>>();
    vec![embed.refuses(error::WORDING, &SERVED)]
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Embeddings")]
struct List<'a> {
    #[schemars(extend("const" = "list"))]
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: EmbedUsage,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Embedding")]
struct Item<'a> {
    #[schemars(extend("const" = "embedding"))]
    object: &'static str,
    index: usize,
    embedding: Shown<'a>,
}

#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "EmbeddingValues")]
enum Shown<'a> {
    Floats(&'a [f32]),
    /// Of little-endian 32-bit floats.
    Base64(String),
}

#[derive(Serialize, JsonSchema)]
struct EmbedUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

async fn create(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    request: Request,
) -> Response {
    let mut ticket = Ticket::new(Arc::clone(&front), ModelTask::Embed, id.0);
    match answer(&front, &mut ticket, request).await {
        Ok((json, usage)) => whole::answered(ticket, usage, json),
        Err(error) => refuse(ticket, &error),
    }
}

async fn answer(front: &Front, ticket: &mut Ticket, request: Request) -> Result<(Vec<u8>, Usage)> {
    let mut body: EmbeddingsBody = body::json(front, ticket, request).await?;
    let base64 = match body.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            let message = "encoding_format has to be 'float' or 'base64'";
            return Err(Error::invalid("encoding_format", message));
        }
    };
    let input = body.input.take();
    let input = input.ok_or_else(|| Error::invalid("input", "'input' is required"))?;
    if input.len() > INPUTS_MAX {
        let message = format!("{} inputs, at most {INPUTS_MAX}", input.len());
        return Err(Error::invalid("input", message));
    }
    let name = model_name(body.model.as_ref())?;
    let entry = front.enter(ticket, name, ModelTask::Embed)?;
    let Entry { model, .. } = entry;
    let finish = Finish::new(model, model.encoder()?, None, body.dimensions)?;
    let inputs = encode::tokens(front, entry, input, None, "input").await?;
    let encoded = encode::run(front, ticket, model, inputs, Yield::Answer).await?;
    let Encoded { mut vectors, usage } = encoded;
    let numbers = vectors.len() * finish.dimensions;
    let a_micro = if base64 { COPIED_PER_MICRO } else { PRINTED_PER_MICRO };
    let model = model.name.clone();
    let print = move || {
        vectors.iter_mut().for_each(|vector| finish.apply(vector));
        Ok((json(&model, &vectors, usage, base64), usage))
    };
    front.heavy(Micros((numbers / a_micro) as u64), print).await
}

fn json(model: &str, vectors: &[Vec<f32>], usage: Usage, base64: bool) -> Vec<u8> {
    let encode = |vector: &'_ [f32]| {
        let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
        STANDARD.encode(bytes)
    };
    let data = vectors.iter().enumerate().map(|(index, vector)| Item {
        object: "embedding",
        index,
        embedding: match base64 {
            true => Shown::Base64(encode(vector)),
            false => Shown::Floats(vector),
        },
    });
    let tokens = usage.prompt_tokens;
    let list = List {
        object: "list",
        data: data.collect(),
        model,
        usage: EmbedUsage { prompt_tokens: tokens, total_tokens: tokens },
    };
    serde_json::to_vec(&list).expect("strings and finite numbers always serialise")
}
