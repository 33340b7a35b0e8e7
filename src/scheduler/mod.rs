//! Decides what runs next: one queue over all models, pages and slots, at step granularity.
//! Pure: no device, no clock, no channel, no tokio; `now` is always given in.

pub mod notes;
pub mod step;

mod blocks;
mod cost_model;
mod encode;
mod generate;
mod generate_commit;
mod lane;
mod pages;
mod policy;
mod seats;
mod sequence;
mod setback;
mod slab;
mod turn;

#[cfg(test)]
mod check;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use crate::error::{Error, ErrorKind};
use crate::request::{Event, LaneId, Micros, Request, RequestId, Task};
use lane::{Lane, Work};
use notes::Notes;
use pages::Pages;
use policy::FairQueue;
use seats::Seats;
use step::{Outcome, SlotId, Step, StepId, StepKind};
use turn::{CommitTurn, PlanTurn};

/// The scheduler's fixed surroundings.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// A step should take no longer than this.
    pub step_target: Micros,
    /// It may take as long as this while no answer has begun: nobody waits for a next token, and
    /// large steps are done faster.
    pub quiet_target: Micros,
    /// Execution slots of the device.
    pub slots: u8,
    /// Uncommitted steps a slot may have.
    pub depth: u8,
    /// Super-pages in the KV region, shared by all lanes.
    pub kv_pages: u32,
}

/// One model's place in the queue.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    /// Share of the device relative to other lanes with work; 1.0 is the default.
    pub weight: f64,
    /// What kind of work.
    pub kind: LaneKind,
    /// Most rows (token positions) in a step: what the workspace was sized for.
    pub rows_max: u32,
    /// First guess of a step's time: fixed part, and part for each row. Learned afterwards.
    pub cost: (Micros, Micros),
}

/// Generating or encoding.
#[derive(Debug, Clone)]
pub enum LaneKind {
    /// Autoregressive, with KV blocks.
    Generate {
        /// Longest sequence, prompt and answer.
        context: u32,
        /// Super-pages in a group: the model's layers.
        layers: u32,
        /// KV blocks that fit one super-page.
        blocks_per_page: u32,
        /// Groups that no other lane can take.
        guaranteed_groups: u32,
        /// Most sequences running at once.
        seats: u32,
    },
    /// Whole inputs, no state.
    Encode,
}

/// What the scheduler holds at one moment; the engine publishes it before steps and after them.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// By lane.
    pub lanes: Vec<LaneLoad>,
    /// Arrival of the oldest waiting request.
    pub oldest: Option<Micros>,
    /// Super-pages lent to lanes, used or cached, of the region's total.
    pub kv_pages_lent: u32,
    /// Share of all KV blocks that running sequences hold, 0..1.
    pub kv_usage: f64,
}

/// One lane's part of [`Load`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LaneLoad {
    /// Requests waiting for the device, preempted ones included.
    pub waiting: u32,
    /// Prompt tokens waiting.
    pub waiting_tokens: u64,
    /// Predicted device time of what waits.
    pub waiting_work: Micros,
    /// Predicted time until the last of them begins if only this lane has work.
    pub start_delay: Micros,
    /// The same for one more prompt token, in microseconds, if there is a seat.
    pub token_delay: f64,
    /// How many more could begin at once.
    pub seats: u32,
    /// Requests with rows on the device.
    pub running: u32,
    /// KV blocks that running sequences hold.
    pub blocks_used: u32,
    /// KV blocks that only the prefix cache holds.
    pub blocks_cached: u32,
    /// Preemptions since start.
    pub preemptions: u64,
}

/// One event for one request.
pub type Said = (RequestId, Event);

/// The device queue.
///
/// A turn is `admit` and `cancel` for what arrived, `plan`, the device's work, `commit` or
/// `abandon`. Whenever a request waits or runs and no step is in flight, `plan` finds work.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    lanes: Vec<Lane>,
    queue: FairQueue,
    pages: Pages,
    seats: Seats,
    notes: Notes,
    /// Requests about which something is still to be said: lane and index in it.
    live: HashMap<RequestId, (usize, u32)>,
    /// Deadlines of live requests, the earliest first; some are of requests already over.
    deadlines: BinaryHeap<Reverse<(Micros, RequestId)>>,
    /// Uncommitted steps by slot, in order of dispatch.
    flights: Vec<VecDeque<Flight>>,
    /// Member lists to reuse.
    spare_members: Vec<Vec<u32>>,
    /// Lanes that had nothing to plan in this turn.
    passed: Vec<bool>,
    last_step: StepId,
}

/// A step that is not committed yet.
#[derive(Debug)]
struct Flight {
    step: StepId,
    lane: usize,
    predicted: Micros,
    /// Index in the lane of each span's request.
    members: Vec<u32>,
}

impl Scheduler {
    /// An empty queue over `lanes`; `LaneId` is the index.
    ///
    /// # Panics
    /// If the lanes' guarantees exceed the pages, or one does not hold its longest sequence.
    pub fn new(config: SchedulerConfig, lanes: Vec<LaneConfig>) -> Self {
        assert!(config.slots > 0 && config.depth > 0, "a device has a slot, a slot runs a step");
        let queue = FairQueue::new(lanes.iter().map(|lane| lane.weight));
        let pages = Pages::new(config.kv_pages, lanes.iter().map(|lane| lane.kind.needs()));
        let seats = Seats::new(lanes.iter().map(|lane| lane.kind.seats()));
        let lane = |(index, lane): (usize, &LaneConfig)| Lane::new(index, lane, &config);
        Self {
            lanes: lanes.iter().enumerate().map(lane).collect(),
            queue,
            pages,
            seats,
            notes: Notes::default(),
            live: HashMap::new(),
            deadlines: BinaryHeap::new(),
            flights: (0..config.slots).map(|_| VecDeque::new()).collect(),
            spare_members: Vec::new(),
            passed: vec![false; lanes.len()],
            last_step: StepId(0),
            config,
        }
    }

    /// Takes a request into its lane's waiting list.
    ///
    /// # Panics
    /// If its id is in use, or it does not fit its lane: admission checks that.
    pub fn admit(&mut self, request: Request) {
        let number = usize::from(request.lane.0);
        let lane = &mut self.lanes[number];
        if !lane.has_work() {
            self.queue.wake(number);
            self.pages.set_active(number, true);
        }
        let task = request.task.clone();
        let index = match (&mut lane.work, task) {
            (Work::Generate(lane), Task::Generate(task)) => lane.admit(&request, task),
            (Work::Encode(lane), Task::Encode(task)) => lane.admit(&request, task),
            (_, task) => panic!("lane {} does not serve {task:?}", request.lane),
        };
        let known = self.live.insert(request.id, (number, index));
        assert!(known.is_none(), "request {} is admitted once", request.id.0);
        if let Some(deadline) = request.deadline {
            self.deadlines.push(Reverse((deadline, request.id)));
            if self.deadlines.len() > 2 * self.live.len() + 64 {
                self.deadlines.retain(|Reverse((_, id))| self.live.contains_key(id));
            }
        }
    }

    /// Forgets a request: nothing more is said about it. In-flight rows are discarded at commit.
    /// A request that is over already, or never was, is none of our business.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some((number, index)) = self.live.remove(&id) {
            self.conclude(number, &mut Vec::new(), |lane, turn| lane.drop_request(index, turn));
        }
    }

    /// Ends every request with `error`: the drain's last act, or a dead device.
    pub fn fail_all(&mut self, error: &Error, said: &mut Vec<Said>) {
        for number in 0..self.lanes.len() {
            self.conclude(number, said, |lane, turn| match &mut lane.work {
                Work::Generate(lane) => lane.fail_all(error, turn),
                Work::Encode(lane) => lane.fail_all(error, turn),
            });
        }
        assert!(self.live.is_empty(), "every live request is in a lane");
    }

    /// Fills `step` with the next work for `slot`; false when there is none now. Requests whose
    /// deadline passed while waiting are failed into `said`.
    ///
    /// # Panics
    /// If the slot has `depth` uncommitted steps already.
    pub fn plan(
        &mut self,
        now: Micros,
        slot: SlotId,
        step: &mut Step,
        said: &mut Vec<Said>,
    ) -> bool {
        let in_flight = self.flights[usize::from(slot.0)].len();
        assert!(in_flight < usize::from(self.config.depth), "slot {} is full", slot.0);
        self.notes.clear();
        step.clear();
        self.expire(now, said);
        self.passed.fill(false);
        while let Some(number) = self.next_lane(slot) {
            if self.plan_lane(number, (now, slot), step, said) {
                return true;
            }
            self.passed[number] = true;
        }
        false
    }

    /// Takes in what a step gave, in dispatch order within a slot.
    pub fn commit(&mut self, now: Micros, step: &Step, outcome: &Outcome, said: &mut Vec<Said>) {
        let flight = self.land(step);
        let lane = &mut self.lanes[flight.lane];
        self.queue.measured(flight.lane, flight.predicted, outcome.elapsed);
        lane.cost.learn(step.kind, step.rows() as u32, outcome.elapsed);
        lane.allowed = (lane.allowed + 1).min(lane.rows_max);
        let result = turn::Result { now, step, outcome };
        let members = &flight.members;
        self.conclude(flight.lane, said, |lane, turn| match &mut lane.work {
            Work::Generate(lane) => lane.commit(result, members, turn),
            Work::Encode(lane) => lane.commit(result, members, turn),
        });
        self.spare_members.push(flight.members);
    }

    /// Takes in that a step failed: its requests end with `error`, the lane goes on. The grants
    /// it carried are announced again with the lane's next plan.
    pub fn abandon(&mut self, step: &Step, error: &Error, said: &mut Vec<Said>) {
        let flight = self.land(step);
        for grant in &step.grants {
            self.pages.grant_again(flight.lane, grant.group);
        }
        let members = &flight.members;
        self.conclude(flight.lane, said, |lane, turn| match &mut lane.work {
            Work::Generate(lane) => lane.abandon(&step.spans, members, error, turn),
            Work::Encode(lane) => lane.abandon(&step.spans, members, error, turn),
        });
        self.spare_members.push(flight.members);
    }

    /// Whether any request is waiting, running or in flight.
    pub fn is_idle(&self) -> bool {
        self.lanes.iter().all(|lane| lane.in_flight == 0 && !lane.has_work())
    }

    /// Uncommitted steps of a slot.
    pub fn in_flight(&self, slot: SlotId) -> usize {
        self.flights[usize::from(slot.0)].len()
    }

    /// What the last `plan`, `commit` or `abandon` has to tell telemetry.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Device time that a step's rows would take in reference steps: the largest ones within the
    /// step target, where a row is cheapest.
    pub fn work(&self, step: &Step) -> Micros {
        let cost = &self.lanes[usize::from(step.lane.0)].cost;
        let rows = step.rows() as f64;
        let decodes = step.spans.iter().filter(|span| span.len() == 1).count() as f64;
        let micros = match step.kind {
            StepKind::Encode => rows * cost.rate(StepKind::Encode),
            StepKind::Prefill => rows * cost.rate(StepKind::Prefill),
            StepKind::Decode => rows * cost.rate(StepKind::Decode),
            StepKind::Mixed => {
                let prompts = (rows - decodes) * cost.rate(StepKind::Prefill);
                prompts + decodes * cost.rate(StepKind::Decode)
            }
        };
        Micros(micros.round() as u64)
    }

    /// What is held now, written into `load` without allocating once it has its size.
    pub fn load(&self, load: &mut Load) {
        load.lanes.resize(self.lanes.len(), LaneLoad::default());
        load.oldest = None;
        for (number, (lane, load_of)) in self.lanes.iter().zip(&mut load.lanes).enumerate() {
            lane.load(self.seats.left(number), load_of);
            load_of.blocks_used = self.pages.blocks(number).held();
            load_of.blocks_cached = self.pages.blocks(number).cached();
            load.oldest = [load.oldest, lane.oldest()].into_iter().flatten().min();
        }
        load.kv_pages_lent = self.pages.lent();
        load.kv_usage = self.pages.usage();
    }

    /// Fails waiting requests whose deadline has passed. One that ever had rows is worth
    /// finishing.
    fn expire(&mut self, now: Micros, said: &mut Vec<Said>) {
        while let Some(&Reverse((deadline, id))) = self.deadlines.peek()
            && deadline <= now
        {
            self.deadlines.pop();
            let Some(&(number, index)) = self.live.get(&id) else { continue };
            if !self.lanes[number].never_started(index) {
                continue;
            }
            let error = Error::new(
                ErrorKind::DeadlineExceeded,
                "the request's deadline passed while it waited for the device",
            );
            self.conclude(number, said, |lane, turn| {
                turn.fail(id, &error);
                lane.drop_request(index, turn);
            });
        }
    }

    /// Of the lanes that may use the slot and were not passed over, the one furthest behind its
    /// share.
    fn next_lane(&self, slot: SlotId) -> Option<usize> {
        let may_run = |&number: &usize| {
            let lane = &self.lanes[number];
            !self.passed[number] && lane.has_work() && (lane.in_flight == 0 || lane.slot == slot)
        };
        let start = |number: usize| self.queue.start(number);
        (0..self.lanes.len())
            .filter(may_run)
            .min_by(|&one, &other| start(one).total_cmp(&start(other)))
    }

    /// Fills `step` with work of one lane; false if it has none that can run now.
    fn plan_lane(
        &mut self,
        number: usize,
        (now, slot): (Micros, SlotId),
        step: &mut Step,
        said: &mut Vec<Said>,
    ) -> bool {
        let may_admit = self.seats.available(number);
        if let Work::Generate(lane) = &mut self.lanes[number].work {
            let blocks = lane.survey(may_admit);
            self.make_room(number, blocks);
        }
        let target = self.target();
        let mut members = self.spare_members.pop().unwrap_or_default();
        members.clear();
        step.lane = LaneId(number as u16);
        let Lane { work, cost, allowed, .. } = &mut self.lanes[number];
        let mut turn = PlanTurn {
            now,
            target,
            allowed: *allowed,
            cost,
            step: &mut *step,
            chunked: false,
            members: &mut members,
            pages: &mut self.pages,
            seats: &mut self.seats,
            notes: &mut self.notes,
            said,
        };
        match work {
            Work::Generate(lane) => lane.plan(&mut turn),
            Work::Encode(lane) => lane.plan(&mut turn),
        }
        if step.spans.is_empty() {
            self.spare_members.push(members);
            return false;
        }
        self.pages.announce(number, &mut step.grants);
        self.last_step.0 += 1;
        step.id = self.last_step;
        step.slot = slot;
        let lane = &mut self.lanes[number];
        step.predicted = lane.cost.predict(step.kind, step.rows() as u32);
        lane.in_flight += 1;
        lane.slot = slot;
        self.queue.dispatched(number, step.predicted);
        let (step, predicted) = (step.id, step.predicted);
        let flight = Flight { step, lane: number, predicted, members };
        self.flights[usize::from(slot.0)].push_back(flight);
        true
    }

    /// How long a step should take at most.
    fn target(&self) -> Micros {
        let SchedulerConfig { step_target, quiet_target, .. } = self.config;
        let speaks = |lane: &Lane| match &lane.work {
            Work::Generate(lane) => lane.speaks(),
            Work::Encode(_) => false,
        };
        if self.lanes.iter().any(speaks) { step_target } else { quiet_target.max(step_target) }
    }

    /// Gets a lane blocks: from what nobody uses, and as far as its guarantee goes by preempting
    /// sequences of lanes above theirs. Some of these may have to land first.
    fn make_room(&mut self, number: usize, blocks: u32) {
        if self.pages.make_room(number, blocks) {
            return;
        }
        let mut took = false;
        while self.pages.lacking(number, blocks) > 0 {
            let victim = self.pages.most_above_guarantee(number);
            let victim = victim.expect("guarantees fit the pool, so some lane is above its own");
            let Work::Generate(lane) = &mut self.lanes[victim].work else {
                unreachable!("an encoding lane has no pages");
            };
            let group = lane.cheapest_group(&self.pages).expect("it has a group in use");
            self.pages.take_away(victim, group);
            lane.preempt_holders(group, &mut self.pages, &mut self.seats);
            took = true;
        }
        if took {
            self.pages.make_room(number, blocks);
        }
    }

    /// Takes a step out of the slot that it ran in.
    fn land(&mut self, step: &Step) -> Flight {
        self.notes.clear();
        let flight = self.flights[usize::from(step.slot.0)].pop_front();
        let flight = flight.expect("a step lands once");
        assert!(flight.step == step.id, "steps of a slot land in order");
        self.lanes[flight.lane].in_flight -= 1;
        flight
    }

    /// Lets a lane take something in, and notes whether it still has work.
    fn conclude(
        &mut self,
        number: usize,
        said: &mut Vec<Said>,
        take_in: impl FnOnce(&mut Lane, &mut CommitTurn),
    ) {
        let mut turn = CommitTurn {
            pages: &mut self.pages,
            seats: &mut self.seats,
            notes: &mut self.notes,
            live: &mut self.live,
            said,
        };
        take_in(&mut self.lanes[number], &mut turn);
        self.pages.set_active(number, self.lanes[number].has_work());
    }
}

/// Names a lane in a log line.
impl std::fmt::Display for LaneId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
