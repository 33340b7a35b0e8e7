//! The device thread: admit, plan, run, commit; block on the inbox when there is nothing to plan.
//! Knows no HTTP and no text: requests come in as token ids, events go out by the batch.

pub mod budget;
pub mod fake;
pub mod gpu_runner;
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

use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::error::{Error, ErrorKind};
use crate::lifecycle::Phase;
use crate::request::{Event, LaneId, Micros, Request, RequestId, Sink, Submission, TenantId};
use crate::scheduler::step::{Outcome, SlotId, Step};
use crate::scheduler::{Load, Said, Scheduler};
use crate::telemetry::{StepReport, Telemetry};

/// One step's events, each with the way to its request.
pub type Delivery = Vec<(Sink, Event)>;

/// Steps that may fail in a row before the device counts as dead.
const FAILURES_MAX: u32 = 3;

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
    pub installs: std::sync::mpsc::Receiver<Install>,
    /// Events go out here, one batch a step.
    pub deliveries: mpsc::UnboundedSender<Delivery>,
    /// The engine stops when this says `Closing`.
    pub phase: watch::Receiver<Phase>,
    /// Counts everything.
    pub telemetry: Arc<Telemetry>,
}

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It was told to stop.
    Stopped,
    /// The device, or the engine itself, cannot go on.
    Failed(String),
}

/// The loop and its state.
pub struct Engine {
    scheduler: Scheduler,
    runner: Box<dyn Runner>,
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
    failures: u32,
}

/// A request about which something is still to be said.
struct Live {
    sink: Sink,
    lane: LaneId,
    tenant: TenantId,
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
        Self { sink, lane: request.lane, tenant: request.tenant, busy: Micros(0) }
    }
}

impl Engine {
    /// An engine over `runner` with as many slots and uncommitted steps a slot as the scheduler
    /// was told.
    pub fn new(
        scheduler: Scheduler,
        runner: Box<dyn Runner>,
        (slots, depth): (u8, u8),
        links: Links,
    ) -> Self {
        Self {
            scheduler,
            runner,
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
            failures: 0,
        }
    }

    /// Runs until told to stop or until the device is dead. Every request that is left then ends
    /// with a retryable error. Must be called inside a tokio runtime's context.
    pub fn run(mut self) -> Ending {
        let ending = catch_unwind(AssertUnwindSafe(|| self.turns()))
            .unwrap_or_else(|panic| Ending::Failed(format!("panic: {}", panic_text(&*panic))));
        if matches!(ending, Ending::Failed(_)) {
            self.links.telemetry.device_error("fatal");
        }
        self.end_all(&ending);
        ending
    }

    fn turns(&mut self) -> Ending {
        loop {
            if *self.links.phase.borrow() >= Phase::Closing {
                return Ending::Stopped;
            }
            self.install();
            self.receive();
            self.drop_cancelled();
            if let Err(failure) = self.turn() {
                return Ending::Failed(failure);
            }
        }
    }

    /// One round: fill every slot, then take in the oldest step of each.
    fn turn(&mut self) -> Result<(), String> {
        let telemetry = Arc::clone(&self.links.telemetry);
        let held = telemetry.occupy();
        for slot in 0..self.slots.len() {
            while self.slots[slot].steps.len() < self.depth && self.dispatch(slot)? {}
        }
        let mut idle = true;
        for slot in 0..self.slots.len() {
            if let Some(step) = self.slots[slot].steps.pop_front() {
                idle = false;
                self.take_in(step)?;
            }
        }
        drop(held);
        self.deliver();
        self.publish();
        if idle {
            self.wait();
        }
        Ok(())
    }

    /// Plans and submits one step; false when there is nothing to do for this slot.
    fn dispatch(&mut self, slot: usize) -> Result<bool, String> {
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
        let runner = &mut self.runner;
        match guarded(|| runner.submit(&step)) {
            Ok(()) => self.slots[slot].steps.push_back(step),
            Err(error) => self.step_failed(step, &error)?,
        }
        Ok(true)
    }

    /// Waits for a submitted step and commits it.
    fn take_in(&mut self, step: Step) -> Result<(), String> {
        self.outcome.clear();
        let (runner, outcome) = (&mut self.runner, &mut self.outcome);
        if let Err(error) = guarded(|| runner.collect(step.slot, outcome)) {
            return self.step_failed(step, &error);
        }
        self.failures = 0;
        let now = self.links.telemetry.now();
        self.scheduler.commit(now, &step, &self.outcome, &mut self.said);
        self.report(&step);
        self.spare.push(step);
        Ok(())
    }

    /// Ends the step's requests; the server goes on unless the device is dead.
    fn step_failed(&mut self, step: Step, error: &StepError) -> Result<(), String> {
        let lane = step.lane;
        let kind = error.kind.as_str();
        tracing::error!(%lane, step = step.id.0, kind, %error, "step failed");
        let fatal = error.kind == StepErrorKind::Fatal;
        if !fatal {
            self.links.telemetry.device_error(kind);
        }
        self.failures += 1;
        if fatal || self.failures >= FAILURES_MAX {
            return Err(error.to_string());
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
            let mut tenant = TenantId::default();
            if let Some(live) = self.live.get_mut(&span.request) {
                live.busy = live.busy.plus(part(span.len() as u32));
                tenant = live.tenant;
            }
            match self.tenants.last_mut() {
                Some((last, rows)) if *last == tenant => *rows += span.len() as u32,
                _ => self.tenants.push((tenant, span.len() as u32)),
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

    fn install(&mut self) {
        while let Ok(Install { lane, model, installed }) = self.links.installs.try_recv() {
            // Whoever loads models waits for the answer; without anybody it does not matter.
            let _ = installed.send(self.runner.install(lane, model));
        }
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

    /// Blocks until a request comes or the phase changes; no longer than a tick while requests
    /// wait, for their deadlines pass and their clients go.
    fn wait(&mut self) {
        let idle = self.scheduler.is_idle();
        let Links { inbox, phase, .. } = &mut self.links;
        let runtime = tokio::runtime::Handle::current();
        let first = runtime.block_on(async {
            tokio::select! {
                submission = inbox.recv() => submission,
                _ = phase.changed() => None,
                () = tokio::time::sleep(IDLE_TICK), if !idle => None,
            }
        });
        if let Some(submission) = first {
            self.admit(submission);
        }
    }

    /// The last act: whatever is left is told that it was cut, or that the device is gone. After
    /// a panic the scheduler's state is not to be trusted, so this goes by the live requests.
    fn end_all(&mut self, ending: &Ending) {
        let error = match ending {
            Ending::Stopped => Error::new(
                ErrorKind::Cut,
                "the server is shutting down and its grace period is over; try again",
            ),
            Ending::Failed(_) => Error::new(
                ErrorKind::DeviceFailed,
                "the device failed and the server is restarting; try again",
            ),
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
        self.load = Load::default();
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

/// What a panic said.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
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
