//! Everything that can be set: flags, `SCONCE_*` environment, sconce.toml and models/*.toml become
//! one validated, frozen [`Config`]. Knows the keys and their limits, not what they are used for.

pub mod manifest;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use manifest::Manifest;

/// The whole configuration: validated, frozen.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[admin]`
    pub admin: Admin,
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
    /// More connections than this wait unaccepted.
    pub max_connections: usize,
    /// Largest request body.
    pub max_body_bytes: usize,
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
    /// Bytes of device memory to use; none: decided at start.
    pub memory_limit: Option<u64>,
    /// Share of the device that this process pays for, 0..=1.
    pub share: f64,
}

/// `[cost]`
#[derive(Debug, Clone, Default)]
pub struct Cost {
    /// Price of the whole device; none: no cost series.
    pub device_hourly_usd: Option<f64>,
}

/// `[models]`
#[derive(Debug, Clone)]
pub struct Models {
    /// Folder of manifests.
    pub dir: PathBuf,
    /// Folder of fetched files.
    pub cache_dir: PathBuf,
    /// Never fetch.
    pub offline: bool,
}

/// `[scheduler]`
#[derive(Debug, Clone)]
pub struct Scheduler {
    /// A step should take no longer.
    pub step_target: Duration,
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

impl Default for Server {
    fn default() -> Self {
        Self {
            hosts: loopback(),
            port: 8080,
            keep_alive: Duration::from_secs(620),
            max_connection_age: Duration::from_secs(300),
            max_connections: 4096,
            max_body_bytes: 4 << 20,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { hosts: loopback(), port: 9464, metrics_on_main: false }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_wait: Duration::from_secs(30),
            queue_requests: 512,
            queue_tokens: 262_144,
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
        Self { memory_limit: None, share: 1.0 }
    }
}

impl Default for Models {
    fn default() -> Self {
        Self { dir: "models".into(), cache_dir: PathBuf::new(), offline: false }
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Self { step_target: Duration::from_millis(25), kv_bytes: None }
    }
}

fn loopback() -> Vec<IpAddr> {
    vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]
}
