//! What the scheduler costs the device thread: steady decoding of 1,024 rows over 16 lanes, and
//! requests that come and go. Budget: 5 µs a step and 0.2 µs a row.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sconce::request::{
    Detail, Generate, LaneId, Micros, Request, RequestId, Sampling, Task, TenantId,
};
use sconce::scheduler::step::{Outcome, Output, SlotId, Step, StepKind};
use sconce::scheduler::{LaneConfig, LaneKind, Said, Scheduler, SchedulerConfig};

const ROWS: u64 = 1024;
const CONTEXT: u32 = 2048;

/// A scheduler, and an engine's loop without a device.
struct Loop {
    scheduler: Scheduler,
    lanes: u16,
    step: Step,
    outcome: Outcome,
    said: Vec<Said>,
    now: u64,
    next_id: u64,
}

impl Loop {
    fn new(lanes: u16) -> Self {
        let rows = (ROWS / u64::from(lanes)) as u32;
        let lane = LaneConfig {
            weight: 1.0,
            kind: LaneKind::Generate {
                context: CONTEXT,
                layers: 24,
                blocks_per_page: 64,
                guaranteed_groups: rows,
                seats: rows,
            },
            rows_max: 2048,
            cost: (Micros(1000), Micros(5)),
        };
        let config = SchedulerConfig {
            step_target: Micros(8000),
            quiet_target: Micros(8000),
            slots: 1,
            depth: 2,
            kv_pages: 24 * (ROWS as u32 + 64),
        };
        Self {
            scheduler: Scheduler::new(config, vec![lane; usize::from(lanes)]),
            lanes,
            step: Step::default(),
            outcome: Outcome::default(),
            said: Vec::new(),
            now: 0,
            next_id: 0,
        }
    }

    /// All rows decode, each at about `context` positions.
    fn decoding(lanes: u16, context: u32) -> Self {
        let mut looped = Self::new(lanes);
        (0..ROWS).for_each(|_| looped.admit(context - 64, CONTEXT - context));
        let rows = ROWS / u64::from(lanes);
        while looped.turn() != rows || looped.step.kind != StepKind::Decode {}
        // Until every lane has its prompts computed and its cost model settled.
        (0..u64::from(lanes) * 32).for_each(|_| _ = looped.turn());
        looped
    }

    fn admit(&mut self, prompt: u32, max_tokens: u32) {
        let id = self.next_id;
        self.next_id += 1;
        let prompt: Vec<u32> = (0..prompt).map(|at| at * 31 + id as u32).collect();
        self.scheduler.admit(Request {
            id: RequestId(id),
            lane: LaneId((id % u64::from(self.lanes)) as u16),
            tenant: TenantId(0),
            arrived: Micros(self.now),
            deadline: Some(Micros(self.now + 600_000_000)),
            task: Task::Generate(Generate {
                prompt: prompt.into(),
                max_tokens,
                stop_tokens: [1, 2].into(),
                sampling: Sampling::default(),
                detail: Detail::default(),
            }),
        });
    }

    /// Plans and commits one step; returns its rows.
    fn turn(&mut self) -> u64 {
        self.now += 1000;
        self.said.clear();
        let now = Micros(self.now);
        if !self.scheduler.plan(now, SlotId(0), &mut self.step, &mut self.said) {
            return 0;
        }
        self.outcome.clear();
        self.outcome.elapsed = Micros(1000 + 5 * self.step.rows() as u64);
        for span in &self.step.spans {
            if let Output::Sample { position, .. } = span.output {
                self.outcome.tokens.push(position % 50 + 10);
            }
        }
        self.scheduler.commit(now, &self.step, &self.outcome, &mut self.said);
        black_box(&self.said);
        self.step.rows() as u64
    }
}

/// Each iteration is one decode step of one lane's share of 1,024 rows.
fn steady_decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode_step");
    for (lanes, context) in [(16, 256), (16, 1024), (1, 256)] {
        let rows = ROWS / u64::from(lanes);
        group.throughput(Throughput::Elements(rows));
        let name = format!("{rows} rows, 1024 over {lanes} lanes, at {context} positions");
        group.bench_function(name, |bench| {
            bench.iter_custom(|iterations| time_turns(lanes, context, iterations));
        });
    }
    group.finish();
}

/// Time of so many turns, all of them full decode steps.
fn time_turns(lanes: u16, context: u32, turns: u64) -> Duration {
    let mut spent = Duration::ZERO;
    let mut left = turns;
    while left > 0 {
        let mut looped = Loop::decoding(lanes, context);
        let now = left.min(u64::from(lanes) * 512);
        let began = Instant::now();
        let rows: u64 = (0..now).map(|_| looped.turn()).sum();
        spent += began.elapsed();
        assert_eq!(rows, now * ROWS / u64::from(lanes), "every step is full");
        left -= now;
    }
    spent
}

/// Each iteration admits, runs and finishes 64 requests of 16 lanes.
fn come_and_go(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("come_and_go");
    group.throughput(Throughput::Elements(64));
    group.bench_function("admit, prefill, 4 tokens, finish; 64 requests", |bench| {
        let mut looped = Loop::new(16);
        bench.iter(|| {
            (0..64).for_each(|_| looped.admit(48, 4));
            while !looped.scheduler.is_idle() {
                looped.turn();
            }
        });
    });
    group.finish();
}

criterion_group!(benches, steady_decode, come_and_go);
criterion_main!(benches);
