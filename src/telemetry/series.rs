//! The handles of every counter, gauge and histogram, made once at start so that an update is
//! an atomic operation or two and a series is there before its first event.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{Counter, Gauge, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::Setup;
use super::histogram::{self, Histogram};
use super::metrics::{self as table, Family, Kind};
use super::tenants::Tenants;
use crate::model::{ModelState, ModelTask};

/// All series of one server.
#[derive(Debug)]
pub(super) struct Series {
    /// Counters and gauges.
    pub(super) handle: PrometheusHandle,
    /// Sorted by family.
    pub(super) histograms: Vec<Arc<Histogram>>,
    pub(super) queue: QueueSeries,
    /// By lane.
    pub(super) models: Vec<ModelSeries>,
    /// Requests that named no model of ours.
    pub(super) unknown: RequestSeries,
    pub(super) tenants: Tenants,
    /// By `metrics::MEMORY`, then the limit.
    pub(super) memory: [Gauge; 4],
    pub(super) memory_limit: Gauge,
    pub(super) kv_pages_limit: Gauge,
    /// By `metrics::PHASES`.
    pub(super) phases: [Gauge; 7],
    pub(super) drain_deadline: Gauge,
    /// By `metrics::DRAINS`.
    pub(super) drains: [Counter; 4],
    /// By `metrics::STAGES`.
    pub(super) start: [Gauge; 4],
    /// By `metrics::DEVICE_ERRORS`.
    pub(super) errors: [Counter; 4],
}

/// The queue as a whole.
#[derive(Debug)]
pub(super) struct QueueSeries {
    pub(super) depth: Gauge,
    pub(super) tokens: Gauge,
    pub(super) work: Gauge,
    pub(super) oldest: Gauge,
    pub(super) running: Gauge,
    pub(super) in_flight: Gauge,
    pub(super) kv_usage: Gauge,
}

/// One model's series.
#[derive(Debug)]
pub(super) struct ModelSeries {
    pub(super) requests: RequestSeries,
    pub(super) within_objective: Counter,
    pub(super) queue_depth: Gauge,
    pub(super) queue_tokens: Gauge,
    pub(super) running: Gauge,
    /// By `ModelState`.
    pub(super) states: [Gauge; 6],
    pub(super) duration: Arc<Histogram>,
    pub(super) queue_wait: Arc<Histogram>,
    pub(super) first_token: Arc<Histogram>,
    pub(super) token_gap: Arc<Histogram>,
    pub(super) prompt_tokens: Counter,
    pub(super) cached_tokens: Counter,
    pub(super) generated_tokens: Counter,
    /// By `StepKind`.
    pub(super) steps: [StepSeries; 4],
    /// By `metrics::PAGES`.
    pub(super) kv_pages: [Gauge; 2],
    pub(super) preemptions: Counter,
    pub(super) load: Gauge,
}

/// How requests ended or why they were refused.
#[derive(Debug)]
pub(super) struct RequestSeries {
    /// By task, then by `metrics::OUTCOMES`.
    pub(super) ended: [[Counter; 7]; 4],
    /// By `metrics::REJECTIONS`.
    pub(super) rejected: [Counter; 6],
}

/// Steps of one kind.
#[derive(Debug)]
pub(super) struct StepSeries {
    pub(super) duration: Arc<Histogram>,
    pub(super) rows: Arc<Histogram>,
    pub(super) tokens: Arc<Histogram>,
}

impl Series {
    /// Makes every series, at zero.
    pub(super) fn new(setup: &Setup) -> Self {
        let maker = Maker::new();
        maker.constants(setup);
        let model = |(name, task): &(String, ModelTask)| maker.model(name, *task);
        let mut series = Self {
            queue: maker.queue(),
            models: setup.models.iter().map(model).collect(),
            unknown: maker.requests(table::UNKNOWN),
            memory: table::MEMORY.map(|part| maker.gauge(&table::MEMORY_USED, &[part])),
            memory_limit: maker.gauge(&table::MEMORY_LIMIT, &[]),
            kv_pages_limit: maker.gauge(&table::KV_PAGES_LIMIT, &[]),
            phases: table::PHASES.map(|phase| maker.gauge(&table::PHASE, &[phase])),
            drain_deadline: maker.gauge(&table::DRAIN_DEADLINE, &[]),
            drains: table::DRAINS.map(|result| maker.counter(&table::DRAIN_REQUESTS, &[result])),
            start: table::STAGES.map(|stage| maker.gauge(&table::START, &[stage])),
            errors: table::DEVICE_ERRORS.map(|kind| maker.counter(&table::ERRORS, &[kind])),
            handle: maker.recorder.handle(),
            histograms: maker.histograms.take(),
            tenants: Tenants::new(maker.recorder),
        };
        histogram::sort(&mut series.histograms);
        for model in &series.models {
            model.states[ModelState::Absent as usize].set(1.0);
        }
        series.phases[0].set(1.0);
        series
    }
}

/// Makes series of the families in the table.
struct Maker {
    recorder: PrometheusRecorder,
    histograms: RefCell<Vec<Arc<Histogram>>>,
}

impl Maker {
    fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        for family in table::ALL {
            let (name, help) = (family.name.into(), family.help.into());
            let unit = Unit::from_string(family.unit);
            match family.kind {
                Kind::Counter => recorder.describe_counter(name, unit, help),
                Kind::Gauge => recorder.describe_gauge(name, unit, help),
                Kind::Histogram | Kind::NanoCounter => {}
            }
        }
        Self { recorder, histograms: RefCell::default() }
    }

    fn counter(&self, family: &'static Family, values: &[&str]) -> Counter {
        counter(&self.recorder, family, values)
    }

    fn gauge(&self, family: &'static Family, values: &[&str]) -> Gauge {
        let gauge = self.recorder.register_gauge(&key(family, Kind::Gauge, values), &ORIGIN);
        gauge.set(0.0);
        gauge
    }

    fn histogram(&self, family: &'static Family, values: &[&str]) -> Arc<Histogram> {
        let histogram = Histogram::new(family, values);
        self.histograms.borrow_mut().push(Arc::clone(&histogram));
        histogram
    }

    fn queue(&self) -> QueueSeries {
        QueueSeries {
            depth: self.gauge(&table::QUEUE_DEPTH, &[]),
            tokens: self.gauge(&table::QUEUE_TOKENS, &[]),
            work: self.gauge(&table::QUEUE_WORK, &[]),
            oldest: self.gauge(&table::QUEUE_OLDEST, &[]),
            running: self.gauge(&table::REQUESTS_RUNNING, &[]),
            in_flight: self.gauge(&table::IN_FLIGHT, &[]),
            kv_usage: self.gauge(&table::KV_USAGE, &[]),
        }
    }

    fn model(&self, name: &str, task: ModelTask) -> ModelSeries {
        ModelSeries {
            requests: self.requests(name),
            within_objective: self.counter(&table::WITHIN_OBJECTIVE, &[name]),
            queue_depth: self.gauge(&table::MODEL_QUEUE_DEPTH, &[name]),
            queue_tokens: self.gauge(&table::MODEL_QUEUE_TOKENS, &[name]),
            running: self.gauge(&table::MODEL_RUNNING, &[name]),
            states: ModelState::ALL
                .map(|state| self.gauge(&table::MODEL_STATE, &[name, state.as_str()])),
            duration: self.histogram(&table::REQUEST_DURATION, &[name, task.as_str()]),
            queue_wait: self.histogram(&table::QUEUE_WAIT, &[name]),
            first_token: self.histogram(&table::FIRST_TOKEN, &[name]),
            token_gap: self.histogram(&table::TOKEN_GAP, &[name]),
            prompt_tokens: self.counter(&table::PROMPT_TOKENS, &[name]),
            cached_tokens: self.counter(&table::CACHED_TOKENS, &[name]),
            generated_tokens: self.counter(&table::GENERATED_TOKENS, &[name]),
            steps: table::STEPS.map(|kind| StepSeries {
                duration: self.histogram(&table::STEP_DURATION, &[name, kind]),
                rows: self.histogram(&table::STEP_ROWS_USED, &[name, kind]),
                tokens: self.histogram(&table::STEP_TOKENS_USED, &[name, kind]),
            }),
            kv_pages: table::PAGES.map(|state| self.gauge(&table::KV_PAGES, &[name, state])),
            preemptions: self.counter(&table::PREEMPTIONS, &[name]),
            load: self.gauge(&table::MODEL_LOAD, &[name]),
        }
    }

    fn requests(&self, model: &str) -> RequestSeries {
        let ended = |task, outcome| self.counter(&table::REQUESTS, &[model, task, outcome]);
        RequestSeries {
            ended: table::TASKS.map(|task| table::OUTCOMES.map(|outcome| ended(task, outcome))),
            rejected: table::REJECTIONS
                .map(|reason| self.counter(&table::REJECTED, &[model, reason])),
        }
    }

    /// What never changes while the process lives.
    fn constants(&self, setup: &Setup) {
        let version = env!("CARGO_PKG_VERSION");
        let commit = option_env!("SCONCE_COMMIT").unwrap_or("unknown");
        self.gauge(&table::BUILD, &[version, commit]).set(1.0);
        self.gauge(&table::CONFIG, &[&setup.config_hash]).set(1.0);
        let last = [&setup.last_exit.0[..], &setup.last_exit.1];
        self.gauge(&table::LAST_EXIT, &last).set(1.0);
        self.gauge(&table::SHARE, &[]).set(setup.device_share);
        // All of the start but this is still to come.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.gauge(&table::PROCESS_START, &[]).set(now);
    }
}

/// A counter at zero.
pub(super) fn counter(
    recorder: &PrometheusRecorder,
    family: &'static Family,
    values: &[&str],
) -> Counter {
    let counter = recorder.register_counter(&key(family, Kind::Counter, values), &ORIGIN);
    counter.increment(0);
    counter
}

/// The recorder asks where a call comes from and does not use the answer.
static ORIGIN: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

fn key(family: &'static Family, kind: Kind, values: &[&str]) -> Key {
    assert!(family.kind == kind && family.labels.len() == values.len(), "{}", family.name);
    let labels = family.labels.iter().zip(values);
    let labels = labels.map(|(&label, &value)| Label::new(label, value.to_owned()));
    Key::from_parts(family.name, labels.collect::<Vec<_>>())
}
