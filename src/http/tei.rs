//! The routes of Hugging Face's Text Embeddings Inference. That server has one model a process and
//! no field for a name: here a model is named in the path (`/models/NAME/embed`) or as `model` in
//! the body, and needs no name where only one is for the task.

mod embed;
mod info;
mod refusal;
mod score;
mod texts;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router};

use super::openapi::{Operation, SERVED};
use super::rerank::RerankBody;
use super::tail::Tail;
use super::{Id, whole};
use crate::admission::Front;
use crate::admission::ticket::Ticket;
use crate::catalog::Model;
use crate::error::{Error, ErrorKind};
use crate::model::ModelTask;
use crate::request::Usage;
use refusal::{Refusal, WORDING};
use wire::{
    DecodeBody, EmbedAllBody, EmbedBody, PredictBody, Prediction, SimilarityBody, Token,
    TokenizeBody,
};

/// The HTTP response for an error that came before any model was known.
pub(super) fn response(error: &Error, id: &str) -> Response {
    Refusal::from(error.clone()).response(id)
}

/// A ranking in this API's form.
pub(super) async fn ranked(call: &mut Call, body: RerankBody) -> Result<Done, Refusal> {
    score::ranked(call, body).await
}

pub(super) fn router() -> Router<Arc<Front>> {
    let mut router = Router::new()
        .route("/", at(Verb::Own))
        .route("/info", get(info::bare))
        .route("/models/{*path}", get(info::named).post(named));
    // `/rerank` is `rerank.rs`'s: other APIs have it too.
    for (path, verb) in VERBS.iter().filter(|(_, verb)| *verb != Verb::Rerank) {
        router = router.route(path, at(*verb));
    }
    router
}

pub(super) fn operations() -> Vec<Operation> {
    let info = |path| {
        use ErrorKind::*;
        let info = Operation::get(path, "tei", "What a model is").gives::<info::Info<'static>>();
        info.refuses(WORDING, &[InvalidRequest, ModelNotFound, NotFound, ModelLoading])
    };
    let mut all = vec![info("/info"), info("/models/{model}/info")];
    for (bare, named, verb) in [
        ("/embed", "/models/{model}/embed", Verb::Embed),
        ("/embed_all", "/models/{model}/embed_all", Verb::EmbedAll),
        ("/similarity", "/models/{model}/similarity", Verb::Similarity),
        ("/predict", "/models/{model}/predict", Verb::Predict),
        ("/tokenize", "/models/{model}/tokenize", Verb::Tokenize),
        ("/decode", "/models/{model}/decode", Verb::Decode),
        ("/", "/models/{model}", Verb::Own),
    ] {
        let at = |path| verb.described(Operation::post(path, "tei", ""));
        all.extend([bare, named].map(at));
    }
    let rerank = Operation::post("/models/{model}/rerank", "tei", "");
    all.push(Verb::Rerank.described(rerank));
    all
}

/// A ranking that also takes and gives what this API does.
pub(super) fn also_ranks(operation: Operation) -> Operation {
    operation.gives::<Vec<score::Rank<'static>>>().refuses(WORDING, &SERVED)
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Embed,
    EmbedAll,
    Similarity,
    Predict,
    Rerank,
    Tokenize,
    Decode,
    /// What the model is for.
    Own,
}

const VERBS: [(&str, Verb); 7] = [
    ("/embed", Verb::Embed),
    ("/embed_all", Verb::EmbedAll),
    ("/similarity", Verb::Similarity),
    ("/predict", Verb::Predict),
    ("/rerank", Verb::Rerank),
    ("/tokenize", Verb::Tokenize),
    ("/decode", Verb::Decode),
];

/// What answers tell of their cost.
const COMPUTE_HEADERS: [&str; 5] = [
    "x-compute-time",
    "x-compute-characters",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
];

/// Every kind of encoder.
const ENCODERS: [ModelTask; 3] = [ModelTask::Embed, ModelTask::Rerank, ModelTask::Classify];

/// A request on its way.
pub(super) struct Call {
    pub(super) front: Arc<Front>,
    pub(super) ticket: Ticket,
    /// The model's name, if the path has it.
    pub(super) name: Option<String>,
    pub(super) started: Instant,
}

/// An answer, and what its headers tell.
pub(super) struct Done {
    pub(super) json: Vec<u8>,
    pub(super) usage: Usage,
    pub(super) characters: usize,
    pub(super) tokenised: Duration,
}

fn at(verb: Verb) -> MethodRouter<Arc<Front>> {
    post(move |State(front): State<Arc<Front>>, Extension(id): Extension<Id>, request: Request| {
        run(front, id, verb, None, request)
    })
}

/// `POST /models/{name}/{verb}`, or without a verb; names may hold slashes.
async fn named(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    Tail(path): Tail,
    request: Request,
) -> Response {
    let known = VERBS.iter().find_map(|(end, verb)| Some((path.strip_suffix(end)?, *verb)));
    let (name, verb) = known.unwrap_or((&path, Verb::Own));
    let name = name.to_owned();
    run(front, id, verb, Some(name), request).await
}

async fn run(
    front: Arc<Front>,
    id: Id,
    verb: Verb,
    name: Option<String>,
    request: Request,
) -> Response {
    let verb = match own(&front, verb, name.as_deref()) {
        Ok(verb) => verb,
        Err(error) => return response(&error, id.as_str()),
    };
    let ticket = Ticket::new(Arc::clone(&front), verb.task(), id.0);
    let mut call = Call { front, ticket, name, started: Instant::now() };
    let done = match verb {
        Verb::Embed | Verb::Own => embed::embed(&mut call, request).await,
        Verb::EmbedAll => embed::embed_all(&mut call, request).await,
        Verb::Similarity => embed::similarity(&mut call, request).await,
        Verb::Predict => score::predict(&mut call, request).await,
        Verb::Rerank => score::rerank(&mut call, request).await,
        Verb::Tokenize => texts::tokenize(&mut call, request).await,
        Verb::Decode => texts::decode(&mut call, request).await,
    };
    call.respond(done)
}

/// The verb of a path without one: what its model is for.
fn own(front: &Front, verb: Verb, name: Option<&str>) -> Result<Verb, Error> {
    if verb != Verb::Own {
        return Ok(verb);
    }
    let model = match name {
        Some(name) => front.catalog.find(name)?,
        None => front.catalog.only(&ENCODERS)?,
    };
    match model.task {
        ModelTask::Embed => Ok(Verb::Embed),
        ModelTask::Classify => Ok(Verb::Predict),
        ModelTask::Rerank => Ok(Verb::Rerank),
        ModelTask::Generate => {
            let message = format!("the model '{}' is for chat and completions", model.name);
            Err(Error::invalid("model", message))
        }
    }
}

impl Verb {
    /// What it takes and gives.
    fn described(self, operation: Operation) -> Operation {
        let operation = match self {
            Verb::Embed => operation.about("A vector for each text").takes::<EmbedBody>(),
            Verb::EmbedAll => operation.about("A vector for each token").takes::<EmbedAllBody>(),
            Verb::Similarity => {
                operation.about("How close sentences are").takes::<SimilarityBody>()
            }
            Verb::Predict => operation.about("A score for each label").takes::<PredictBody>(),
            Verb::Rerank => operation.about("Texts by a query").takes::<RerankBody>(),
            Verb::Tokenize => operation.about("Tokens of texts").takes::<TokenizeBody>(),
            Verb::Decode => operation.about("Texts of tokens").takes::<DecodeBody>(),
            Verb::Own => operation
                .about("What the model is for: vectors, scores or a ranking")
                .takes::<EmbedBody>()
                .takes::<PredictBody>()
                .takes::<RerankBody>(),
        };
        let operation = match self {
            Verb::Embed => operation.gives::<Vec<Vec<f32>>>(),
            Verb::EmbedAll => operation.gives::<Vec<Vec<Vec<f32>>>>(),
            Verb::Similarity => operation.gives::<Vec<f32>>(),
            Verb::Predict => operation
                .gives::<Vec<Prediction<'static>>>()
                .gives::<Vec<Vec<Prediction<'static>>>>(),
            Verb::Rerank => operation.gives::<Vec<score::Rank<'static>>>(),
            Verb::Tokenize => operation.gives::<Vec<Vec<Token<'static>>>>(),
            Verb::Decode => operation.gives::<Vec<String>>(),
            Verb::Own => operation
                .gives::<Vec<Vec<f32>>>()
                .gives::<Vec<Prediction<'static>>>()
                .gives::<Vec<Vec<Prediction<'static>>>>()
                .gives::<Vec<score::Rank<'static>>>(),
        };
        let operation = operation.tells(&COMPUTE_HEADERS).refuses(WORDING, &SERVED);
        let (empty, wrong) = (StatusCode::BAD_REQUEST, StatusCode::FAILED_DEPENDENCY);
        let kind = ErrorKind::InvalidRequest;
        operation.refuses_with(empty, WORDING, kind).refuses_with(wrong, WORDING, kind)
    }

    /// What its requests are counted as.
    fn task(self) -> ModelTask {
        match self {
            Verb::Predict => ModelTask::Classify,
            Verb::Rerank => ModelTask::Rerank,
            _ => ModelTask::Embed,
        }
    }
}

impl Call {
    /// The model by the path's name, the body's, or as the only one for `tasks`.
    pub(super) fn model<'a>(
        &self,
        front: &'a Front,
        in_body: Option<&String>,
        tasks: &[ModelTask],
    ) -> Result<&'a Model, Refusal> {
        let Some(name) = self.name.as_ref().or(in_body) else {
            return Ok(front.catalog.only(tasks)?);
        };
        let model = front.catalog.find(name)?;
        if !tasks.contains(&model.task) {
            return Err(Refusal::wrong_model(model, tasks));
        }
        Ok(model)
    }

    /// The HTTP response; the ticket's end.
    pub(super) fn respond(mut self, done: Result<Done, Refusal>) -> Response {
        let Done { json, usage, characters, tokenised } = match done {
            Ok(done) => done,
            Err(refusal) => {
                self.ticket.fail(&refusal.error);
                return refusal.response(self.ticket.request_id());
            }
        };
        let mut response = whole::answered(self.ticket, usage, json);
        let total = self.started.elapsed().as_millis() as u64;
        let tokens = u64::from(usage.prompt_tokens);
        let told = [total, characters as u64, tokens, total, tokenised.as_millis() as u64];
        for (name, value) in COMPUTE_HEADERS.into_iter().zip(told) {
            response.headers_mut().insert(name, HeaderValue::from(value));
        }
        response
    }
}
