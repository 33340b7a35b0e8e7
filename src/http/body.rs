//! Reads a request's body: bounded, timed, parsed as JSON. Knows no endpoint.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use serde_path_to_error::{Path, Segment};
use tokio::time::{Instant, timeout_at};

use super::admin::from_a_page;
use super::object::Object;
use crate::admission::Front;
use crate::admission::callers::Caller;
use crate::admission::ticket::Ticket;
use crate::config::Server;
use crate::error::{Error, ErrorKind, Result};

/// Bytes that are reserved for a body before any of it is here, and that every request may have
/// without asking: the bodies of most are smaller.
const AT_FIRST: usize = 64 * 1024;

/// Characters of a field's name that are shown.
const NAME_MAX: usize = 40;

/// Characters of a parser's message that are shown: it quotes the offending value.
const SHOWN_MAX: usize = 200;

/// The body as `T`; also takes the caller and its `x-request-timeout` over into the ticket.
///
/// # Errors
/// `InvalidRequest` for what is not JSON of this shape, `TooLarge` above `server.max_body_bytes`,
/// `RequestTimeout` for one that takes longer than `server.body_timeout_seconds`.
pub(super) async fn json<T: DeserializeOwned + Send + 'static>(
    front: &Front,
    ticket: &mut Ticket,
    request: Request,
) -> Result<T> {
    check_content_type(request.headers())?;
    let (_, bytes) = whole(front, ticket, request).await?;
    parse(front, bytes).await
}

/// A `T` out of the bytes of an object.
///
/// # Errors
/// `InvalidRequest` for what is not JSON of this shape.
pub(super) async fn parse<T: DeserializeOwned + Send + 'static>(
    front: &Front,
    bytes: Vec<u8>,
) -> Result<T> {
    let Object(body) = front.parse(bytes, misshapen).await?;
    Ok(body)
}

/// The body as it is, and the headers; also tells the ticket who calls and takes the caller's
/// `x-request-timeout` over into it.
///
/// # Errors
/// `TooLarge` above `server.max_body_bytes`, `InvalidRequest` for one that does not arrive,
/// `QueueFull` when too much is being read; whatever keeps the request out, before it is read.
pub(super) async fn whole(
    front: &Front,
    ticket: &mut Ticket,
    request: Request,
) -> Result<(HeaderMap, Vec<u8>)> {
    let (mut parts, body) = request.into_parts();
    if let Some(caller) = parts.extensions.remove::<Caller>() {
        ticket.belongs_to(caller);
    }
    if let Some(seconds) = parts.headers.get("x-request-timeout") {
        ticket.limit_time(seconds.to_str().unwrap_or(""))?;
    }
    front.greet(ticket)?;
    let bytes = read(ticket, &parts.headers, body, &front.config.server).await?;
    Ok((parts.headers, bytes))
}

/// The error for JSON of the wrong shape, and the field that it is about.
fn misshapen(place: &Path, error: &serde_json::Error) -> Error {
    let shown: String = error.to_string().chars().take(SHOWN_MAX).collect();
    let message = format!("the body is not JSON of the right shape: {shown}");
    let error = Error::new(ErrorKind::InvalidRequest, message);
    match place.iter().next() {
        Some(Segment::Map { key }) => error.at(key.chars().take(NAME_MAX).collect::<String>()),
        _ => error,
    }
}

/// Refuses what a web page can send without asking (`text/plain`, forms, or no type at all): a
/// server without keys on a loopback address is reachable from every page that its user opens.
pub(super) fn check_content_type(headers: &HeaderMap) -> Result<()> {
    let Some(given) = headers.get(header::CONTENT_TYPE) else {
        if from_a_page(headers) {
            let message = "content-type has to be application/json for what a web page sends";
            return Err(Error::invalid("content-type", message));
        }
        return Ok(());
    };
    let given = given.to_str().unwrap_or("").to_ascii_lowercase();
    let essence = given.split(';').next().unwrap_or("").trim();
    if essence == "application/json" || essence.ends_with("+json") {
        return Ok(());
    }
    let shown: String = essence.chars().take(80).collect();
    let message = format!("content-type has to be application/json, not '{shown}'");
    Err(Error::invalid("content-type", message))
}

async fn read(
    ticket: &mut Ticket,
    headers: &HeaderMap,
    mut body: Body,
    limits: &Server,
) -> Result<Vec<u8>> {
    let most = limits.max_body_bytes;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    let announced = announced.and_then(|length| length.parse::<usize>().ok()).unwrap_or(0);
    if announced > most {
        return Err(too_large(announced, most));
    }
    // What is announced is not believed beyond the usual: memory is taken as bytes come.
    let mut bytes = Vec::with_capacity(announced.min(AT_FIRST));
    let until = ticket.expires().min(Instant::now() + limits.body_timeout);
    loop {
        let Ok(frame) = timeout_at(until, body.frame()).await else {
            return Err(too_slow(bytes.len(), limits));
        };
        match frame {
            None => return Ok(bytes),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                let length = bytes.len() + data.len();
                if length > most {
                    return Err(too_large(length, most));
                }
                let more = length.saturating_sub(bytes.len().max(AT_FIRST));
                if more > 0 {
                    ticket.grow_body(more)?;
                }
                bytes.extend_from_slice(&data);
            }
            Some(Err(_)) => {
                ticket.gone();
                return Err(Error::new(ErrorKind::InvalidRequest, "the body ended too early"));
            }
        }
    }
}

fn too_slow(bytes: usize, limits: &Server) -> Error {
    let message = format!(
        "the body did not arrive within {} s (server.body_timeout_seconds); {bytes} bytes did",
        limits.body_timeout.as_secs_f64()
    );
    Error::new(ErrorKind::RequestTimeout, message)
}

fn too_large(bytes: usize, most: usize) -> Error {
    let message =
        format!("the body has {bytes} bytes or more, the limit is {most} (server.max_body_bytes)");
    Error::new(ErrorKind::TooLarge, message)
}
