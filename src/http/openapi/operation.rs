//! One operation of the OpenAPI document, put together by the module that serves it.

use std::collections::{BTreeMap, HashSet};

use axum::http::StatusCode;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::{SchemaOf, Schemas};
use crate::error::ErrorKind;
use crate::http::error;

const JSON: &str = "application/json";

/// Which listener has an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) enum Listener {
    Main,
    Admin,
}

/// How an API words its errors.
#[derive(Debug, Clone, Copy)]
pub(in crate::http) struct Wording {
    /// Of the body.
    pub(in crate::http) schema: SchemaOf,
    /// Which status a case has.
    pub(in crate::http) status: fn(ErrorKind) -> StatusCode,
}

/// What may be asked on one path with one method.
#[derive(Debug)]
pub(in crate::http) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    listeners: Vec<Listener>,
    /// Whether it answers without a key.
    open: bool,
    tag: &'static str,
    summary: &'static str,
    /// Query parameters: name, meaning, schema.
    query: Vec<(&'static str, &'static str, SchemaOf)>,
    /// Shapes of its body; none: it takes no body.
    bodies: Vec<SchemaOf>,
    answers: BTreeMap<u16, Answer>,
}

/// What an answer of one status can be.
#[derive(Debug, Default)]
struct Answer {
    says: Vec<&'static str>,
    /// Errors that have this status.
    kinds: Vec<ErrorKind>,
    /// Shapes by media type.
    content: BTreeMap<&'static str, Vec<SchemaOf>>,
    /// The shape of a stream's events.
    event: Option<SchemaOf>,
    /// Headers of its own.
    headers: Vec<&'static str>,
}

/// The schema of `T`.
pub(in crate::http) fn schema_of<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Schema {
    schemas.subschema_for::<T>()
}

impl Operation {
    pub(in crate::http) fn get(
        path: &'static str,
        tag: &'static str,
        summary: &'static str,
    ) -> Self {
        Self {
            method: "get",
            path,
            listeners: vec![Listener::Main],
            open: false,
            tag,
            summary,
            query: Vec::new(),
            bodies: Vec::new(),
            answers: BTreeMap::new(),
        }
    }

    pub(in crate::http) fn post(
        path: &'static str,
        tag: &'static str,
        summary: &'static str,
    ) -> Self {
        Self { method: "post", ..Self::get(path, tag, summary) }
    }

    /// What it does.
    pub(in crate::http) fn about(mut self, summary: &'static str) -> Self {
        self.summary = summary;
        self
    }

    /// It is on this listener.
    pub(in crate::http) fn on(mut self, listener: Listener) -> Self {
        self.listeners = vec![listener];
        self
    }

    /// It answers without a key.
    pub(in crate::http) fn open(mut self) -> Self {
        self.open = true;
        self
    }

    /// Its body is a `T`, or of another shape that was given before.
    pub(in crate::http) fn takes<T: JsonSchema>(mut self) -> Self {
        self.bodies.push(schema_of::<T>);
        self
    }

    /// It has a query parameter.
    pub(in crate::http) fn query<T: JsonSchema>(
        mut self,
        name: &'static str,
        says: &'static str,
    ) -> Self {
        self.query.push((name, says, schema_of::<T>));
        self
    }

    /// 200 with a `T` in JSON, or of another shape that was given before.
    pub(in crate::http) fn gives<T: JsonSchema>(self) -> Self {
        self.answers::<T>(StatusCode::OK, "The answer")
    }

    /// Another status, with a `T` in JSON.
    pub(in crate::http) fn answers<T: JsonSchema>(
        mut self,
        status: StatusCode,
        says: &'static str,
    ) -> Self {
        self.answer(status, says).shape(JSON, schema_of::<T>);
        self
    }

    /// A status with plain text.
    pub(in crate::http) fn says(mut self, status: StatusCode, says: &'static str) -> Self {
        self.answer(status, says).shape("text/plain", schema_of::<String>);
        self
    }

    /// 200 with a stream of events, each a `T`.
    pub(in crate::http) fn streams<T: JsonSchema>(mut self) -> Self {
        let answer = self.answer(StatusCode::OK, "The answer");
        answer.shape("text/event-stream", schema_of::<String>);
        answer.event = Some(schema_of::<T>);
        self
    }

    /// 200 comes with these headers.
    pub(in crate::http) fn tells(mut self, headers: &[&'static str]) -> Self {
        self.answer(StatusCode::OK, "The answer").headers.extend(headers);
        self
    }

    /// Errors that it can end in.
    pub(in crate::http) fn refuses(mut self, wording: Wording, kinds: &[ErrorKind]) -> Self {
        for &kind in kinds {
            self.refuse((wording.status)(kind), wording, kind);
        }
        self
    }

    /// An error whose status is not the usual one.
    pub(in crate::http) fn refuses_with(
        mut self,
        status: StatusCode,
        wording: Wording,
        kind: ErrorKind,
    ) -> Self {
        self.refuse(status, wording, kind);
        self
    }

    /// Path and method.
    pub(super) fn key(&self) -> (&'static str, &'static str) {
        (self.path, self.method)
    }

    /// Takes in what the other listener has at the same place.
    pub(super) fn join(&mut self, other: Self) {
        self.listeners.extend(other.listeners);
        for (status, answer) in other.answers {
            let known = self.answers.entry(status).or_default();
            known.says.extend(answer.says);
            known.kinds.extend(answer.kinds);
            for (media, shapes) in answer.content {
                known.content.entry(media).or_default().extend(shapes);
            }
        }
    }

    /// As the document has it.
    pub(super) fn shown(&self, schemas: &mut Schemas) -> Value {
        let mut shown = json!({
            "operationId": self.id(),
            "tags": [self.tag],
            "summary": self.summary,
            "security": if self.open { json!([]) } else { json!([{}, {"key": []}]) },
        });
        let parameters = self.parameters(schemas);
        if !parameters.is_empty() {
            shown["parameters"] = parameters.into();
        }
        if self.listeners == [Listener::Admin] {
            let says = "The admin listener (`admin.host`, `admin.port`)";
            shown["servers"] = json!([{"url": "http://localhost:9464", "description": says}]);
        }
        if !self.bodies.is_empty() {
            let schema = any_of(&self.bodies, &mut schemas.taken);
            shown["requestBody"] = json!({"required": true, "content": {JSON: {"schema": schema}}});
        }
        let answers = self.answers.iter();
        let answers = answers.map(|(status, answer)| (status.to_string(), answer.shown(schemas)));
        shown["responses"] = answers.collect::<Map<String, Value>>().into();
        shown
    }

    /// `post_v1_chat_completions`.
    fn id(&self) -> String {
        let words = self.path.split(|c: char| !c.is_ascii_alphanumeric());
        let words = std::iter::once(self.method).chain(words.filter(|word| !word.is_empty()));
        words.collect::<Vec<_>>().join("_")
    }

    fn parameters(&self, schemas: &mut Schemas) -> Vec<Value> {
        let names = self.path.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
        let in_path = names.map(|(name, _)| {
            let says = match name {
                "version" => "Models have one version, `1`",
                _ => "A model's name; it may hold slashes",
            };
            json!({"name": name, "in": "path", "required": true, "description": says,
                   "schema": {"type": "string", "minLength": 1}})
        });
        let mut parameters: Vec<Value> = in_path.collect();
        parameters.extend(self.query.iter().map(|(name, says, schema)| {
            json!({"name": name, "in": "query", "description": says,
                   "schema": schema(&mut schemas.taken)})
        }));
        parameters
    }

    fn answer(&mut self, status: StatusCode, says: &'static str) -> &mut Answer {
        let answer = self.answers.entry(status.as_u16()).or_default();
        answer.says.push(says);
        answer
    }

    fn refuse(&mut self, status: StatusCode, wording: Wording, kind: ErrorKind) {
        let answer = self.answers.entry(status.as_u16()).or_default();
        answer.kinds.push(kind);
        answer.shape(JSON, wording.schema);
    }

    /// Adds what the layers in front of it can say.
    pub(in crate::http) fn layered(mut self) -> Self {
        let too_large = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        self.refuse(too_large, error::WORDING, ErrorKind::TooLarge);
        if self.open {
            return self;
        }
        if self.listeners == [Listener::Admin] {
            self.refuse(StatusCode::FORBIDDEN, error::WORDING, ErrorKind::InvalidRequest);
        }
        self.refuses(error::WORDING, &[ErrorKind::InvalidRequest, ErrorKind::Unauthorized])
    }
}

impl Answer {
    fn shape(&mut self, media: &'static str, schema: SchemaOf) {
        self.content.entry(media).or_default().push(schema);
    }

    fn shown(&self, schemas: &mut Schemas) -> Value {
        let mut content = Map::new();
        for (&media, shapes) in &self.content {
            let mut shown = json!({"schema": any_of(shapes, &mut schemas.given)});
            if media == "text/event-stream"
                && let Some(event) = self.event
            {
                let error = (error::WORDING.schema)(&mut schemas.given);
                shown["schema"] = stream_of(&event(&mut schemas.given), &error);
            }
            content.insert(media.to_owned(), shown);
        }
        let codes = self.kinds.iter().map(|kind| format!("`{}`", kind.code()));
        let mut says: Vec<String> = self.says.iter().map(|says| (*says).to_owned()).collect();
        says.extend(codes);
        let mut seen = HashSet::new();
        says.retain(|one| seen.insert(one.clone()));
        json!({"description": says.join(", "), "headers": self.headers(), "content": content})
    }

    fn headers(&self) -> Map<String, Value> {
        let mut all = vec![("x-request-id", true)];
        all.extend(self.headers.iter().map(|&name| (name, true)));
        let again = |kind: &ErrorKind| kind.retryable();
        if self.kinds.iter().any(again) {
            all.push(("retry-after", self.says.is_empty() && self.kinds.iter().all(again)));
        }
        if self.kinds.contains(&ErrorKind::Unauthorized) {
            all.push(("www-authenticate", true));
        }
        let shown = all.into_iter().map(|(name, always)| {
            let header = if always {
                json!({"$ref": format!("#/components/headers/{name}")})
            } else {
                header(name, false)
            };
            (name.to_owned(), header)
        });
        shown.collect()
    }
}

/// Events of a stream: chunks, perhaps an error, and the word that ends it.
fn stream_of(chunk: &Schema, error: &Schema) -> Value {
    let data = json!({
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, error]},
    });
    json!({
        "description": "One event. There are comment lines while it is quiet; a failure is an \
                        event with an `error`; the last event is `[DONE]`.",
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    })
}

/// Headers that answers always have, where they have them.
pub(super) fn headers() -> Map<String, Value> {
    let names = HEADERS.iter().map(|(name, ..)| *name);
    names.map(|name| (name.to_owned(), header(name, true))).collect()
}

/// What headers mean, and the least of those that are numbers.
const HEADERS: [(&str, &str, Option<u32>); 8] = [
    ("x-request-id", "The request's id: the caller's own, or one of the server's", None),
    ("www-authenticate", "How to present a key", None),
    ("retry-after", "Seconds after which to try again", Some(1)),
    ("x-compute-time", "Milliseconds that the request took", Some(0)),
    ("x-compute-characters", "Characters of its texts", Some(0)),
    ("x-compute-tokens", "Their tokens", Some(0)),
    ("x-total-time", "Milliseconds that the request took", Some(0)),
    ("x-tokenization-time", "Milliseconds of these for tokenising", Some(0)),
];

fn header(name: &str, required: bool) -> Value {
    let known = HEADERS.iter().find(|(known, ..)| *known == name);
    let (_, says, least) = known.unwrap_or_else(|| panic!("no header {name}"));
    let schema = match least {
        Some(least) => json!({"type": "integer", "minimum": least}),
        None => json!({"type": "string"}),
    };
    json!({"description": says, "required": required, "schema": schema})
}

fn any_of(shapes: &[SchemaOf], schemas: &mut SchemaGenerator) -> Value {
    let mut shown: Vec<Value> = Vec::new();
    for shape in shapes {
        let schema = shape(schemas).into();
        if !shown.contains(&schema) {
            shown.push(schema);
        }
    }
    match shown.len() {
        1 => shown.remove(0),
        _ => json!({"anyOf": shown}),
    }
}
