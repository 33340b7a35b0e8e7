//! The front alone: `cargo bench --bench front`. Small embedding requests over HTTP on loopback,
//! with the real tokenizer and an engine whose device answers at once. Prints requests a second,
//! what the front adds to the engine's own time (for comparison: a probe, which is connection and
//! HTTP alone), and what a request costs in CPU time, which a busy machine changes least.

#![allow(clippy::unwrap_used, reason = "a broken measurement fails by it")]
#![allow(clippy::print_stdout, reason = "the table is the result")]

#[path = "../tests/it/fixtures.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod fixtures;
mod statistics;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sconce::admission::Front;
use sconce::admission::callers::Callers;
use sconce::catalog::{Catalog, ModelCard};
use sconce::config::Config;
use sconce::engine::fake::{FakeDevice, FakeRunner};
use sconce::engine::lanes::Lanes;
use sconce::engine::warmup::{Scratch, Trial};
use sconce::engine::{Engine, Links, Machine, fan_out};
use sconce::http::listener::{Limits, Server};
use sconce::http::main_router;
use sconce::lifecycle::Lifecycle;
use sconce::model::{EncoderCard, ModelState, ModelTask};
use sconce::request::{
    Encode, Event, LaneId, Micros, Request, RequestId, Sink, Submission, Task, TenantId, Text,
    Yield,
};
use sconce::scheduler::{LaneConfig, LaneKind, Scheduler, SchedulerConfig};
use sconce::telemetry::{Setup, Telemetry};
use sconce::text::ModelText;
use serde_json::json;
use statistics::{median, quantile};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

const MODEL: &str = "all-minilm-l6-v2";
const WIDTH: usize = 384;
const TEXT: &str = "a small lamp on the harbour wall";

/// Length of one measurement; everything is repeated and the median quoted.
const SPAN: Duration = Duration::from_secs(1);
const ROUNDS: usize = 9;

/// Threads for requests, as many as the server takes on two cores.
const WORKERS: usize = 2;

/// Connections that always have a request under way when throughput is measured.
const CONNECTIONS: usize = 32;

/// What one measurement saw.
struct Seen {
    /// Microseconds from the request's first byte to the answer's last.
    times: Vec<f64>,
    per_second: f64,
    /// CPU microseconds a request, by the threads' name.
    cpu: BTreeMap<String, f64>,
}

impl Seen {
    fn time(&self, share: f64) -> f64 {
        quantile(&self.times, share)
    }
}

/// All measurements, one after the other, so that a change of the machine's speed meets all alike.
struct Round {
    engine: Seen,
    probe: Seen,
    alone: Seen,
    many: Seen,
}

fn main() {
    // Each request is logged, as JSON, to where nobody reads it.
    let nowhere = std::fs::File::create("/dev/null").unwrap();
    tracing_subscriber::fmt().json().with_writer(nowhere).init();
    let site = Site::open();
    let probe = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let floats = request(json!({"model": MODEL, "input": TEXT}));
    let base64 = request(json!({"model": MODEL, "input": TEXT, "encoding_format": "base64"}));
    println!(
        "| answer as | engine p50 | probe p50 | one client p50 | p99 | added p50 \
         | {CONNECTIONS} clients |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut costs = Vec::new();
    for (name, request) in [("floats", &floats), ("base64", &base64)] {
        let round = |_| Round {
            engine: site.engine(),
            probe: site.load(probe, 1),
            alone: site.load(request, 1),
            many: site.load(request, CONNECTIONS),
        };
        let rounds: Vec<Round> = (0..ROUNDS).map(round).collect();
        let of = |value: fn(&Round) -> f64| median(rounds.iter().map(value));
        println!(
            "| {name} | {:.0} µs | {:.0} µs | {:.0} µs | {:.0} µs | {:.0} µs | {:.0} requests/s |",
            of(|round| round.engine.time(0.5)),
            of(|round| round.probe.time(0.5)),
            of(|round| round.alone.time(0.5)),
            of(|round| round.alone.time(0.99)),
            of(|round| round.alone.time(0.5) - round.engine.time(0.5)),
            of(|round| round.many.per_second),
        );
        costs.push((name, rounds.into_iter().map(|round| round.many.cpu).collect::<Vec<_>>()));
    }
    println!();
    for (name, rounds) in costs {
        let threads = rounds[0].keys().map(|thread| {
            let each = rounds.iter().map(|cpu| cpu.get(thread).copied().unwrap_or(0.0));
            format!("{thread} {:.0} µs", median(each))
        });
        let threads: Vec<String> = threads.collect();
        println!("CPU time a request, {name}: {}", threads.join(", "));
    }
}

/// A front and a fake engine, put together as `serve.rs` does.
struct Site {
    runtime: Runtime,
    front: Arc<Front>,
    port: u16,
}

impl Site {
    fn open() -> Self {
        let config = Arc::new(Config::default());
        let telemetry = Telemetry::new(Setup {
            models: vec![(MODEL.into(), ModelTask::Embed)],
            device_hourly_usd: Some(1.0),
            ..Setup::default()
        });
        let lifecycle = Lifecycle::new(Duration::from_secs(30), Arc::clone(&telemetry));
        let callers = Callers::open(&config.auth, Arc::clone(&telemetry)).unwrap();
        let (inbox, submissions) = mpsc::channel(config.limits.queue_requests);
        let catalog = Arc::new(catalog());
        let front = Front::new(
            Arc::clone(&config),
            Arc::clone(&catalog),
            Arc::clone(&telemetry),
            Arc::clone(&lifecycle),
            callers,
            inbox,
        );
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime =
            runtime.worker_threads(WORKERS).thread_name("front").enable_all().build().unwrap();
        let (deliveries, delivered) = mpsc::unbounded_channel();
        runtime.spawn(fan_out(delivered));
        let (_, installs) = mpsc::unbounded_channel();
        let links = Links {
            inbox: submissions,
            installs,
            deliveries,
            phase: lifecycle.watch(),
            telemetry,
            catalog,
            pulse: Arc::default(),
        };
        let handle = runtime.handle().clone();
        let engine = std::thread::Builder::new().name("engine".into());
        let engine = engine.spawn(move || {
            let _entered = handle.enter();
            let device = FakeDevice { width: WIDTH, ..FakeDevice::default() };
            let (scheduler, lanes) = scheduler();
            let runner = Box::new(FakeRunner::new(device));
            Engine::new(scheduler, Machine { runner, lanes, slots: (1, 1) }, links).run()
        });
        engine.unwrap();
        lifecycle.models_ready();
        let server = {
            let _entered = runtime.enter();
            let limits = Limits::main(&config.server);
            Server::bind(&[IpAddr::V4(Ipv4Addr::LOCALHOST)], 0, limits).unwrap()
        };
        let port = server.port();
        runtime.spawn(server.serve(main_router(Arc::clone(&front)), lifecycle.watch()));
        Self { runtime, front, port }
    }

    /// What the engine takes for the same task, asked from the front's own threads.
    fn engine(&self) -> Seen {
        let model = self.front.catalog.find(MODEL).unwrap();
        let tokens = model.text().unwrap().tokenizer.encode(TEXT, true).unwrap();
        let front = Arc::clone(&self.front);
        let asking = self.runtime.spawn(async move {
            let mut times = Vec::new();
            let start = Instant::now();
            while start.elapsed() < SPAN {
                let text = Text::single(tokens.clone());
                let task = Task::Encode(Encode { inputs: vec![text], yields: Yield::Answer });
                let (sink, mut events) = Sink::for_task(&task);
                let request = Request {
                    id: RequestId(1 << 40 | times.len() as u64),
                    lane: LaneId(0),
                    tenant: TenantId::default(),
                    arrived: front.telemetry.now(),
                    deadline: None,
                    task,
                };
                let asked = Instant::now();
                front.telemetry.submitted(LaneId(0), tokens.len() as u64);
                front.inbox.send(Submission { request, sink }).await.unwrap();
                while let Some(event) = events.recv().await {
                    if let Event::Done { .. } = event {
                        break;
                    }
                }
                times.push(asked.elapsed().as_secs_f64() * 1e6);
            }
            times
        });
        let times = self.runtime.block_on(asking).unwrap();
        Seen { per_second: times.len() as f64 / SPAN.as_secs_f64(), times, cpu: BTreeMap::new() }
    }

    /// One thread that keeps a request under way on each of its connections.
    fn load(&self, request: &[u8], connections: usize) -> Seen {
        let before = cpu();
        let port = self.port;
        let request = request.to_vec();
        let client = std::thread::Builder::new().name("client".into());
        let client = client.spawn(move || {
            let mut clients: Vec<Client> =
                (0..connections).map(|_| Client::connect(port)).collect();
            clients.iter_mut().for_each(|client| client.ask(&request));
            let mut times = Vec::new();
            let start = Instant::now();
            while start.elapsed() < SPAN {
                for client in &mut clients {
                    times.push(client.hear().as_secs_f64() * 1e6);
                    client.ask(&request);
                }
            }
            let seconds = start.elapsed().as_secs_f64();
            clients.iter_mut().for_each(|client| {
                client.hear();
            });
            (times, seconds, cpu())
        });
        let (times, seconds, after) = client.unwrap().join().unwrap();
        let used = |(name, micros): (&String, &f64)| {
            let used = micros - before.get(name).unwrap_or(&0.0);
            (name.clone(), used / times.len() as f64)
        };
        let cpu = after.iter().map(used).filter(|(_, micros)| *micros >= 0.5).collect();
        Seen { per_second: times.len() as f64 / seconds, times, cpu }
    }
}

/// A connection that is kept. Knows just enough HTTP to cost next to nothing.
struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
    asked: Instant,
}

impl Client {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { stream, buffer: vec![0; 64 * 1024], asked: Instant::now() }
    }

    fn ask(&mut self, request: &[u8]) {
        self.asked = Instant::now();
        self.stream.write_all(request).unwrap();
    }

    /// Reads the answer to its end; how long it took.
    fn hear(&mut self) -> Duration {
        let mut length = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[length..]).unwrap();
            assert!(read > 0, "the connection was closed");
            length += read;
            let seen = &self.buffer[..length];
            let Some(end) = seen.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = std::str::from_utf8(&seen[..end]).unwrap();
            assert!(head.starts_with("HTTP/1.1 200"), "{}", String::from_utf8_lossy(seen));
            let body = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if length == end + 4 + body.unwrap().parse::<usize>().unwrap() {
                return self.asked.elapsed();
            }
        }
    }
}

fn request(body: serde_json::Value) -> Vec<u8> {
    let body = body.to_string();
    let head = "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\nuser-agent: bench\r\n\
                accept: application/json\r\ncontent-type: application/json\r\n";
    format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn catalog() -> Catalog {
    let catalog = Catalog::new(vec![ModelCard {
        name: MODEL.into(),
        aliases: vec![],
        task: ModelTask::Embed,
        created: 0,
        owned_by: "sconce".into(),
    }]);
    let tokenizer = std::fs::read(fixtures::model_file(MODEL, "tokenizer.json")).unwrap();
    let model = catalog.find(MODEL).unwrap();
    model.set_encoder(EncoderCard {
        vocab: 30_522,
        width: WIDTH as u32,
        pooling: "mean",
        normalize: true,
        ..EncoderCard::default()
    });
    model.set_text(ModelText::from_hf(&tokenizer).unwrap(), 256);
    model.set_state(ModelState::Ready);
    catalog
}

fn scheduler() -> (Scheduler, Lanes) {
    let lane = LaneConfig {
        weight: 1.0,
        kind: LaneKind::Encode,
        rows_max: 2048,
        cost: (Micros(100), Micros(1)),
    };
    let config = SchedulerConfig {
        step_target: Micros(25_000),
        quiet_target: Micros(0),
        slots: 1,
        depth: 1,
        kv_pages: 0,
    };
    let trial = Trial { lane: LaneId(0), config: lane.clone(), context: 2048 };
    let lanes = Lanes::new(vec![(trial, true)], Scratch { first: config.kv_pages });
    (Scheduler::new(config, vec![lane]), lanes)
}

/// CPU microseconds of this process's threads so far, by name. Threads of a pool share theirs.
fn cpu() -> BTreeMap<String, f64> {
    let mut used = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file));
        let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else { continue };
        let nanoseconds: f64 = times.split(' ').next().unwrap().parse().unwrap();
        *used.entry(name.trim().to_owned()).or_default() += nanoseconds / 1e3;
    }
    used
}
