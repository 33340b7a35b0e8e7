//! W3C Trace Context on the wire: what a caller says of its trace is taken in, and goes on with the
//! answer. Knows headers, not what becomes of a trace.

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::telemetry::request_log::RequestLog;
use crate::telemetry::trace::{Parent, Trace};

const PARENT: HeaderName = HeaderName::from_static("traceparent");
const STATE: HeaderName = HeaderName::from_static("tracestate");

/// Longest `tracestate` that is taken: what the specification asks for at least.
const STATE_BYTES_MAX: usize = 512;

/// What goes on with an answer.
#[derive(Debug, Default)]
pub(super) struct PassedOn {
    parent: Option<HeaderValue>,
    state: Option<HeaderValue>,
}

/// Has `request` logged, as part of its caller's trace.
pub(super) fn begin(log: &RequestLog, request: &Request) -> PassedOn {
    let headers = request.headers();
    let parent = only(headers, &PARENT).and_then(|value| Parent::parse(value.to_str().ok()?));
    let state = only(headers, &STATE).filter(|value| value.len() <= STATE_BYTES_MAX);
    let state = state.filter(|_| parent.is_some()).cloned();
    let text = state.as_ref().and_then(|state| state.to_str().ok());
    let route = route(request);
    let trace = Trace::begin(&route, parent, text);
    let parent = trace.passed_on();
    let parent = parent.and_then(|parent| HeaderValue::from_str(parent.header()).ok());
    log.list(route, trace);
    PassedOn { parent, state }
}

/// Adds it to the answer's headers.
pub(super) fn answer(passed_on: PassedOn, headers: &mut HeaderMap) {
    let PassedOn { parent, state } = passed_on;
    for (name, value) in [(PARENT, parent), (STATE, state)] {
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
}

/// The value of a header that is there once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Method and path as the router has them: nothing that a client made up.
fn route(request: &Request) -> String {
    let path = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str);
    let known = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];
    let method = request.method().as_str();
    let method = known.into_iter().find(|known| *known == method).unwrap_or("OTHER");
    format!("{method} {path}")
}
