//! The loop over a fake device: what requests are told when all goes well. `tests/failing.rs` has
//! what they are told when it does not.

mod failing;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use super::fake::{FakeDevice, FakeRunner};
use super::faults::{FaultyRunner, Script};
use super::lanes::Lanes;
use super::warmup::{Scratch, Trial};
use super::{Ending, Engine, Install, Links, Machine, fan_out};
use crate::catalog::{Catalog, ModelCard};
use crate::error::ErrorKind;
use crate::lifecycle::Phase;
use crate::lifecycle::watchdog::Pulse;
use crate::model::ModelTask;
use crate::request::{
    Detail, Encode, Event, Events, Finish, Generate, LaneId, Micros, Request, RequestId, Sampling,
    Sink, Submission, Task, TenantId, Text, Yield,
};
use crate::scheduler::{LaneConfig, LaneKind, LaneLoad, Scheduler, SchedulerConfig};
use crate::telemetry::{Setup, Telemetry};

/// An engine on its thread, with both ends of its links.
struct Bench {
    runtime: Runtime,
    inbox: mpsc::Sender<Submission>,
    phase: watch::Sender<Phase>,
    telemetry: Arc<Telemetry>,
    catalog: Arc<Catalog>,
    installs: mpsc::UnboundedSender<Install>,
    engine: Option<std::thread::JoinHandle<Ending>>,
    /// Who asks.
    tenant: TenantId,
    next: u64,
}

const GENERATE: LaneId = LaneId(0);
const EMBED: LaneId = LaneId(1);

impl Bench {
    /// Two lanes, both with a model, over a device that does its work.
    fn new(device: FakeDevice) -> Self {
        Self::over(device, Script::Steps(vec![]), [true, true])
    }

    /// Lanes with `true` have a model from the start.
    fn over(device: FakeDevice, script: Script, loaded: [bool; 2]) -> Self {
        Self::deep(device, script, loaded, 1)
    }

    /// With up to `depth` steps on the device.
    fn deep(device: FakeDevice, script: Script, loaded: [bool; 2], depth: u8) -> Self {
        let cost = (Micros(100), Micros(10));
        let lane = |kind| LaneConfig { weight: 1.0, kind, rows_max: 64, cost };
        let generate = LaneKind::Generate {
            context: 256,
            layers: 2,
            blocks_per_page: 4,
            guaranteed_groups: 2,
            seats: 8,
        };
        let config = SchedulerConfig {
            step_target: Micros(10_000),
            quiet_target: Micros(0),
            slots: 1,
            depth,
            kv_pages: 16,
        };
        let lanes = vec![lane(generate), lane(LaneKind::Encode)];
        let trial = |(number, (config, loaded)): (usize, (&LaneConfig, bool))| {
            let lane = LaneId(number as u16);
            (Trial { lane, config: config.clone(), context: 64 }, loaded)
        };
        let tried = lanes.iter().zip(loaded).enumerate().map(trial).collect();
        let lanes_of_machine = Lanes::new(tried, Scratch { first: config.kv_pages });
        let scheduler = Scheduler::new(config, lanes);
        let card = |(name, task): (&str, ModelTask)| ModelCard {
            name: name.into(),
            aliases: vec![],
            task,
            created: 0,
            owned_by: "tests".into(),
        };
        let cards = [("chat", ModelTask::Generate), ("embed", ModelTask::Embed)].map(card);
        let catalog = Arc::new(Catalog::new(cards.into()));
        let telemetry = Telemetry::new(Setup {
            models: vec![("chat".into(), ModelTask::Generate), ("embed".into(), ModelTask::Embed)],
            ..Setup::default()
        });
        let runtime = Runtime::new().unwrap();
        let (inbox, receiver) = mpsc::channel(64);
        let (installer, installs) = mpsc::unbounded_channel();
        let (deliveries, delivered) = mpsc::unbounded_channel();
        let (phase, watched) = watch::channel(Phase::Ready);
        runtime.spawn(fan_out(delivered));
        let links = Links {
            inbox: receiver,
            installs,
            deliveries,
            phase: watched,
            telemetry: telemetry.clone(),
            catalog: catalog.clone(),
            pulse: Arc::new(Pulse::default()),
        };
        let handle = runtime.handle().clone();
        let engine = std::thread::spawn(move || {
            let _entered = handle.enter();
            let runner = Box::new(FaultyRunner::new(Box::new(FakeRunner::new(device)), script));
            let machine = Machine { runner, lanes: lanes_of_machine, slots: (1, depth) };
            Engine::new(scheduler, machine, links).run()
        });
        Self {
            runtime,
            inbox,
            phase,
            telemetry,
            catalog,
            installs: installer,
            engine: Some(engine),
            tenant: TenantId(0),
            next: 0,
        }
    }

    fn ask(&mut self, lane: LaneId, task: Task) -> Events {
        self.next += 1;
        let (sink, events) = Sink::for_task(&task);
        let request = Request {
            id: RequestId(self.next),
            lane,
            tenant: self.tenant,
            arrived: self.telemetry.now(),
            deadline: None,
            task,
        };
        self.telemetry.submitted(lane, 1);
        self.inbox.try_send(Submission { request, sink }).unwrap();
        events
    }

    fn generate(&mut self, max_tokens: u32) -> Events {
        let task = Task::Generate(Generate {
            prompt: vec![1, 2, 3].into(),
            max_tokens,
            stop_tokens: vec![9].into(),
            sampling: Sampling::default(),
            detail: Detail::default(),
        });
        self.ask(GENERATE, task)
    }

    /// Everything that is said until the end.
    fn hear(&self, mut events: Events) -> Vec<Event> {
        self.runtime.block_on(async move {
            let mut heard = Vec::new();
            let limit = Duration::from_secs(20);
            while let Some(event) = tokio::time::timeout(limit, events.recv()).await.unwrap() {
                heard.push(event);
            }
            heard
        })
    }

    fn end(&mut self) -> Ending {
        self.engine.take().unwrap().join().unwrap()
    }
}

/// A device that says 5, 6, 7, 8, 5, 6, ...
fn device() -> FakeDevice {
    FakeDevice { vocabulary: vec![5, 6, 7, 8], width: 4, ..FakeDevice::default() }
}

fn tokens(events: &[Event]) -> Vec<u32> {
    let token = |event: &Event| match event {
        Event::Token(token) => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

fn failure(events: &[Event]) -> Option<ErrorKind> {
    match events.last() {
        Some(Event::Failed(error)) => Some(error.kind()),
        _ => None,
    }
}

#[test]
fn an_answer_comes_token_by_token_and_ends_once() {
    let mut bench = Bench::new(device());
    let events = bench.generate(4);
    let heard = bench.hear(events);
    assert_eq!(tokens(&heard), [8, 5, 6, 7], "positions 3 to 6");
    let Some(Event::Done { finish, usage }) = heard.last() else { panic!("{heard:?}") };
    assert_eq!(*finish, Finish::Length);
    assert_eq!((usage.prompt_tokens, usage.generated_tokens), (3, 4));
    assert_eq!(heard.iter().filter(|event| event.is_terminal()).count(), 1);
}

#[test]
fn a_stop_token_ends_an_answer_unseen() {
    let mut bench = Bench::new(FakeDevice { vocabulary: vec![5, 6, 7, 8, 9], ..device() });
    let events = bench.generate(100);
    let heard = bench.hear(events);
    assert_eq!(tokens(&heard), [8]);
    assert!(matches!(heard.last(), Some(Event::Done { finish: Finish::Stop, .. })));
}

#[test]
fn vectors_come_for_every_input() {
    let mut bench = Bench::new(device());
    let inputs = (1..=10).map(|len| Text::single(vec![7; len])).collect();
    let events = bench.ask(EMBED, Task::Encode(Encode { inputs, yields: Yield::Answer }));
    let heard = bench.hear(events);
    let mut seen: Vec<u32> = heard
        .iter()
        .filter_map(|event| match event {
            Event::Vector { index, values } => {
                assert_eq!(values.len(), 4);
                Some(*index)
            }
            _ => None,
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..10).collect::<Vec<u32>>());
    assert!(matches!(heard.last(), Some(Event::Done { finish: Finish::Complete, .. })));
}

#[test]
fn closing_cuts_what_runs_and_says_so() {
    let step = Duration::from_millis(5);
    let mut bench = Bench::new(FakeDevice { step, ..device() });
    let running: Vec<Events> = (0..12).map(|_| bench.generate(200)).collect();
    std::thread::sleep(Duration::from_millis(60));
    bench.phase.send(Phase::Closing).unwrap();
    assert_eq!(bench.end(), Ending::Stopped);
    for events in running {
        let heard = bench.hear(events);
        assert_eq!(failure(&heard), Some(ErrorKind::Cut));
    }
    let load = bench.telemetry.snapshot().load;
    assert_eq!(load.lanes.len(), 2);
    assert!(load.lanes.iter().all(|lane| *lane == LaneLoad::default()), "nobody is left");
    assert!(bench.telemetry.render().contains("sconce_model_requests_running{model=\"chat\"} 0\n"));
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let step = Duration::from_millis(2);
    let mut bench = Bench::new(FakeDevice { step, ..device() });
    let mut gone: Vec<Events> = (0..8).map(|_| bench.generate(200)).collect();
    bench.runtime.block_on(gone[0].recv()).unwrap();
    drop(gone);
    let started = std::time::Instant::now();
    let events = bench.generate(4);
    assert_eq!(tokens(&bench.hear(events)).len(), 4);
    assert!(started.elapsed() < Duration::from_millis(300), "200 tokens would take longer");
    // The last event comes before the engine has told its load.
    let mut left = u32::MAX;
    while left > 0 && started.elapsed() < Duration::from_secs(10) {
        let load = bench.telemetry.snapshot().load;
        left = load.lanes.iter().map(|lane| lane.running + lane.waiting).sum();
    }
    assert_eq!(left, 0);
}

#[test]
fn requests_are_seen_while_the_step_that_takes_them_in_runs() {
    let step = Duration::from_millis(400);
    let mut bench = Bench::new(FakeDevice { step, ..device() });
    // More tokens than steps here, so that none is done.
    let asked: Vec<Events> = (0..3).map(|_| bench.generate(100)).collect();
    let held = || {
        let snapshot = bench.telemetry.snapshot();
        let lanes = snapshot.load.lanes.iter();
        (snapshot.inbox, lanes.map(|lane| lane.running + lane.waiting).sum::<u32>())
    };
    let started = std::time::Instant::now();
    // The first is taken in alone, or with others.
    while bench.inbox.capacity() < bench.inbox.max_capacity() {
        assert!(started.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(held(), (0, 3), "{:?}", started.elapsed());
    drop(asked);
}

#[test]
fn device_time_is_charged_to_who_asks() {
    // The third token ends the answer, when the step after it is on the device.
    let (step, vocabulary) = (Duration::from_millis(2), vec![9, 6, 7, 5, 6]);
    let device = FakeDevice { step, vocabulary, ..device() };
    let mut bench = Bench::deep(device, Script::Steps(vec![]), [true, true], 2);
    bench.tenant = bench.telemetry.tenant("acme").unwrap();
    let events = bench.generate(4);
    assert_eq!(tokens(&bench.hear(events)), [5, 6]);
    bench.phase.send(Phase::Closing).unwrap();
    bench.end();
    let page = bench.telemetry.render();
    let seconds = |tenant: &str| -> f64 {
        let name = "sconce_tenant_device_seconds_total";
        let series = format!("{name}{{tenant=\"{tenant}\",model=\"chat\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&series));
        line.unwrap_or_else(|| panic!("no {series}")).parse().unwrap()
    };
    assert!(seconds("acme") >= 0.006, "{}", seconds("acme"));
    assert_eq!(seconds("anonymous"), 0.0);
}
