//! One line in the log for each request, however it ends: what was asked of whom, how it ended,
//! what it took and how long. Never what was said: no prompt, no answer, no path of a client.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use super::trace::Trace;
use super::{Ended, RequestReport};
use crate::request::Micros;

/// One HTTP request. Whoever lets go of it last, be it the maker of its status or of its last byte,
/// has it logged.
#[derive(Debug)]
pub struct RequestLog {
    id: Arc<str>,
    started: Instant,
    began: SystemTime,
    /// Set for what is logged: requests of the API, and not probes and scrapes.
    listed: OnceLock<Listed>,
    told: Mutex<Told>,
}

#[derive(Debug)]
struct Listed {
    /// As the router has it, without what the client put in.
    route: String,
    trace: Trace,
}

#[derive(Debug, Default)]
struct Told {
    status: Option<u16>,
    end: Option<End>,
}

/// How a request to a model ended.
#[derive(Debug, Clone)]
pub struct End {
    /// The manifest's name, or `unknown`.
    pub model: String,
    /// As metrics have it.
    pub report: RequestReport,
    /// The tenant's name, as metrics have it.
    pub tenant: String,
    /// Name of the caller's API key.
    pub key: Option<String>,
    /// Time from arrival to the first rows on the device, if it came that far.
    pub queue_wait: Option<Micros>,
    /// Time from arrival to the first token.
    pub first_token: Option<Micros>,
}

impl RequestLog {
    /// Starts the clock.
    pub fn new(id: Arc<str>) -> Arc<Self> {
        Arc::new(Self {
            id,
            started: Instant::now(),
            began: SystemTime::now(),
            listed: OnceLock::new(),
            told: Mutex::default(),
        })
    }

    /// What the client can quote.
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// This is to be logged.
    pub fn list(&self, route: String, trace: Trace) {
        let _ = self.listed.set(Listed { route, trace });
    }

    /// It is answered with this status; a body may follow.
    pub fn status(&self, status: u16) {
        self.told().status = Some(status);
    }

    /// It is over.
    pub fn end(&self, end: End) {
        self.told().end = Some(end);
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        let Told { status, end } = std::mem::take(&mut *self.told());
        let Some(Listed { route, trace }) = self.listed.get() else { return };
        let report = end.as_ref().map(|end| &end.report);
        let usage = report.map(|report| report.usage);
        let code = report.and_then(|report| match report.ended {
            Ended::Failed(kind) => Some(kind.code()),
            Ended::Ok | Ended::Cancelled => None,
        });
        let waited = |time: Option<Micros>| time.map(|time| time.0 as f64 / 1e3);
        tracing::info!(
            request_id = &*self.id,
            trace_id = trace.id(),
            route,
            model = end.as_ref().map(|end| end.model.as_str()),
            task = report.map(|report| report.task.as_str()),
            outcome = report.map(|report| report.ended.as_str()),
            status,
            code,
            prompt_tokens = usage.map(|usage| usage.prompt_tokens),
            cached_tokens = usage.map(|usage| usage.cached_tokens),
            generated_tokens = usage.map(|usage| usage.generated_tokens),
            queue_wait_ms = waited(end.as_ref().and_then(|end| end.queue_wait)),
            first_token_ms = waited(end.as_ref().and_then(|end| end.first_token)),
            duration_ms = self.started.elapsed().as_micros() as f64 / 1e3,
            tenant = end.as_ref().map(|end| end.tenant.as_str()),
            key = end.as_ref().and_then(|end| end.key.as_deref()),
            "request finished"
        );
        trace.end(self.began, status, end.as_ref());
    }
}
