//! What happens, counted: call sites say what happened, `metrics.rs` knows the names, `cost.rs`
//! knows the money. Never waits for the device.

pub mod board;
mod cost;
mod exposition;
mod histogram;
mod metrics;
pub mod observed;
#[cfg(feature = "otlp")]
pub mod otlp;
mod outcome;
pub mod price_file;
mod published;
pub mod request_log;
mod series;
mod tariff;
mod tenants;
pub mod trace;
#[cfg(test)]
mod objective_tests;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::config::price::PriceTag;
use crate::error::ErrorKind;
use crate::model::{ModelState, ModelTask};
use crate::request::{LaneId, Micros, TenantId};
use crate::scheduler::Load;
use crate::scheduler::step::StepKind;
use cost::{Ledger, Nanos, Waste};
use published::Published;
use series::Series;
use tariff::Tariff;

/// All measurements of one server. Nothing here waits: an event is a few atomic operations.
#[derive(Debug)]
pub struct Telemetry {
    clock: Clock,
    /// Model names by lane.
    models: Vec<String>,
    /// Objectives by lane.
    objectives: Vec<Option<Duration>>,
    series: Series,
    board: board::Board,
    ledger: Ledger,
    /// Read when somebody scrapes, written when the price changes; no event needs it.
    tariff: Mutex<Tariff>,
    published: Published,
    /// The phase, an index of `metrics::PHASES`.
    phase: AtomicU8,
    /// One more than the last finished stage of each model's load.
    stages: Vec<AtomicU8>,
    /// Whether pages also have the names that vLLM's metrics have.
    vllm_metrics: bool,
    /// Whether a counter has changed since the last render.
    changed: AtomicBool,
    scrapes: tokio::sync::watch::Sender<u64>,
}

/// Time since the server started: what every `Micros` of a request counts from.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

/// Work holds the device until this is dropped: until then the time is not idle, whoever is
/// charged for it in the end. Report what was done first, then drop it.
#[derive(Debug)]
#[must_use = "the device counts as held until this is dropped"]
pub struct Occupied<'a>(&'a Ledger);

/// What is known when the server starts; every series exists from then on.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Model names and tasks, by lane.
    pub models: Vec<(String, ModelTask)>,
    /// How long a request of each may take, by lane; none: as long as it likes.
    pub objectives: Vec<Option<Duration>>,
    /// Price of the whole device; none as long as no [`PriceTag`] says one.
    pub device_hourly_usd: Option<f64>,
    /// Share of the device that this process pays for.
    pub device_share: f64,
    /// Also show what routers and dashboards of vLLM read, under its names.
    pub vllm_metrics: bool,
    /// Hash of the effective configuration.
    pub config_hash: String,
    /// Name of the device.
    pub device_name: String,
    /// Its UUID; empty on a CPU.
    pub device_uuid: String,
    /// Its MIG profile; empty without one.
    pub device_mig: String,
    /// Exit code and reason of the process before this one.
    pub last_exit: (String, String),
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

/// Why a request was not admitted; an index of `metrics::REJECTIONS`.
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
    /// Device time that these are expected to take, by lane.
    pub inbox_work: Vec<Micros>,
    /// How much longer the lane's next request waits for them.
    pub inbox_delay: Vec<Micros>,
    /// Accepted and not fully answered.
    pub in_flight: u32,
}

impl Telemetry {
    /// Creates every series. Time counts from here on, also the device's wall time.
    pub fn new(setup: Setup) -> Arc<Self> {
        let lanes = setup.models.len();
        Arc::new(Self {
            clock: Clock(Instant::now()),
            series: Series::new(&setup),
            board: board::Board::new(&setup),
            ledger: Ledger::new(lanes, tenants::ROWS),
            tariff: Mutex::new(Tariff::new(&setup)),
            published: Published::new(lanes),
            vllm_metrics: setup.vllm_metrics,
            objectives: setup.objectives,
            models: setup.models.into_iter().map(|(name, _)| name).collect(),
            phase: AtomicU8::new(0),
            stages: (0..lanes).map(|_| AtomicU8::new(0)).collect(),
            changed: AtomicBool::new(false),
            scrapes: tokio::sync::watch::Sender::new(0),
        })
    }

    /// Time since start.
    pub fn now(&self) -> Micros {
        self.clock.now()
    }

    /// The clock alone, for those who measure and have nothing to report.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// A request was refused before it was admitted.
    pub fn rejected(&self, lane: Option<LaneId>, reason: Rejection) {
        self.requests(lane).rejected[reason as usize].increment(1);
        self.changed();
    }

    /// A request of `tokens` prompt tokens went into the inbox.
    pub fn submitted(&self, lane: LaneId, tokens: u64) {
        self.published.inbox(lane, 1, tokens as i64);
    }

    /// The engine took a request of `tokens` prompt tokens out of the inbox.
    pub fn received(&self, lane: LaneId, tokens: u64) {
        self.published.inbox(lane, -1, -(tokens as i64));
    }

    /// The id of the tenant with this name, which has series of its own from then on; none when
    /// too many have.
    pub fn tenant(&self, name: &str) -> Option<TenantId> {
        self.series.tenants.named(name)
    }

    /// The tenant's name as metrics have it.
    pub fn tenant_name(&self, id: TenantId) -> &str {
        &self.series.tenants.of(id).name
    }

    /// A request was accepted (`+1`) or fully answered (`-1`). Called by `lifecycle::InFlight`
    /// and by nobody else.
    pub fn in_flight(&self, change: i32) {
        self.published.in_flight(i64::from(change));
    }

    /// A request is over, answered or not; called once for every HTTP request of the API.
    pub fn request_finished(&self, report: &RequestReport) {
        let outcome = report.ended.outcome();
        self.requests(report.lane).ended[report.task as usize][outcome as usize].increment(1);
        let usage = &report.usage;
        let [prompt, cached, generated] =
            [usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens].map(u64::from);
        if let Some(model) = self.model(report.lane) {
            if outcome.was_worked_on() {
                model.duration.record(report.duration.as_secs_f64());
            }
            if report.ended == Ended::Ok && self.is_within_objective(report) {
                model.within_objective.increment(1);
            }
            model.prompt_tokens.increment(prompt);
            model.cached_tokens.increment(cached);
            model.generated_tokens.increment(generated);
        }
        let tenant = self.series.tenants.of(report.tenant);
        tenant.requests[outcome as usize].increment(1);
        let disjoint = [prompt.saturating_sub(cached), cached, generated];
        for (counter, tokens) in tenant.tokens.iter().zip(disjoint) {
            counter.increment(tokens);
        }
        self.changed();
    }

    /// A request got its first rows after waiting this long.
    pub fn scheduled(&self, lane: LaneId, waited: Micros) {
        if let Some(model) = self.model(Some(lane)) {
            model.queue_wait.record(waited.as_seconds());
        }
    }

    /// A request's first token came this long after it arrived.
    pub fn first_token(&self, lane: LaneId, after: Micros) {
        if let Some(model) = self.model(Some(lane)) {
            model.first_token.record(after.as_seconds());
        }
    }

    /// A later token came this long after the one before.
    pub fn next_token(&self, lane: LaneId, after: Micros) {
        if let Some(model) = self.model(Some(lane)) {
            model.token_gap.record(after.as_seconds());
        }
    }

    /// A step or a load takes the device. Without this a scrape in the middle of it would book
    /// the time as idle, and the charge that follows would be cut by as much.
    pub fn occupy(&self) -> Occupied<'_> {
        self.ledger.open(self.nanos());
        Occupied(&self.ledger)
    }

    /// A step finished; `rows` says how many of its rows each tenant had.
    pub fn step_finished(&self, report: &StepReport, rows: &[(TenantId, u32)]) {
        let lane = report.lane;
        let charged = self.ledger.step(lane, nanos(report.busy), rows, self.nanos());
        self.ledger.work(lane, nanos(report.work));
        let cancelled = nanos(report.wasted_cancelled).min(charged);
        self.ledger.waste(lane, Waste::Cancelled, cancelled);
        let preempted = nanos(report.wasted_preempted).min(charged - cancelled);
        self.ledger.waste(lane, Waste::Preempted, preempted);
        if let Some(model) = self.model(Some(lane)) {
            let step = &model.steps[report.kind as usize];
            step.duration.record(report.elapsed.as_seconds());
            step.rows.record(f64::from(report.spans));
            step.tokens.record(f64::from(report.rows));
        }
        self.changed();
    }

    /// From now on the device has this price.
    pub fn price(&self, tag: &PriceTag) {
        let now = self.nanos();
        self.tariff.lock().unwrap_or_else(PoisonError::into_inner).change(tag, &self.ledger, now);
        self.changed();
    }

    /// Device time already charged to steps went into answers that a drain cut off.
    pub fn cut_off(&self, lane: LaneId, busy: Micros) {
        self.ledger.waste(lane, Waste::Cut, nanos(busy));
    }

    /// Device time went into loading or warming up a model.
    pub fn load_finished(&self, lane: LaneId, elapsed: Micros) {
        self.ledger.load(lane, nanos(elapsed), self.nanos());
        self.changed();
    }

    /// A stage of a model's start took this long: `fetch`, `verify`, `load` or `warm`, in this
    /// order; an earlier stage than the last begins a new load.
    pub fn stage_finished(&self, lane: LaneId, stage: &'static str, elapsed: Duration) {
        let Some(stage) = index_of(&metrics::STAGES, stage) else { return };
        let Some(model) = self.model(Some(lane)) else { return };
        let last = self.stages[lane.0 as usize].swap(stage as u8 + 1, Ordering::Relaxed);
        match stage as u8 + 1 > last {
            true => model.load.increment(elapsed),
            false => model.load.set(elapsed),
        }
        if self.phase.load(Ordering::Relaxed) == 0 {
            self.series.start[stage].increment(elapsed);
        }
    }

    /// A model came into this state.
    pub fn model_state(&self, lane: LaneId, state: ModelState) {
        if let Some(model) = self.model(Some(lane)) {
            select(&model.states, state as usize);
        }
    }

    /// A step failed; `kind` is `panic`, `step`, `memory` or `fatal`.
    pub fn device_error(&self, kind: &'static str) {
        if let Some(kind) = index_of(&metrics::DEVICE_ERRORS, kind) {
            self.series.errors[kind].increment(1);
        }
        self.changed();
    }

    /// The process came into the phase with this label.
    pub fn phase_entered(&self, phase: &'static str) {
        if let Some(phase) = index_of(&metrics::PHASES, phase) {
            self.phase.store(phase as u8, Ordering::Relaxed);
            select(&self.series.phases, phase);
        }
    }

    /// The process will be gone after this time.
    pub fn drain_deadline(&self, remaining: Duration) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.series.drain_deadline.set(now + remaining);
    }

    /// A request ended after the notice to drain: `finished`, `handed_over`, `checkpointed` or
    /// `cut`.
    pub fn drained(&self, result: &'static str) {
        if let Some(result) = index_of(&metrics::DRAINS, result) {
            self.series.drains[result].increment(1);
        }
        self.changed();
    }

    /// The engine says what the scheduler holds, before steps and after them. Allocates nothing.
    pub fn publish(&self, load: &Load) {
        self.published.publish(load);
    }

    /// The last published numbers.
    pub fn snapshot(&self) -> Snapshot {
        self.published.snapshot()
    }

    /// Device memory by use, in bytes: weights, kv, workspace, free; and the limit.
    pub fn memory(&self, weights: u64, kv: u64, workspace: u64, limit: u64) {
        let free = limit.saturating_sub(weights + kv + workspace);
        for (gauge, bytes) in self.series.memory.iter().zip([weights, kv, workspace, free]) {
            gauge.set(bytes as f64);
        }
        self.series.memory_limit.set(limit as f64);
    }

    /// Super-pages in the KV region.
    pub fn kv_limit(&self, pages: u32) {
        self.series.kv_pages_limit.set(pages);
        self.published.kv_limit(pages);
    }

    /// How a lane's blocks lie in pages: a group of `layers` pages holds `blocks_per_page`
    /// blocks. Without it the lane's pages read 0, as an encoder's do.
    pub fn kv_layout(&self, lane: LaneId, layers: u32, blocks_per_page: u32) {
        self.published.layout(lane, f64::from(layers) / f64::from(blocks_per_page.max(1)));
    }

    fn nanos(&self) -> Nanos {
        self.clock.0.elapsed().as_nanos() as Nanos
    }

    fn changed(&self) {
        // A load first: the line stays shared while nobody scrapes.
        if !self.changed.load(Ordering::Relaxed) {
            self.changed.store(true, Ordering::SeqCst);
        }
    }

    fn is_within_objective(&self, report: &RequestReport) -> bool {
        let lane = report.lane.map(|lane| lane.0 as usize);
        let objective = lane.and_then(|lane| *self.objectives.get(lane)?);
        objective.is_none_or(|objective| report.duration <= objective)
    }

    fn model(&self, lane: Option<LaneId>) -> Option<&series::ModelSeries> {
        self.series.models.get(lane?.0 as usize)
    }

    fn requests(&self, lane: Option<LaneId>) -> &series::RequestSeries {
        self.model(lane).map_or(&self.series.unknown, |model| &model.requests)
    }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            objectives: Vec::new(),
            device_hourly_usd: None,
            device_share: 1.0,
            vllm_metrics: false,
            config_hash: String::new(),
            device_name: String::new(),
            device_uuid: String::new(),
            device_mig: String::new(),
            last_exit: ("none".to_owned(), "none".to_owned()),
        }
    }
}

impl Clock {
    /// Time since the server started.
    pub fn now(self) -> Micros {
        self.0.elapsed().into()
    }
}

impl Drop for Occupied<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn nanos(time: Micros) -> Nanos {
    time.0.saturating_mul(1_000)
}

/// Sets one of `gauges` to 1 and the others to 0.
fn select(gauges: &[::metrics::Gauge], chosen: usize) {
    for (index, gauge) in gauges.iter().enumerate() {
        gauge.set(f64::from(u8::from(index == chosen)));
    }
}

/// Where a label value stands; a value that is not in the table is a defect that tests find.
fn index_of(values: &[&str], value: &str) -> Option<usize> {
    let index = values.iter().position(|known| *known == value);
    debug_assert!(index.is_some(), "no such label value: {value}");
    index
}
