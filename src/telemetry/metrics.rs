//! Every metric: name, type, unit, help, labels and buckets, in one table. The only file that
//! holds metric names; it knows nothing of what happens to them.

pub(super) mod vllm;

/// One family as Prometheus shows it.
#[derive(Debug)]
pub(super) struct Family {
    /// Base unit in the name; counters end in `_total`.
    pub(super) name: &'static str,
    /// How it is kept and shown.
    pub(super) kind: Kind,
    /// The unit of one sample; empty for a plain count.
    pub(super) unit: &'static str,
    /// One sentence for a person.
    pub(super) help: &'static str,
    /// Label names. `model` is always first.
    pub(super) labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets; empty otherwise.
    pub(super) buckets: &'static [f64],
}

/// How a family is kept and shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A count.
    Counter,
    /// Shown as a counter of whole units; kept by the ledger in billionths.
    NanoCounter,
    /// Up and down.
    Gauge,
    /// Buckets, never a summary: quantiles of several pods cannot be added up.
    Histogram,
}

impl Kind {
    /// As in a `# TYPE` line.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Kind::Counter | Kind::NanoCounter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Label value where the requested model is not one of ours.
pub(super) const UNKNOWN: &str = "unknown";
/// Label value of requests without a tenant.
pub(super) const ANONYMOUS: &str = "anonymous";
/// How a request can end.
pub(super) const OUTCOMES: [&str; 7] =
    ["ok", "client_error", "cancelled", "timeout", "rejected", "cut", "error"];
/// Why a request can be refused.
pub(super) const REJECTIONS: [&str; 6] =
    ["queue_full", "max_wait", "tenant", "draining", "loading", "too_large"];
/// What can be asked for.
pub(super) const TASKS: [&str; 4] = ["generate", "embed", "rerank", "classify"];
/// What a step can be made of.
pub(super) const STEPS: [&str; 4] = ["prefill", "decode", "mixed", "encode"];
/// Why device time can be lost.
pub(super) const WASTES: [&str; 3] = ["cancelled", "preempted", "cut"];
/// Disjoint kinds of tokens that a tenant is charged for.
pub(super) const TOKENS: [&str; 3] = ["prompt", "cached", "generated"];
/// Disjoint uses of device memory.
pub(super) const MEMORY: [&str; 4] = ["weights", "kv", "workspace", "free"];
/// How the KV cache holds a page.
pub(super) const PAGES: [&str; 2] = ["used", "cached"];
/// Phases of the process.
pub(super) const PHASES: [&str; 7] =
    ["loading", "ready", "lame_duck", "draining", "drained", "closing", "stopped"];
/// What a drain does with a request.
pub(super) const DRAINS: [&str; 4] = ["finished", "handed_over", "checkpointed", "cut"];
/// Stages of a model's start.
pub(super) const STAGES: [&str; 4] = ["fetch", "verify", "load", "warm"];
/// What can go wrong on the device.
pub(super) const DEVICE_ERRORS: [&str; 4] = ["panic", "step", "memory", "fatal"];

/// How the memory of a whole device is held.
pub(super) const HELD: [&str; 2] = ["used", "free"];

const MODEL: &[&str] = &["model"];
const MODEL_TASK: &[&str] = &["model", "task"];
const MODEL_KIND: &[&str] = &["model", "kind"];

/// Embeddings answer in milliseconds, long answers take minutes: one wide set for both.
const REQUEST_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0, 300.0, 600.0,
];
const WAIT_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const TOKEN_GAP_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1.0, 2.5,
];
const STEP_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.1, 0.25, 1.0];
const STEP_ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
const STEP_TOKENS: &[f64] =
    &[1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0];

type Labels = &'static [&'static str];

const fn family(kind: Kind, name: &'static str, unit: &'static str, labels: Labels) -> Family {
    Family { name, kind, unit, help: "", labels, buckets: &[] }
}

const fn counter(name: &'static str, unit: &'static str, labels: Labels) -> Family {
    family(Kind::Counter, name, unit, labels)
}

const fn nano(name: &'static str, unit: &'static str, labels: Labels) -> Family {
    family(Kind::NanoCounter, name, unit, labels)
}

const fn gauge(name: &'static str, unit: &'static str, labels: Labels) -> Family {
    family(Kind::Gauge, name, unit, labels)
}

const fn histogram(
    name: &'static str,
    unit: &'static str,
    labels: Labels,
    buckets: &'static [f64],
) -> Family {
    Family { buckets, ..family(Kind::Histogram, name, unit, labels) }
}

impl Family {
    const fn help(self, help: &'static str) -> Family {
        Family { help, ..self }
    }
}

pub(super) static QUEUE_DEPTH: Family = gauge("sconce_queue_depth", "", &[])
    .help("Admitted requests that wait for the device; preempted ones count again.");
pub(super) static QUEUE_TOKENS: Family =
    gauge("sconce_queue_tokens", "tokens", &[]).help("Prompt tokens that wait for the device.");
pub(super) static QUEUE_WORK: Family = gauge("sconce_queue_work_seconds", "seconds", &[])
    .help("Predicted device time of what waits; additive over pods.");
pub(super) static QUEUE_OLDEST: Family = gauge("sconce_queue_oldest_age_seconds", "seconds", &[])
    .help("Age of the request that waits longest.");
pub(super) static REQUESTS_RUNNING: Family =
    gauge("sconce_requests_running", "", &[]).help("Requests that have rows on the device.");
pub(super) static IN_FLIGHT: Family =
    gauge("sconce_requests_in_flight", "", &[]).help("Requests accepted and not fully answered.");
pub(super) static KV_USAGE: Family = gauge("sconce_kv_usage_ratio", "ratio", &[])
    .help("Share of the KV cache that running requests hold, 0 to 1.");
pub(super) static MODEL_QUEUE_DEPTH: Family =
    gauge("sconce_model_queue_depth", "", MODEL).help("Requests of a model that wait.");
pub(super) static MODEL_QUEUE_TOKENS: Family =
    gauge("sconce_model_queue_tokens", "tokens", MODEL).help("Prompt tokens of a model that wait.");
pub(super) static MODEL_RUNNING: Family = gauge("sconce_model_requests_running", "", MODEL)
    .help("Requests of a model that have rows on the device.");
pub(super) static MODEL_STATE: Family = gauge("sconce_model_state", "", &["model", "state"])
    .help("1 for the state that a model is in, 0 for the others.");
pub(super) static REQUESTS: Family =
    counter("sconce_requests_total", "", &["model", "task", "outcome"])
        .help("Requests that are over, by how they ended.");
pub(super) static WITHIN_OBJECTIVE: Family =
    counter("sconce_requests_within_objective_total", "", MODEL).help(
        "Requests answered within the latency objective of their model's manifest, or at all \
         where it names none.",
    );
pub(super) static REJECTED: Family = counter("sconce_rejections_total", "", &["model", "reason"])
    .help("Requests refused before they were admitted.");
pub(super) static REQUEST_DURATION: Family =
    histogram("sconce_request_duration_seconds", "seconds", MODEL_TASK, REQUEST_SECONDS).help(
        "First byte in to last byte out, of requests that were worked on: outcomes ok, timeout, \
         cut and error.",
    );
pub(super) static QUEUE_WAIT: Family =
    histogram("sconce_queue_wait_seconds", "seconds", MODEL, WAIT_SECONDS)
        .help("Time from admission to the first rows on the device.");
pub(super) static FIRST_TOKEN: Family =
    histogram("sconce_time_to_first_token_seconds", "seconds", MODEL, FIRST_TOKEN_SECONDS)
        .help("Time from admission to the first token.");
pub(super) static TOKEN_GAP: Family =
    histogram("sconce_inter_token_latency_seconds", "seconds", MODEL, TOKEN_GAP_SECONDS)
        .help("Time between two tokens of one answer.");
pub(super) static PROMPT_TOKENS: Family = counter("sconce_prompt_tokens_total", "tokens", MODEL)
    .help("Prompt tokens of finished requests, cached ones included.");
pub(super) static CACHED_TOKENS: Family =
    counter("sconce_prompt_tokens_cached_total", "tokens", MODEL)
        .help("Prompt tokens of finished requests that came from the prefix cache.");
pub(super) static GENERATED_TOKENS: Family =
    counter("sconce_generated_tokens_total", "tokens", MODEL)
        .help("Tokens generated by finished requests.");
pub(super) static STEP_DURATION: Family =
    histogram("sconce_step_duration_seconds", "seconds", MODEL_KIND, STEP_SECONDS)
        .help("Measured device time of a step.");
pub(super) static STEP_ROWS_USED: Family = histogram("sconce_step_rows", "", MODEL_KIND, STEP_ROWS)
    .help("Sequences that took part in a step: the batch size.");
pub(super) static STEP_TOKENS_USED: Family =
    histogram("sconce_step_tokens", "tokens", MODEL_KIND, STEP_TOKENS)
        .help("Token positions computed in a step.");
pub(super) static DEVICE_BUSY: Family = nano("sconce_device_busy_seconds_total", "seconds", MODEL)
    .help("Measured device time of a model's steps; busy + load + idle = wall.");
pub(super) static DEVICE_LOAD: Family = nano("sconce_device_load_seconds_total", "seconds", MODEL)
    .help("Device time that went into a model's weights and warm-up.");
pub(super) static DEVICE_IDLE: Family = nano("sconce_device_idle_seconds_total", "seconds", &[])
    .help("Device time that no model used.");
pub(super) static DEVICE_WORK: Family = nano("sconce_device_work_seconds_total", "seconds", MODEL)
    .help(
        "Device time that the computed rows would have needed in full steps; its rate is the \
         load.",
    );
pub(super) static DEVICE_WASTED: Family =
    nano("sconce_device_wasted_seconds_total", "seconds", &["model", "reason"])
        .help("Busy time whose result was thrown away; a subset of busy.");
pub(super) static COST: Family = nano("sconce_cost_usd_total", "usd", &["model", "state"])
    .help("Device time times price times share; idle time has an empty model.");
pub(super) static PRICE: Family = gauge("sconce_device_price_usd_per_hour", "usd", &[])
    .help("Configured price of the whole device.");
pub(super) static PRICE_INFO: Family = gauge("sconce_device_price_info", "", &["as_of", "source"])
    .help("Always 1: of which day the price is, and who says so.");
pub(super) static SHARE: Family = gauge("sconce_device_share_ratio", "ratio", &[])
    .help("Share of the device that this process pays for.");
pub(super) static TENANT_SECONDS: Family =
    nano("sconce_tenant_device_seconds_total", "seconds", &["tenant", "model"])
        .help("Busy device time by tenant, each row charged its share of its step.");
pub(super) static TENANT_REQUESTS: Family =
    counter("sconce_tenant_requests_total", "", &["tenant", "outcome"])
        .help("Requests of a tenant that are over, by how they ended.");
pub(super) static TENANT_TOKENS: Family =
    counter("sconce_tenant_tokens_total", "tokens", &["tenant", "kind"])
        .help("Tokens of a tenant's finished requests; kind prompt leaves the cached ones out.");
pub(super) static MEMORY_USED: Family = gauge("sconce_device_memory_bytes", "bytes", &["use"])
    .help("Device memory of this process by use; the uses are disjoint.");
pub(super) static MEMORY_LIMIT: Family = gauge("sconce_device_memory_limit_bytes", "bytes", &[])
    .help("Device memory that this process may use.");
pub(super) static KV_PAGES: Family = gauge("sconce_kv_pages", "", &["model", "state"])
    .help("KV pages that running requests use, and that only the prefix cache holds.");
pub(super) static KV_PAGES_LIMIT: Family =
    gauge("sconce_kv_pages_limit", "", &[]).help("KV pages of the device, shared by all models.");
pub(super) static PREEMPTIONS: Family = counter("sconce_preemptions_total", "", MODEL)
    .help("Running requests that were sent back to wait.");
pub(super) static PHASE: Family = gauge("sconce_phase", "", &["phase"])
    .help("1 for the phase that the process is in, 0 for the others.");
pub(super) static DRAIN_DEADLINE: Family =
    gauge("sconce_drain_deadline_timestamp_seconds", "seconds", &[])
        .help("Unix time at which the process will be gone; 0 means none is set.");
pub(super) static DRAIN_REQUESTS: Family = counter("sconce_drain_requests_total", "", &["result"])
    .help("Requests that ended after the notice to drain, by what became of them.");
pub(super) static START: Family = gauge("sconce_start_seconds", "seconds", &["stage"])
    .help("Time that each stage of the start took, all models together.");
pub(super) static MODEL_LOAD: Family = gauge("sconce_model_load_seconds", "seconds", MODEL)
    .help("Time that all stages of a model's last load took.");
pub(super) static ERRORS: Family = counter("sconce_device_errors_total", "", &["kind"]).help(
    "Failed steps: panic, step (the device goes on), memory (they wait and are tried again) \
         or fatal (the process ends).",
);
pub(super) static BUILD: Family =
    gauge("sconce_build_info", "", &["version", "commit"]).help("Always 1: what is running.");
pub(super) static CONFIG: Family = gauge("sconce_config_info", "", &["hash"])
    .help("Always 1: hash of the effective configuration.");
pub(super) static DEVICE: Family =
    gauge("sconce_device_info", "", &["name", "uuid", "mig"]).help("Always 1: the device in use.");

pub(super) static UTILIZATION: Family = gauge("sconce_device_utilization_ratio", "ratio", &[])
    .help("Share of the last moments in which the whole GPU computed, for whomever, as NVML says.");
pub(super) static BOARD_MEMORY: Family =
    gauge("sconce_device_board_memory_bytes", "bytes", &["state"])
        .help("Memory of the whole GPU or MIG instance, all processes together, as NVML says.");
pub(super) static POWER: Family = gauge("sconce_device_power_watts", "watts", &[])
    .help("Power that the whole GPU draws, as NVML says.");
pub(super) static ENERGY: Family = counter("sconce_device_energy_joules_total", "joules", &[])
    .help("Energy that the whole GPU has drawn since its driver was loaded, as NVML says.");
pub(super) static LAST_EXIT: Family = gauge("sconce_last_exit_info", "", &["code", "reason"])
    .help("Always 1: how the process before this one ended; none where none is known of.");

/// By its customary name, which dashboards and alerts of all servers know.
pub(super) static PROCESS_START: Family = gauge("process_start_time_seconds", "seconds", &[])
    .help("Unix time at which the process started.");

/// Every family that is there from the start, in the order of the documentation. A GPU's own (from
/// `UTILIZATION` to `ENERGY`) come with its first answer.
pub(super) static ALL: [&Family; 52] = [
    &QUEUE_DEPTH,
    &QUEUE_TOKENS,
    &QUEUE_WORK,
    &QUEUE_OLDEST,
    &REQUESTS_RUNNING,
    &IN_FLIGHT,
    &KV_USAGE,
    &MODEL_QUEUE_DEPTH,
    &MODEL_QUEUE_TOKENS,
    &MODEL_RUNNING,
    &MODEL_STATE,
    &REQUESTS,
    &WITHIN_OBJECTIVE,
    &REJECTED,
    &REQUEST_DURATION,
    &QUEUE_WAIT,
    &FIRST_TOKEN,
    &TOKEN_GAP,
    &PROMPT_TOKENS,
    &CACHED_TOKENS,
    &GENERATED_TOKENS,
    &STEP_DURATION,
    &STEP_ROWS_USED,
    &STEP_TOKENS_USED,
    &DEVICE_BUSY,
    &DEVICE_LOAD,
    &DEVICE_IDLE,
    &DEVICE_WORK,
    &DEVICE_WASTED,
    &COST,
    &PRICE,
    &PRICE_INFO,
    &SHARE,
    &TENANT_SECONDS,
    &TENANT_REQUESTS,
    &TENANT_TOKENS,
    &MEMORY_USED,
    &MEMORY_LIMIT,
    &KV_PAGES,
    &KV_PAGES_LIMIT,
    &PREEMPTIONS,
    &PHASE,
    &DRAIN_DEADLINE,
    &DRAIN_REQUESTS,
    &START,
    &MODEL_LOAD,
    &ERRORS,
    &BUILD,
    &CONFIG,
    &DEVICE,
    &LAST_EXIT,
    &PROCESS_START,
];
