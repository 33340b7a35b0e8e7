//! The one place that turns an [`Error`] into a status code, headers and the OpenAI error body.

use axum::Extension;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use super::Id;
use super::openapi::{Wording, schema_of};
use crate::error::{Error, ErrorKind, Fault};

// Clients in Rust break where one of the four keys is missing, or `code` is a number.
/// Why a request is not answered.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Error")]
struct Envelope<'a> {
    error: Details<'a>,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ErrorDetails")]
struct Details<'a> {
    /// What is wrong: the measured value, the limit, and the setting that changes it.
    message: &'a str,
    #[schemars(extend("enum" = ["invalid_request_error", "rate_limit_exceeded", "server_error"]))]
    r#type: &'static str,
    /// The field that it is about.
    param: Option<&'a str>,
    /// Stable; what programs go by.
    code: Option<&'static str>,
}

/// Why a request is not answered, with the message at the top too.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "RerankError")]
struct Both<'a> {
    message: &'a str,
    #[serde(flatten)]
    envelope: Envelope<'a>,
}

/// What most routes answer errors with.
pub(super) const WORDING: Wording = Wording { schema: schema_of::<Envelope<'static>>, status };

/// What the versioned routes for reranking answer errors with.
pub(super) const WORDING_BOTH: Wording = Wording { schema: schema_of::<Both<'static>>, status };

/// The whole response for `error`, its message naming the request.
pub(super) fn response(error: &Error, id: &str) -> Response {
    with_status(status(error.kind()), error, id)
}

/// As [`response`], for the few cases in which the kind does not say the status.
pub(super) fn with_status(status: StatusCode, error: &Error, id: &str) -> Response {
    with_body(status, error, body(error, id))
}

/// As [`response`], for APIs with a body of their own.
pub(super) fn with_body(status: StatusCode, error: &Error, json: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    add_retry_headers(headers, error);
    response
}

/// As [`response`], with the message at the top of the body too: where Cohere's clients look.
pub(super) fn with_message(error: &Error, id: &str) -> Response {
    let message = naming(error, id);
    let both = Both { message: error.message(), envelope: Envelope::new(error, &message) };
    let json = serde_json::to_vec(&both).expect("strings and nulls always serialise");
    with_body(status(error.kind()), error, json)
}

/// The OpenAI error body, also the payload of an error event in a stream.
pub(super) fn body(error: &Error, id: &str) -> Vec<u8> {
    let message = naming(error, id);
    serde_json::to_vec(&Envelope::new(error, &message)).expect("strings and nulls always serialise")
}

/// What a person reads, with the request's id.
fn naming(error: &Error, id: &str) -> String {
    format!("{} (request id: {id})", error.message())
}

impl<'a> Envelope<'a> {
    fn new(error: &'a Error, message: &'a str) -> Self {
        let kind = error.kind();
        let (param, code) = (error.param(), Some(kind.code()));
        Self { error: Details { message, r#type: family(kind), param, code } }
    }
}

/// The fallback for unknown paths.
pub(super) async fn no_such_path(Extension(id): Extension<Id>, uri: Uri) -> Response {
    let path: String = uri.path().chars().take(80).collect();
    response(&Error::new(ErrorKind::NotFound, format!("there is no '{path}' here")), id.as_str())
}

/// The fallback for known paths; axum adds `Allow`.
pub(super) async fn no_such_method(
    Extension(id): Extension<Id>,
    method: Method,
    uri: Uri,
) -> Response {
    let path: String = uri.path().chars().take(80).collect();
    let method: String = method.as_str().chars().take(20).collect();
    let error = Error::new(ErrorKind::NotFound, format!("'{path}' does not take {method}"));
    with_status(StatusCode::METHOD_NOT_ALLOWED, &error, id.as_str()).into_response()
}

/// 503 only for draining, loading and dead: meshes eject pods on 5xx, so overload is 429.
pub(super) fn status(kind: ErrorKind) -> StatusCode {
    use ErrorKind::*;
    match kind {
        InvalidRequest | Unsupported | ContextLengthExceeded => StatusCode::BAD_REQUEST,
        Unauthorized => StatusCode::UNAUTHORIZED,
        RequestTimeout => StatusCode::REQUEST_TIMEOUT,
        TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ModelNotFound | NotFound => StatusCode::NOT_FOUND,
        QueueFull | RateLimited => StatusCode::TOO_MANY_REQUESTS,
        Draining | ModelLoading | DeviceFailed | Cut => StatusCode::SERVICE_UNAVAILABLE,
        StepFailed | Internal => StatusCode::INTERNAL_SERVER_ERROR,
        DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
    }
}

fn family(kind: ErrorKind) -> &'static str {
    match (kind, kind.fault()) {
        (ErrorKind::QueueFull | ErrorKind::RateLimited, _) => "rate_limit_exceeded",
        (_, Fault::Caller) => "invalid_request_error",
        _ => "server_error",
    }
}

fn add_retry_headers(headers: &mut HeaderMap, error: &Error) {
    let kind = error.kind();
    if kind == ErrorKind::Unauthorized {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if error.retryable() {
        // Whole seconds, at least one: zero would be "at once", and clients read no fractions.
        let seconds = error.wait().map_or(1, |wait| wait.as_secs_f64().ceil().max(1.0) as u64);
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    } else if kind.fault() != Fault::Caller {
        // The SDKs retry every 5xx unless told not to.
        headers.insert("x-should-retry", HeaderValue::from_static("false"));
    }
    if matches!(kind, ErrorKind::Draining | ErrorKind::DeviceFailed | ErrorKind::Cut) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}
