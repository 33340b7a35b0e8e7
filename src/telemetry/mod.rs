//! What happens, counted: call sites say what happened, `metrics.rs` knows the names, `cost.rs`
//! knows the money. Never waits for the device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::ErrorKind;
use crate::model::ModelTask;
use crate::request::{LaneId, Micros, TenantId};
use crate::scheduler::Load;
use crate::scheduler::step::StepKind;

/// All measurements of one server.
#[derive(Debug)]
pub struct Telemetry {
    started: Instant,
}

/// What is known when the server starts; every series exists from then on.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Model names and tasks, by lane.
    pub models: Vec<(String, ModelTask)>,
    /// Price of the whole device.
    pub device_hourly_usd: Option<f64>,
    /// Share of the device that this process pays for.
    pub device_share: f64,
    /// Hash of the effective configuration.
    pub config_hash: String,
    /// Name of the device.
    pub device_name: String,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ended {
    /// Answered.
    Ok,
    /// The client went away.
    Cancelled,
    /// It failed.
    Failed(ErrorKind),
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rejection {
    /// Too many waiting requests or tokens.
    QueueFull,
    /// Predicted wait above the limit.
    MaxWait,
    /// A tenant's own limit.
    Tenant,
    /// Shutting down.
    Draining,
    /// Model not ready.
    Loading,
    /// Body, input or context above its limit.
    TooLarge,
}

/// One finished step.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Whose.
    pub lane: LaneId,
    /// The mix.
    pub kind: StepKind,
    /// Sequences that took part.
    pub spans: u32,
    /// Token positions computed.
    pub rows: u32,
    /// Measured device time charged to the lane: elapsed / busy slots.
    pub busy: Micros,
    /// Measured device time of the step.
    pub elapsed: Micros,
    /// Device time that a full step would have needed for these rows.
    pub work: Micros,
    /// Part of `busy` spent on rows whose result was thrown away as cancelled.
    pub wasted_cancelled: Micros,
    /// Part of `busy` spent on recomputing preempted rows.
    pub wasted_preempted: Micros,
}

/// One finished request.
#[derive(Debug, Clone, Copy)]
pub struct RequestReport {
    /// Which model; none if it was never found.
    pub lane: Option<LaneId>,
    /// Whose.
    pub tenant: TenantId,
    /// What was asked for.
    pub task: ModelTask,
    /// How it ended.
    pub ended: Ended,
    /// From the first byte to the last.
    pub duration: Duration,
    /// Prompt, cached and generated tokens.
    pub usage: crate::request::Usage,
}

/// What `/stats` and admission read: the last published numbers.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Scheduler's load, as last published.
    pub load: Load,
    /// Submitted and not yet seen by the scheduler.
    pub inbox: u32,
    /// Prompt tokens of these.
    pub inbox_tokens: u64,
    /// Accepted and not fully answered.
    pub in_flight: u32,
}

#[expect(unused_variables, clippy::unused_self, reason = "skeleton")]
impl Telemetry {
    /// Creates every series.
    pub fn new(setup: Setup) -> Arc<Self> {
        Arc::new(Self { started: Instant::now() })
    }

    /// Time since start.
    pub fn now(&self) -> Micros {
        Micros(self.started.elapsed().as_micros() as u64)
    }

    /// A request was refused before it was admitted.
    pub fn rejected(&self, lane: Option<LaneId>, reason: Rejection) {}

    /// A request of `tokens` prompt tokens went into the inbox.
    pub fn submitted(&self, tokens: u64) {}

    /// The engine took requests with `tokens` prompt tokens out of the inbox.
    pub fn received(&self, requests: u32, tokens: u64) {}

    /// A request was accepted (`+1`) or fully answered (`-1`).
    pub fn in_flight(&self, change: i32) {}

    /// A request is over, answered or not; called once for every HTTP request of the API.
    pub fn request_finished(&self, report: &RequestReport) {}

    /// A request got its first rows after waiting this long.
    pub fn scheduled(&self, lane: LaneId, waited: Micros) {}

    /// A request's first token came this long after it arrived.
    pub fn first_token(&self, lane: LaneId, after: Micros) {}

    /// A later token came this long after the one before.
    pub fn next_token(&self, lane: LaneId, after: Micros) {}

    /// A step finished.
    pub fn step_finished(&self, report: &StepReport) {}

    /// Device time went into loading or warming up a model.
    pub fn load_finished(&self, lane: LaneId, elapsed: Micros) {}

    /// A stage of a model's start took this long: `fetch`, `verify`, `load` or `warm`.
    pub fn stage_finished(&self, lane: LaneId, stage: &'static str, elapsed: Duration) {}

    /// A step failed; `kind` is `panic`, `step` or `fatal`.
    pub fn device_error(&self, kind: &'static str) {}

    /// The engine publishes what the scheduler holds, after every turn.
    pub fn publish(&self, load: &Load) {}

    /// The last published numbers.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::default()
    }

    /// Device memory by use, in bytes: weights, kv, workspace, free; and the limit.
    pub fn memory(&self, weights: u64, kv: u64, workspace: u64, limit: u64) {}

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> String {
        String::new()
    }
}
