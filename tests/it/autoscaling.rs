//! The autoscaler's own questions, thresholds and behaviour, read from the manifests, against real
//! servers under a step of load: Prometheus scrapes them, and KEDA's other way asks `/stats`. Needs
//! Debian's `prometheus` package: `cargo test -- --ignored`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::hpa::{Hpa, Metric, SYNC_SECONDS};
use crate::k8s_tools::{one, rendered};
use crate::prometheus::{Prometheus, alone};
use crate::server::{Server, chat, get, post};

/// Seconds of the autoscaler that pass in one of ours: windows, periods, scrapes and decisions are
/// shortened together. Requests are not, so the run shows the order of things, not their margins.
const SPEED: f64 = 20.0;
/// The machine's pool: as many pods as it can run.
const PODS_MAX: u32 = 2;
const CLIENTS_BEFORE: usize = 1;
const CLIENTS_STEP: usize = 28;
const STEP: Duration = Duration::from_secs(25);
/// At 95 of 100 answers; or four times what a quiet server takes, if that is longer here.
const OBJECTIVE: f64 = 8.0;

/// What a trigger asks, and its threshold for one pod.
struct Trigger {
    /// PromQL, or a path into `/stats`.
    question: String,
    threshold: f64,
}

fn triggers(component: &str) -> (Hpa, Vec<Trigger>) {
    let scaler = one(&rendered()[&format!("components/{component}")], "ScaledObject", "sconce");
    let trigger = |trigger: &Value| {
        let metadata = &trigger["metadata"];
        let text = |key: &str| metadata[key].as_str();
        let question = text("query").map(shorten).or(text("valueLocation").map(str::to_owned));
        let threshold = text("threshold").or(text("targetValue")).unwrap();
        assert_eq!(trigger["metricType"], "AverageValue");
        Trigger { question: question.unwrap(), threshold: threshold.parse().unwrap() }
    };
    let triggers = scaler["spec"]["triggers"].as_array().unwrap().iter().map(trigger).collect();
    let mut hpa = Hpa::new(scaler, SPEED);
    hpa.max = hpa.max.min(PODS_MAX);
    (hpa, triggers)
}

/// The query with its windows shortened.
fn shorten(query: &str) -> String {
    let mut text = query.to_owned();
    for minutes in 1..=2 {
        let window = format!("[{}ms]", (f64::from(minutes) * 60_000.0 / SPEED) as u32);
        text = text.replace(&format!("[{minutes}m]"), &window);
    }
    assert_ne!(text, query, "no window in {query}");
    text
}

/// The pods that the Service knows, and what clients saw of them.
#[derive(Default)]
struct Service {
    urls: Mutex<Vec<String>>,
    turn: AtomicUsize,
    /// When a request ended and how long it took.
    answers: Mutex<Vec<(Instant, f64)>>,
    refused: AtomicUsize,
}

impl Service {
    fn url(&self) -> String {
        let urls = self.urls.lock().unwrap();
        urls[self.turn.fetch_add(1, Ordering::Relaxed) % urls.len()].clone()
    }

    /// One client that asks again and again, and tries again when it is told to.
    fn client(self: &Arc<Self>, number: usize, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
        let (service, stop) = (Arc::clone(self), Arc::clone(stop));
        std::thread::spawn(move || {
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut body = chat(&format!("{number}, {turn}: what is a lamp?"), 8);
                body["ignore_eos"] = json!(true);
                let started = Instant::now();
                let (status, answer) = post(&service.url(), &body);
                match status {
                    200 => {
                        let took = started.elapsed().as_secs_f64();
                        service.answers.lock().unwrap().push((Instant::now(), took));
                    }
                    429 | 503 => {
                        service.refused.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(300));
                    }
                    _ => panic!("{status}: {answer}"),
                }
                turn += 1;
            }
        })
    }

    /// The 95th percentile of the answers that ended in the last 10 s.
    fn p95(&self) -> Option<f64> {
        let answers = self.answers.lock().unwrap();
        let recent = answers.iter().filter(|(at, _)| at.elapsed() < Duration::from_secs(10));
        let mut took: Vec<f64> = recent.map(|(_, took)| *took).collect();
        took.sort_by(f64::total_cmp);
        took.get(took.len() * 95 / 100).copied()
    }
}

struct Clients(Arc<AtomicBool>, Vec<JoinHandle<()>>);

impl Clients {
    fn start(service: &Arc<Service>, count: usize) -> Self {
        let stop = Arc::default();
        let clients = (0..count).map(|number| service.client(number, &stop)).collect();
        Self(stop, clients)
    }

    /// No new requests; those under way go on.
    fn cease(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn stop(self) {
        self.cease();
        for client in self.1 {
            client.join().unwrap();
        }
    }
}

/// What was seen at one decision.
struct Seen {
    /// Seconds since the start.
    at: f64,
    /// By Prometheus: queue, in flight.
    values: Vec<f64>,
    asked: u32,
    /// By `/stats`.
    asked_stats: u32,
    ready: usize,
    in_flight: f64,
    p95: Option<f64>,
}

/// The fleet and its two scalers.
struct Fleet {
    started: Instant,
    prometheus: Prometheus,
    targets: PathBuf,
    pods: Vec<Server>,
    service: Arc<Service>,
    by_prometheus: (Hpa, Vec<Trigger>),
    by_stats: (Hpa, Vec<Trigger>),
    asked: u32,
    asked_stats: u32,
    seen: Vec<Seen>,
    leaving: Option<JoinHandle<i32>>,
}

impl Fleet {
    fn start(folder: &Path) -> Self {
        let targets = folder.join("targets.json");
        let scrape = SYNC_SECONDS / SPEED * 1000.0;
        let config = format!(
            "global: {{scrape_interval: {scrape}ms, scrape_timeout: {scrape}ms}}\n\
             scrape_configs:\n- job_name: pods\n  file_sd_configs:\n  - files: ['{}']\n",
            targets.display()
        );
        let mut fleet = Self {
            started: Instant::now(),
            prometheus: Prometheus::start(&config, None),
            targets,
            pods: Vec::new(),
            service: Arc::default(),
            by_prometheus: triggers("keda-prometheus"),
            by_stats: triggers("keda-metrics-api"),
            asked: 1,
            asked_stats: 1,
            seen: Vec::new(),
            leaving: None,
        };
        fleet.add();
        fleet.pods[0].wait_ready();
        fleet.discover();
        fleet
    }

    /// Starts a pod; it gets requests when it is ready.
    fn add(&mut self) {
        self.pods.push(Server::launch(&["--grace-seconds", "30"]));
        self.discover();
    }

    /// What the Service and Prometheus know of the pods.
    fn discover(&self) {
        let ready = self.pods.iter().filter(|pod| get(&pod.url("/readyz")).0 == 200);
        *self.service.urls.lock().unwrap() =
            ready.map(|pod| pod.url("/v1/chat/completions")).collect();
        let target = |(number, pod): (usize, &Server)| {
            let labels = json!({"namespace": "sconce", "job": "sconce", "pod": number.to_string()});
            json!({"targets": [pod.admin_address()], "labels": labels})
        };
        let targets: Vec<Value> = self.pods.iter().enumerate().map(target).collect();
        // Moved into place: Prometheus must not read half of it.
        let partial = self.targets.with_extension("partial");
        std::fs::write(&partial, Value::from(targets).to_string()).unwrap();
        std::fs::rename(partial, &self.targets).unwrap();
    }

    /// One poll of both scalers, one decision of each, and what the first one's asks for.
    fn turn(&mut self) {
        let now = self.started.elapsed().as_secs_f64();
        let questions = &self.by_prometheus.1;
        let values: Option<Vec<f64>> =
            questions.iter().map(|trigger| self.prometheus.query(&trigger.question)).collect();
        // No answer is not zero (ignoreNullValues is false): the autoscaler keeps what it has.
        let Some(values) = values else { return };
        let metrics: Vec<Metric> =
            values.iter().zip(questions).map(|(value, t)| (*value, t.threshold)).collect();
        self.asked = self.by_prometheus.0.decide(now, self.asked, &metrics);

        let stats: Vec<Value> = self
            .pods
            .iter()
            .filter_map(|pod| serde_json::from_str(&get(&pod.admin_url("/stats")).1).ok())
            .collect();
        let sum = |path: &str| {
            let pointer = format!("/{}", path.replace('.', "/"));
            stats.iter().map(|stats| stats.pointer(&pointer).unwrap().as_f64().unwrap()).sum()
        };
        let metrics: Vec<Metric> =
            self.by_stats.1.iter().map(|t| (sum(&t.question), t.threshold)).collect();
        let in_flight = metrics[1].0;
        self.asked_stats = self.by_stats.0.decide(now, self.asked_stats, &metrics);

        self.reconcile();
        let ready = self.service.urls.lock().unwrap().len();
        let (asked, asked_stats, p95) = (self.asked, self.asked_stats, self.service.p95());
        self.seen.push(Seen { at: now, values, asked, asked_stats, ready, in_flight, p95 });
    }

    /// Starts or ends pods as asked.
    fn reconcile(&mut self) {
        let asked = self.asked as usize;
        if asked > self.pods.len() && self.leaving.is_none() {
            self.add();
        } else if asked < self.pods.len() {
            let mut pod = self.pods.pop().unwrap();
            pod.signal("TERM");
            self.leaving = Some(std::thread::spawn(move || {
                pod.wait_exit(Duration::from_secs(40)).0.code().unwrap()
            }));
        }
        self.discover();
    }

    /// Polls and decides until `done`, at most for `limit`.
    fn run(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) {
        let pause = Duration::from_secs_f64(SYNC_SECONDS / SPEED);
        let started = Instant::now();
        while started.elapsed() < limit && !done(self) {
            let turn = Instant::now();
            self.turn();
            std::thread::sleep(pause.saturating_sub(turn.elapsed()));
        }
    }

    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn table(&self) -> String {
        let mut text = "second  queue  in flight  asked  asked (stats)  ready  p95 s\n".to_owned();
        let mut last = (0, 0, 0);
        for (number, seen) in self.seen.iter().enumerate() {
            let state = (seen.asked, seen.asked_stats, seen.ready);
            if state == last && number % 6 != 0 {
                continue;
            }
            last = state;
            let p95 = seen.p95.map_or("-".to_owned(), |p95| format!("{p95:.2}"));
            writeln!(
                text,
                "{:6.1}  {:5.0}  {:9.1}  {:5}  {:13}  {:5}  {p95:>5}",
                seen.at, seen.values[0], seen.values[1], seen.asked, seen.asked_stats, seen.ready
            )
            .unwrap();
        }
        text
    }
}

#[test]
#[ignore = "needs Debian's package prometheus"]
#[allow(clippy::print_stdout, reason = "the table is what the run is for")]
fn replicas_follow_a_step_of_load() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut fleet = Fleet::start(folder.path());
    let service = Arc::clone(&fleet.service);

    let quiet = Clients::start(&service, CLIENTS_BEFORE);
    fleet.run(Duration::from_secs(12), |_| false);
    let objective = fleet.seen.last().and_then(|s| s.p95).map_or(OBJECTIVE, |p95| 4.0 * p95);
    let objective = objective.max(OBJECTIVE);

    let step = fleet.now();
    let busy = Clients::start(&service, CLIENTS_STEP);
    fleet.run(STEP, |_| false);
    let over = fleet.now();
    busy.cease();
    let window = fleet.by_prometheus.0.down_window();
    let limit = Duration::from_secs_f64(window + 150.0);
    fleet.run(limit, |fleet| fleet.asked == 1 && fleet.asked_stats == 1);
    busy.stop();
    quiet.stop();
    let code = fleet.leaving.take().map(|leaving| leaving.join().unwrap());
    let table = fleet.table();
    println!("load from {step:.1} to {over:.1} s, objective {objective:.1} s\n{table}");

    let seen = &fleet.seen;
    let first = |what: &dyn Fn(&Seen) -> bool| seen.iter().find(|s| what(s)).map(|s| s.at);
    for (name, asked) in
        [("Prometheus", (|s| s.asked) as fn(&Seen) -> u32), ("stats", |s| s.asked_stats)]
    {
        let out = first(&|s| asked(s) >= 2).unwrap_or_else(|| panic!("{name}: never out\n{table}"));
        assert!(out > step, "{name}: out at {out} without load\n{table}");
        let broken = first(&|s| s.at > step && s.p95.is_some_and(|p95| p95 > objective));
        assert!(broken.is_none_or(|at| out < at), "{name}: out at {out}, too late\n{table}");
        let back = first(&|s| s.at > over && asked(s) == 1);
        let back = back.unwrap_or_else(|| panic!("{name}: never back\n{table}"));
        // The window begins with the last wish for two, at the end of the step at the latest; half
        // of it leaves room for a step whose last seconds asked for no more than one.
        assert!(back - over > window / 2.0, "{name}: back after {} s\n{table}", back - over);
        // Never zero with work running, whatever the minimum: a wish is rounded up.
        assert!(seen.iter().all(|s| asked(s) >= 1));
    }
    let thresholds: Vec<f64> = fleet.by_prometheus.1.iter().map(|t| t.threshold).collect();
    let mut queue_alone_says_none = 0;
    for s in seen.iter().filter(|s| s.in_flight >= 1.0 && s.values[1] > 0.0) {
        let wish = s.values.iter().zip(&thresholds).map(|(v, t)| (v / t).ceil() as u32).max();
        assert!(wish >= Some(1), "at {}: {:?}\n{table}", s.at, s.values);
        queue_alone_says_none += u32::from(s.values[0] == 0.0);
    }
    println!("turns with work running and an empty queue: {queue_alone_says_none}");
    assert_eq!(code, Some(0), "the pod that left cut something\n{table}");
    assert_eq!(service.urls.lock().unwrap().len(), 1);
}
