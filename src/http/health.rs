//! Liveness and readiness: the only paths that answer without a key. Overload never flips
//! readiness; only the phase and a dead engine do.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;

use super::openapi::{Listener, Operation};
use crate::admission::Front;
use crate::lifecycle::Phase;

/// What the probes ask.
const LIVE: &str = "Whether the process is worth keeping";
pub(super) const READY: &str = "Whether the process wants requests";

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/health", get(ready))
}

pub(super) fn operations() -> Vec<Operation> {
    let probe = |path, summary| {
        let probe = Operation::get(path, "probes", summary).open();
        probe.says(StatusCode::OK, "Yes").says(StatusCode::SERVICE_UNAVAILABLE, "No")
    };
    vec![
        probe("/livez", LIVE),
        probe("/livez", LIVE).on(Listener::Admin),
        probe("/readyz", READY),
        probe("/health", READY),
    ]
}

/// Whether the process is worth keeping: until it has stopped, unless the engine has died.
pub(super) fn is_live(front: &Front) -> bool {
    let phase = front.lifecycle.phase();
    // In an orderly end the engine goes first.
    let engine = phase == Phase::Closing || phase < Phase::Closing && !front.inbox.is_closed();
    engine && !front.lifecycle.has_failed()
}

/// Whether the process wants new requests.
pub(super) fn is_ready(front: &Front) -> bool {
    let serves = front.lifecycle.phase() == Phase::Ready && !front.lifecycle.has_failed();
    serves && !front.inbox.is_closed()
}

pub(super) async fn live(State(front): State<Arc<Front>>) -> (StatusCode, &'static str) {
    if is_live(&front) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped\n")
    }
}

async fn ready(State(front): State<Arc<Front>>) -> (StatusCode, String) {
    let phase = format!("{}\n", front.lifecycle.phase().as_str());
    (if is_ready(&front) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, phase)
}
