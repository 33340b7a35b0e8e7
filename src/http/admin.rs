//! What operators, probes and scrapers ask: `/metrics`, `/stats`, `/readyz`, `/drain`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use schemars::JsonSchema;
use serde::Serialize;

use super::auth::forbid;
use super::health::{self, READY, is_ready};
use super::openapi::{Listener, Operation};
use super::{Id, error};
use crate::admission::Front;
use crate::admission::callers::Caller;
use crate::catalog::Model;
use crate::config::manifest::Manifest;
use crate::error::Error;
use crate::lifecycle::{Notice, Phase};
use crate::model::ModelState;
use crate::scheduler::LaneLoad;

/// Longest deadline that a drain may be given.
const DEADLINE_MAX: Duration = Duration::from_secs(86_400);

pub(super) fn metrics_router() -> Router<Arc<Front>> {
    Router::new().route("/metrics", get(metrics))
}

/// What probes may ask without a key.
pub(super) fn probes() -> Router<Arc<Front>> {
    Router::new().route("/livez", get(health::live)).route("/readyz", get(ready))
}

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new()
        .route("/stats", get(stats))
        .route("/config", get(config))
        .route("/drain", get(drain_state).post(drain))
}

pub(super) fn operations() -> Vec<Operation> {
    let get = |path, summary| Operation::get(path, "admin", summary).on(Listener::Admin);
    let ready = Operation::get("/readyz", "probes", READY).on(Listener::Admin).open();
    let drain = Operation::post("/drain", "admin", "Begins a drain").on(Listener::Admin);
    vec![
        ready
            .gives::<Readiness<'static>>()
            .answers::<Readiness<'static>>(StatusCode::SERVICE_UNAVAILABLE, "No"),
        get("/metrics", "Metrics for Prometheus").says(StatusCode::OK, "The metrics"),
        get("/stats", "Load, for scalers").gives::<Stats<'static>>(),
        get("/config", "Every setting and its source")
            .gives::<BTreeMap<&'static str, Setting<'static>>>(),
        get("/drain", "How far a drain is").gives::<DrainState>(),
        drain
            .query::<Seconds>("deadline", "Seconds until the process is gone; none: the grace")
            .answers::<DrainState>(StatusCode::ACCEPTED, "It has begun"),
    ]
}

/// What a deadline may be.
#[derive(JsonSchema)]
#[schemars(inline)]
struct Seconds(
    #[schemars(range(min = 0, max = 86_400))]
    #[expect(dead_code, reason = "for its schema")]
    f64,
);

async fn metrics(State(front): State<Arc<Front>>) -> Response {
    let text = front.telemetry.render();
    front.telemetry.scraped();
    let mut response = text.into_response();
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

#[derive(Serialize, JsonSchema)]
struct Readiness<'a> {
    phase: &'static str,
    ready: bool,
    models: BTreeMap<&'a str, ModelReadiness>,
}

/// One setting, as it took effect.
#[derive(Serialize, JsonSchema)]
struct Setting<'a> {
    value: &'a str,
    source: String,
}

/// Every setting with its source. None is a secret.
async fn config(State(front): State<Arc<Front>>) -> Response {
    let values = front.config.values.iter();
    let settings: BTreeMap<&str, Setting<'_>> = values
        .map(|set| (set.key, Setting { value: &set.value, source: set.source.to_string() }))
        .collect();
    axum::Json(settings).into_response()
}

#[derive(Serialize, JsonSchema)]
struct ModelReadiness {
    state: &'static str,
    /// Of its files.
    bytes: u64,
    /// Until it answers; null when it does.
    eta_seconds: Option<f64>,
}

async fn ready(State(front): State<Arc<Front>>) -> Response {
    let ready = is_ready(&front);
    let of = |model: &Model| {
        let state = model.state();
        let answers = matches!(state, ModelState::Ready | ModelState::Evicted);
        let eta = if answers { None } else { model.loading().wait() };
        let manifest = front.config.manifests.get(model.lane.0 as usize);
        ModelReadiness {
            state: state.as_str(),
            bytes: manifest.map_or(0, Manifest::bytes),
            eta_seconds: eta.map(|eta| eta.as_secs_f64()),
        }
    };
    let readiness = Readiness {
        phase: front.lifecycle.phase().as_str(),
        ready,
        models: front.catalog.models().iter().map(|m| (m.name.as_str(), of(m))).collect(),
    };
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(readiness)).into_response()
}

/// The stable document that scalers read; fields are added, never renamed.
#[derive(Serialize, JsonSchema)]
struct Stats<'a> {
    schema: u32,
    phase: &'static str,
    scaling: Scaling,
    queue: Queue,
    models: BTreeMap<&'a str, ModelStats>,
}

/// Zero while the process does not accept: scalers ask terminating pods too.
#[derive(Default, Serialize, JsonSchema)]
struct Scaling {
    queue: u64,
    in_flight: u64,
}

#[derive(Serialize, JsonSchema)]
struct Queue {
    requests: u64,
    tokens: u64,
    work_seconds: f64,
    oldest_age_seconds: f64,
    running: u64,
    in_flight: u64,
    kv_usage_ratio: f64,
}

#[derive(Serialize, JsonSchema)]
struct ModelStats {
    task: &'static str,
    state: &'static str,
    requests: u32,
    tokens: u64,
    work_seconds: f64,
    running: u32,
}

async fn stats(State(front): State<Arc<Front>>) -> Response {
    let snapshot = front.telemetry.snapshot();
    let load = &snapshot.load;
    let sum = |of: fn(&LaneLoad) -> u64| load.lanes.iter().map(of).sum::<u64>();
    let queue = Queue {
        requests: sum(|lane| lane.waiting.into()) + u64::from(snapshot.inbox),
        tokens: sum(|lane| lane.waiting_tokens) + snapshot.inbox_tokens,
        work_seconds: sum(|lane| lane.waiting_work.0) as f64 / 1e6,
        oldest_age_seconds: load
            .oldest
            .map_or(0.0, |oldest| front.telemetry.now().since(oldest).as_seconds()),
        running: sum(|lane| lane.running.into()),
        in_flight: snapshot.in_flight.into(),
        kv_usage_ratio: load.kv_usage,
    };
    let phase = front.lifecycle.phase();
    let scaling = match phase {
        Phase::Ready | Phase::LameDuck => {
            Scaling { queue: queue.requests, in_flight: queue.in_flight }
        }
        _ => Scaling::default(),
    };
    let idle = LaneLoad::default();
    let of = |model: &Model| {
        let lane = load.lanes.get(model.lane.0 as usize).unwrap_or(&idle);
        ModelStats {
            task: model.task.as_str(),
            state: model.state().as_str(),
            requests: lane.waiting,
            tokens: lane.waiting_tokens,
            work_seconds: lane.waiting_work.as_seconds(),
            running: lane.running,
        }
    };
    let models = front.catalog.models().iter().map(|m| (m.name.as_str(), of(m))).collect();
    axum::Json(Stats { schema: 1, phase: phase.as_str(), scaling, queue, models }).into_response()
}

#[derive(Serialize, JsonSchema)]
struct DrainState {
    phase: &'static str,
    in_flight: usize,
    /// Until the deadline; null when there is none.
    remaining_seconds: Option<f64>,
}

async fn drain_state(State(front): State<Arc<Front>>) -> axum::Json<DrainState> {
    axum::Json(DrainState {
        phase: front.lifecycle.phase().as_str(),
        in_flight: front.lifecycle.in_flight(),
        remaining_seconds: front.lifecycle.remaining().map(|left| left.as_secs_f64()),
    })
}

async fn drain(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    if !caller.admin {
        let message = "only a client on this machine, or one with an admin key, may start a drain";
        return forbid(message, &id);
    }
    if from_a_page(request.headers()) {
        return forbid("a web page may not start a drain", &id);
    }
    let within = match deadline(request.uri().query().unwrap_or("")) {
        Ok(within) => within,
        Err(error) => return error::response(&error, id.as_str()),
    };
    front.lifecycle.notify(Notice { source: "http", within, terminate: false });
    (StatusCode::ACCEPTED, drain_state(State(front)).await).into_response()
}

/// Browsers mark what pages send: a page that somebody on this machine opens is not that somebody.
pub(super) fn from_a_page(headers: &HeaderMap) -> bool {
    headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site")
}

/// `deadline=SECONDS` of a query; none: the configured grace.
fn deadline(query: &str) -> Result<Option<Duration>, Error> {
    let refuse = |what: String| Err(Error::invalid("deadline", what));
    let mut within = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if key != "deadline" {
            return refuse("the only parameter is deadline=SECONDS".into());
        }
        let seconds = value.parse::<f64>().ok().filter(|seconds| *seconds >= 0.0);
        let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        match duration.filter(|duration| *duration <= DEADLINE_MAX) {
            Some(duration) => within = Some(duration),
            None => return refuse("deadline has to be 0 to 86400 seconds".into()),
        }
    }
    Ok(within)
}
