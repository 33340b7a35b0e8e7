//! The table of everything that can be set: one row a key. Knows how a text becomes a field of
//! [`Config`] and back; not where the text came from.

use super::values::{
    Parsed, count, device, endpoint, header, hosts, join, memory, number, path, port, seconds,
    secret, show_device, show_memory, show_size, size, switch, whole,
};
use super::{Config, Verify, price};

const DAY: f64 = 86_400.0;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// One key.
pub(super) struct Setting {
    /// `section.name`, as in sconce.toml.
    pub(super) key: &'static str,
    /// Environment names, the first found wins.
    pub(super) env: &'static [&'static str],
    /// Parses, checks the range and stores; an error says what is allowed.
    pub(super) set: fn(&mut Config, &str) -> Parsed<()>,
    /// The effective value as text; empty when unset.
    pub(super) get: fn(&Config) -> String,
}

/// Every key, in the order of the documentation.
pub(super) const SETTINGS: &[&[Setting]] = &[SERVER, LIMITS, DEVICE, MODELS];

/// Every row of the table.
pub(super) fn all() -> impl Iterator<Item = &'static Setting> {
    SETTINGS.iter().copied().flatten()
}

/// A path, or nothing.
fn shown(path: Option<&std::path::Path>) -> String {
    path.map(|path| path.display().to_string()).unwrap_or_default()
}

const SERVER: &[Setting] = &[
    Setting {
        key: "server.host",
        env: &["SCONCE_HOST"],
        set: |c, t| hosts(t).map(|v| c.server.hosts = v),
        get: |c| join(&c.server.hosts, ","),
    },
    Setting {
        key: "server.port",
        env: &["SCONCE_PORT"],
        set: |c, t| port(t).map(|v| c.server.port = v),
        get: |c| c.server.port.to_string(),
    },
    Setting {
        key: "server.keep_alive_seconds",
        env: &[],
        set: |c, t| seconds(t, 1.0..=DAY).map(|v| c.server.keep_alive = v),
        get: |c| c.server.keep_alive.as_secs_f64().to_string(),
    },
    Setting {
        key: "server.max_connection_age_seconds",
        env: &[],
        set: |c, t| seconds(t, 1.0..=DAY).map(|v| c.server.max_connection_age = v),
        get: |c| c.server.max_connection_age.as_secs_f64().to_string(),
    },
    Setting {
        key: "server.max_connections",
        env: &[],
        set: |c, t| count(t, 1..=1_000_000).map(|v| c.server.max_connections = v),
        get: |c| c.server.max_connections.to_string(),
    },
    Setting {
        key: "server.max_body_bytes",
        env: &[],
        set: |c, t| size(t, 1024..=1 << 30).map(|v| c.server.max_body_bytes = v as usize),
        get: |c| show_size(c.server.max_body_bytes as u64),
    },
    Setting {
        key: "server.body_timeout_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.1..=3600.0).map(|v| c.server.body_timeout = v),
        get: |c| c.server.body_timeout.as_secs_f64().to_string(),
    },
    Setting {
        key: "server.write_timeout_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.1..=3600.0).map(|v| c.server.write_timeout = v),
        get: |c| c.server.write_timeout.as_secs_f64().to_string(),
    },
    Setting {
        key: "admin.host",
        env: &["SCONCE_ADMIN_HOST"],
        set: |c, t| hosts(t).map(|v| c.admin.hosts = v),
        get: |c| join(&c.admin.hosts, ","),
    },
    Setting {
        key: "admin.port",
        env: &["SCONCE_ADMIN_PORT"],
        set: |c, t| port(t).map(|v| c.admin.port = v),
        get: |c| c.admin.port.to_string(),
    },
    Setting {
        key: "admin.metrics_on_main",
        env: &[],
        set: |c, t| switch(t).map(|v| c.admin.metrics_on_main = v),
        get: |c| c.admin.metrics_on_main.to_string(),
    },
    Setting {
        key: "admin.vllm_metrics",
        env: &[],
        set: |c, t| switch(t).map(|v| c.admin.vllm_metrics = v),
        get: |c| c.admin.vllm_metrics.to_string(),
    },
    Setting {
        key: "admin.socket",
        env: &["SCONCE_ADMIN_SOCKET"],
        set: |c, t| path(t).map(|v| c.admin.socket = Some(v)),
        get: |c| shown(c.admin.socket.as_deref()),
    },
    Setting {
        key: "admin.termination_log",
        env: &["SCONCE_TERMINATION_LOG"],
        set: |c, t| path(t).map(|v| c.admin.termination_log = v),
        get: |c| c.admin.termination_log.display().to_string(),
    },
    Setting {
        key: "admin.last_exit_file",
        env: &["SCONCE_LAST_EXIT_FILE"],
        set: |c, t| path(t).map(|v| c.admin.last_exit_file = Some(v)),
        get: |c| shown(c.admin.last_exit_file.as_deref()),
    },
    Setting {
        key: "auth.keys_file",
        env: &["SCONCE_KEYS_FILE"],
        set: |c, t| path(t).map(|v| c.auth.keys_file = Some(v)),
        get: |c| shown(c.auth.keys_file.as_deref()),
    },
    Setting {
        key: "auth.tenant_header",
        env: &[],
        set: |c, t| header(t).map(|v| c.auth.tenant_header = Some(v)),
        get: |c| c.auth.tenant_header.clone().unwrap_or_default(),
    },
    Setting {
        key: "auth.open_metrics",
        env: &[],
        set: |c, t| switch(t).map(|v| c.auth.open_metrics = v),
        get: |c| c.auth.open_metrics.to_string(),
    },
    Setting {
        key: "auth.no_auth",
        env: &["SCONCE_NO_AUTH"],
        set: |c, t| switch(t).map(|v| c.auth.no_auth = v),
        get: |c| c.auth.no_auth.to_string(),
    },
];

const LIMITS: &[Setting] = &[
    Setting {
        key: "limits.max_wait_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.1..=3600.0).map(|v| c.limits.max_wait = v),
        get: |c| c.limits.max_wait.as_secs_f64().to_string(),
    },
    Setting {
        key: "limits.queue_requests",
        env: &[],
        set: |c, t| count(t, 1..=1_000_000).map(|v| c.limits.queue_requests = v),
        get: |c| c.limits.queue_requests.to_string(),
    },
    Setting {
        key: "limits.queue_tokens",
        env: &[],
        set: |c, t| count(t, 1..=1_000_000_000).map(|v| c.limits.queue_tokens = v),
        get: |c| c.limits.queue_tokens.to_string(),
    },
    Setting {
        key: "limits.max_choices",
        env: &[],
        set: |c, t| count(t, 1..=128).map(|v| c.limits.max_choices = v),
        get: |c| c.limits.max_choices.to_string(),
    },
    Setting {
        key: "limits.request_timeout_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.1..=DAY).map(|v| c.limits.request_timeout = v),
        get: |c| c.limits.request_timeout.as_secs_f64().to_string(),
    },
    Setting {
        key: "limits.sse_ping_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.1..=3600.0).map(|v| c.limits.sse_ping = v),
        get: |c| c.limits.sse_ping.as_secs_f64().to_string(),
    },
    Setting {
        key: "drain.grace_seconds",
        env: &["SCONCE_GRACE_SECONDS"],
        set: |c, t| seconds(t, 1.0..=DAY).map(|v| c.drain.grace = v),
        get: |c| c.drain.grace.as_secs_f64().to_string(),
    },
    Setting {
        key: "drain.linger_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.0..=3600.0).map(|v| c.drain.linger = v),
        get: |c| c.drain.linger.as_secs_f64().to_string(),
    },
    Setting {
        key: "scheduler.step_target_seconds",
        env: &[],
        set: |c, t| seconds(t, 0.001..=1.0).map(|v| c.scheduler.step_target = Some(v)),
        get: |c| {
            let target = c.scheduler.step_target;
            target.map(|target| target.as_secs_f64().to_string()).unwrap_or_default()
        },
    },
    Setting {
        key: "scheduler.kv_bytes",
        env: &[],
        set: |c, t| size(t, MIB..=16 * TIB).map(|v| c.scheduler.kv_bytes = Some(v)),
        get: |c| c.scheduler.kv_bytes.map(show_size).unwrap_or_default(),
    },
];

const DEVICE: &[Setting] = &[
    Setting {
        key: "device.kind",
        env: &["SCONCE_DEVICE"],
        set: |c, t| device(t).map(|v| c.device.kind = v),
        get: |c| show_device(c.device.kind).to_owned(),
    },
    Setting {
        key: "device.deterministic",
        env: &["SCONCE_DETERMINISTIC"],
        set: |c, t| switch(t).map(|v| c.device.deterministic = v),
        get: |c| c.device.deterministic.to_string(),
    },
    Setting {
        key: "device.memory_limit",
        env: &["SCONCE_DEVICE_MEMORY_LIMIT"],
        set: |c, t| memory(t, MIB..=16 * TIB).map(|v| c.device.memory_limit = Some(v)),
        get: |c| c.device.memory_limit.map(show_memory).unwrap_or_default(),
    },
    Setting {
        key: "device.stall_seconds",
        env: &["SCONCE_DEVICE_STALL_SECONDS"],
        set: |c, t| seconds(t, 1.0..=3600.0).map(|v| c.device.stall = Some(v)),
        get: |c| c.device.stall.map(|v| v.as_secs_f64().to_string()).unwrap_or_default(),
    },
    Setting {
        key: "device.share",
        env: &["SCONCE_DEVICE_SHARE"],
        set: |c, t| number(t, 0.001..=1.0).map(|v| c.device.share = v),
        get: |c| c.device.share.to_string(),
    },
    Setting {
        key: "cost.device_hourly_usd",
        env: &["SCONCE_DEVICE_HOURLY_USD"],
        set: |c, t| number(t, price::USD).map(|v| c.cost.device_hourly_usd = Some(v)),
        get: |c| c.cost.device_hourly_usd.map(|v| v.to_string()).unwrap_or_default(),
    },
    Setting {
        key: "cost.price_file",
        env: &["SCONCE_PRICE_FILE"],
        set: |c, t| path(t).map(|v| c.cost.price_file = Some(v)),
        get: |c| shown(c.cost.price_file.as_deref()),
    },
    Setting {
        key: "cpu.threads",
        env: &["SCONCE_THREADS"],
        set: |c, t| whole(t, 1..=1024).map(|v| c.cpu.threads = Some(v as usize)),
        get: |c| c.cpu.threads.map(|v| v.to_string()).unwrap_or_default(),
    },
];

const MODELS: &[Setting] = &[
    Setting {
        key: "models.dir",
        env: &["SCONCE_MODELS_DIR"],
        set: |c, t| path(t).map(|v| c.models.dir = v),
        get: |c| c.models.dir.display().to_string(),
    },
    Setting {
        key: "models.cache_dir",
        env: &["SCONCE_CACHE_DIR"],
        set: |c, t| path(t).map(|v| c.models.cache_dir = v),
        get: |c| c.models.cache_dir.display().to_string(),
    },
    Setting {
        key: "models.roots",
        env: &[],
        set: |c, t| {
            let parts = t.split([':', '\n']).filter(|part| !part.is_empty());
            parts.map(path).collect::<Parsed<_>>().map(|v| c.models.roots = v)
        },
        get: |c| {
            let roots: Vec<_> = c.models.roots.iter().map(|root| root.display()).collect();
            join(&roots, ":")
        },
    },
    Setting {
        key: "models.offline",
        env: &["SCONCE_OFFLINE", "HF_HUB_OFFLINE"],
        set: |c, t| switch(t).map(|v| c.models.offline = v),
        get: |c| c.models.offline.to_string(),
    },
    Setting {
        key: "models.hub_endpoint",
        env: &["HF_ENDPOINT"],
        set: |c, t| endpoint(t).map(|v| c.models.hub_endpoint = v),
        get: |c| c.models.hub_endpoint.clone(),
    },
    Setting {
        key: "models.hub_token",
        env: &["HF_TOKEN"],
        set: |c, t| secret(t).map(|v| c.models.hub_token = Some(v)),
        get: |c| c.models.hub_token.as_ref().map(|_| "(set)".to_owned()).unwrap_or_default(),
    },
    Setting {
        key: "models.hub_cache",
        env: &["HF_HUB_CACHE"],
        set: |c, t| path(t).map(|v| c.models.hub_cache = Some(v)),
        get: |c| shown(c.models.hub_cache.as_deref()),
    },
    Setting {
        key: "models.ca_file",
        env: &["SSL_CERT_FILE"],
        set: |c, t| path(t).map(|v| c.models.ca_file = Some(v)),
        get: |c| shown(c.models.ca_file.as_deref()),
    },
    Setting {
        key: "models.verify",
        env: &[],
        set: |c, t| {
            c.models.verify = match t {
                "once" => Verify::Once,
                "always" => Verify::Always,
                _ => return Err("once (then stamped) or always".into()),
            };
            Ok(())
        },
        get: |c| match c.models.verify {
            Verify::Once => "once".into(),
            Verify::Always => "always".into(),
        },
    },
    Setting {
        key: "log.format",
        env: &["SCONCE_LOG_FORMAT"],
        set: |c, t| {
            c.log.json = match t {
                "json" => Some(true),
                "text" => Some(false),
                _ => return Err("text or json".into()),
            };
            Ok(())
        },
        get: |c| match c.log.json {
            Some(true) => "json".into(),
            Some(false) => "text".into(),
            None => String::new(),
        },
    },
    Setting {
        key: "log.filter",
        env: &["SCONCE_LOG_FILTER", "RUST_LOG"],
        set: |c, t| {
            let directives = tracing_subscriber::EnvFilter::try_new(t);
            directives.map_err(|_| "directives such as info or sconce=debug,warn".to_owned())?;
            c.log.filter = Some(t.to_owned());
            Ok(())
        },
        get: |c| c.log.filter.clone().unwrap_or_default(),
    },
];
