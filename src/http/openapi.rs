//! The OpenAPI document: what every module says of its own operations, with the schemas of its
//! wire types. Knows no handler; `tests/openapi.rs` compares it with the routers.

mod bodies;
mod operation;

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::response::Response;
use axum::routing::get;
use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::generate::json_response;
use crate::admission::Front;
use crate::error::ErrorKind;
pub(super) use bodies::{ChatBody, TextBody};
pub(super) use operation::{Listener, Operation, Wording, schema_of};

/// Everything that a request to a model can end in.
pub(super) const SERVED: [ErrorKind; 15] = [
    ErrorKind::InvalidRequest,
    ErrorKind::Unsupported,
    ErrorKind::ContextLengthExceeded,
    ErrorKind::ModelNotFound,
    ErrorKind::RequestTimeout,
    ErrorKind::TooLarge,
    ErrorKind::QueueFull,
    ErrorKind::RateLimited,
    ErrorKind::Draining,
    ErrorKind::ModelLoading,
    ErrorKind::DeviceFailed,
    ErrorKind::Cut,
    ErrorKind::StepFailed,
    ErrorKind::Internal,
    ErrorKind::DeadlineExceeded,
];

/// Gives a type's schema, or a reference to it.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// Collects the schemas of types that come in, and of those that go out: a field with a default
/// may be missing in the one and never is in the other.
struct Schemas {
    taken: SchemaGenerator,
    given: SchemaGenerator,
}

const PATH: &str = "/openapi.json";

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new().route(PATH, get(serve))
}

pub(super) fn operations() -> Vec<Operation> {
    let document = Operation::get(PATH, "server", "This document");
    vec![document.gives::<Map<String, Value>>()]
}

async fn serve() -> Response {
    static TEXT: LazyLock<Vec<u8>> =
        LazyLock::new(|| serde_json::to_vec(&document()).expect("a tree of JSON"));
    json_response(TEXT.clone())
}

/// The whole document, of both listeners.
pub(super) fn document() -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for operation in joined(super::operations()) {
        let shown = operation.shown(&mut schemas);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = shown;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Sconce",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Many models, one device, one queue",
            "description": "Chat, completions and embeddings as OpenAI's API has them; \
                            embeddings, ranking and classification as TEI, Cohere and KServe have \
                            them. Fields that are not listed are ignored, but for those that \
                            would change the answer and are not served: they are refused with 400 \
                            `unsupported`.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas.all(),
            "headers": operation::headers(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    })
}

/// Operations of one path and method that both listeners have, as one.
fn joined(operations: Vec<Operation>) -> Vec<Operation> {
    let mut all: Vec<Operation> = Vec::new();
    for operation in operations {
        match all.iter_mut().find(|known| known.key() == operation.key()) {
            Some(known) => known.join(operation),
            None => all.push(operation),
        }
    }
    all
}

impl Schemas {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12()
                .with(|settings| settings.definitions_path = "/components/schemas".into())
        };
        Self {
            taken: settings().for_deserialize().into_generator(),
            given: settings().for_serialize().into_generator(),
        }
    }

    /// Every schema by its name.
    fn all(mut self) -> Map<String, Value> {
        let mut all = self.taken.take_definitions(true);
        for (name, schema) in self.given.take_definitions(true) {
            let before = all.insert(name, schema);
            assert!(before.is_none(), "two wire types have the same name: {before:?}");
        }
        all.sort_keys();
        all.values_mut().for_each(bound);
        all
    }
}

/// Says what the formats of whole numbers mean, and nothing of null where a field is missing.
fn bound(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("default").is_some_and(Value::is_null) {
                fields.shift_remove("default");
            }
            if fields.get("format").is_some_and(|format| format == "uint32") {
                fields.entry("maximum").or_insert_with(|| u32::MAX.into());
            }
            fields.values_mut().for_each(bound);
        }
        Value::Array(items) => items.iter_mut().for_each(bound),
        _ => {}
    }
}
