//! One API request from its first byte to its last: holds the in-flight guard, and is counted and
//! logged exactly once, however it ends. Knows no HTTP.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Front;
use super::bodies::Held;
use super::callers::Caller;
use super::quota::Pass;
use crate::error::{Error, ErrorKind, Result};
use crate::lifecycle::{InFlight, Phase};
use crate::model::ModelTask;
use crate::request::{LaneId, Meter, Micros, TenantId, Usage};
use crate::telemetry::request_log::{End, RequestLog};
use crate::telemetry::{Ended, Rejection, RequestReport};

/// One API request. Dropping it is its end: answered if [`Ticket::finish`] was called, failed if
/// [`Ticket::fail`] was, else its client went away.
#[derive(Debug)]
pub struct Ticket {
    front: Arc<Front>,
    log: Arc<RequestLog>,
    started: Instant,
    arrived: Micros,
    timeout: Duration,
    task: ModelTask,
    caller: Caller,
    pass: Option<Pass>,
    /// Memory that its body takes.
    body: Option<Held>,
    /// What each of its tasks has taken.
    meters: Vec<Arc<Meter>>,
    lane: Option<LaneId>,
    in_flight: Option<InFlight>,
    /// Prompt tokens in the inbox; none while nothing was submitted.
    submitted: Option<u64>,
    refused_for: Option<Rejection>,
    ended: Option<Ended>,
    usage: Usage,
}

impl Ticket {
    /// Starts the clock.
    pub fn new(front: Arc<Front>, task: ModelTask, log: Arc<RequestLog>) -> Self {
        let arrived = front.telemetry.now();
        let timeout = front.config.limits.request_timeout;
        Self {
            front,
            log,
            started: Instant::now(),
            arrived,
            timeout,
            task,
            caller: Caller::default(),
            pass: None,
            body: None,
            meters: Vec::new(),
            lane: None,
            in_flight: None,
            submitted: None,
            refused_for: None,
            ended: None,
            usage: Usage::default(),
        }
    }

    /// What the client can quote.
    pub fn request_id(&self) -> &Arc<str> {
        self.log.id()
    }

    /// Who asks.
    pub fn tenant(&self) -> TenantId {
        self.caller.tenant
    }

    /// Says who asks.
    pub fn belongs_to(&mut self, caller: Caller) {
        self.caller = caller;
    }

    /// When it arrived, on the telemetry clock.
    pub fn arrived(&self) -> Micros {
        self.arrived
    }

    /// When it is over, on the telemetry clock.
    pub fn deadline(&self) -> Micros {
        self.arrived.plus(self.timeout.into())
    }

    /// When it is over.
    pub fn expires(&self) -> Instant {
        self.started + self.timeout
    }

    /// The caller's own time limit; the lower one holds.
    ///
    /// # Errors
    /// `InvalidRequest` unless `seconds` is a positive number.
    pub fn limit_time(&mut self, seconds: &str) -> Result<()> {
        let wanted = seconds.trim().parse::<f64>().ok().filter(|&seconds| seconds > 0.0);
        let wanted = wanted.ok_or_else(|| {
            let message = "x-request-timeout has to be a positive number of seconds";
            Error::invalid("x-request-timeout", message)
        })?;
        self.timeout =
            self.timeout.min(Duration::try_from_secs_f64(wanted).unwrap_or(Duration::MAX));
        Ok(())
    }

    /// Takes memory for so many more bytes of its body.
    ///
    /// # Errors
    /// `QueueFull` when other requests' bodies take it all.
    pub fn grow_body(&mut self, bytes: usize) -> Result<()> {
        self.front.bodies.take(&mut self.body, bytes)
    }

    /// The error for a passed deadline.
    pub fn expired(&self) -> Error {
        let message = format!(
            "the request was not answered within its {} s (limits.request_timeout_seconds, or \
             the x-request-timeout header)",
            self.timeout.as_secs_f64()
        );
        Error::new(ErrorKind::DeadlineExceeded, message)
    }

    /// It was answered in full.
    pub fn finish(&mut self, usage: Usage) {
        self.usage = usage;
        self.ended = Some(Ended::Ok);
    }

    /// Takes over the guard of a request that is answered, for as long as its answer is written.
    pub fn answers(&mut self) -> Option<InFlight> {
        self.in_flight.take()
    }

    /// It failed with `error`; the first failure counts.
    pub fn fail(&mut self, error: &Error) {
        if self.ended.is_none() {
            self.ended = Some(Ended::Failed(error.kind()));
        }
    }

    /// Its client went away.
    pub fn gone(&mut self) {
        self.ended = Some(Ended::Cancelled);
    }

    /// What has been generated so far, for a request that does not end well.
    pub fn spent(&mut self, usage: Usage) {
        self.usage = usage;
    }

    pub(super) fn set_lane(&mut self, lane: LaneId) {
        self.lane = Some(lane);
    }

    pub(super) fn accepted(&mut self, in_flight: InFlight) {
        self.in_flight = Some(in_flight);
    }

    pub(super) fn refused_for(&mut self, reason: Rejection) {
        self.refused_for = Some(reason);
    }

    pub(super) fn metered(&mut self, meter: Arc<Meter>) {
        self.meters.push(meter);
    }

    pub(super) fn submitted(&mut self, tokens: u64) {
        self.submitted = Some(tokens);
        self.spend(tokens);
        // A ranking may show its texts again; they go with the ticket.
        if self.task != ModelTask::Rerank {
            self.body = None;
        }
    }

    pub(super) fn take_quota(&mut self) -> Result<()> {
        if let Some(quota) = &self.caller.quota {
            self.pass = Some(quota.enter(self.front.telemetry.now())?);
        }
        Ok(())
    }

    fn metered_usage(&self) -> Usage {
        self.meters.iter().map(|meter| meter.usage()).fold(Usage::default(), |sum, usage| Usage {
            prompt_tokens: sum.prompt_tokens + usage.prompt_tokens,
            cached_tokens: sum.cached_tokens + usage.cached_tokens,
            generated_tokens: sum.generated_tokens + usage.generated_tokens,
        })
    }

    /// Books tokens on the caller's key.
    fn spend(&self, tokens: u64) {
        if let Some(pass) = &self.pass {
            pass.spend(self.front.telemetry.now(), tokens);
        }
    }

    fn report(&self, ended: Ended) {
        let front = &self.front;
        if let (Ended::Failed(kind), None) = (ended, self.submitted)
            && let Some(reason) = self.refused_for.or_else(|| rejection(kind))
        {
            front.telemetry.rejected(self.lane, reason);
        }
        let duration = self.started.elapsed();
        // Who left before the end has taken what came until then.
        let usage = match ended {
            Ended::Cancelled => self.metered_usage(),
            _ => self.usage,
        };
        self.spend(usage.generated_tokens.into());
        let report = RequestReport {
            lane: self.lane,
            tenant: self.tenant(),
            task: self.task,
            ended,
            duration,
            usage,
        };
        front.telemetry.request_finished(&report);
        let model = self.lane.map_or("unknown", |lane| front.catalog.lane(lane).name.as_str());
        let meters = || self.meters.iter();
        self.log.end(End {
            model: model.to_owned(),
            report,
            tenant: front.telemetry.tenant_name(report.tenant).to_owned(),
            key: self.caller.key().map(str::to_owned),
            queue_wait: meters().filter_map(|meter| meter.waited()).min(),
            first_token: meters().filter_map(|meter| meter.first_token()).min(),
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let ended = self.ended.unwrap_or_else(|| {
            if std::thread::panicking() {
                Ended::Failed(ErrorKind::Internal)
            } else if self.front.lifecycle.phase() == Phase::Stopped {
                // Nobody waits any longer: the server closed this connection, not the client.
                Ended::Failed(ErrorKind::Cut)
            } else {
                Ended::Cancelled
            }
        });
        self.report(ended);
        let cut = matches!(ended, Ended::Failed(ErrorKind::Cut | ErrorKind::DeviceFailed));
        match &mut self.in_flight {
            Some(in_flight) if cut => in_flight.cut(),
            Some(in_flight) if self.submitted.is_none() && ended != Ended::Ok => {
                in_flight.refused();
            }
            _ => {}
        }
    }
}

/// Why a request that failed before it was submitted was not admitted.
fn rejection(kind: ErrorKind) -> Option<Rejection> {
    match kind {
        ErrorKind::QueueFull => Some(Rejection::QueueFull),
        ErrorKind::RateLimited => Some(Rejection::Tenant),
        ErrorKind::Draining => Some(Rejection::Draining),
        ErrorKind::ModelLoading => Some(Rejection::Loading),
        ErrorKind::TooLarge | ErrorKind::ContextLengthExceeded => Some(Rejection::TooLarge),
        _ => None,
    }
}
