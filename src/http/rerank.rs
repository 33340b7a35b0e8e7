//! `/rerank`, `/v1/rerank`, `/v2/rerank`: documents by how well they answer a query. Cohere's and
//! Jina's clients send `documents` and get one body that suits both; a body with `texts` is
//! `tei.rs`'s.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::encode::{self, INPUTS_MAX};
use super::openapi::{Operation, SERVED};
use super::tei::{self, Call};
use super::{Id, body, error, whole};
use crate::admission::Front;
use crate::admission::ticket::Ticket;
use crate::catalog::Model;
use crate::error::{Error, Result};
use crate::model::ModelTask;
use crate::request::{Usage, Yield};
use crate::text::{Cut, Passage, Side};

pub(super) fn router() -> Router<Arc<Front>> {
    let at = |version: Option<&'static str>| {
        post(
            move |State(front): State<Arc<Front>>,
                  Extension(id): Extension<Id>,
                  request: Request| { create(front, id, version, request) },
        )
    };
    Router::new()
        .route("/rerank", at(None))
        .route("/v1/rerank", at(Some("1")))
        .route("/v2/rerank", at(Some("2")))
}

pub(super) fn operations() -> Vec<Operation> {
    let at = |path| {
        let rank = Operation::post(path, "rerank", "Documents by how well they answer a query");
        let rank = rank.takes::<RerankBody>().gives::<Answer<'static>>();
        rank.refuses(error::WORDING_BOTH, &SERVED)
    };
    // Each takes TEI's body too, and answers that in TEI's form.
    ["/rerank", "/v1/rerank", "/v2/rerank"].map(at).map(tei::also_ranks).into()
}

/// The body of every API that reranks.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend(
    "required" = ["query"],
    "anyOf" = [{"required": ["documents"]}, {"required": ["texts"]}]
))]
pub(super) struct RerankBody {
    pub(super) model: Option<String>,
    #[schemars(required, length(min = 1))]
    pub(super) query: Option<String>,
    #[schemars(length(min = 1, max = INPUTS_MAX))]
    pub(super) texts: Option<Vec<String>>,
    pub(super) raw_scores: Option<bool>,
    pub(super) return_text: Option<bool>,
    pub(super) truncate: Option<bool>,
    #[schemars(extend("enum" = ["Left", "Right", "left", "right", null]))]
    pub(super) truncation_direction: Option<String>,
    #[schemars(length(min = 1, max = INPUTS_MAX))]
    documents: Option<Vec<Document>>,
    #[schemars(range(min = 1))]
    top_n: Option<usize>,
    return_documents: Option<bool>,
    #[schemars(range(min = 1))]
    max_tokens_per_doc: Option<usize>,
}

/// A document as it comes in.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Document {
    Text(String),
    Object { text: String },
}

/// What is to be ranked.
pub(super) struct Ranking<'a> {
    pub(super) query: String,
    pub(super) documents: &'a [String],
    pub(super) cut: Option<Cut>,
    /// Scores as the model gives them, not as probabilities.
    pub(super) raw: bool,
}

/// A ranking.
pub(super) struct Ranked {
    /// Index and score of each document, the best first.
    pub(super) order: Vec<(usize, f32)>,
    pub(super) usage: Usage,
    pub(super) tokenised: Duration,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Ranking")]
struct Answer<'a> {
    id: &'a str,
    model: &'a str,
    results: Vec<Placed<'a>>,
    meta: Meta,
    usage: Tokens,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "RankedDocument")]
struct Placed<'a> {
    index: usize,
    relevance_score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<Shown<'a>>,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ShownDocument")]
struct Shown<'a> {
    text: &'a str,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "RankingMeta")]
struct Meta {
    api_version: Version,
    billed_units: Units,
    tokens: InputTokens,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ApiVersion")]
struct Version {
    version: &'static str,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "BilledUnits")]
struct Units {
    search_units: u32,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "InputTokens")]
struct InputTokens {
    input_tokens: u32,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "RerankUsage")]
struct Tokens {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// Scores every document and sorts them.
///
/// # Errors
/// `ContextLengthExceeded` for a pair that is too long and may not be cut, and whatever admission
/// or the engine refuses.
pub(super) async fn rank(
    front: &Front,
    ticket: &mut Ticket,
    model: &Model,
    ranking: Ranking<'_>,
) -> Result<Ranked> {
    let Ranking { query, documents, cut, raw } = ranking;
    if query.is_empty() {
        return Err(Error::invalid("query", "'query' is empty"));
    }
    let entry = front.enter_model(ticket, model)?;
    let started = Instant::now();
    let query: Arc<str> = query.into();
    let pair = |text: &String| Passage { text: Arc::clone(&query), second: Some(text.clone()) };
    let passages = documents.iter().map(pair).collect();
    let inputs = front.encode_passages(entry, passages, cut).await?;
    let tokenised = started.elapsed();
    let mut encoded = encode::run(front, ticket, model, inputs, Yield::Answer).await?;
    let card = model.encoder()?;
    if !raw {
        encoded.vectors.iter_mut().for_each(|scores| encode::probabilities(card, scores));
    }
    let mut order: Vec<(usize, f32)> =
        encoded.vectors.iter().map(|scores| scores[0]).enumerate().collect();
    // Stable: documents of one score stay in their order.
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(Ranked { order, usage: encoded.usage, tokenised })
}

async fn create(
    front: Arc<Front>,
    id: Id,
    version: Option<&'static str>,
    request: Request,
) -> Response {
    let ticket = Ticket::new(Arc::clone(&front), ModelTask::Rerank, id.0);
    let mut call = Call { front, ticket, name: None, started: Instant::now() };
    let front = Arc::clone(&call.front);
    let body = match body::json::<RerankBody>(&front, &mut call.ticket, request).await {
        Ok(body) => body,
        Err(error) => return refuse(call.ticket, version, &error),
    };
    if body.texts.is_some() && body.documents.is_none() {
        let done = tei::ranked(&mut call, body).await;
        return call.respond(done);
    }
    match answer(&front, &mut call.ticket, version.unwrap_or("1"), body).await {
        Ok((json, usage)) => whole::answered(call.ticket, usage, json),
        Err(error) => refuse(call.ticket, version.or(Some("1")), &error),
    }
}

async fn answer(
    front: &Front,
    ticket: &mut Ticket,
    version: &'static str,
    body: RerankBody,
) -> Result<(Vec<u8>, Usage)> {
    let query = body.query.ok_or_else(|| Error::invalid("query", "'query' is required"))?;
    let documents =
        body.documents.ok_or_else(|| Error::invalid("documents", "'documents' is required"))?;
    if documents.is_empty() || documents.len() > INPUTS_MAX {
        let message = format!("{} documents; 1 to {INPUTS_MAX} are ranked", documents.len());
        return Err(Error::invalid("documents", message));
    }
    for (name, value) in [("top_n", body.top_n), ("max_tokens_per_doc", body.max_tokens_per_doc)] {
        if value == Some(0) {
            return Err(Error::invalid(name, format!("'{name}' is 0; at least 1 is needed")));
        }
    }
    let documents: Vec<String> = documents
        .into_iter()
        .map(|document| match document {
            Document::Text(text) | Document::Object { text } => text,
        })
        .collect();
    let model = match &body.model {
        Some(name) => front.catalog.find(name)?,
        None => front.catalog.only(&[ModelTask::Rerank])?,
    };
    if model.task != ModelTask::Rerank {
        let message =
            format!("the model '{}' is for '{}', not reranking", model.name, model.task.as_str());
        return Err(Error::invalid("model", message));
    }
    // These clients expect long documents to be cut.
    let second = body.max_tokens_per_doc.unwrap_or(usize::MAX);
    let cut = Cut { length: model.context() as usize, second, side: Side::Right };
    let ranking = Ranking {
        query,
        documents: &documents,
        cut: Some(cut),
        raw: body.raw_scores.unwrap_or(false),
    };
    let ranked = rank(front, ticket, model, ranking).await?;
    let shown = [body.return_documents, body.return_text].contains(&Some(true));
    let place = |&(index, relevance_score): &(usize, f32)| Placed {
        index,
        relevance_score,
        document: shown.then(|| Shown { text: &documents[index] }),
    };
    let tokens = ranked.usage.prompt_tokens;
    let answer = Answer {
        id: &format!("rerank-{}", uuid::Uuid::new_v4().simple()),
        model: &model.name,
        results: ranked.order.iter().take(body.top_n.unwrap_or(usize::MAX)).map(place).collect(),
        meta: Meta {
            api_version: Version { version },
            billed_units: Units { search_units: 1 },
            tokens: InputTokens { input_tokens: tokens },
        },
        usage: Tokens { prompt_tokens: tokens, total_tokens: tokens },
    };
    let json = serde_json::to_vec(&answer).expect("strings and finite numbers always serialise");
    Ok((json, ranked.usage))
}

/// Ends the ticket with `error` and says so: as TEI does where neither a version in the path nor
/// a field has told another API.
fn refuse(mut ticket: Ticket, version: Option<&'static str>, refused: &Error) -> Response {
    ticket.fail(refused);
    match version {
        None => tei::response(refused, ticket.request_id()),
        Some(_) => error::with_message(refused, ticket.request_id()),
    }
}
