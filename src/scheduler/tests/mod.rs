//! Tests of the scheduler as a whole, one mechanism each, and the rig that they share.

mod choices;
mod memory;
mod queue;

use super::step::{BlockCopy, Outcome, Output, SlotId, Step};
use super::{LaneConfig, LaneKind, LaneLoad, Load, Said, Scheduler, SchedulerConfig};
use crate::error::{Error, ErrorKind};
use crate::request::{
    Detail, Encode, Event, Finish, Generate, LaneId, Micros, Request, RequestId, Sampling, Task,
    TenantId, Text, TokenId, Usage, Yield,
};

/// A scheduler whose steps give what the test says.
struct Rig {
    scheduler: Scheduler,
    said: Vec<Said>,
    now: u64,
}

/// A generating lane with one layer and `blocks` guaranteed blocks in groups of one.
fn generating(blocks: u32) -> LaneConfig {
    LaneConfig {
        weight: 1.0,
        kind: LaneKind::Generate {
            context: blocks * 32,
            layers: 1,
            blocks_per_page: 1,
            guaranteed_groups: blocks,
            seats: 8,
        },
        rows_max: 256,
        cost: (Micros(100), Micros(1)),
    }
}

fn encoding(rows_max: u32) -> LaneConfig {
    LaneConfig { weight: 1.0, kind: LaneKind::Encode, rows_max, cost: (Micros(100), Micros(1)) }
}

fn prompt(first: TokenId, length: u32) -> Vec<TokenId> {
    (first..first + length).collect()
}

impl Rig {
    /// One slot of depth 2, a step target that nothing reaches.
    fn new(kv_pages: u32, lanes: Vec<LaneConfig>) -> Self {
        Self::with(1, Micros(1_000_000), kv_pages, lanes)
    }

    fn with(slots: u8, step_target: Micros, kv_pages: u32, lanes: Vec<LaneConfig>) -> Self {
        let quiet_target = Micros(3 * step_target.0);
        let config = SchedulerConfig { step_target, quiet_target, slots, depth: 2, kv_pages };
        Self { scheduler: Scheduler::new(config, lanes), said: Vec::new(), now: 0 }
    }

    fn request(&self, id: u64, lane: u16, task: Task) -> Request {
        Request {
            id: RequestId(id),
            lane: LaneId(lane),
            tenant: TenantId(0),
            arrived: Micros(self.now),
            deadline: None,
            task,
        }
    }

    /// Admits a generation with stop token 0.
    fn generate(&mut self, id: u64, lane: u16, prompt: &[TokenId], max_tokens: u32) {
        let request = self.request(id, lane, generation(prompt, max_tokens));
        self.scheduler.admit(request);
    }

    fn embed(&mut self, id: u64, lane: u16, lengths: &[u32]) {
        let inputs = lengths.iter().map(|&length| Text::single(prompt(1, length))).collect();
        let request =
            self.request(id, lane, Task::Encode(Encode { inputs, yields: Yield::Answer }));
        self.scheduler.admit(request);
    }

    /// The next step of a slot.
    fn plan_in(&mut self, slot: u8) -> Option<Step> {
        self.now += 1;
        let mut step = Step::default();
        let now = Micros(self.now);
        let planned = self.scheduler.plan(now, SlotId(slot), &mut step, &mut self.said);
        self.scheduler.check();
        planned.then_some(step)
    }

    fn plan(&mut self) -> Step {
        self.plan_in(0).expect("there is work")
    }

    /// Commits a step; every sampled token is `token`.
    fn commit(&mut self, step: &Step, token: TokenId) {
        self.now += 1;
        let mut outcome = Outcome { elapsed: step.predicted, ..Outcome::default() };
        for span in &step.spans {
            match span.output {
                Output::Sample { .. } => outcome.tokens.push(token),
                Output::Answer | Output::Hidden => outcome.vectors.push(vec![span.len() as f32]),
                Output::None => {}
            }
        }
        self.scheduler.commit(Micros(self.now), step, &outcome, &mut self.said);
        self.scheduler.check();
    }

    /// There was no memory for a step.
    fn put_back(&mut self, step: &Step) {
        self.scheduler.put_back(step, &mut self.said);
        self.scheduler.check();
    }

    /// Plans and commits a step.
    fn turn(&mut self, token: TokenId) -> Step {
        let step = self.plan();
        self.commit(&step, token);
        step
    }

    /// What was said about a request since the last call, besides that it started.
    fn hear(&mut self, id: u64) -> Vec<Event> {
        let (mine, others) =
            std::mem::take(&mut self.said).into_iter().partition(|said| said.0.0 == id);
        self.said = others;
        let started = |event: &Event| matches!(event, Event::Started { .. });
        mine.into_iter().map(|(_, event)| event).filter(|event| !started(event)).collect()
    }

    /// Runs until a request is over; returns its tokens and end.
    fn finish(&mut self, id: u64) -> (usize, Finish, Usage) {
        let mut tokens = 0;
        for turn in 0..2000 {
            for event in self.hear(id) {
                match event {
                    Event::Token(_) => tokens += 1,
                    Event::Done { finish, usage } => return (tokens, finish, usage),
                    event => panic!("{event:?}"),
                }
            }
            self.turn(1000 + turn);
        }
        panic!("request {id} does not end");
    }

    fn load(&self) -> Load {
        let mut load = Load::default();
        self.scheduler.load(&mut load);
        load
    }

    fn lane(&self, lane: usize) -> LaneLoad {
        self.load().lanes[lane].clone()
    }
}

fn generation(prompt: &[TokenId], max_tokens: u32) -> Task {
    Task::Generate(Generate {
        prompt: prompt.into(),
        max_tokens,
        stop_tokens: [0].into(),
        sampling: Sampling::default(),
        detail: Detail::default(),
    })
}

/// Requests with rows in a step, and how many.
fn rows(step: &Step) -> Vec<(u64, usize)> {
    step.spans.iter().map(|span| (span.request.0, span.len())).collect()
}
