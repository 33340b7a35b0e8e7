//! Asks a running server over HTTP/1.1 without TLS: one connection a request, all of it bounded.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, Uri};
use http_body_util::{BodyExt, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::{Fault, PlanError};

/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Where a server listens.
#[derive(Debug, Clone)]
pub(super) struct Target {
    authority: String,
    address: String,
}

impl Target {
    /// From `http://HOST:PORT`.
    ///
    /// # Errors
    /// Another scheme, or no host.
    pub(super) fn parse(flag: &str, url: &str) -> Result<Self, PlanError> {
        let wrong = || {
            let message = format!("{flag} {url:?}: must be http://HOST:PORT, without a path");
            PlanError::new(Fault::Usage, message)
        };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().filter(|_| uri.scheme_str() == Some("http"));
        let authority = authority.filter(|_| matches!(uri.path(), "/" | "")).ok_or_else(wrong)?;
        let port = authority.port_u16().unwrap_or(80);
        let address = format!("{}:{port}", authority.host());
        Ok(Self { authority: authority.to_string(), address })
    }

    /// The status and the body of an answer.
    ///
    /// # Errors
    /// No connection, no whole answer in `limit`, or one that is too large: in words.
    pub(super) async fn ask(
        &self,
        path: &str,
        body: Option<String>,
        limit: Duration,
    ) -> Result<(u16, Vec<u8>), String> {
        let whole = self.exchange(path, body);
        let answer = tokio::time::timeout(limit, whole).await;
        let late = || format!("{}{path}: no answer in {limit:?}", self.authority);
        answer.map_err(|_| late())?.map_err(|what| format!("{}{path}: {what}", self.authority))
    }

    async fn exchange(&self, path: &str, body: Option<String>) -> Result<(u16, Vec<u8>), String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let stream = TcpStream::connect(&self.address).await.map_err(|error| text(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| text(&error))?;
        let connection = tokio::spawn(connection);
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.authority)
            .header("content-type", "application/json")
            .header("connection", "close")
            .body(body.map_or_else(Body::empty, Body::from))
            .map_err(|error| text(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| text(&error));
        let read = match answer {
            Ok(answer) => {
                let status = answer.status().as_u16();
                let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
                let body = body.map_err(|error| text(error.as_ref()));
                body.map(|body| (status, body.to_bytes().to_vec()))
            }
            Err(error) => Err(error),
        };
        connection.abort();
        read
    }

    /// The text of an admin page.
    ///
    /// # Errors
    /// No answer, or another one than 200.
    pub(super) async fn page(&self, path: &str) -> Result<String, PlanError> {
        let answer = self.ask(path, None, Duration::from_secs(10)).await;
        let fail = |what: String| PlanError::new(Fault::Unavailable, what);
        let (status, body) = answer.map_err(fail)?;
        if status != 200 {
            let hint = if status == 404 { " (is this the admin port?)" } else { "" };
            return Err(fail(format!("{}{path}: status {status}{hint}", self.authority)));
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

/// Runs `work` to its end on this thread.
///
/// # Errors
/// The system refuses what waiting needs, or what `work` says.
pub(super) fn wait<T>(work: impl Future<Output = Result<T, PlanError>>) -> Result<T, PlanError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| PlanError::new(Fault::Unavailable, error.to_string()))?;
    runtime.block_on(work)
}
