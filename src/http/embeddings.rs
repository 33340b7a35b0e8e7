//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use tokio::time::timeout_at;

use super::generate::{json_response, model_name, refuse};
use super::openai::EmbeddingsBody;
use super::{Id, answer, body};
use crate::admission::ticket::Ticket;
use crate::admission::{Entry, Front};
use crate::catalog::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::model::ModelTask;
use crate::request::{Embed, Event, Events, Micros, Task, TokenId, Usage};

/// Most inputs in one request: the API's own limit.
const INPUTS_MAX: usize = 2048;

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new().route("/v1/embeddings", post(create))
}

/// One request on its way.
struct Running {
    model: String,
    events: Events,
    inputs: usize,
    base64: bool,
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: EmbedUsage,
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: usize,
    embedding: Encoded<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Encoded<'a> {
    Floats(&'a [f32]),
    Base64(String),
}

#[derive(Serialize)]
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
    let running = match begin(&front, &mut ticket, request).await {
        Ok(running) => running,
        Err(error) => return refuse(ticket, &error),
    };
    let answered = match timeout_at(ticket.expires(), running.collect(&front)).await {
        Ok(answered) => answered,
        Err(_) => Err(ticket.expired()),
    };
    match answered {
        Ok((json, usage)) => {
            ticket.finish(usage);
            json_response(json)
        }
        Err(error) => refuse(ticket, &error),
    }
}

async fn begin(front: &Front, ticket: &mut Ticket, request: Request) -> Result<Running> {
    let mut body: EmbeddingsBody = body::json(front, ticket, request).await?;
    if body.dimensions.is_some() {
        let message = "'dimensions' is not served; leave it out for the model's own";
        return Err(Error::new(ErrorKind::Unsupported, message).at("dimensions"));
    }
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
    let Entry { model, text } = front.enter(ticket, name, ModelTask::Embed)?;
    let inputs = input.encode(front, text, model.context(), "input").await?;
    check_lengths(model, &inputs)?;
    let count = inputs.len();
    let mut receivers = front.submit(ticket, model, vec![Task::Embed(Embed { inputs })])?;
    let events = receivers.pop().expect("one task, one receiver");
    Ok(Running { model: model.name.clone(), events, inputs: count, base64 })
}

fn check_lengths(model: &Model, inputs: &[Arc<[TokenId]>]) -> Result<()> {
    let limit = model.context() as usize;
    if let Some(index) = inputs.iter().position(|input| input.is_empty()) {
        let message = format!("input {index} has no tokens; at least 1 is needed");
        return Err(Error::invalid("input", message));
    }
    let Some(index) = inputs.iter().position(|input| input.len() > limit) else {
        return Ok(());
    };
    let length = inputs[index].len();
    let message =
        format!("input {index} has {length} tokens; the model takes {limit} (limits.context)");
    Err(Error::new(ErrorKind::ContextLengthExceeded, message).at("input"))
}

impl Running {
    /// The response's body and what it took.
    async fn collect(mut self, front: &Front) -> Result<(Vec<u8>, Usage)> {
        let mut vectors: Vec<Vec<f32>> = vec![Vec::new(); self.inputs];
        let usage = loop {
            match self.events.recv().await.ok_or_else(answer::gone)? {
                Event::Vector { index, values } => vectors[index as usize] = values,
                Event::Done { usage, .. } => break usage,
                Event::Failed(error) => return Err(error),
                Event::Started { .. } | Event::Token(_) | Event::Scored { .. } => {
                    return Err(Error::new(ErrorKind::Internal, "a token came for an embedding"));
                }
            }
        };
        let numbers: usize = vectors.iter().map(Vec::len).sum();
        // Printing numbers is CPU work; copying them into base64 hardly is.
        let expected = Micros(numbers as u64 / if self.base64 { 500 } else { 25 });
        front.heavy(expected, move || Ok((self.json(&vectors, usage)?, usage))).await
    }

    fn json(&self, vectors: &[Vec<f32>], usage: Usage) -> Result<Vec<u8>> {
        let finite = |vector: &Vec<f32>| vector.iter().all(|value| value.is_finite());
        if let Some(index) = vectors.iter().position(|v| v.is_empty() || !finite(v)) {
            let message = format!("the vector of input {index} is missing or not finite");
            return Err(Error::new(ErrorKind::Internal, message));
        }
        let encode = |vector: &'_ [f32]| {
            let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
            STANDARD.encode(bytes)
        };
        let data = vectors.iter().enumerate().map(|(index, vector)| Item {
            object: "embedding",
            index,
            embedding: match self.base64 {
                true => Encoded::Base64(encode(vector)),
                false => Encoded::Floats(vector),
            },
        });
        let tokens = usage.prompt_tokens;
        let list = List {
            object: "list",
            data: data.collect(),
            model: &self.model,
            usage: EmbedUsage { prompt_tokens: tokens, total_tokens: tokens },
        };
        Ok(serde_json::to_vec(&list).expect("strings and finite numbers always serialise"))
    }
}
