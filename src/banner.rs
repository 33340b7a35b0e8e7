//! What a server says of itself once it is ready: for a person some lines, for a machine one event
//! with the same in it. Knows what is said, not how it came about.

use std::io::Write;
use std::net::SocketAddr;

use crate::config::Config;
use crate::engine::start::Opened;

/// Where it listens.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// The API's.
    pub api: Vec<SocketAddr>,
    /// Those of metrics and administration.
    pub admin: Vec<SocketAddr>,
}

/// Says it: as an event where logs are JSON, else as lines to `out`.
pub fn show(config: &Config, addresses: &Addresses, device: &Opened, out: &mut dyn Write) {
    let Opened { name, threads, memory_limit } = device;
    let names: Vec<&str> = config.manifests.iter().map(|one| one.name.as_str()).collect();
    let names = names.join(", ");
    let version = env!("CARGO_PKG_VERSION");
    let [api, admin] = [&addresses.api, &addresses.admin].map(|all| joined(all));
    let (limits, hash) = (&config.limits, config.hash());
    let keys = config.auth.keys_file.is_some();
    let grace_seconds = config.drain.grace.as_secs_f64();
    let max_wait_seconds = limits.max_wait.as_secs_f64();
    let request_timeout_seconds = limits.request_timeout.as_secs_f64();
    if config.log.is_json() {
        tracing::info!(
            version,
            api,
            admin,
            models = names,
            device = name,
            threads,
            memory_limit,
            queue_requests = limits.queue_requests,
            queue_tokens = limits.queue_tokens,
            max_wait_seconds,
            request_timeout_seconds,
            max_connections = config.server.max_connections,
            max_body_bytes = config.server.max_body_bytes,
            grace_seconds,
            keys,
            config_hash = hash,
            "ready"
        );
        return;
    }
    let port = addresses.api.first().map_or(config.server.port, SocketAddr::port);
    let admin_port = addresses.admin.first().map_or(config.admin.port, SocketAddr::port);
    let threads = threads.map(|threads| format!(", {threads} threads")).unwrap_or_default();
    let gib = *memory_limit as f64 / f64::from(1 << 30);
    let guarded = if keys { "API keys" } else { "no API keys" };
    let lines = [
        format!("sconce {version} is ready, configuration {hash}"),
        format!("  api      http://localhost:{port}/v1 ({api}; {guarded})"),
        format!("  metrics  http://localhost:{admin_port}/metrics ({admin})"),
        format!("  models   {names}"),
        format!("  device   {name}{threads}, {gib:.1} GiB of memory to use"),
        format!(
            "  limits   {} requests or {} tokens waiting, {max_wait_seconds} s of waiting, \
             {request_timeout_seconds} s a request, {grace_seconds} s of grace",
            limits.queue_requests, limits.queue_tokens
        ),
        format!("  try      curl http://localhost:{port}/v1/models"),
    ];
    // Nobody reads a closed pipe.
    let _ = writeln!(out, "\n{}\n", lines.join("\n"));
}

fn joined(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_where_and_what_and_how_much() {
        let mut config = Config::default();
        config.log.json = Some(false);
        config.limits.queue_requests = 77;
        let at = |text: &str| text.parse().expect("an address");
        let addresses = Addresses { api: vec![at("127.0.0.1:81"), at("[::1]:81")], admin: vec![] };
        let device = Opened { name: "cpu".into(), threads: Some(3), memory_limit: 3 << 29 };
        let mut shown = Vec::new();
        show(&config, &addresses, &device, &mut shown);
        let shown = String::from_utf8(shown).expect("text");
        for part in [
            "http://localhost:81/v1 (127.0.0.1:81, [::1]:81; no API keys)",
            "http://localhost:9464/metrics",
            "cpu, 3 threads, 1.5 GiB",
            "77 requests or 262144 tokens",
            &config.hash(),
        ] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }
}
