//! What runs steps: real models on a device, or the fake one of the tests. A runner knows models
//! and memory, not requests: what a step is for is the scheduler's business.

use crate::device::cuda::fault::Fault;
use crate::engine::residency::LoadedModel;
use crate::request::LaneId;
use crate::scheduler::step::{Outcome, SlotId, Step};

/// Runs steps. Called from the engine thread only.
pub trait Runner: Send {
    /// Starts `step`. A device may still be working on it when this returns; steps of a slot run
    /// in the order of their submission.
    ///
    /// # Errors
    /// The step failed at once; nothing is to be collected for it.
    fn submit(&mut self, step: &Step) -> Result<(), StepError>;

    /// Waits until the oldest submitted step of `slot` is done, and fills `outcome` (cleared by
    /// the caller), `elapsed` included.
    ///
    /// # Errors
    /// The step failed: what it computed is lost, the runner stays usable unless `Fatal`.
    fn collect(&mut self, slot: SlotId, outcome: &mut Outcome) -> Result<(), StepError>;

    /// Makes a model runnable in its lane.
    ///
    /// # Errors
    /// There is no memory for it.
    fn install(&mut self, lane: LaneId, model: LoadedModel) -> Result<(), StepError>;
}

/// A step that failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("step failed: {message}")]
pub struct StepError {
    /// What happened.
    pub message: String,
    /// How bad it is.
    pub kind: StepErrorKind,
}

/// How bad a failed step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepErrorKind {
    /// This step is lost, the next may succeed.
    Step,
    /// So it is after a panic.
    Panic,
    /// There was no memory for it. Nothing is wrong with step or device: it can be done later, or
    /// in smaller parts.
    Memory,
    /// The device cannot be used any more: the process must end.
    Fatal,
}

impl StepError {
    /// A failure that ends this step only.
    pub fn step(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: StepErrorKind::Step }
    }
}

impl StepErrorKind {
    /// How bad a failure of the device is for what runs on it.
    pub fn of(fault: Fault) -> Self {
        match fault {
            Fault::Memory => StepErrorKind::Memory,
            _ if fault.is_sticky() => StepErrorKind::Fatal,
            _ => StepErrorKind::Step,
        }
    }

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            StepErrorKind::Step => "step",
            StepErrorKind::Panic => "panic",
            StepErrorKind::Memory => "memory",
            StepErrorKind::Fatal => "fatal",
        }
    }
}
