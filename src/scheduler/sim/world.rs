//! One simulated world: lanes, arrivals, a clock, and the loop that an engine would run.

use super::client::{Client, End};
use super::device::{Device, VOCABULARY};
use super::rng::Rng;
use crate::error::{Error, ErrorKind};
use crate::request::{
    Adjustment, Detail, Encode, Finish, Generate, LaneId, Micros, Request, RequestId, Sampling,
    Task, TenantId, Text, TokenId, Yield,
};
use crate::scheduler::step::{BLOCK_TOKENS, Outcome, SlotId, Step, StepKind};
use crate::scheduler::{LaneConfig, LaneKind, Load, Said, Scheduler, SchedulerConfig};
use std::collections::VecDeque;
use std::sync::Arc;

/// More steps than any world needs: beyond it, the world goes in circles.
const STEPS_MAX: u64 = 60_000;

/// What happened, to know that the simulation reaches every corner.
#[derive(Debug, Default)]
pub(super) struct Fate {
    steps: u64,
    mixed: u64,
    finished: u64,
    stopped: u64,
    cached_tokens: u64,
    recomputed: u64,
    overrun: u64,
    dropped: u64,
    late: u64,
    cancelled: u64,
    failed: u64,
    preemptions: u64,
    reclaimed: u64,
    put_back: u64,
}

/// A scheduler, a device and their clients.
pub(super) struct World {
    rng: Rng,
    now: Micros,
    config: SchedulerConfig,
    lanes: Vec<LaneConfig>,
    /// True cost of each lane's step: fixed, each row.
    costs: Vec<(u64, u64)>,
    scheduler: Scheduler,
    device: Device,
    clients: Vec<Client>,
    /// Arrivals to come, the next one last.
    arrivals: Vec<Request>,
    /// Steps in flight by slot, with their end.
    slots: Vec<VecDeque<(Step, Micros)>>,
    spare: Vec<Step>,
    said: Vec<Said>,
    outcome: Outcome,
    /// Texts that prompts begin with, by lane.
    texts: Vec<Vec<TokenId>>,
    drain_at: Option<Micros>,
    fate: Fate,
}

impl World {
    /// A random world.
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let lanes: Vec<LaneConfig> = (0..rng.within(1, 6)).map(|_| random_lane(&mut rng)).collect();
        let slots = rng.within(1, 2) as u8;
        let depth = rng.within(1, 2) as u8;
        let guaranteed: u32 = lanes.iter().map(guaranteed_pages).sum();
        let spare = rng.within(0, u64::from(guaranteed) + 4) as u32;
        let config = SchedulerConfig {
            step_target: Micros(rng.within(500, 20_000)),
            quiet_target: Micros(rng.within(500, 60_000)),
            slots,
            depth,
            kv_pages: guaranteed + if rng.once_in(3) { 0 } else { spare },
        };
        let mut world = Self::with(rng, config, lanes);
        let requests = world.rng.within(5, 60);
        let mut at = 0;
        let mut arrivals: Vec<Request> = Vec::new();
        while (arrivals.len() as u64) < requests {
            // Bursts and lulls.
            at += if world.rng.once_in(3) { world.rng.within(0, 60_000) } else { 0 };
            let lane = world.rng.within(0, world.lanes.len() as u64 - 1) as usize;
            let id = RequestId(arrivals.len() as u64);
            let request = world.random_request(id, lane, Micros(at));
            let choices = if world.rng.once_in(4) { world.rng.within(1, 5) } else { 1 };
            arrivals.extend((0..choices).filter_map(|choice| choice_of(&request, choice)));
        }
        arrivals.reverse();
        world.arrivals = arrivals;
        if world.rng.once_in(8) {
            world.drain_at = Some(Micros(world.rng.within(0, at + 50_000)));
        }
        world
    }

    /// Two lanes with more work than they will finish.
    pub(super) fn backlogged(rng: &mut Rng, depth: u8, weights: [f64; 2]) -> Self {
        let mut lanes: Vec<LaneConfig> = (0..2).map(|_| random_lane(rng)).collect();
        lanes.iter_mut().zip(weights).for_each(|(lane, weight)| lane.weight = weight);
        let kv_pages = lanes.iter().map(guaranteed_pages).sum();
        let config = SchedulerConfig {
            step_target: Micros(8000),
            quiet_target: Micros(25_000),
            slots: 1,
            depth,
            kv_pages,
        };
        let mut world = Self::with(rng.clone(), config, lanes);
        for id in 0..1200 {
            let mut request = world.random_request(RequestId(id), id as usize % 2, Micros(0));
            request.deadline = None;
            world.admit(request);
        }
        world
    }

    fn with(rng: Rng, config: SchedulerConfig, lanes: Vec<LaneConfig>) -> Self {
        let mut rng = rng;
        let costs = lanes.iter().map(|_| (rng.within(50, 8000), rng.within(1, 200))).collect();
        let text = |_| (0..400).map(|_| token(&mut rng)).collect();
        let texts = lanes.iter().map(text).collect();
        Self {
            now: Micros(0),
            costs,
            scheduler: Scheduler::new(config.clone(), lanes.clone()),
            device: Device::new(config.kv_pages, 4),
            clients: Vec::new(),
            arrivals: Vec::new(),
            slots: (0..config.slots).map(|_| VecDeque::new()).collect(),
            spare: Vec::new(),
            said: Vec::new(),
            outcome: Outcome::default(),
            texts,
            drain_at: None,
            fate: Fate::default(),
            config,
            lanes,
            rng,
        }
    }

    /// Runs until nothing is left, checking all the way.
    pub(super) fn run(mut self) -> Fate {
        loop {
            assert!(self.fate.steps < STEPS_MAX, "the world goes in circles");
            self.arrive();
            self.interfere();
            self.fill_slots();
            self.scheduler.check();
            if self.slots.iter().any(|slot| !slot.is_empty()) {
                self.finish_next();
                self.scheduler.check();
                continue;
            }
            assert!(self.scheduler.is_idle(), "work waits, nothing is in flight, no plan");
            match self.arrivals.last() {
                Some(next) => self.now = self.now.max(next.arrived),
                None => break,
            }
        }
        self.settle()
    }

    /// Runs `steps` steps and returns each lane's device time after each of them while both have
    /// work, and the longest step.
    pub(super) fn run_backlogged(mut self, steps: u64) -> (Vec<[f64; 2]>, f64) {
        let (mut used, mut longest) = ([0.0; 2], 0f64);
        let mut history = Vec::new();
        let mut load = Load::default();
        while self.fate.steps < steps {
            self.fill_slots();
            let (lane, elapsed) = self.finish_next();
            used[usize::from(lane.0)] += elapsed.0 as f64;
            longest = longest.max(elapsed.0 as f64);
            self.scheduler.load(&mut load);
            if load.lanes.iter().any(|lane| lane.waiting == 0) {
                break;
            }
            history.push(used);
        }
        assert!(history.len() > 50, "the lanes ran dry after {} steps", history.len());
        (history, longest)
    }

    fn arrive(&mut self) {
        while self.arrivals.last().is_some_and(|next| next.arrived <= self.now) {
            let request = self.arrivals.pop().expect("there is one");
            self.admit(request);
        }
    }

    fn admit(&mut self, request: Request) {
        let layers = match self.lanes[usize::from(request.lane.0)].kind {
            LaneKind::Generate { layers, .. } => layers,
            LaneKind::Encode => 0,
        };
        self.device.introduce(request.id, request.tenant);
        self.clients.push(Client::new(request.clone(), layers));
        self.scheduler.admit(request);
    }

    /// Clients leave, and the server drains.
    fn interfere(&mut self) {
        if self.rng.once_in(25) && !self.clients.is_empty() {
            let last = self.clients.len() as u64 - 1;
            let client = &mut self.clients[self.rng.within(0, last) as usize];
            self.fate.cancelled += u64::from(client.is_open());
            client.cancelled |= client.is_open();
            self.scheduler.cancel(client.request.id);
        }
        if self.drain_at.is_some_and(|at| at <= self.now) {
            self.drain_at = None;
            self.scheduler.fail_all(&Error::new(ErrorKind::Cut, "drained"), &mut self.said);
            self.deliver();
            assert!(!self.clients.iter().any(Client::is_open), "a drain ends everything");
        }
    }

    fn fill_slots(&mut self) {
        for number in 0..self.slots.len() {
            while self.slots[number].len() < usize::from(self.config.depth) {
                let mut step = self.spare.pop().unwrap_or_default();
                let before = self.scheduler.loans();
                let slot = SlotId(number as u8);
                let planned = self.scheduler.plan(self.now, slot, &mut step, &mut self.said);
                self.deliver();
                if !planned {
                    self.scheduler.check_guarantees();
                    self.spare.push(step);
                    break;
                }
                self.check_loans(&before, step.lane);
                self.check_step(&step);
                self.device.dispatch(&step);
                let began = self.slots[number].back().map_or(self.now, |(_, end)| *end);
                let end = began.max(self.now).plus(self.duration(&step));
                self.slots[number].push_back((step, end));
            }
        }
    }

    /// No lane loses a group that it is guaranteed while it has work.
    fn check_loans(&mut self, before: &[(u32, u32, bool)], planned: LaneId) {
        for (lane, (before, after)) in before.iter().zip(self.scheduler.loans()).enumerate() {
            let (had, guaranteed, was_active) = *before;
            // Its last request may have passed its deadline in this very plan.
            let active = was_active && after.2;
            if after.0 < had && lane != usize::from(planned.0) {
                self.fate.reclaimed += 1;
                let kept = after.0 >= guaranteed || !active;
                assert!(kept, "lane {lane} kept {} of {guaranteed} groups", after.0);
            }
        }
    }

    fn check_step(&mut self, step: &Step) {
        let lane = &self.lanes[usize::from(step.lane.0)];
        assert!(step.rows() > 0 && step.rows() <= lane.rows_max as usize);
        let mut next = 0;
        for span in &step.spans {
            assert!(span.rows.start == next && !span.is_empty(), "rows are packed");
            next = span.rows.end;
            let covered = span.blocks.len() * BLOCK_TOKENS;
            let positions = span.start as usize + span.len();
            let needs_blocks = step.kind != StepKind::Encode;
            assert!(!needs_blocks || (covered >= positions && covered < positions + BLOCK_TOKENS));
        }
        assert_eq!(next as usize, step.rows());
        assert!(step.predicted.0 > 0 && self.scheduler.work(step).0 < 1 << 40);
        self.fate.steps += 1;
        self.fate.mixed += u64::from(step.kind == StepKind::Mixed);
    }

    /// The step that ends first ends.
    fn finish_next(&mut self) -> (LaneId, Micros) {
        let ends = |slot: &VecDeque<(Step, Micros)>| slot.front().map(|(_, end)| *end);
        let slots = 0..self.slots.len();
        let first = slots.filter_map(|slot| Some((ends(&self.slots[slot])?, slot))).min();
        let (end, slot) = first.expect("a step is in flight");
        let (step, _) = self.slots[slot].pop_front().expect("a step is in flight");
        let elapsed = end.since(self.now).max(Micros(1));
        self.now = end;
        self.outcome.clear();
        if self.rng.once_in(150) && !self.clients.is_empty() && self.drain_at.is_none() {
            let took_grants = self.config.depth > 1 || self.rng.once_in(2);
            self.device.fail(&step, took_grants);
            let error = Error::new(ErrorKind::StepFailed, "the step failed");
            self.scheduler.abandon(&step, &error, &mut self.said);
        } else if self.rng.once_in(60) {
            // No memory for it: everybody gets the same in the end.
            self.device.fail(&step, self.config.depth > 1 || self.rng.once_in(2));
            self.scheduler.put_back(&step, &mut self.said);
            self.fate.put_back += 1;
        } else {
            self.device.run(&step, &mut self.outcome);
            self.outcome.elapsed = elapsed;
            self.scheduler.commit(self.now, &step, &self.outcome, &mut self.said);
        }
        let notes = self.scheduler.notes();
        self.fate.recomputed += u64::from(notes.recomputed_rows);
        self.fate.overrun += u64::from(notes.overrun_rows);
        self.fate.dropped += u64::from(notes.cancelled_rows);
        self.deliver();
        let lane = step.lane;
        self.spare.push(step);
        (lane, elapsed)
    }

    fn deliver(&mut self) {
        for (id, event) in self.said.drain(..) {
            self.clients[id.0 as usize].hear(self.now, event);
        }
    }

    /// Everything was answered, nothing is held.
    fn settle(mut self) -> Fate {
        for client in &self.clients {
            match client.end {
                Some(End::Done(finish, usage)) => {
                    self.fate.finished += 1;
                    self.fate.stopped += u64::from(finish == Finish::Stop);
                    self.fate.cached_tokens += u64::from(usage.cached_tokens);
                }
                Some(End::Failed(ErrorKind::DeadlineExceeded)) => self.fate.late += 1,
                Some(End::Failed(_)) => self.fate.failed += 1,
                None => assert!(client.cancelled, "request {:?} was dropped", client.request.id),
            }
        }
        let mut load = Load::default();
        self.scheduler.load(&mut load);
        for lane in &load.lanes {
            self.fate.preemptions += lane.preemptions;
            let held = (lane.waiting, lane.running, lane.waiting_tokens, lane.blocks_used);
            assert_eq!(held, (0, 0, 0, 0), "an idle scheduler holds nothing");
        }
        assert!(load.oldest.is_none() && load.kv_usage == 0.0);
        self.fate
    }

    fn duration(&mut self, step: &Step) -> Micros {
        let (fixed, row) = self.costs[usize::from(step.lane.0)];
        let micros = (fixed + row * step.rows() as u64) * self.rng.within(70, 130) / 100;
        Micros(if self.rng.once_in(200) { micros * 8 } else { micros })
    }

    fn random_request(&mut self, id: RequestId, lane: usize, arrived: Micros) -> Request {
        let task = match self.lanes[lane].kind {
            LaneKind::Generate { context, .. } => self.random_generation(lane, context),
            LaneKind::Encode => self.random_embedding(lane),
        };
        let deadline =
            self.rng.once_in(6).then(|| arrived.plus(Micros(self.rng.within(0, 300_000))));
        let tenant = TenantId(self.rng.within(0, 2) as u32);
        Request { id, lane: LaneId(lane as u16), tenant, arrived, deadline, task }
    }

    fn random_generation(&mut self, lane: usize, context: u32) -> Task {
        let rng = &mut self.rng;
        let max_tokens = rng.within(1, u64::from(context) / 2) as u32;
        let length = rng.within(1, u64::from(context - max_tokens)) as usize;
        let shared = rng.within(0, length as u64) as usize;
        let mut prompt = self.texts[lane][..shared].to_vec();
        prompt.extend((shared..length).map(|_| token(rng)));
        let stop: &[TokenId] = if rng.once_in(3) { &[] } else { &[7] };
        let sampling = Sampling { seed: rng.next(), ..Sampling::default() };
        let penalty = Adjustment { frequency: 0.5, ..Adjustment::default() };
        let detail = Detail {
            adjustment: rng.once_in(4).then(|| Arc::new(penalty)),
            logprobs: rng.once_in(4).then_some(0),
        };
        Task::Generate(Generate {
            prompt: prompt.into(),
            max_tokens,
            stop_tokens: stop.into(),
            sampling,
            detail,
        })
    }

    fn random_embedding(&mut self, lane: usize) -> Task {
        let longest = u64::from(self.lanes[lane].rows_max);
        let rng = &mut self.rng;
        let count = rng.within(1, 6);
        let yields = if rng.once_in(4) { Yield::Tokens } else { Yield::Answer };
        let mut text = || {
            let length = rng.within(1, longest);
            let second = rng.once_in(3).then(|| rng.within(0, length - 1) as u32);
            Text { tokens: (0..length).map(|_| token(rng)).collect(), second }
        };
        let inputs = (0..count).map(|_| text()).collect();
        Task::Encode(Encode { inputs, yields })
    }
}

impl Fate {
    pub(super) fn add(&mut self, other: &Fate) {
        self.steps += other.steps;
        self.mixed += other.mixed;
        self.finished += other.finished;
        self.stopped += other.stopped;
        self.cached_tokens += other.cached_tokens;
        self.recomputed += other.recomputed;
        self.overrun += other.overrun;
        self.dropped += other.dropped;
        self.late += other.late;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.preemptions += other.preemptions;
        self.reclaimed += other.reclaimed;
        self.put_back += other.put_back;
    }

    pub(super) fn assert_everything_happened(&self) {
        let all = [
            self.mixed,
            self.finished,
            self.stopped,
            self.cached_tokens,
            self.recomputed,
            self.overrun,
            self.dropped,
            self.late,
            self.cancelled,
            self.failed,
            self.preemptions,
            self.reclaimed,
            self.put_back,
        ];
        assert!(all.iter().all(|&count| count > 0), "{self:?}");
    }
}

/// Another choice of the same prompt; none for an embedding, which has but one answer.
fn choice_of(request: &Request, choice: u64) -> Option<Request> {
    let mut request = request.clone();
    request.id.0 += choice;
    match &mut request.task {
        Task::Generate(generate) => generate.sampling.choice = choice as u32,
        Task::Encode(_) if choice > 0 => return None,
        Task::Encode(_) => {}
    }
    Some(request)
}

fn random_lane(rng: &mut Rng) -> LaneConfig {
    let kind = if rng.once_in(4) {
        LaneKind::Encode
    } else {
        let context = rng.within(8, 200) as u32;
        let blocks_per_page = rng.within(1, 4) as u32;
        let longest = context.div_ceil(BLOCK_TOKENS as u32).div_ceil(blocks_per_page);
        LaneKind::Generate {
            context,
            layers: rng.within(1, 3) as u32,
            blocks_per_page,
            guaranteed_groups: longest + rng.within(0, 2) as u32,
            seats: rng.within(1, 10) as u32,
        }
    };
    LaneConfig {
        weight: rng.within(1, 4) as f64,
        kind,
        rows_max: rng.within(1, 160) as u32,
        cost: (Micros(rng.within(0, 10_000)), Micros(rng.within(0, 300))),
    }
}

fn guaranteed_pages(lane: &LaneConfig) -> u32 {
    match lane.kind {
        LaneKind::Generate { layers, guaranteed_groups, .. } => layers * guaranteed_groups,
        LaneKind::Encode => 0,
    }
}

fn token(rng: &mut Rng) -> TokenId {
    rng.within(0, VOCABULARY - 1) as TokenId
}
