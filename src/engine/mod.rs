//! The device thread: admit, plan, run, commit; block on the inbox when there is nothing to plan.
//! Knows no HTTP and no text: requests come in as token ids, events go out by the batch.

pub mod board;
pub mod budget;
pub mod fake;
pub mod faults;
pub mod gpu_runner;
pub mod lanes;
pub mod later;
pub mod model_runner;
pub mod residency;
pub mod runner;
pub mod start;
mod texts;
pub mod warmup;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::catalog::Catalog;
use crate::engine::lanes::Lanes;
use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::error::{Error, ErrorKind};
use crate::lifecycle::Phase;
use crate::lifecycle::last_words::Reason;
use crate::lifecycle::watchdog::Pulse;
use crate::request::{Event, LaneId, Micros, Request, RequestId, Sink, Submission, TenantId};
use crate::scheduler::step::{Outcome, SlotId, Step};
use crate::scheduler::{LaneLoad, Load, Said, Scheduler};
use crate::telemetry::{StepReport, Telemetry};

/// One step's events, each with the way to its request.
pub type Delivery = Vec<(Sink, Event)>;

/// How often an engine looks up that has requests and nothing to do for them.
const IDLE_TICK: Duration = Duration::from_millis(50);

/// A model on its way into the running engine.
#[derive(Debug)]
pub struct Install {
    /// Its lane.
    pub lane: LaneId,
    /// Ready to run.
    pub model: LoadedModel,
    /// Told whether it is in.
    pub installed: std::sync::mpsc::Sender<Result<(), StepError>>,
}

/// What connects the engine to the rest.
#[derive(Debug)]
pub struct Links {
    /// Requests come in here.
    pub inbox: mpsc::Receiver<Submission>,
    /// Models that are loaded while others serve.
    pub installs: mpsc::UnboundedReceiver<Install>,
    /// Events go out here, one batch a step.
    pub deliveries: mpsc::UnboundedSender<Delivery>,
    /// The engine stops when this says `Closing`.
    pub phase: watch::Receiver<Phase>,
    /// Counts everything.
    pub telemetry: Arc<Telemetry>,
    /// Learns of models that cannot go on.
    pub catalog: Arc<Catalog>,
    /// Shows that the engine is alive.
    pub pulse: Arc<Pulse>,
}

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It was told to stop.
    Stopped,
    /// The device, or the engine itself, cannot go on.
    Failed(Failure),
}

/// Why an engine cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In a word.
    pub reason: Reason,
    /// In a line.
    pub message: String,
}

/// What runs the steps of an engine.
pub struct Machine {
    /// A device.
    pub runner: Box<dyn Runner>,
    /// What it has of each lane.
    pub lanes: Lanes,
    /// Its execution slots, and uncommitted steps a slot, as the scheduler was told.
    pub slots: (u8, u8),
}

/// The loop and its state.
pub struct Engine {
    scheduler: Scheduler,
    runner: Box<dyn Runner>,
    lanes: Lanes,
    links: Links,
    live: HashMap<RequestId, Live>,
    slots: Vec<Slot>,
    depth: usize,
    spare: Vec<Step>,
    outcome: Outcome,
    said: Vec<Said>,
    gone: Vec<RequestId>,
    /// Rows of a step by tenant.
    tenants: Vec<(TenantId, u32)>,
    load: Load,
}

/// A request about which something is still to be said.
struct Live {
    sink: Sink,
    lane: LaneId,
    /// Device time charged for its rows so far.
    busy: Micros,
}

/// An execution slot: its submitted, uncommitted steps in order.
#[derive(Debug, Default)]
struct Slot {
    steps: std::collections::VecDeque<Step>,
}

impl Live {
    fn new(request: &Request, sink: Sink) -> Self {
        Self { sink, lane: request.lane, busy: Micros(0) }
    }
}

impl Engine {
    /// An engine that runs what `scheduler` plans on `machine`.
    pub fn new(scheduler: Scheduler, machine: Machine, links: Links) -> Self {
        let Machine { runner, lanes, slots: (slots, depth) } = machine;
        Self {
            scheduler,
            runner,
            lanes,
            links,
            live: HashMap::new(),
            slots: (0..slots).map(|_| Slot::default()).collect(),
            depth: depth as usize,
            spare: Vec::new(),
            outcome: Outcome::default(),
            said: Vec::new(),
            gone: Vec::new(),
            tenants: Vec::new(),
            load: Load::default(),
        }
    }

    /// Runs until told to stop or until the device is dead. Every request that is left then ends
    /// with a retryable error. Must be called inside a tokio runtime's context.
    pub fn run(mut self) -> Ending {
        let ending = catch_unwind(AssertUnwindSafe(|| self.turns()))
            .unwrap_or_else(|panic| Ending::Failed(Failure::panic(&*panic)));
        self.links.pulse.working(false);
        if matches!(ending, Ending::Failed(_)) {
            self.links.telemetry.device_error("fatal");
        }
        self.end_all(&ending);
        if matches!(ending, Ending::Failed(_)) {
            // Giving memory back would wait for a device that may never answer again.
            std::mem::forget(self.runner);
        }
        ending
    }

    fn turns(&mut self) -> Ending {
        loop {
            if *self.links.phase.borrow() >= Phase::Closing {
                return Ending::Stopped;
            }
            while let Ok(install) = self.links.installs.try_recv() {
                self.install(install);
            }
            self.receive();
            self.drop_cancelled();
            self.links.pulse.working(!self.scheduler.is_idle() || self.lanes.have_trials());
            if let Err(failure) = self.turn() {
                return Ending::Failed(failure);
            }
        }
    }

    /// One round: fill every slot, then take in the oldest step of each.
    fn turn(&mut self) -> Result<(), Failure> {
        let telemetry = Arc::clone(&self.links.telemetry);
        let held = telemetry.occupy();
        let trial = self.lanes.wants_device();
        for slot in 0..self.slots.len() {
            while !trial && self.slots[slot].steps.len() < self.depth && self.dispatch(slot)? {}
        }
        let mut idle = true;
        for slot in 0..self.slots.len() {
            // A trial waits until nothing else is on the device.
            while let Some(step) = self.slots[slot].steps.pop_front() {
                idle = false;
                self.take_in(step)?;
                if !trial {
                    break;
                }
            }
        }
        if trial {
            self.publish();
            self.try_lane()?;
        }
        drop(held);
        self.deliver();
        self.publish();
        if idle && !self.lanes.have_trials() {
            self.wait();
        }
        Ok(())
    }

    /// Plans and submits one step; false when there is nothing to do for this slot.
    fn dispatch(&mut self, slot: usize) -> Result<bool, Failure> {
        let mut step = self.spare.pop().unwrap_or_default();
        step.clear();
        let now = self.links.telemetry.now();
        let id = SlotId(slot as u8);
        if !self.scheduler.plan(now, id, &mut step, &mut self.said) {
            self.spare.push(step);
            return Ok(false);
        }
        for note in &self.scheduler.notes().scheduled {
            self.links.telemetry.scheduled(note.lane, note.waited);
            if let Some(live) = self.live.get(&note.request) {
                live.sink.scheduled(note.waited);
            }
        }
        // Or what came in would be seen nowhere for as long as the step takes.
        self.publish();
        let runner = &mut self.runner;
        match guarded(|| runner.submit(&step)) {
            Ok(()) => self.slots[slot].steps.push_back(step),
            Err(error) => {
                // Steps of a slot end in order: those before it are on the device. From one that
                // is dead nothing comes back.
                while error.kind != StepErrorKind::Fatal
                    && let Some(before) = self.slots[slot].steps.pop_front()
                {
                    self.take_in(before)?;
                }
                self.step_failed(step, &error)?;
            }
        }
        Ok(true)
    }

    /// Waits for a submitted step and commits it.
    fn take_in(&mut self, step: Step) -> Result<(), Failure> {
        self.outcome.clear();
        let (runner, outcome) = (&mut self.runner, &mut self.outcome);
        if let Err(error) = guarded(|| runner.collect(step.slot, outcome)) {
            return self.step_failed(step, &error);
        }
        self.links.pulse.step_done();
        self.lanes.succeeded(step.lane);
        let now = self.links.telemetry.now();
        self.scheduler.commit(now, &step, &self.outcome, &mut self.said);
        self.report(&step);
        self.spare.push(step);
        Ok(())
    }

    /// Ends the step's requests, or lets them wait if there was no memory; the server goes on
    /// unless the device is dead.
    fn step_failed(&mut self, step: Step, error: &StepError) -> Result<(), Failure> {
        let lane = step.lane;
        let (kind, rows) = (error.kind.as_str(), step.rows());
        tracing::error!(%lane, step = step.id.0, rows, kind, %error, "step failed");
        self.count(error);
        self.links.pulse.step_done();
        match error.kind {
            StepErrorKind::Fatal => return Err(Failure::device(error)),
            StepErrorKind::Memory if self.lanes.may_try_again(lane) => {
                self.scheduler.put_back(&step, &mut self.said);
                self.spare.push(step);
                return Ok(());
            }
            // That it found no memory for so long says nothing about the lane.
            StepErrorKind::Memory => {}
            StepErrorKind::Step | StepErrorKind::Panic => self.lanes.failed(lane),
        }
        let told = Error::new(
            ErrorKind::StepFailed,
            "the computation of this request failed; others are not affected, try again",
        );
        self.scheduler.abandon(&step, &told, &mut self.said);
        self.spare.push(step);
        Ok(())
    }

    /// Tells telemetry what a committed step took and gave.
    fn report(&mut self, step: &Step) {
        let telemetry = &self.links.telemetry;
        let notes = self.scheduler.notes();
        for token in &notes.tokens {
            if token.first {
                telemetry.first_token(token.lane, token.after);
                if let Some(live) = self.live.get(&token.request) {
                    live.sink.first_token(token.after);
                }
            } else {
                telemetry.next_token(token.lane, token.after);
            }
        }
        // Slots that compute side by side share the device, so each is charged its part.
        let others = self.slots.iter().filter(|slot| !slot.steps.is_empty()).count() as u64;
        let busy_slots = (1 + others).min(self.slots.len() as u64);
        let elapsed = self.outcome.elapsed;
        let busy = Micros(elapsed.0 / busy_slots);
        let rows = step.rows() as u32;
        let part = |of: u32| Micros(busy.0 * u64::from(of) / u64::from(rows.max(1)));
        self.tenants.clear();
        for span in &step.spans {
            if let Some(live) = self.live.get_mut(&span.request) {
                live.busy = live.busy.plus(part(span.len() as u32));
            }
            match self.tenants.last_mut() {
                Some((last, rows)) if *last == span.tenant => *rows += span.len() as u32,
                _ => self.tenants.push((span.tenant, span.len() as u32)),
            }
        }
        let report = StepReport {
            lane: step.lane,
            kind: step.kind,
            spans: step.spans.len() as u32,
            rows,
            busy,
            elapsed,
            work: self.scheduler.work(step),
            wasted_cancelled: part(notes.cancelled_rows + notes.overrun_rows),
            wasted_preempted: part(notes.recomputed_rows),
        };
        telemetry.step_finished(&report, &self.tenants);
    }

    /// Empties the inbox into the scheduler.
    fn receive(&mut self) {
        while let Ok(submission) = self.links.inbox.try_recv() {
            self.admit(submission);
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission { request, sink } = submission;
        self.links.telemetry.received(request.lane, request.task.prompt_tokens() as u64);
        if self.lanes.is_out(request.lane) {
            let told = Event::Failed(self.out_of_service(request.lane));
            self.said.push((request.id, told));
            self.live.insert(request.id, Live::new(&request, sink));
            return;
        }
        self.live.insert(request.id, Live::new(&request, sink));
        self.scheduler.admit(request);
    }

    /// A receiver that is gone is a client that is gone.
    fn drop_cancelled(&mut self) {
        let gone = self.live.iter().filter(|(_, live)| live.sink.is_cancelled());
        self.gone.extend(gone.map(|(&id, _)| id));
        for id in self.gone.drain(..) {
            self.live.remove(&id);
            self.scheduler.cancel(id);
        }
    }

    /// Hands this turn's events over, in one batch.
    fn deliver(&mut self) {
        if self.said.is_empty() {
            return;
        }
        let live = &mut self.live;
        let mut batch = Delivery::with_capacity(self.said.len());
        for (id, event) in self.said.drain(..) {
            let sink = if event.is_terminal() {
                live.remove(&id).map(|live| live.sink)
            } else {
                live.get(&id).map(|live| live.sink.clone())
            };
            if let Some(sink) = sink {
                batch.push((sink, event));
            }
        }
        // The fan-out ends only after the engine, so this cannot fail while anybody listens.
        let _ = self.links.deliveries.send(batch);
    }

    fn publish(&mut self) {
        self.scheduler.load(&mut self.load);
        self.links.telemetry.publish(&self.load);
    }

    /// Blocks until a request or a model comes or the phase changes; no longer than a tick while
    /// requests wait, for their deadlines pass and their clients go.
    fn wait(&mut self) {
        let idle = self.scheduler.is_idle();
        self.links.pulse.working(!idle);
        let Links { inbox, installs, phase, .. } = &mut self.links;
        let runtime = tokio::runtime::Handle::current();
        let (first, install) = runtime.block_on(async {
            tokio::select! {
                submission = inbox.recv() => (submission, None),
                Some(install) = installs.recv() => (None, Some(install)),
                _ = phase.changed() => (None, None),
                () = tokio::time::sleep(IDLE_TICK), if !idle => (None, None),
            }
        });
        first.into_iter().for_each(|submission| self.admit(submission));
        install.into_iter().for_each(|install| self.install(install));
    }

    /// The last act: whatever is left is told that it was cut, or that the device is gone. After
    /// a panic the scheduler's state is not to be trusted, so this goes by the live requests.
    fn end_all(&mut self, ending: &Ending) {
        let error = match ending {
            Ending::Stopped => Error::cut(),
            Ending::Failed(_) => Error::device_failed(),
        };
        self.deliver();
        // A sender that has a permit may still deliver: only the end of the channel is the end.
        self.links.inbox.close();
        let runtime = tokio::runtime::Handle::current();
        while let Some(Submission { request, sink }) = runtime.block_on(self.links.inbox.recv()) {
            self.links.telemetry.received(request.lane, request.task.prompt_tokens() as u64);
            self.live.insert(request.id, Live::new(&request, sink));
        }
        let mut batch = Delivery::with_capacity(self.live.len());
        for (_, Live { sink, lane, busy, .. }) in self.live.drain() {
            self.links.telemetry.cut_off(lane, busy);
            batch.push((sink, Event::Failed(error.clone())));
        }
        let _ = self.links.deliveries.send(batch);
        // For each lane, or its last figures would stand.
        let lanes = vec![LaneLoad::default(); self.load.lanes.len()];
        self.load = Load { lanes, ..Load::default() };
        self.links.telemetry.publish(&self.load);
    }
}

/// Runs `call`; a panic in it is a failed step, not a dead process.
fn guarded<T>(call: impl FnOnce() -> Result<T, StepError>) -> Result<T, StepError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = format!("panic: {}", panic_text(&*panic));
        Err(StepError { message, kind: StepErrorKind::Panic })
    })
}

impl Failure {
    fn panic(panic: &(dyn std::any::Any + Send)) -> Self {
        Self { reason: Reason::Panic, message: panic_text(panic).to_owned() }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// Carries deliveries to their requests: one wake-up a step instead of one a row.
pub async fn fan_out(mut deliveries: mpsc::UnboundedReceiver<Delivery>) {
    while let Some(batch) = deliveries.recv().await {
        for (sink, event) in batch {
            sink.send(event);
        }
    }
}
