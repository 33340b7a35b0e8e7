//! Errors as this API has them: a flat body, statuses of its own.

use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;

use crate::catalog::Model;
use crate::error::{Error, ErrorKind};
use crate::http::error;
use crate::http::openapi::{Wording, schema_of};
use crate::model::ModelTask;

/// A request that is not answered.
#[derive(Debug)]
pub(in crate::http) struct Refusal {
    pub(super) error: Error,
    status: StatusCode,
    kind: Kind,
}

/// The API's own words.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[schemars(rename = "TeiErrorType")]
enum Kind {
    Unhealthy,
    Backend,
    Overloaded,
    Validation,
    Empty,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "TeiError")]
struct Body<'a> {
    error: &'a str,
    error_type: Kind,
}

/// How these errors are worded.
pub(in crate::http) const WORDING: Wording =
    Wording { schema: schema_of::<Body<'static>>, status: |kind| known(kind).0 };

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let (status, kind) = known(error.kind());
        Self { error, status, kind }
    }
}

/// The status and the API's own word for a case.
fn known(kind: ErrorKind) -> (StatusCode, Kind) {
    use ErrorKind::*;
    match kind {
        InvalidRequest | Unsupported => (StatusCode::UNPROCESSABLE_ENTITY, Kind::Validation),
        ContextLengthExceeded | TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, Kind::Validation),
        QueueFull | RateLimited => (StatusCode::TOO_MANY_REQUESTS, Kind::Overloaded),
        Draining | ModelLoading | DeviceFailed | Cut => {
            (StatusCode::SERVICE_UNAVAILABLE, Kind::Unhealthy)
        }
        StepFailed | Internal => (StatusCode::FAILED_DEPENDENCY, Kind::Backend),
        DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, Kind::Overloaded),
        kind => (error::status(kind), Kind::Validation),
    }
}

impl Refusal {
    /// More inputs than one request may have.
    pub(super) fn too_many(count: usize, most: usize) -> Self {
        let message = format!("batch size {count} > maximum allowed batch size {most}");
        Error::new(ErrorKind::TooLarge, message).into()
    }

    /// Nothing to work on.
    pub(super) fn empty(field: &'static str) -> Self {
        let error = Error::invalid(field, format!("`{field}` cannot be empty"));
        Self { error, status: StatusCode::BAD_REQUEST, kind: Kind::Empty }
    }

    /// The model is there, for something else.
    pub(super) fn wrong_model(model: &Model, tasks: &[ModelTask]) -> Self {
        let wanted: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
        let message = format!(
            "the model '{}' is for '{}', this endpoint is for '{}'",
            model.name,
            model.task.as_str(),
            wanted.join("' or '")
        );
        let error = Error::invalid("model", message);
        Self { error, status: StatusCode::FAILED_DEPENDENCY, kind: Kind::Backend }
    }

    /// The HTTP response.
    pub(super) fn response(&self, id: &str) -> Response {
        let message = format!("{} (request id: {id})", self.error.message());
        let body = Body { error: &message, error_type: self.kind };
        let json = serde_json::to_vec(&body).expect("strings always serialise");
        error::with_body(self.status, &self.error, json)
    }
}
