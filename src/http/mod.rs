//! The HTTP front: routes, wire types, error mapping. Knows the engine only as an inbox.

pub mod listener;

mod admin;
mod answer;
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
mod models;
mod openai;
mod params;
mod rerank;
mod sse;
mod tei;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::Response;

use crate::admission::Front;

/// Where a response names its request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The request's id: the caller's own, or one of ours. In every response and every error.
#[derive(Debug, Clone)]
struct Id(Arc<str>);

/// What the API's clients may ask.
pub fn main_router(front: Arc<Front>) -> Router {
    let mut router = Router::new()
        .merge(chat::router())
        .merge(completions::router())
        .merge(embeddings::router())
        .merge(rerank::router())
        .merge(tei::router())
        .merge(models::router())
        .merge(health::router())
        .merge(kserve::router());
    if front.config.admin.metrics_on_main {
        router = router.merge(admin::metrics_router());
    }
    finish(router, front)
}

/// What operators, probes and scrapers may ask; its own listener.
pub fn admin_router(front: Arc<Front>) -> Router {
    finish(Router::new().merge(admin::metrics_router()).merge(admin::router()), front)
}

/// Adds what every answer has: JSON errors, `x-request-id`, `Connection: close` in a drain.
fn finish(router: Router<Arc<Front>>, front: Arc<Front>) -> Router {
    router
        .fallback(error::no_such_path)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&front), identify))
        .with_state(front)
}

async fn identify(State(front): State<Arc<Front>>, mut request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).filter(|id| is_sane(id)).cloned();
    let id = id.unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).expect("hexadecimal and dashes")
    });
    let text = id.to_str().expect("visible ASCII, checked or made above");
    request.extensions_mut().insert(Id(text.into()));
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    if front.lifecycle.closing_connections() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

/// Whether a caller's request id can go into logs and headers as it is.
fn is_sane(id: &HeaderValue) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
    (1..=128).contains(&id.len()) && id.as_bytes().iter().all(allowed)
}
