//! The HTTP front: routes, wire types, error mapping. Knows the engine only as an inbox.

pub mod listener;

mod admin;
mod answer;
mod auth;
mod body;
mod chat;
mod completions;
mod connection;
mod embeddings;
mod encode;
mod error;
mod generate;
mod health;
mod input;
mod kserve;
mod logprobs;
mod models;
mod object;
mod openai;
mod openapi;
mod params;
mod rerank;
mod sampling;
mod slots;
mod sse;
mod tail;
mod tei;
mod trace;
mod whole;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;

use crate::admission::Front;
use crate::error::{Error, ErrorKind};
use crate::telemetry::request_log::RequestLog;

/// Where a response names its request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The request, as all that handles it knows it: by its id (the caller's own, or one of ours),
/// which is in every response, every error and its line in the log.
#[derive(Debug, Clone)]
struct Id(Arc<RequestLog>);

impl Id {
    fn as_str(&self) -> &str {
        self.0.id()
    }
}

/// Most bytes of a request's headers; beyond twice that, the connection's own limit answers.
const HEADER_BYTES_MAX: usize = 64 * 1024;

/// Most headers of a request.
const HEADERS_MAX: usize = 100;

/// What the API's clients may ask. Deny by default: what is merged here needs a key, and only
/// what `open` adds does not.
pub fn main_router(front: Arc<Front>) -> Router {
    let mut guarded = Router::new()
        .merge(chat::router())
        .merge(completions::router())
        .merge(embeddings::router())
        .merge(rerank::router())
        .merge(tei::router())
        .merge(models::router())
        .merge(kserve::router())
        .merge(openapi::router());
    let mut open = health::router().merge(kserve::probes());
    if front.config.admin.metrics_on_main {
        match front.config.auth.open_metrics {
            true => open = open.merge(admin::metrics_router()),
            false => guarded = guarded.merge(admin::metrics_router()),
        }
    }
    let guarded =
        fall_back(guarded).layer(middleware::from_fn_with_state(Arc::clone(&front), auth::callers));
    finish(guarded, open, front)
}

/// What operators, probes and scrapers may ask; its own listener.
pub fn admin_router(front: Arc<Front>) -> Router {
    let mut guarded = admin::router();
    let mut open = admin::probes();
    match front.config.auth.open_metrics {
        true => open = open.merge(admin::metrics_router()),
        false => guarded = guarded.merge(admin::metrics_router()),
    }
    let guarded = fall_back(guarded)
        .layer(middleware::from_fn_with_state(Arc::clone(&front), auth::operators));
    finish(guarded, open, front)
}

/// What both listeners can be asked, as the document says it.
fn operations() -> Vec<openapi::Operation> {
    let modules = [
        chat::operations,
        completions::operations,
        embeddings::operations,
        models::operations,
        rerank::operations,
        tei::operations,
        kserve::operations,
        openapi::operations,
        health::operations,
        admin::operations,
    ];
    let all = modules.into_iter().flat_map(|operations| operations());
    all.map(openapi::Operation::layered).collect()
}

/// What answers where no route does.
fn fall_back(router: Router<Arc<Front>>) -> Router<Arc<Front>> {
    router.fallback(error::no_such_path).method_not_allowed_fallback(error::no_such_method)
}

/// Adds what every answer has: JSON errors, `x-request-id`, `Connection: close` in a drain.
fn finish(guarded: Router<Arc<Front>>, open: Router<Arc<Front>>, front: Arc<Front>) -> Router {
    guarded
        .merge(open.method_not_allowed_fallback(error::no_such_method))
        .layer(middleware::from_fn_with_state(Arc::clone(&front), identify))
        .with_state(front)
}

async fn identify(State(front): State<Arc<Front>>, mut request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).filter(|id| is_sane(id)).cloned();
    let id = id.unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).expect("hexadecimal and dashes")
    });
    let text = id.to_str().expect("visible ASCII, checked or made above");
    request.extensions_mut().insert(Id(RequestLog::new(text.into())));
    let mut response = match check_headers(&request) {
        Ok(()) => next.run(request).await,
        Err(error) => error::with_status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, &error, text),
    };
    response.headers_mut().insert(REQUEST_ID, id);
    if front.lifecycle.closing_connections() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

/// Refuses more headers than any client needs.
fn check_headers(request: &Request) -> Result<(), Error> {
    let headers = request.headers();
    if headers.len() > HEADERS_MAX {
        let message = format!("{} headers, at most {HEADERS_MAX}", headers.len());
        return Err(Error::new(ErrorKind::TooLarge, message));
    }
    let uri = request.uri().path_and_query().map_or(0, |uri| uri.as_str().len());
    let line = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 4;
    let bytes = uri + headers.iter().map(line).sum::<usize>();
    if bytes > HEADER_BYTES_MAX {
        let message = format!("{bytes} bytes of headers and path, at most {HEADER_BYTES_MAX}");
        return Err(Error::new(ErrorKind::TooLarge, message));
    }
    Ok(())
}

/// Whether a caller's request id can go into logs and headers as it is.
fn is_sane(id: &HeaderValue) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
    (1..=128).contains(&id.len()) && id.as_bytes().iter().all(allowed)
}
