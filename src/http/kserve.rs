//! KServe's Open Inference Protocol, version 2, for encoders: health, metadata, inference. Texts
//! come in as BYTES; vectors and scores go out as FP32. Knows JSON tensors and the binary form of
//! text that Triton's clients send.

mod tensor;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Router};
use schemars::JsonSchema;
use serde::Serialize;

use super::encode::{self, Encoded, Finish, INPUTS_MAX};
use super::generate::json_response;
use super::openapi::{Operation, SERVED, Wording, schema_of};
use super::tail::Tail;
use super::{Id, error, health, whole};
use crate::admission::Front;
use crate::admission::ticket::Ticket;
use crate::catalog::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{ModelState, ModelTask};
use crate::request::{Micros, Usage, Yield};
use crate::text::{Passage, Side};
use tensor::Question;

/// Every model has one version.
const VERSION: &str = "1";

/// Name of the input that has a query for each text.
const QUERY: &str = "query";
/// Name of the input that has the texts.
const TEXT: &str = "text";

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/", get(server))
        .route("/v2/models/{*path}", get(describe).post(infer))
}

pub(super) fn operations() -> Vec<Operation> {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    let get = |path, summary| Operation::get(path, "kserve", summary);
    let model = |path, summary| {
        let kinds = [ErrorKind::InvalidRequest, ErrorKind::ModelNotFound, ErrorKind::ModelLoading];
        get(path, summary).refuses(WORDING, &kinds)
    };
    let about = |path| model(path, "What a model takes and gives").gives::<Metadata<'static>>();
    let is_ready = |path| {
        let ready = model(path, "Whether a model is ready").gives::<ModelReady<'static>>();
        ready.answers::<ModelReady<'static>>(unavailable, "No")
    };
    let infer = |path| {
        let infer = Operation::post(path, "kserve", "Vectors or scores of texts");
        let infer = infer.takes::<tensor::Body>().gives::<Inference<'static>>();
        infer.refuses(WORDING, &SERVED)
    };
    vec![
        get("/v2", "What the server is").gives::<Server>(),
        get("/v2/", "What the server is").gives::<Server>(),
        get("/v2/health/live", "Whether the process is worth keeping")
            .open()
            .gives::<Live>()
            .answers::<Live>(unavailable, "No"),
        get("/v2/health/ready", "Whether every model is ready")
            .open()
            .gives::<Ready>()
            .answers::<Ready>(unavailable, "No"),
        about("/v2/models/{model}"),
        about("/v2/models/{model}/versions/{version}"),
        is_ready("/v2/models/{model}/ready"),
        is_ready("/v2/models/{model}/versions/{version}/ready"),
        infer("/v2/models/{model}/infer"),
        infer("/v2/models/{model}/versions/{version}/infer"),
    ]
}

/// How these errors are worded.
const WORDING: Wording = Wording { schema: schema_of::<Refused<'static>>, status: error::status };

/// What a probe asks, without a key.
pub(super) fn probes() -> Router<Arc<Front>> {
    Router::new().route("/v2/health/live", get(live)).route("/v2/health/ready", get(ready))
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ServerMetadata")]
struct Server {
    name: &'static str,
    version: &'static str,
    extensions: [&'static str; 1],
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ServerLive")]
struct Live {
    live: bool,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ServerReady")]
struct Ready {
    ready: bool,
}

#[derive(Serialize, JsonSchema)]
struct ModelReady<'a> {
    name: &'a str,
    ready: bool,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ModelMetadata")]
struct Metadata<'a> {
    name: &'a str,
    versions: [&'static str; 1],
    platform: &'static str,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

/// A tensor's description; -1 is any number.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "TensorMetadata")]
struct Tensor {
    name: &'static str,
    datatype: &'static str,
    shape: Vec<i64>,
}

#[derive(Serialize, JsonSchema)]
struct Inference<'a> {
    model_name: &'a str,
    model_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: [Output<'a>; 1],
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "OutputTensor")]
struct Output<'a> {
    name: &'static str,
    datatype: &'static str,
    shape: &'a [usize],
    data: &'a [f32],
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "KServeError")]
struct Refused<'a> {
    error: &'a str,
}

async fn server() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    json_response(written(&Server { name: "sconce", version, extensions: ["binary_tensor_data"] }))
}

async fn live(State(front): State<Arc<Front>>) -> Response {
    let live = health::is_live(&front);
    with_health(live, written(&Live { live }))
}

/// Strict, as Triton is: the server is ready when every model is.
async fn ready(State(front): State<Arc<Front>>) -> Response {
    let ready = health::is_ready(&front) && front.catalog.models().iter().all(is_loaded);
    with_health(ready, written(&Ready { ready }))
}

fn is_loaded(model: &Model) -> bool {
    matches!(model.state(), ModelState::Ready | ModelState::Evicted)
}

fn with_health(well: bool, json: Vec<u8>) -> Response {
    let mut response = json_response(json);
    if !well {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// `GET /v2/models/{name}[/versions/{version}][/ready]`; names may hold slashes.
async fn describe(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    Tail(path): Tail,
) -> Response {
    let (rest, asks_ready) = match path.strip_suffix("/ready") {
        Some(rest) => (rest, true),
        None => (path.as_str(), false),
    };
    let described = find(&front, rest).and_then(|model| {
        if asks_ready {
            let ready = health::is_ready(&front) && is_loaded(model);
            return Ok((ready, written(&ModelReady { name: &model.name, ready })));
        }
        Ok((true, written(&metadata(model)?)))
    });
    match described {
        Ok((well, json)) => with_health(well, json),
        Err(error) => refuse(&error, id.as_str()),
    }
}

fn find<'a>(front: &'a Front, path: &str) -> Result<&'a Model> {
    let (name, version) = match path.rsplit_once("/versions/") {
        Some((name, version)) => (name, version),
        None => (path, VERSION),
    };
    if version != VERSION {
        let shown: String = version.chars().take(20).collect();
        let message = format!("there is no version '{shown}' of a model, only '{VERSION}'");
        return Err(Error::new(ErrorKind::ModelNotFound, message));
    }
    front.catalog.find(name)
}

fn metadata(model: &Model) -> Result<Metadata<'_>> {
    let width = i64::from(card_width(model)?);
    let text = |name| Tensor { name, datatype: "BYTES", shape: vec![-1] };
    let inputs = match model.task {
        ModelTask::Rerank => vec![text(QUERY), text(TEXT)],
        _ => vec![text(TEXT)],
    };
    let output = Tensor { name: output_name(model), datatype: "FP32", shape: vec![-1, width] };
    let (versions, platform) = ([VERSION], "sconce");
    Ok(Metadata { name: &model.name, versions, platform, inputs, outputs: vec![output] })
}

fn card_width(model: &Model) -> Result<u32> {
    if model.task == ModelTask::Generate {
        let message = format!(
            "the model '{}' generates text: this protocol is for embeddings and scores; use /v1",
            model.name
        );
        return Err(Error::invalid("model", message));
    }
    Ok(model.encoder()?.width)
}

fn output_name(model: &Model) -> &'static str {
    match model.task {
        ModelTask::Rerank | ModelTask::Classify => "scores",
        _ => "embedding",
    }
}

/// `POST /v2/models/{name}[/versions/{version}]/infer`
async fn infer(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    Tail(path): Tail,
    request: Request,
) -> Response {
    let model = match path.strip_suffix("/infer").map(|rest| find(&front, rest)) {
        Some(Ok(model)) => model,
        Some(Err(error)) => return refuse(&error, id.as_str()),
        None => {
            let error = Error::new(ErrorKind::NotFound, "only '/infer' takes a POST here");
            return refuse(&error, id.as_str());
        }
    };
    let task = if model.task == ModelTask::Generate { ModelTask::Embed } else { model.task };
    let mut ticket = Ticket::new(Arc::clone(&front), task, id.0);
    match answer(&front, &mut ticket, model, request).await {
        Ok((json, usage)) => whole::answered(ticket, usage, json),
        Err(error) => {
            ticket.fail(&error);
            refuse(&error, ticket.request_id())
        }
    }
}

async fn answer(
    front: &Front,
    ticket: &mut Ticket,
    model: &Model,
    request: Request,
) -> Result<(Vec<u8>, Usage)> {
    let question = tensor::read(front, ticket, request).await?;
    card_width(model)?;
    let name = output_name(model);
    if let Some(other) = question.outputs.iter().find(|output| *output != name) {
        let shown: String = other.chars().take(80).collect();
        let message = format!("there is no output '{shown}', only '{name}'");
        return Err(Error::invalid("outputs", message));
    }
    let entry = front.enter_model(ticket, model)?;
    let Question { id, truncate, mut inputs, .. } = question;
    let texts = tensor::take(&mut inputs, TEXT)?;
    let queries = match model.task {
        ModelTask::Rerank => Some(tensor::take(&mut inputs, QUERY)?),
        _ => None,
    };
    let passages = passages(texts, queries)?;
    let cut = encode::cut(model, truncate, Side::Right);
    let inputs = front.encode_passages(entry, passages, cut).await?;
    let Encoded { mut vectors, usage } =
        encode::run(front, ticket, model, inputs, Yield::Answer).await?;
    let card = model.encoder()?;
    let finish = Finish::new(model, card, None, None)?;
    for vector in &mut vectors {
        match model.task {
            ModelTask::Embed => finish.apply(vector),
            _ => encode::probabilities(card, vector),
        }
    }
    let shape = [vectors.len(), card.width as usize];
    let model_name = model.name.clone();
    let data = vectors.concat();
    let expected = Micros((data.len() / super::embeddings::PRINTED_PER_MICRO) as u64);
    let print = move || {
        let output = Output { name, datatype: "FP32", shape: &shape, data: &data };
        let (model_version, id) = (VERSION, id.as_deref());
        let outputs = [output];
        let answer = Inference { model_name: &model_name, model_version, id, outputs };
        Ok((written(&answer), usage))
    };
    front.heavy(expected, print).await
}

/// Texts, each with its query; one query may be for all of them.
fn passages(texts: Vec<String>, queries: Option<Vec<String>>) -> Result<Vec<Passage>> {
    if texts.is_empty() || texts.len() > INPUTS_MAX {
        let message = format!("{} texts; 1 to {INPUTS_MAX} are taken", texts.len());
        return Err(Error::invalid("inputs", message));
    }
    let Some(queries) = queries else {
        if let Some(index) = texts.iter().position(String::is_empty) {
            return Err(Error::invalid("inputs", format!("text {index} is empty")));
        }
        return Ok(texts.into_iter().map(Passage::single).collect());
    };
    if queries.len() != 1 && queries.len() != texts.len() {
        let message = format!("{} queries for {} texts", queries.len(), texts.len());
        return Err(Error::invalid("inputs", message));
    }
    let queries: Vec<Arc<str>> = queries.into_iter().map(Arc::from).collect();
    let query = |index: usize| Arc::clone(&queries[if queries.len() == 1 { 0 } else { index }]);
    let texts = texts.into_iter().enumerate();
    Ok(texts.map(|(i, text)| Passage { text: query(i), second: Some(text) }).collect())
}

fn written(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("strings and finite numbers always serialise")
}

fn refuse(refused: &Error, id: &str) -> Response {
    let message = format!("{} (request id: {id})", refused.message());
    let json = written(&Refused { error: &message });
    error::with_body(error::status(refused.kind()), refused, json)
}
