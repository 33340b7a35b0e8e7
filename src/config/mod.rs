//! Everything that can be set: flags, `SCONCE_*` environment, sconce.toml and models/*.toml become
//! one validated, frozen [`Config`]. Knows the keys and their limits, not what they are used for.

pub mod cache;
pub mod error;
pub mod flags;
pub mod keys;
pub mod load;
pub mod manifest;
pub mod price;
mod document;
mod settings;
pub(crate) mod values;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest, Sha256};

use manifest::Manifest;

/// The whole configuration: validated, frozen.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[admin]`
    pub admin: Admin,
    /// `[auth]`
    pub auth: Auth,
    /// `[limits]`
    pub limits: Limits,
    /// `[drain]`
    pub drain: Drain,
    /// `[device]`
    pub device: Device,
    /// `[cost]`
    pub cost: Cost,
    /// `[models]`
    pub models: Models,
    /// `[scheduler]`
    pub scheduler: Scheduler,
    /// `[cpu]`
    pub cpu: Cpu,
    /// `[log]`
    pub log: Log,
    /// The manifests of `models.dir`, sorted by name; lane ids are the indices.
    pub manifests: Vec<Manifest>,
    /// Every setting as text with its source, in the order of the documentation. None is secret.
    pub values: Vec<Effective>,
    /// What was noticed before logs could be written.
    pub notes: Vec<Note>,
}

/// One setting as it took effect.
#[derive(Debug, Clone)]
pub struct Effective {
    /// `section.name`, as in sconce.toml.
    pub key: &'static str,
    /// The value; empty when unset.
    pub value: String,
    /// Who set it.
    pub source: Source,
}

/// Who set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag, by name.
    Flag(&'static str),
    /// An environment variable, by name.
    Env(&'static str),
    /// A line of a file.
    File(PathBuf, usize),
    /// Nobody.
    Default,
}

/// Something that does not stop the server: unknown environment (a warning) and the like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// A warning, or else a detail for debugging.
    pub warning: bool,
    /// One line.
    pub text: String,
}

/// `[server]`
#[derive(Debug, Clone)]
pub struct Server {
    /// Addresses to bind; the default is 127.0.0.1 and ::1.
    pub hosts: Vec<IpAddr>,
    /// Port of the main listener; 0 lets the system choose.
    pub port: u16,
    /// Idle keep-alive.
    pub keep_alive: Duration,
    /// A connection older than this (± 10 %) is closed after its answer.
    pub max_connection_age: Duration,
    /// One more takes the place of the one that has been idle for longest; while all are busy, it
    /// waits.
    pub max_connections: usize,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// From the end of a request's headers to the end of its body.
    pub body_timeout: Duration,
    /// A client that takes nothing of its answer for this long is gone.
    pub write_timeout: Duration,
}

/// `[admin]`
#[derive(Debug, Clone)]
pub struct Admin {
    /// Addresses to bind; loopback by default.
    pub hosts: Vec<IpAddr>,
    /// Port of the admin listener.
    pub port: u16,
    /// Also serve `/metrics` on the main port.
    pub metrics_on_main: bool,
    /// `/metrics` also has vLLM's names, for routers and dashboards that know only these.
    pub vllm_metrics: bool,
    /// Also listen on this Unix socket, for its owner alone.
    pub socket: Option<PathBuf>,
    /// Where a container's runtime looks for the reason of its end; written only if it is there.
    pub termination_log: PathBuf,
    /// Where a process leaves its exit for the next one; none: in the cache, by host and port.
    pub last_exit_file: Option<PathBuf>,
}

/// `[auth]`
#[derive(Debug, Clone, Default)]
pub struct Auth {
    /// File of API keys; with it, nothing but health probes answers without one.
    pub keys_file: Option<PathBuf>,
    /// Header in which a gateway names the tenant.
    pub tenant_header: Option<String>,
    /// `/metrics` answers without a key.
    pub open_metrics: bool,
    /// Serve beyond loopback without API keys.
    pub no_auth: bool,
}

/// `[limits]`
#[derive(Debug, Clone)]
pub struct Limits {
    /// Refuse when the predicted wait is longer.
    pub max_wait: Duration,
    /// Waiting requests.
    pub queue_requests: usize,
    /// Waiting prompt tokens.
    pub queue_tokens: usize,
    /// Answers to one prompt.
    pub max_choices: usize,
    /// A request's whole time.
    pub request_timeout: Duration,
    /// Comment lines that keep a quiet stream open.
    pub sse_ping: Duration,
}

/// `[drain]`
#[derive(Debug, Clone)]
pub struct Drain {
    /// The grace that the pod really has.
    pub grace: Duration,
    /// How long to wait for a last scrape.
    pub linger: Duration,
}

/// `[device]`
#[derive(Debug, Clone)]
pub struct Device {
    /// What computes.
    pub kind: DeviceKind,
    /// The same text whatever shares a batch, at the price of slower products of many rows.
    pub deterministic: bool,
    /// Device memory to use; none: decided at start.
    pub memory_limit: Option<MemoryLimit>,
    /// Share of the device that this process pays for, 0..=1.
    pub share: f64,
    /// Work that waits this long without a finished step means that the device hangs; none:
    /// decided at start, longer on a processor.
    pub stall: Option<Duration>,
}

/// How much of a device's memory a process may use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MemoryLimit {
    /// So many bytes.
    Bytes(u64),
    /// This part of the whole, 0..=1: for pods that share a device of any size.
    Part(f64),
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceKind {
    /// A GPU where there is one that this program can use, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU; without one the server does not start.
    Cuda,
}

/// `[cost]`
#[derive(Debug, Clone, Default)]
pub struct Cost {
    /// Price of the whole device.
    pub device_hourly_usd: Option<f64>,
    /// File of a dated price, which wins over `device_hourly_usd` as soon as it can be read; read
    /// again every minute. Without either there are no cost series.
    pub price_file: Option<PathBuf>,
}

/// `[models]`
#[derive(Debug, Clone)]
pub struct Models {
    /// Folder of manifests.
    pub dir: PathBuf,
    /// Folder of fetched files.
    pub cache_dir: PathBuf,
    /// Folders of files that are already there, as `ROOT/MODEL/FILE`; looked at before any source
    /// and never written to.
    pub roots: Vec<PathBuf>,
    /// Never fetch.
    pub offline: bool,
    /// Where `hub:` sources are.
    pub hub_endpoint: String,
    /// Sent to the hub, and nowhere else.
    pub hub_token: Option<String>,
    /// Where the hub's own tools keep files; looked at, never written to.
    pub hub_cache: Option<PathBuf>,
    /// PEM file of root certificates; none: those of the browsers.
    pub ca_file: Option<PathBuf>,
    /// How often checksums are compared.
    pub verify: Verify,
}

/// How often a file's checksum is compared with its manifest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verify {
    /// Once; then a stamp with size and time of change vouches for it.
    #[default]
    Once,
    /// At every start.
    Always,
}

/// `[scheduler]`
#[derive(Debug, Clone, Default)]
pub struct Scheduler {
    /// A step should take no longer; none: what suits the device.
    pub step_target: Option<Duration>,
    /// Bytes of the KV region; none: decided at start.
    pub kv_bytes: Option<u64>,
}

/// `[cpu]`
#[derive(Debug, Clone, Default)]
pub struct Cpu {
    /// Compute threads; none: from quota and affinity.
    pub threads: Option<usize>,
}

/// `[log]`
#[derive(Debug, Clone, Default)]
pub struct Log {
    /// JSON lines instead of text; none: JSON when not on a terminal.
    pub json: Option<bool>,
    /// Filter directive, as in `RUST_LOG`.
    pub filter: Option<String>,
}

impl Config {
    /// Twelve hexadecimal digits that change with any setting or manifest, wherever it was set.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        for setting in settings::all() {
            hasher.update(format!("{}={}\n", setting.key, (setting.get)(self)));
        }
        for manifest in &self.manifests {
            hasher.update(format!("{manifest:?}\n"));
        }
        hasher.finalize()[..6].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Cost {
    /// What to do without a price.
    pub const ADVICE: &str = "cost.device_hourly_usd or cost.price_file sets one";

    /// Whether there is, or may come to be, a price.
    pub fn has_price(&self) -> bool {
        self.device_hourly_usd.is_some() || self.price_file.is_some()
    }
}

impl MemoryLimit {
    /// In bytes, on a device of `total`.
    pub fn bytes(self, total: u64) -> u64 {
        match self {
            MemoryLimit::Bytes(bytes) => bytes,
            MemoryLimit::Part(part) => (total as f64 * part) as u64,
        }
    }
}

impl Log {
    /// Whether logs are JSON lines: as set, or else unless a person is watching.
    pub fn is_json(&self) -> bool {
        self.json.unwrap_or_else(|| !std::io::stderr().is_terminal())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Flag(name) => write!(f, "flag {name}"),
            Source::Env(name) => write!(f, "environment {name}"),
            Source::File(path, line) => write!(f, "{}:{line}", path.display()),
            Source::Default => write!(f, "default"),
        }
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            hosts: values::loopback(),
            port: 8080,
            keep_alive: Duration::from_secs(620),
            max_connection_age: Duration::from_secs(300),
            max_connections: 4096,
            max_body_bytes: 4 << 20,
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            hosts: values::loopback(),
            port: 9464,
            metrics_on_main: false,
            vllm_metrics: false,
            socket: None,
            termination_log: "/dev/termination-log".into(),
            last_exit_file: None,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_wait: Duration::from_secs(30),
            queue_requests: 512,
            queue_tokens: 262_144,
            max_choices: 16,
            request_timeout: Duration::from_secs(600),
            sse_ping: Duration::from_secs(15),
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self { grace: Duration::from_secs(120), linger: Duration::from_secs(20) }
    }
}

impl Default for Device {
    fn default() -> Self {
        Self {
            kind: DeviceKind::Auto,
            deterministic: false,
            memory_limit: None,
            share: 1.0,
            stall: None,
        }
    }
}

impl Default for Models {
    fn default() -> Self {
        Self {
            dir: "models".into(),
            cache_dir: PathBuf::new(),
            roots: vec!["/models".into(), "/mnt/models".into()],
            offline: false,
            hub_endpoint: "https://huggingface.co".into(),
            hub_token: None,
            hub_cache: None,
            ca_file: None,
            verify: Verify::Once,
        }
    }
}
