//! What the scheduler costs the device thread: steady decoding of 1,024 rows over 16 lanes, and
//! requests that come and go. Budget: 5 µs a step and 0.2 µs a row.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sconce::request::{Generate, LaneId, Micros, Request, RequestId, Sampling, Task, TenantId};
use sconce::scheduler::step::{Outcome, Output, SlotId, Step};
use sconce::scheduler::{LaneConfig, LaneKind, Said, Scheduler, SchedulerConfig};

const LANES: u16 = 16;
const ROWS: u64 = 1024;
const CONTEXT: u32 = 2048;

/// A scheduler, and an engine's loop without a device.
struct Loop {
    scheduler: Scheduler,
    step: Step,
    outcome: Outcome,
    said: Vec<Said>,
    now: u64,
    next_id: u64,
}

impl Loop {
    fn new() -> Self {
        let lane = LaneConfig {
            weight: 1.0,
            kind: LaneKind::Generate {
                context: CONTEXT,
                layers: 24,
                blocks_per_page: 64,
                guaranteed_groups: 70,
                seats: (ROWS / u64::from(LANES)) as u32,
            },
            rows_max: 2048,
            cost: (Micros(1000), Micros(5)),
        };
        let config = SchedulerConfig {
            step_target: Micros(8000),
            slots: 1,
            depth: 2,
            kv_pages: 24 * 80 * u32::from(LANES),
        };
        Self {
            scheduler: Scheduler::new(config, vec![lane; usize::from(LANES)]),
            step: Step::default(),
            outcome: Outcome::default(),
            said: Vec::new(),
            now: 0,
            next_id: 0,
        }
    }

    fn admit(&mut self, prompt: u32, max_tokens: u32) {
        let id = self.next_id;
        self.next_id += 1;
        let prompt: Vec<u32> = (0..prompt).map(|at| at * 31 + id as u32).collect();
        self.scheduler.admit(Request {
            id: RequestId(id),
            lane: LaneId((id % u64::from(LANES)) as u16),
            tenant: TenantId(0),
            arrived: Micros(self.now),
            deadline: Some(Micros(self.now + 600_000_000)),
            task: Task::Generate(Generate {
                prompt: prompt.into(),
                max_tokens,
                stop_tokens: [1, 2].into(),
                sampling: Sampling::default(),
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

/// Each iteration is one decode step of 64 rows, of 16 lanes in turn: 64 × 0.2 + 5 µs allowed.
fn steady_decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scheduler");
    for context in [256, 1024] {
        let rows = ROWS / u64::from(LANES);
        group.throughput(Throughput::Elements(rows));
        group.bench_function(
            format!("decode step, 1024 rows over 16 lanes, at {context}"),
            |bench| {
                let mut looped = Loop::new();
                let start = |looped: &mut Loop| {
                    *looped = Loop::new();
                    (0..ROWS).for_each(|_| looped.admit(context - 64, CONTEXT - context));
                    while looped.turn() != rows {}
                    (0..u64::from(LANES) * 4).for_each(|_| _ = looped.turn());
                };
                start(&mut looped);
                bench.iter(|| {
                    if looped.turn() != rows {
                        start(&mut looped);
                    }
                });
            },
        );
    }
    group.finish();
}

/// Each iteration admits, runs and finishes 64 requests of 16 lanes.
fn come_and_go(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scheduler");
    group.throughput(Throughput::Elements(64));
    group.bench_function("admit, prefill, 4 tokens, finish; 64 requests", |bench| {
        let mut looped = Loop::new();
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
