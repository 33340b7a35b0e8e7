//! `GET /v1/models` and `GET /v1/models/{id}`; ids may hold slashes.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Router};
use schemars::JsonSchema;
use serde::Serialize;

use super::generate::json_response;
use super::openapi::Operation;
use super::tail::Tail;
use super::{Id, error};
use crate::admission::Front;
use crate::catalog::Model;
use crate::error::ErrorKind;

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new().route("/v1/models", get(list)).route("/v1/models/{*id}", get(one))
}

pub(super) fn operations() -> Vec<Operation> {
    let list = Operation::get("/v1/models", "openai", "Every model");
    let one = Operation::get("/v1/models/{model}", "openai", "One model");
    vec![
        list.gives::<List<'static>>(),
        one.gives::<Card<'static>>().refuses(error::WORDING, &[ErrorKind::ModelNotFound]),
    ]
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Models")]
struct List<'a> {
    #[schemars(extend("const" = "list"))]
    object: &'static str,
    data: Vec<Card<'a>>,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Model")]
struct Card<'a> {
    id: &'a str,
    #[schemars(extend("const" = "model"))]
    object: &'static str,
    created: u64,
    owned_by: &'a str,
    // Not in the API's own description, but what proxies and user interfaces look for.
    /// Its context in tokens.
    max_model_len: u32,
}

async fn list(State(front): State<Arc<Front>>) -> Response {
    let data = front.catalog.models().iter().map(card).collect();
    let list = List { object: "list", data };
    json_response(serde_json::to_vec(&list).expect("strings and numbers always serialise"))
}

async fn one(
    State(front): State<Arc<Front>>,
    Extension(request): Extension<Id>,
    Tail(id): Tail,
) -> Response {
    match front.catalog.find(&id) {
        Ok(model) => json_response(
            serde_json::to_vec(&card(model)).expect("strings and numbers always serialise"),
        ),
        Err(error) => error::response(&error, request.as_str()),
    }
}

fn card(model: &Model) -> Card<'_> {
    Card {
        id: &model.name,
        object: "model",
        created: model.created,
        owned_by: &model.owned_by,
        max_model_len: model.context(),
    }
}
