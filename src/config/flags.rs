//! The settings that can be given on the command line. The doc comments are the help. Values stay
//! text here: `load` parses them as it parses the environment and sconce.toml.

use std::path::PathBuf;

/// Flags win over the environment, which wins over sconce.toml.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Configuration file [env: SCONCE_CONFIG] [default: ./sconce.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Addresses to listen on, separated by commas [env: SCONCE_HOST] [default: 127.0.0.1,::1]
    #[arg(long, global = true, value_name = "ADDRESS", help_heading = "Listening")]
    pub host: Option<String>,

    /// Port of the API; 0 lets the system choose [env: SCONCE_PORT] [default: 8080]
    #[arg(long, global = true, value_name = "PORT", help_heading = "Listening")]
    pub port: Option<String>,

    /// Addresses of metrics and administration [env: SCONCE_ADMIN_HOST] [default: 127.0.0.1,::1]
    #[arg(long, global = true, value_name = "ADDRESS", help_heading = "Listening")]
    pub admin_host: Option<String>,

    /// Port of metrics and administration [env: SCONCE_ADMIN_PORT] [default: 9464]
    #[arg(long, global = true, value_name = "PORT", help_heading = "Listening")]
    pub admin_port: Option<String>,

    /// Serve beyond loopback without API keys [env: SCONCE_NO_AUTH]
    #[arg(long, global = true, help_heading = "Listening")]
    pub no_auth: bool,

    /// Seconds from SIGTERM to the kill that follows [env: SCONCE_GRACE_SECONDS] [default: 30 in
    /// Kubernetes, else 120]
    #[arg(long, global = true, value_name = "SECONDS", help_heading = "Listening")]
    pub grace_seconds: Option<String>,

    /// Folder of manifests [env: SCONCE_MODELS_DIR] [default: ./models, or those built in]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Models")]
    pub models_dir: Option<String>,

    /// Folder of fetched files [env: SCONCE_CACHE_DIR] [default: sconce in the user's cache]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Models")]
    pub cache_dir: Option<String>,

    /// Fetch nothing; use what is there [env: SCONCE_OFFLINE]
    #[arg(long, global = true, help_heading = "Models")]
    pub offline: bool,

    /// auto, cpu or cuda [env: SCONCE_DEVICE] [default: auto, a GPU where there is one]
    #[arg(long, global = true, value_name = "KIND", help_heading = "Device")]
    pub device_kind: Option<String>,

    /// The same text whatever shares a batch, also on a GPU [env: SCONCE_DETERMINISTIC]
    #[arg(long, global = true, help_heading = "Device")]
    pub deterministic: bool,

    /// Device memory to use, as 4GiB or 45% [env: SCONCE_DEVICE_MEMORY_LIMIT] [default: what is
    /// free]
    #[arg(long, global = true, value_name = "BYTES", help_heading = "Device")]
    pub device_memory_limit: Option<String>,

    /// Share of the device that is paid for, up to 1 [env: SCONCE_DEVICE_SHARE] [default: 1]
    #[arg(long, global = true, value_name = "SHARE", help_heading = "Device")]
    pub device_share: Option<String>,

    /// Price of the whole device [env: SCONCE_DEVICE_HOURLY_USD] [default: none, no cost metrics]
    #[arg(long, global = true, value_name = "USD", help_heading = "Device")]
    pub device_hourly_usd: Option<String>,

    /// Compute threads [env: SCONCE_THREADS] [default: from CPU quota and affinity]
    #[arg(long, global = true, value_name = "N", help_heading = "Device")]
    pub threads: Option<String>,

    /// text or json [env: SCONCE_LOG_FORMAT] [default: text on a terminal, else json]
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Logs")]
    pub log_format: Option<String>,

    /// Log directives, as debug or sconce=debug,warn [env: SCONCE_LOG_FILTER, RUST_LOG] [default:
    /// info]
    #[arg(long, global = true, value_name = "DIRECTIVES", help_heading = "Logs")]
    pub log_filter: Option<String>,
}

impl Flags {
    /// The value given for the setting `key`, with the flag's name.
    pub(super) fn get(&self, key: &str) -> Option<(&'static str, &str)> {
        let switch = |given: bool| given.then_some("true");
        let (flag, value) = match key {
            "server.host" => ("--host", self.host.as_deref()),
            "server.port" => ("--port", self.port.as_deref()),
            "admin.host" => ("--admin-host", self.admin_host.as_deref()),
            "admin.port" => ("--admin-port", self.admin_port.as_deref()),
            "auth.no_auth" => ("--no-auth", switch(self.no_auth)),
            "drain.grace_seconds" => ("--grace-seconds", self.grace_seconds.as_deref()),
            "models.dir" => ("--models-dir", self.models_dir.as_deref()),
            "models.cache_dir" => ("--cache-dir", self.cache_dir.as_deref()),
            "models.offline" => ("--offline", switch(self.offline)),
            "device.kind" => ("--device-kind", self.device_kind.as_deref()),
            "device.deterministic" => ("--deterministic", switch(self.deterministic)),
            "device.memory_limit" => ("--device-memory-limit", self.device_memory_limit.as_deref()),
            "device.share" => ("--device-share", self.device_share.as_deref()),
            "cost.device_hourly_usd" => ("--device-hourly-usd", self.device_hourly_usd.as_deref()),
            "cpu.threads" => ("--threads", self.threads.as_deref()),
            "log.format" => ("--log-format", self.log_format.as_deref()),
            "log.filter" => ("--log-filter", self.log_filter.as_deref()),
            _ => return None,
        };
        value.map(|value| (flag, value))
    }
}
