//! Who may ask: a layer over every route but the health probes, and over paths that do not exist.
//! Decides by what a route was given, never by what a path looks like.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use super::connection::Peer;
use super::{Id, error, trace};
use crate::admission::Front;
use crate::admission::callers::Caller;
use crate::error::{Error, ErrorKind, Result};

/// Lets in whoever presents a key, or everybody where no keys are configured; all are logged.
pub(super) async fn callers(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    mut request: Request,
    next: Next,
) -> Response {
    let passed_on = trace::begin(&id.0, &request);
    let mut response = match recognise(&front, request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error::response(&error, id.as_str()),
    };
    id.0.status(response.status().as_u16());
    trace::answer(passed_on, response.headers_mut());
    response
}

/// Lets in who is on this machine, and from elsewhere who presents an admin key; everybody where
/// no keys are configured, as a bind beyond loopback was then asked for by name.
pub(super) async fn operators(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = match request.extensions().get::<Peer>() {
        Some(peer) if peer.is_local() => Ok(Caller::local()),
        _ => recognise(&front, request.headers()),
    };
    match caller {
        Ok(caller) if front.callers.need_keys() && !caller.admin => {
            forbid("this needs an admin key (admin = true in the file of keys)", &id)
        }
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error::response(&error, id.as_str()),
    }
}

/// 403.
pub(super) fn forbid(message: &str, id: &Id) -> Response {
    let error = Error::new(ErrorKind::InvalidRequest, message);
    error::with_status(StatusCode::FORBIDDEN, &error, id.as_str())
}

fn recognise(front: &Front, headers: &HeaderMap) -> Result<Caller> {
    let tenant = front.config.auth.tenant_header.as_deref().and_then(|name| headers.get(name));
    front.callers.recognise(bearer(headers), tenant.map(|name| name.as_bytes()))
}

/// The key of `Authorization: Bearer KEY`; none if there are several such headers.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (given.next(), given.next()) else { return None };
    let (scheme, key) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}
