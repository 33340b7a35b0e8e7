//! The engine's lanes beside their requests: which have a model, which fail, which are being tried.
//! A lane that fails is tried with a step that is known to be good, so that neither bad requests
//! nor one bad model are taken for a dead device. Knows no scheduling.

use std::collections::VecDeque;
use std::time::Instant;

use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::engine::warmup::{self, Scratch, Trial, Warmup};
use crate::engine::{Engine, Failure, Install, guarded};
use crate::error::{Error, ErrorKind};
use crate::lifecycle::last_words::Reason;
use crate::model::ModelState;
use crate::request::LaneId;

/// Steps of a lane that may fail in a row before the lane is tried.
const FAILURES_MAX: u32 = 3;

/// Steps of a lane that may find no memory in a row, each half as large as the one before.
const SHORT_MAX: u32 = 12;

/// The lanes of an engine.
#[derive(Debug, Default)]
pub struct Lanes {
    lanes: Vec<Lane>,
    scratch: Scratch,
    /// Lanes that fail, to be tried.
    suspects: VecDeque<LaneId>,
    /// Models that are warming up.
    arrivals: VecDeque<Arrival>,
    /// Whether this turn is for a trial: every other one, so that nobody waits for many of them.
    trial_is_next: bool,
}

#[derive(Debug)]
struct Lane {
    trial: Trial,
    state: State,
    /// Steps in a row that failed, and that found no memory.
    failed: u32,
    short: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It has no model yet.
    Empty,
    Serving,
    /// Its model cannot compute any more.
    Out,
}

/// A model that is installed and has not served yet.
#[derive(Debug)]
struct Arrival {
    lane: LaneId,
    warmup: Warmup,
    began: Instant,
    installed: std::sync::mpsc::Sender<Result<(), StepError>>,
}

impl Lanes {
    /// Lanes by number; those with `true` have their models.
    pub fn new(lanes: Vec<(Trial, bool)>, scratch: Scratch) -> Self {
        let lane = |(trial, loaded)| Lane {
            trial,
            state: if loaded { State::Serving } else { State::Empty },
            failed: 0,
            short: 0,
        };
        Self { lanes: lanes.into_iter().map(lane).collect(), scratch, ..Self::default() }
    }

    /// Whether a lane takes no requests any more.
    pub(super) fn is_out(&self, lane: LaneId) -> bool {
        self.lanes[usize::from(lane.0)].state == State::Out
    }

    /// A step of the lane went well.
    pub(super) fn succeeded(&mut self, lane: LaneId) {
        let lane = &mut self.lanes[usize::from(lane.0)];
        (lane.failed, lane.short) = (0, 0);
    }

    /// A step of the lane failed; after some in a row the lane will be tried.
    pub(super) fn failed(&mut self, id: LaneId) {
        let lane = &mut self.lanes[usize::from(id.0)];
        lane.failed += 1;
        if lane.failed >= FAILURES_MAX && lane.state == State::Serving {
            lane.failed = 0;
            self.suspects.push_back(id);
        }
    }

    /// A step of the lane found no memory; false when that has happened too often in a row.
    pub(super) fn may_try_again(&mut self, lane: LaneId) -> bool {
        let lane = &mut self.lanes[usize::from(lane.0)];
        let again = lane.short < SHORT_MAX;
        lane.short = if again { lane.short + 1 } else { 0 };
        again
    }

    /// Whether anything is to be tried.
    pub(super) fn have_trials(&self) -> bool {
        !self.suspects.is_empty() || !self.arrivals.is_empty()
    }

    /// Whether this turn is for a trial, for which the device has to be empty.
    pub(super) fn wants_device(&mut self) -> bool {
        self.trial_is_next = !self.trial_is_next && self.have_trials();
        self.trial_is_next
    }

    fn attempt(&self, runner: &mut dyn Runner, lane: &Lane) -> Result<(), StepError> {
        match guarded(|| warmup::attempt(runner, &lane.trial, self.scratch)) {
            // Nothing is wrong with a model that finds no memory.
            Err(error) if error.kind == StepErrorKind::Memory => Ok(()),
            result => result,
        }
    }
}

impl Engine {
    /// Puts a model into its lane, where it warms up.
    pub(super) fn install(&mut self, Install { lane, model, installed }: Install) {
        // Uploading a large model is no step: nobody should take it for a hung one.
        self.links.pulse.working(false);
        let (began, runner) = (Instant::now(), &mut self.runner);
        let held = self.links.telemetry.occupy();
        let result = guarded(|| runner.install(lane, model));
        self.links.telemetry.load_finished(lane, began.elapsed().into());
        drop(held);
        if let Err(error) = result {
            self.count(&error);
            // Whoever loads models waits for the answer; without anybody it does not matter.
            let _ = installed.send(Err(error));
            return;
        }
        let warmup = Warmup::new(&self.lanes.lanes[usize::from(lane.0)].trial, self.lanes.scratch);
        let arrival = Arrival { lane, warmup, began, installed };
        self.lanes.arrivals.push_back(arrival);
    }

    /// One trial: of a lane that fails, or else the next step of a model that warms up. Nothing
    /// else is on the device.
    pub(super) fn try_lane(&mut self) -> Result<(), Failure> {
        let tried = match self.lanes.suspects.pop_front() {
            Some(lane) => self.judge(lane),
            None => self.warm_up(),
        };
        self.links.pulse.step_done();
        tried
    }

    /// Finds out whether its requests, its model or the device made the lane's steps fail.
    fn judge(&mut self, id: LaneId) -> Result<(), Failure> {
        let lane = &self.lanes.lanes[usize::from(id.0)];
        let Err(error) = self.lanes.attempt(&mut *self.runner, lane) else {
            tracing::warn!(lane = %id, "steps failed in a row, but the model computes");
            return Ok(());
        };
        self.count(&error);
        if error.kind == StepErrorKind::Fatal {
            return Err(Failure::device(&error));
        }
        let serving = |(number, lane): &(usize, &Lane)| {
            *number != usize::from(id.0) && lane.state == State::Serving
        };
        let mut others = self.lanes.lanes.iter().enumerate().filter(serving);
        let runner = &mut *self.runner;
        if !others.any(|(_, other)| self.lanes.attempt(runner, other).is_ok()) {
            return Err(Failure::device(&error));
        }
        self.take_out(id, &error);
        Ok(())
    }

    /// Stops to serve a model that cannot compute, for the sake of those that can.
    fn take_out(&mut self, id: LaneId, error: &StepError) {
        let model = self.links.catalog.lane(id);
        tracing::error!(model = model.name, %error, "the model cannot compute, others go on");
        self.lanes.lanes[usize::from(id.0)].state = State::Out;
        model.set_state(ModelState::Failed);
        self.links.telemetry.model_state(id, ModelState::Failed);
        let gone = self.out_of_service(id);
        self.scheduler.fail_lane(id, &gone, &mut self.said);
    }

    /// What requests for a lane that is out are told.
    pub(super) fn out_of_service(&self, lane: LaneId) -> Error {
        let name = &self.links.catalog.lane(lane).name;
        let message = format!(
            "the model '{name}' cannot compute here any more and is out of service; try again, \
             another replica may have it"
        );
        Error::new(ErrorKind::ModelLoading, message)
    }

    fn warm_up(&mut self) -> Result<(), Failure> {
        let Some(mut arrival) = self.lanes.arrivals.pop_front() else { return Ok(()) };
        let (started, runner) = (Instant::now(), &mut *self.runner);
        let done = guarded(|| arrival.warmup.advance(runner));
        let Arrival { lane, began, .. } = arrival;
        self.links.telemetry.load_finished(lane, started.elapsed().into());
        let told = match done {
            Ok(None) => {
                self.lanes.arrivals.push_front(arrival);
                return Ok(());
            }
            Ok(Some(cost)) => {
                self.scheduler.set_cost(lane, cost);
                self.lanes.lanes[usize::from(lane.0)].state = State::Serving;
                self.links.telemetry.stage_finished(lane, "warm", began.elapsed());
                Ok(())
            }
            Err(error) => {
                self.count(&error);
                Err(error)
            }
        };
        let fatal = told.as_ref().err().filter(|error| error.kind == StepErrorKind::Fatal);
        let failure = fatal.map(Failure::device);
        let _ = arrival.installed.send(told);
        failure.map_or(Ok(()), Err)
    }

    /// Counts a failure that does not end the engine; the one that does is counted at its end.
    pub(super) fn count(&self, error: &StepError) {
        if error.kind != StepErrorKind::Fatal {
            self.links.telemetry.device_error(error.kind.as_str());
        }
    }
}

impl Failure {
    /// The device cannot go on.
    pub(super) fn device(error: &StepError) -> Self {
        Self { reason: Reason::Device, message: error.to_string() }
    }
}
