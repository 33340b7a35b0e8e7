//! `GET /info`: what a model is and what may be asked of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;

use super::{ENCODERS, response};
use crate::admission::Front;
use crate::catalog::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::http::Id;
use crate::http::encode::INPUTS_MAX;
use crate::http::generate::json_response;
use crate::http::tail::Tail;
use crate::model::{EncoderCard, ModelTask};

#[derive(Serialize, JsonSchema)]
pub(super) struct Info<'a> {
    model_id: &'a str,
    model_sha: Option<()>,
    model_dtype: &'static str,
    served_model_name: &'a str,
    model_type: Kind<'a>,
    max_concurrent_requests: usize,
    max_input_length: u32,
    max_batch_tokens: usize,
    max_batch_requests: Option<()>,
    max_client_batch_size: usize,
    auto_truncate: bool,
    tokenization_workers: usize,
    version: &'static str,
    sha: Option<()>,
    docker_label: Option<()>,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "ModelKind")]
enum Kind<'a> {
    Embedding { pooling: &'a str },
    Classifier(Labels<'a>),
    Reranker(Labels<'a>),
}

#[derive(Serialize, JsonSchema)]
struct Labels<'a> {
    id2label: BTreeMap<usize, &'a str>,
    label2id: BTreeMap<&'a str, usize>,
}

/// The only encoder.
pub(super) async fn bare(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
) -> Response {
    respond(&front, front.catalog.only(&ENCODERS), &id)
}

/// `GET /models/{name}/info`.
pub(super) async fn named(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    Tail(path): Tail,
) -> Response {
    let shown: String = path.chars().take(80).collect();
    let wrong = || Error::new(ErrorKind::NotFound, format!("there is no GET '/models/{shown}'"));
    let model = path.strip_suffix("/info").ok_or_else(wrong);
    respond(&front, model.and_then(|name| front.catalog.find(name)), &id)
}

fn respond(front: &Front, model: Result<&Model>, id: &Id) -> Response {
    match model.and_then(|model| json(front, model)) {
        Ok(json) => json_response(json),
        Err(error) => response(&error, id.as_str()),
    }
}

fn json(front: &Front, model: &Model) -> Result<Vec<u8>> {
    if model.task == ModelTask::Generate {
        let message = format!("the model '{}' is for chat and completions", model.name);
        return Err(Error::invalid("model", message));
    }
    let card = model.encoder()?;
    let info = Info {
        model_id: &model.name,
        model_sha: None,
        model_dtype: "float32",
        served_model_name: &model.name,
        model_type: match model.task {
            ModelTask::Rerank => Kind::Reranker(labels(card)),
            ModelTask::Classify => Kind::Classifier(labels(card)),
            _ => Kind::Embedding { pooling: card.pooling },
        },
        max_concurrent_requests: front.config.limits.queue_requests,
        max_input_length: model.context(),
        max_batch_tokens: front.config.limits.queue_tokens,
        max_batch_requests: None,
        max_client_batch_size: INPUTS_MAX,
        auto_truncate: false,
        tokenization_workers: std::thread::available_parallelism().map_or(1, usize::from),
        version: env!("CARGO_PKG_VERSION"),
        sha: None,
        docker_label: None,
    };
    Ok(serde_json::to_vec(&info).expect("strings and numbers always serialise"))
}

fn labels(card: &EncoderCard) -> Labels<'_> {
    let named = || card.labels.iter().map(String::as_str).enumerate();
    Labels {
        id2label: named().collect(),
        label2id: named().map(|(index, label)| (label, index)).collect(),
    }
}
