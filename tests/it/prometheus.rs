//! A real Prometheus scrapes the server and answers what scalers and dashboards ask. Needs
//! Debian's `prometheus` package: `cargo test -- --ignored`.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Server, chat, get, post};

/// A running Prometheus.
pub(crate) struct Prometheus {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// Scrapes `address` every second as job `sconce` in namespace `test`.
    fn scrape(address: &str) -> Self {
        let config = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: sconce\n  \
             static_configs:\n  - targets: ['{address}']\n    labels: {{namespace: test}}\n"
        );
        Self::start(&config, None)
    }

    /// Starts one with a configuration, on data that is there if so told.
    pub(crate) fn start(config: &str, data: Option<&Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let own = folder.path().join("data");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", data.unwrap_or(&own).display()))
            .arg("--storage.tsdb.retention.time=100y")
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Debian's package prometheus is installed");
        Self { child, port, _folder: folder }
    }

    /// URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// The value of a query that gives one element; none as long as it gives nothing.
    pub(crate) fn query(&self, query: &str) -> Option<f64> {
        let url = self.url(&format!("/api/v1/query?query={}", encoded(query)));
        let answer: Value = serde_json::from_str(&get(&url).1).ok()?;
        let result = answer["data"]["result"].as_array()?;
        assert!(result.len() <= 1, "a scaler needs one element: {answer}");
        result.first()?["value"][1].as_str()?.parse().ok()
    }

    /// Waits until a query gives a number that suits.
    pub(crate) fn wait(&self, query: &str, suits: impl Fn(f64) -> bool) -> f64 {
        let started = Instant::now();
        loop {
            let value = self.query(query);
            match value {
                Some(value) if suits(value) => return value,
                _ => {}
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{query} gives {value:?}");
            std::thread::sleep(Duration::from_millis(250));
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

static MACHINE: Mutex<()> = Mutex::new(());

/// The machine for one test of this group: they watch servers under load, and each other's load
/// is not theirs.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A query as part of a URL.
pub(crate) fn encoded(query: &str) -> String {
    query.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

const QUEUE: &str = r#"sum(max_over_time(sconce_queue_depth{namespace="test",job="sconce"}[1m]))"#;
const IN_FLIGHT: &str =
    r#"sum(avg_over_time(sconce_requests_in_flight{namespace="test",job="sconce"}[2m]))"#;
const COST_PER_INFERENCE: &str = r#"
    sum(increase(sconce_cost_usd_total{model="smollm2-135m-instruct",state="busy"}[1m]))
    / sum(increase(sconce_requests_total{model="smollm2-135m-instruct",outcome="ok"}[1m]))"#;

#[test]
#[ignore = "needs Debian's package prometheus"]
fn prometheus_answers_what_scalers_and_dashboards_ask() {
    let _alone = alone();
    let server = Server::start(&["--device-hourly-usd", "3.6"]);
    let prometheus = Prometheus::scrape(server.admin_address());
    // With nothing to do the answers are numbers, not emptiness: emptiness reads as an outage.
    assert_eq!(prometheus.wait(QUEUE, |_| true), 0.0);

    let url = server.url("/v1/chat/completions");
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let url = url.clone();
            std::thread::spawn(move || {
                for turn in 0..6 {
                    let mut body = chat(&format!("Turn {turn}: tell me of the sea."), 64);
                    body["ignore_eos"] = json!(true);
                    let (status, answer) = post(&url, &body);
                    assert_eq!(status, 200, "{answer}");
                }
            })
        })
        .collect();
    prometheus.wait(IN_FLIGHT, |value| value > 0.0);
    for client in clients {
        client.join().unwrap();
    }
    let cost = prometheus.wait(COST_PER_INFERENCE, |value| value > 0.0);
    // 3.6 dollars an hour are 0.1 cents a second; an answer takes between 10 ms and 10 s.
    assert!((1e-5..1e-2).contains(&cost), "{cost} dollars an inference");

    // Attributed and idle time make up the wall clock.
    let series = ["busy", "load", "idle"];
    let sum = || -> f64 {
        let query = series.map(|state| format!("sum(sconce_device_{state}_seconds_total)"));
        prometheus.wait(&query.join(" + "), |_| true)
    };
    let (before, started) = (sum(), Instant::now());
    std::thread::sleep(Duration::from_secs(5));
    let (after, wall) = (sum(), started.elapsed().as_secs_f64());
    // A scrape a second apart at each end.
    assert!((after - before - wall).abs() < 2.5, "{before} to {after} in {wall} s");
}

#[test]
#[ignore = "needs Debian's package prometheus"]
fn promtool_finds_nothing_to_complain_about() {
    let server = Server::start(&["--device-hourly-usd", "1"]);
    post(&server.url("/v1/chat/completions"), &chat("Hi", 4));
    let (status, page) = get(&server.admin_url("/metrics"));
    assert_eq!(status, 200);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Debian's package prometheus is installed");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.trim().is_empty(), "{told}");
    assert!(!page.contains(" summary\n"), "quantiles cannot be added up over pods");
}
