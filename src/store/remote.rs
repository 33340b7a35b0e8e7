//! Files over HTTPS, and from a model hub, which is HTTPS with a rule for addresses and a token.
//! What is there of an interrupted download is kept and continued. Knows no manifest and no cache;
//! nothing that it brings is trusted until its checksum was compared.

#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use ureq::http::{Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::config::Models;

use super::error::Failure;
use super::progress::Meter;

const CHUNK_BYTES: usize = 256 << 10;
/// Attempts in a row that bring nothing.
const ATTEMPTS_MAX: u32 = 4;
const BACKOFF: Duration = Duration::from_millis(500);
/// A server that asks for more patience than this is not waited for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence for so long is a dead connection.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const STOP_POLL: Duration = Duration::from_millis(50);

/// Where a file is, and who may have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    url: String,
    /// Sent to this host only, never to one that it redirects to.
    bearer: Option<String>,
}

/// An HTTP client: proxies from the environment as curl reads them, one set of root certificates.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
}

/// How one attempt ended that did not bring the rest of the file.
enum Broken {
    /// Trying again may help, perhaps after this long.
    Retry(String, Option<Duration>),
    /// It will not.
    Final(Failure),
}

impl Address {
    /// A plain address, without credentials.
    pub(super) fn of(url: &str) -> Self {
        Self { url: url.to_owned(), bearer: None }
    }

    /// A file of a hub's repository at a commit.
    pub(super) fn on_hub(models: &Models, repo: &str, revision: &str, path: &str) -> Self {
        let endpoint = models.hub_endpoint.trim_end_matches('/');
        let url = format!("{endpoint}/{repo}/resolve/{revision}/{path}");
        Self { url, bearer: models.hub_token.clone() }
    }
}

impl Client {
    /// A client as the settings want it.
    ///
    /// # Errors
    /// `models.ca_file` cannot be read or holds no certificate.
    pub(super) fn new(models: &Models) -> Result<Self, Failure> {
        let roots = match &models.ca_file {
            None => RootCerts::WebPki,
            Some(path) => certificates(path)?,
        };
        let config = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .http_status_as_error(false)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .user_agent(concat!("sconce/", env!("CARGO_PKG_VERSION")))
            // Weights do not compress, and ranges of a compressed stream mean nothing.
            .accept_encoding("identity");
        Ok(Self { agent: config.build().new_agent() })
    }

    /// Brings the file at `address`, which should have `bytes` bytes, into `partial`, going on
    /// where that ends.
    ///
    /// # Errors
    /// What the server said last, a size other than `bytes`, a full disk, the wish to stop.
    pub(super) fn download(
        &self,
        address: &Address,
        partial: &Path,
        bytes: u64,
        meter: &mut Meter<'_>,
    ) -> Result<(), Failure> {
        let mut futile = 0;
        meter.advance(length(partial).min(bytes));
        loop {
            let before = length(partial);
            if before == bytes {
                return Ok(());
            }
            let (reason, patience) = match self.attempt(address, partial, bytes, meter) {
                Ok(()) => return Ok(()),
                Err(Broken::Final(failure)) => return Err(failure),
                Err(Broken::Retry(reason, patience)) => (reason, patience),
            };
            futile = if length(partial) > before { 0 } else { futile + 1 };
            let patience = patience.unwrap_or(BACKOFF * 2_u32.pow(futile));
            if futile == ATTEMPTS_MAX || patience > RETRY_AFTER_MAX {
                return Err(Failure::Absent(reason));
            }
            tracing::debug!(url = address.url, reason, "the download is tried again");
            rest(patience, meter)?;
        }
    }

    /// The file at `address` from its beginning, as it is read, and how many bytes it has. Whoever
    /// has read enough drops it, and with it the connection.
    ///
    /// # Errors
    /// What the server said, or that it does not say a size.
    pub(super) fn open(&self, address: &Address) -> Result<(impl Read + use<>, u64), Failure> {
        let response = self.request(address).call().map_err(unreachable);
        let response = response.and_then(|response| match response.status() {
            StatusCode::OK => Ok(response),
            status => Err(refusal(status, &response)),
        });
        let response = response.map_err(|broken| match broken {
            Broken::Retry(reason, _) => Failure::Absent(reason),
            Broken::Final(failure) => failure,
        })?;
        let Some(bytes) = promised(&response) else {
            return Err(Failure::Absent("it does not say how many bytes it has".into()));
        };
        Ok((response.into_body().into_with_config().limit(bytes).reader(), bytes))
    }

    fn request(&self, address: &Address) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        let request = self.agent.get(&address.url);
        match &address.bearer {
            Some(bearer) => request.header(header::AUTHORIZATION, format!("Bearer {bearer}")),
            None => request,
        }
    }

    fn attempt(
        &self,
        address: &Address,
        partial: &Path,
        bytes: u64,
        meter: &mut Meter<'_>,
    ) -> Result<(), Broken> {
        let mut there = length(partial);
        if there > bytes {
            there = 0;
        }
        let mut request = self.request(address);
        if there > 0 {
            request = request.header(header::RANGE, format!("bytes={there}-"));
        }
        let response = request.call().map_err(unreachable)?;
        let from = match response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT => there,
            // What is there is longer than the file: another file.
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let _ = fs::remove_file(partial);
                return Err(Broken::Retry("HTTP 416 for the rest of the file".into(), None));
            }
            status => return Err(refusal(status, &response)),
        };
        if let Some(found) =
            promised(&response).map(|rest| from + rest).filter(|found| *found != bytes)
        {
            let reason = format!("wrong size: expected {bytes} bytes, found {found}");
            return Err(Broken::Final(Failure::Wrong(reason)));
        }
        receive(response.into_body(), partial, from..bytes, meter)
    }
}

/// Appends the body to what is there up to `range.start`, and stops at its end.
fn receive(
    body: Body,
    partial: &Path,
    range: std::ops::Range<u64>,
    meter: &mut Meter<'_>,
) -> Result<(), Broken> {
    let writing = |error| Broken::Final(Failure::writing("write", partial, error));
    let opened = File::options().create(true).truncate(false).write(true).open(partial);
    let mut output = opened.map_err(writing)?;
    output.set_len(range.start).map_err(writing)?;
    std::io::Seek::seek(&mut output, std::io::SeekFrom::End(0)).map_err(writing)?;
    let mut input = body.into_with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut left = range.end - range.start;
    loop {
        if meter.stopped() {
            return Err(Broken::Final(Failure::Stopped));
        }
        let count = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => return Err(Broken::Retry(format!("interrupted: {error}"), None)),
        };
        left = left.checked_sub(count as u64).ok_or_else(|| {
            let reason = format!("wrong size: expected {} bytes, found more", range.end);
            Broken::Final(Failure::Wrong(reason))
        })?;
        output.write_all(&buffer[..count]).map_err(writing)?;
        meter.advance(count as u64);
    }
    if left > 0 {
        return Err(Broken::Retry(format!("interrupted, {left} bytes before the end"), None));
    }
    output.sync_all().map_err(writing)
}

/// Bytes that are to come.
fn promised(response: &Response<Body>) -> Option<u64> {
    response.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A status that brings no file.
fn refusal(status: StatusCode, response: &Response<Body>) -> Broken {
    let after = response.headers().get(header::RETRY_AFTER);
    let after = after.and_then(|text| text.to_str().ok()?.parse().ok()).map(Duration::from_secs);
    let told = format!("HTTP {status}");
    match status.as_u16() {
        408 | 429 | 500.. => Broken::Retry(told, after),
        401 | 403 => {
            let hint = "it needs a token that may read it (HF_TOKEN for a hub)";
            Broken::Final(Failure::Absent(format!("{told}: {hint}")))
        }
        _ => Broken::Final(Failure::Absent(told)),
    }
}

/// No answer at all. What is wrong with the address or a certificate does not pass by itself.
fn unreachable(error: ureq::Error) -> Broken {
    match error {
        ureq::Error::Io(_)
        | ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed => {
            let invalid = matches!(&error, ureq::Error::Io(io)
                if io.kind() == std::io::ErrorKind::InvalidData);
            let told = format!("cannot be reached: {error}");
            if invalid { Broken::Final(Failure::Absent(told)) } else { Broken::Retry(told, None) }
        }
        other => Broken::Final(Failure::Absent(format!("cannot be reached: {other}"))),
    }
}

/// Waits, but not for a process that is about to end.
fn rest(patience: Duration, meter: &mut Meter<'_>) -> Result<(), Failure> {
    let mut left = patience;
    while !left.is_zero() {
        if meter.stopped() {
            return Err(Failure::Stopped);
        }
        let nap = left.min(STOP_POLL);
        std::thread::sleep(nap);
        left -= nap;
        meter.tick();
    }
    Ok(())
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

fn certificates(path: &Path) -> Result<RootCerts, Failure> {
    let told = |what: String| Failure::Absent(format!("models.ca_file {}: {what}", path.display()));
    let pem = fs::read(path).map_err(|error| told(format!("cannot be read: {error}")))?;
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = certificates.collect();
    if certificates.is_empty() {
        return Err(told("no certificate in it".into()));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}
