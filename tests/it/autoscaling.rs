//! The autoscaler's own questions, thresholds and behaviour, read from the manifests, against real
//! servers under a step of load: once through a Prometheus that scrapes them, once by asking
//! `/stats` as KEDA does. Needs Debian's `prometheus` package: `cargo test -- --ignored`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::callers::{Clients, Service, manifests_with_seats};
use crate::hpa::{Activity, Hpa, Metric, SYNC_SECONDS};
use crate::k8s_tools::{one, rendered};
use crate::prometheus::{Prometheus, alone};
use crate::server::{Server, get};

/// Seconds of the autoscaler that pass in one of ours: windows, periods, scrapes and decisions are
/// shortened together. Requests are not, so the run shows the order of things, not their margins.
const SPEED: f64 = 20.0;
/// The machine's pool: as many pods as it can run, a core each.
const PODS_MAX: u32 = 2;
/// What a pod works on at the same time. The thresholds of the manifests are for such pods.
const SEATS: u32 = 16;
const CLIENTS_BEFORE: usize = 1;
const CLIENTS_STEP: usize = 28;
/// Seconds that an answer takes at the threshold: several decisions long, as on a real fleet.
const ANSWER_SECONDS: f64 = 7.0;
const STEP_MAX: Duration = Duration::from_secs(150);

/// What a trigger asks, and its threshold for one pod.
struct Trigger {
    /// PromQL, or a path into `/stats`.
    question: String,
    threshold: f64,
}

/// A ScaledObject at work.
struct Scaler {
    hpa: Hpa,
    activity: Activity,
    triggers: Vec<Trigger>,
}

/// Where it reads.
enum Reads {
    /// A Prometheus, and the file in which it finds its targets.
    Prometheus(Prometheus, PathBuf),
    /// Every pod's `/stats`.
    Stats,
}

impl Scaler {
    fn of(component: &str) -> Self {
        let object = one(&rendered()[&format!("components/{component}")], "ScaledObject", "sconce");
        let trigger = |trigger: &Value| {
            let metadata = &trigger["metadata"];
            let text = |key: &str| metadata[key].as_str();
            let question = text("query").map(shorten).or(text("valueLocation").map(str::to_owned));
            let threshold = text("threshold").or(text("targetValue")).unwrap();
            assert_eq!(trigger["metricType"], "AverageValue");
            Trigger { question: question.unwrap(), threshold: threshold.parse().unwrap() }
        };
        let mut hpa = Hpa::new(object, SPEED);
        hpa.max = hpa.max.min(PODS_MAX);
        let triggers = object["spec"]["triggers"].as_array().unwrap().iter().map(trigger);
        Self { hpa, activity: Activity::new(object, SPEED), triggers: triggers.collect() }
    }
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

/// A pod that was told to go: where it still answers, and its exit code when it has ended.
struct Leaving {
    admin: String,
    stats: String,
    ended: JoinHandle<Option<i32>>,
}

/// What was seen at one decision.
struct Seen {
    /// Seconds since the start.
    at: f64,
    /// Queue, in flight.
    values: Vec<f64>,
    wish: u32,
    asked: u32,
    /// Whether the last pod would go, if the minimum were zero.
    none: bool,
    ready: usize,
    waiting: usize,
    p95: Option<f64>,
}

/// The fleet and its scaler.
struct Fleet {
    started: Instant,
    /// Answers to what was asked earlier are not judged.
    judged_since: Instant,
    /// Of its pods' manifests.
    folder: tempfile::TempDir,
    reads: Reads,
    scaler: Scaler,
    pods: Vec<Server>,
    leaving: Option<Leaving>,
    service: Arc<Service>,
    asked: u32,
    /// Decisions without an answer to the questions.
    blind: usize,
    seen: Vec<Seen>,
}

impl Fleet {
    fn start(scaler: Scaler, reads: impl FnOnce(&Path) -> Reads) -> Self {
        let folder = tempfile::tempdir().unwrap();
        manifests_with_seats(folder.path(), SEATS);
        let mut fleet = Self {
            started: Instant::now(),
            judged_since: Instant::now(),
            reads: reads(folder.path()),
            folder,
            scaler,
            pods: Vec::new(),
            leaving: None,
            service: Arc::default(),
            asked: 1,
            blind: 0,
            seen: Vec::new(),
        };
        fleet.add();
        fleet.pods[0].wait_ready();
        fleet.discover();
        fleet
    }

    /// Starts a pod; it gets requests when it is ready.
    fn add(&mut self) {
        let models = self.folder.path().to_str().unwrap().to_owned();
        let arguments = ["--models-dir", &models, "--threads", "1", "--grace-seconds", "30"];
        self.pods.push(Server::launch(&arguments));
        self.discover();
    }

    /// What the Service and Prometheus know of the pods.
    fn discover(&self) {
        let ready = self.pods.iter().filter(|pod| get(&pod.url("/readyz")).0 == 200);
        self.service.set(ready.map(|pod| pod.url("/v1/chat/completions")).collect());
        let Reads::Prometheus(_, file) = &self.reads else { return };
        let live = self.pods.iter().map(|pod| pod.admin_address().to_owned());
        let target = |(number, address): (usize, String)| {
            let labels = json!({"namespace": "sconce", "job": "sconce", "pod": number.to_string()});
            json!({"targets": [address], "labels": labels})
        };
        let leaving = self.leaving.iter().map(|pod| pod.admin.clone());
        let targets: Vec<Value> = live.chain(leaving).enumerate().map(target).collect();
        write_targets(file, &targets);
    }

    /// The answers to the scaler's questions; none while there is no answer.
    fn ask(&self) -> Option<Vec<f64>> {
        let triggers = &self.scaler.triggers;
        if let Reads::Prometheus(prometheus, _) = &self.reads {
            return triggers.iter().map(|trigger| prometheus.query(&trigger.question)).collect();
        }
        // KEDA asks terminating pods too, as long as they answer.
        let urls = self.pods.iter().map(|pod| pod.admin_url("/stats"));
        let urls = urls.chain(self.leaving.iter().map(|pod| pod.stats.clone()));
        let stats: Vec<Value> =
            urls.filter_map(|url| serde_json::from_str(&get(&url).1).ok()).collect();
        let sum = |trigger: &Trigger| {
            let pointer = format!("/{}", trigger.question.replace('.', "/"));
            stats.iter().map(|stats| stats.pointer(&pointer).unwrap().as_f64().unwrap()).sum()
        };
        (!stats.is_empty()).then(|| triggers.iter().map(sum).collect())
    }

    /// One decision, and what follows from it.
    fn turn(&mut self) {
        // Before the questions: what began after them cannot be in the answers.
        let waiting = self.service.waiting();
        let Some(values) = self.ask() else {
            // No answer is not zero (ignoreNullValues is false): keep what there is.
            self.blind += 1;
            return;
        };
        let now = self.now();
        let Scaler { hpa, activity, triggers } = &mut self.scaler;
        let metrics: Vec<Metric> =
            values.iter().zip(triggers.iter()).map(|(value, t)| (*value, t.threshold)).collect();
        self.asked = hpa.decide(now, self.asked, &metrics);
        let (wish, none) = (hpa.last_wish(), activity.asks_for_none(now, &values));
        self.reconcile();
        let (asked, ready) = (self.asked, self.service.pods());
        let p95 = self.service.p95(self.judged_since);
        self.seen.push(Seen { at: now, values, wish, asked, none, ready, waiting, p95 });
    }

    /// Starts or ends pods as asked.
    fn reconcile(&mut self) {
        let asked = self.asked as usize;
        if asked > self.pods.len() && self.leaving.is_none() {
            self.add();
        } else if asked < self.pods.len() {
            let mut pod = self.pods.pop().unwrap();
            let (admin, stats) = (pod.admin_address().to_owned(), pod.admin_url("/stats"));
            // In a cluster endpoints learn of it at the same time, not before.
            pod.signal("TERM");
            let ended = std::thread::spawn(move || pod.wait_exit(Duration::from_secs(60)).0.code());
            self.leaving = Some(Leaving { admin, stats, ended });
        }
        self.discover();
    }

    /// Decides again and again until `done`, at most for `limit`.
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

    /// Makes answers as long as they should be at the threshold on this machine, now; the objective
    /// that follows: the threshold is three quarters of what a pod holds within it.
    fn calibrate(&self) -> f64 {
        let clients = self.scaler.triggers[1].threshold as usize;
        let measure = |tokens: u32, answers: usize| {
            self.service.answer_with(tokens);
            let (started, busy) = (Instant::now(), Clients::start(&self.service, clients));
            while self.service.answered(started) < answers {
                assert!(started.elapsed() < Duration::from_secs(120), "{:?}", self.service.wrong());
                std::thread::sleep(Duration::from_millis(50));
            }
            let p95 = self.service.p95(started).unwrap();
            busy.stop();
            p95
        };
        let few = 8;
        let seconds = measure(few, 2 * clients);
        let tokens = (f64::from(few) * ANSWER_SECONDS / seconds).clamp(4.0, 1000.0) as u32;
        measure(tokens, clients) / 0.75
    }

    fn table(&self) -> String {
        let mut text = "second  queue  in flight  wish  asked  ready  p95 s\n".to_owned();
        let mut last = (0, 0, 0);
        for (number, seen) in self.seen.iter().enumerate() {
            let state = (seen.wish, seen.asked, seen.ready);
            if state == last && number % 6 != 0 {
                continue;
            }
            last = state;
            let p95 = seen.p95.map_or("-".to_owned(), |p95| format!("{p95:.2}"));
            let zero = if seen.none { "  (0, if the minimum were 0)" } else { "" };
            let Seen { at, values, wish, asked, ready, .. } = seen;
            writeln!(
                text,
                "{at:6.1}  {:5.0}  {:9.1}  {wish:4}  {asked:5}  {ready:5}  {p95:>5}{zero}",
                values[0], values[1]
            )
            .unwrap();
        }
        text
    }
}

/// Moved into place: Prometheus must not read half of it.
fn write_targets(file: &Path, targets: &[Value]) {
    let partial = file.with_extension("partial");
    std::fs::write(&partial, Value::from(targets).to_string()).unwrap();
    std::fs::rename(partial, file).unwrap();
}

fn prometheus(folder: &Path) -> Reads {
    let targets = folder.join("targets.json");
    write_targets(&targets, &[]);
    let scrape = SYNC_SECONDS / SPEED * 1000.0;
    let config = format!(
        "global: {{scrape_interval: {scrape}ms, scrape_timeout: {scrape}ms}}\n\
         scrape_configs:\n- job_name: pods\n  file_sd_configs:\n  - files: ['{}']\n",
        targets.display()
    );
    Reads::Prometheus(Prometheus::start(&config, None), targets)
}

/// What the run is judged by: times in seconds since its start.
struct Times {
    objective: f64,
    /// When the load came, and when it went.
    step: f64,
    over: f64,
    /// When the last client had its answer.
    idle: f64,
}

/// A step of load from one client to many and back, and then nobody.
#[allow(clippy::print_stdout, reason = "the table is what the run is for")]
fn step(mut fleet: Fleet) {
    let service = Arc::clone(&fleet.service);
    let objective = fleet.calibrate();

    let quiet = Clients::start(&service, CLIENTS_BEFORE);
    // What the calibration did leaves every window before the first decision.
    std::thread::sleep(Duration::from_secs_f64(130.0 / SPEED));
    fleet.run(Duration::from_secs(5), |_| false);

    let step = fleet.now();
    fleet.judged_since = Instant::now();
    let busy = Clients::start(&service, CLIENTS_STEP);
    let least = step + objective;
    fleet.run(STEP_MAX, |fleet| fleet.now() > least && fleet.service.pods() == 2);
    fleet.run(Duration::from_secs(5), |_| false);
    let over = fleet.now();
    busy.cease();
    let window = fleet.scaler.hpa.down_window();
    fleet.run(Duration::from_secs_f64(window + 150.0), |fleet| fleet.asked == 1);
    busy.stop();
    quiet.stop();
    let idle = fleet.now();
    fleet.run(Duration::from_secs(60), |fleet| fleet.seen.last().is_some_and(|seen| seen.none));

    let code = fleet.leaving.take().and_then(|pod| pod.ended.join().unwrap());
    println!(
        "{CLIENTS_STEP} clients from {step:.1} to {over:.1} s, nobody from {idle:.1} s; \
         objective: p95 of {objective:.1} s\n{}{} decisions without numbers",
        fleet.table(),
        fleet.blind
    );
    judge(&fleet, &Times { objective, step, over, idle });
    assert_eq!(code, Some(0), "the pod that left cut something");
    assert!(service.wrong().is_empty(), "{:?}", service.wrong());
}

fn judge(fleet: &Fleet, times: &Times) {
    let Times { objective, step, over, idle } = *times;
    let seen = &fleet.seen;
    let first = |what: &dyn Fn(&Seen) -> bool| seen.iter().find(|s| what(s)).map(|s| s.at);
    // Out because of the load, before clients miss the objective, and it does what was asked.
    let out = first(&|s| s.asked >= 2).expect("out");
    assert!(out > step, "out at {out} without load");
    let broken = first(&|s| s.at > step && s.p95.is_some_and(|p95| p95 > objective));
    assert!(broken.is_none_or(|at| out < at), "out at {out}, objective broken at {broken:?}");
    assert!(seen.iter().any(|s| s.ready == 2), "the second pod never came");
    // In when the highest wish of the window is one, not before; then at once.
    let wished = seen.iter().rev().find(|s| s.wish >= 2).unwrap().at;
    let back = first(&|s| s.at > over && s.asked == 1).expect("back in");
    let window = fleet.scaler.hpa.down_window();
    assert!(back - wished >= window, "in {} s after the last wish for two", back - wished);
    assert!(back - wished <= window + 15.0, "in only {} s after", back - wished);
    // Never zero with work running; with none it would be, so the question is one.
    for s in seen.iter().filter(|s| s.at < idle) {
        assert!(!s.none && s.asked >= 1, "none at {} with {} waiting", s.at, s.waiting);
    }
    assert!(seen.last().unwrap().none, "still something to do");
    // The queue alone would have said so: it is empty while pods work.
    assert!(seen.iter().any(|s| s.waiting > 0 && s.values[0] == 0.0 && s.values[1] > 0.0));
}

#[test]
#[ignore = "needs Debian's package prometheus"]
fn replicas_follow_a_step_of_load() {
    let _alone = alone();
    step(Fleet::start(Scaler::of("keda-prometheus"), prometheus));
}

#[test]
#[ignore = "takes the machine for a minute or two"]
fn replicas_follow_a_step_of_load_without_prometheus() {
    let _alone = alone();
    step(Fleet::start(Scaler::of("keda-metrics-api"), |_| Reads::Stats));
}
